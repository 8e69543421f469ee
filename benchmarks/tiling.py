"""A large picture tile by tile: time, memory above the idle process, and what is left of the seams.

    python benchmarks/tiling.py --model pretrained/hazelnut --height 4000 --width 6000

The picture is smooth and random. "Seam" is the mean step of the map across the edges of tiles, in multiples of the mean
step across all columns: 1 is no seam. Memory counts the map and the reconstruction of the picture's size, which the
call returns as pictures; on Linux it is the process's resident memory, on a GPU what torch allocated there.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from measure import GIB, in_turns, load_model, machine, peak_memory, print_table, write_json
from PIL import Image

from diffusionad_pipe.tiling import tile_starts


def smooth_picture(height: int, width: int) -> Image.Image:
    coarse = torch.rand(1, 3, 9, 13, generator=torch.Generator().manual_seed(0))
    image = Image.fromarray(coarse[0].permute(1, 2, 0).mul(255).to(torch.uint8).numpy())
    return image.resize((width, height), Image.Resampling.BICUBIC)


def seam(anomaly_map: Image.Image, starts: list[int]) -> float:
    steps = np.abs(np.diff(np.asarray(anomaly_map, dtype=np.float32), axis=1)).mean(0)
    return (
        float(steps[[start - 1 for start in starts[1:]]].mean() / max(steps.mean(), 1e-9)) if len(starts) > 1 else 0.0
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", default="pretrained/hazelnut", help="a folder, a Hub id, or a preset: tiny, small, base, paper"
    )
    parser.add_argument("--height", type=int, default=4000)
    parser.add_argument("--width", type=int, default=6000)
    parser.add_argument("--overlaps", type=float, nargs="+", default=[0.0, 0.25, 0.5])
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--output", type=Path, help="also write the results to this JSON file")
    arguments = parser.parse_args()

    device = PartialState().device
    pipe = load_model(arguments.model, device)
    tile = pipe.config.image_size
    picture = smooth_picture(arguments.height, arguments.width)
    pipe(picture.crop((0, 0, tile, tile)), batch_size=1)  # the first call sets up the kernels

    def tiled(overlap: float) -> Callable[[], Any]:
        def run() -> Any:
            pipe.enable_tiling(tile, overlap)
            return pipe(picture, batch_size=arguments.batch_size)

        return run

    def untiled() -> Any:
        pipe.disable_tiling()
        return pipe(picture)

    methods: dict[str, Callable[[], Any]] = {"not tiled": untiled}
    methods |= {f"overlap {overlap:g}": tiled(overlap) for overlap in arguments.overlaps}
    memory = {name: peak_memory(method, device) for name, method in methods.items()}
    timings = in_turns(methods, arguments.rounds, device)
    rows: list[tuple[Any, ...]] = []
    results: dict[str, Any] = {"machine": machine(device), "model": arguments.model, "tile_size": tile}
    for name, overlap in zip(methods, [None, *arguments.overlaps]):
        tiles, found = 1, 0.0
        if overlap is not None:
            columns = tile_starts(arguments.width, tile, overlap)
            tiles = len(columns) * len(tile_starts(arguments.height, tile, overlap))
            found = seam(methods[name]().anomaly_maps[0], columns)
        used = memory[name]
        results[name] = {**timings[name]._asdict(), "tiles": tiles, "seam": found, "peak_memory": used}
        shown = "" if used is None else f"{used / GIB:.2f}"
        rows.append((name, tiles, timings[name], f"{found:.3f}" if overlap is not None else "", shown))
    size = f"{arguments.width} x {arguments.height}"
    print(f"{arguments.model}, {size}, tiles of {tile}, batch {arguments.batch_size}, {results['machine']}\n")
    print_table(("tiling", "tiles", "seconds", "seam", "peak memory above idle, GiB"), rows)
    write_json(arguments.output, results)


if __name__ == "__main__":
    main()
