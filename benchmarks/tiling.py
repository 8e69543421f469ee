"""A large picture tile by tile: time, memory above the idle process, and what is left of the seams.

    python benchmarks/tiling.py --model pretrained/hazelnut --height 4000 --width 6000

The picture is smooth and random. "Seam" is the mean step of the map across the edges of tiles, in multiples of the mean
step across all columns: 1 is no seam. Memory counts the map and the reconstruction of the picture's size, which the
call returns as pictures; on Linux it is the process's resident memory, on a GPU what torch allocated there.
"""

import argparse
import statistics
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from measure import GIB, Timing, load_model, machine, peak_memory, print_table, write_json
from PIL import Image

from diffusionad_pipe.freed_memory import keep_freed_memory
from diffusionad_pipe.tiling import tile_starts


def smooth_image(height: int, width: int) -> Image.Image:
    coarse = torch.rand(1, 3, 9, 13, generator=torch.Generator().manual_seed(0))
    image = Image.fromarray(coarse[0].permute(1, 2, 0).mul(255).to(torch.uint8).numpy())
    return image.resize((width, height), Image.Resampling.BICUBIC)


def seam(anomaly_map: Image.Image, starts: list[int]) -> float:
    steps = np.abs(np.diff(np.asarray(anomaly_map, dtype=np.float32), axis=1)).mean(0)
    at_seams = steps[[start - 1 for start in starts[1:]]]
    return float(at_seams.mean() / max(steps.mean(), 1e-9)) if len(starts) > 1 else 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", default="pretrained/hazelnut", help="a folder, a Hub id, or a preset: tiny, small, base, paper"
    )
    parser.add_argument("--height", type=int, default=4000)
    parser.add_argument("--width", type=int, default=6000)
    parser.add_argument("--overlaps", type=float, nargs="+", default=[0.0, 0.25, 0.5])
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--output", type=Path, help="also write the results to this JSON file")
    arguments = parser.parse_args()
    keep_freed_memory()  # as the command line does

    device = PartialState().device
    pipe = load_model(arguments.model, device, getattr(torch, arguments.dtype))
    tile = pipe.config.image_size
    image = smooth_image(arguments.height, arguments.width)
    # The first call sets up the kernels.
    pipe([image.crop((0, 0, tile, tile))] * arguments.batch_size, batch_size=arguments.batch_size)

    outputs: dict[str, Any] = {}
    seconds: dict[str, list[float]] = {}
    memory: dict[str, float | None] = {}

    def run(name: str, overlap: float | None) -> None:
        pipe.disable_tiling()
        if overlap is not None:
            pipe.enable_tiling(tile, overlap)
        started = time.perf_counter()
        outputs[name] = pipe(image, batch_size=arguments.batch_size)
        seconds.setdefault(name, []).append(time.perf_counter() - started)

    overlaps = {"not tiled": None} | {f"overlap {overlap:g}": overlap for overlap in arguments.overlaps}
    for _ in range(arguments.rounds):
        for name, overlap in overlaps.items():
            outputs.pop(name, None)
            memory[name] = peak_memory(partial(run, name, overlap), device)

    rows: list[tuple[Any, ...]] = []
    results: dict[str, Any] = {"machine": machine(device), **vars(arguments), "output": None, "tile_size": tile}
    for name, overlap in overlaps.items():
        tiles, found = 1, None
        if overlap is not None:
            columns = tile_starts(arguments.width, tile, overlap)
            tiles = len(columns) * len(tile_starts(arguments.height, tile, overlap))
            found = seam(outputs[name].anomaly_maps[0], columns)
        used, timing = memory[name], Timing(statistics.median(seconds[name]), min(seconds[name]), max(seconds[name]))
        results[name] = {**timing._asdict(), "tiles": tiles, "seam": found, "peak_memory": used}
        shown = "" if used is None else f"{used / GIB:.2f}"
        rows.append((name, tiles, timing, "" if found is None else f"{found:.3f}", shown))
    settings = (
        f"{arguments.dtype}, {arguments.width} x {arguments.height}, tiles of {tile}, batch {arguments.batch_size}"
    )
    print(f"{arguments.model}, {settings}, {results['machine']}\n")
    print_table(("tiling", "tiles", "seconds", "seam", "peak memory above idle, GiB"), rows)
    write_json(arguments.output, results)


if __name__ == "__main__":
    main()
