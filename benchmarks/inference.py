"""The speed of the pipeline: latency, throughput, memory, and the share of the machine's peak.

    python benchmarks/inference.py --model pretrained/hazelnut
    python benchmarks/inference.py --model paper --compile

A picture is a tensor of the networks' size; what is timed ends with its map and score. Compared are

- the authors' way: float32, eager, a UNet call for each noise scale, autograd left on, one picture at a time;
- the same in inference mode;
- iterative denoising with the same UNet in inference mode, 50 and 1000 steps. `--measured_steps` of them are run and
  the time is scaled up, which the table says: all steps cost the same;
- the pipeline, in float32 and bfloat16, with the memory layout channels_last, with batch norm folded, and, with
  `--compile`, compiled.

All are timed in turns, A B C A B C; given are medians, and the fastest and the slowest round. The peak is that of a
product of two large matrices, measured in the same run; shares of it count the convolutions and matrix products of one
network at the batch size with the highest throughput.
"""

import argparse
from collections.abc import Callable
from copy import copy, deepcopy
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from diffusers import DDIMScheduler
from measure import (
    GIB,
    Timing,
    count_flops,
    in_turns,
    load_model,
    machine,
    matrix_peak,
    peak_memory,
    print_table,
    synchronize,
    write_json,
)

from diffusionad_pipe import DiffusionADPipeline

AUTHORS, INFERENCE_MODE = "authors' way", "the same in inference mode"


def authors_way(pipe: DiffusionADPipeline, pictures: torch.Tensor) -> torch.Tensor:
    """Maps `[B, 1, H, W]` as the authors' evaluation computes them; autograd records if it is on."""
    scheduler = pipe.scheduler
    noised, outputs, both = [], [], []
    for timestep in (scheduler.config.small_timestep, scheduler.config.large_timestep):
        timesteps = torch.full((len(pictures),), timestep, device=pictures.device)
        noised.append(scheduler.add_noise(pictures, torch.randn_like(pictures), timesteps))
        outputs.append(pipe.unet(noised[-1], timesteps).sample)
        both.append(timesteps)
    guided = scheduler.step(torch.cat(outputs), torch.cat(both), torch.cat(noised)).prev_sample
    maps = pipe.segmentation(torch.cat([pictures, guided], dim=1)).logits.sigmoid()
    maps.flatten(1).topk(50).values.mean(1)
    return maps.detach().cpu()


@torch.inference_mode()
def iterative(pipe: DiffusionADPipeline, pictures: torch.Tensor, steps: int) -> None:
    """So many DDIM steps, each a call of the UNet."""
    scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    scheduler.set_timesteps(scheduler.config.num_train_timesteps)
    sample = torch.randn_like(pictures)
    for timestep in scheduler.timesteps[-steps:]:
        sample = scheduler.step(pipe.unet(sample, timestep.to(pictures.device)).sample, timestep, sample).prev_sample


def variants(pipe: DiffusionADPipeline, with_compile: bool) -> dict[str, DiffusionADPipeline]:
    """The pipeline in every form that may be faster."""

    def variant(dtype: torch.dtype, fold: bool = False, channels_last: bool = False) -> DiffusionADPipeline:
        changed = copy(pipe)
        changed.register_modules(unet=deepcopy(pipe.unet), segmentation=deepcopy(pipe.segmentation))
        if fold:
            changed.fold_batch_norm()
        for network in (changed.unet, changed.segmentation):
            network.to(dtype=dtype, memory_format=torch.channels_last if channels_last else torch.preserve_format)
        return changed

    found = {
        "float32": variant(torch.float32),
        "bfloat16": variant(torch.bfloat16),
        "bfloat16, channels_last": variant(torch.bfloat16, channels_last=True),
    }
    if getattr(pipe.segmentation.config, "norm_type", None) == "batch":
        found["bfloat16, folded"] = variant(torch.bfloat16, fold=True)
    if with_compile:
        for name, dtype in (("float32, compiled", torch.float32), ("bfloat16, compiled", torch.bfloat16)):
            compiled = variant(dtype, fold=True)
            if compiled.compile():
                found[name] = compiled
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", default="pretrained/hazelnut", help="a folder, a Hub id, or a preset: tiny, small, base, paper"
    )
    parser.add_argument("--batch_sizes", type=int, nargs="*", default=[1, 2, 4, 8, 16], help="none: latency only")
    parser.add_argument("--forms", nargs="+", metavar="FORM", help="of the pipeline, such as bfloat16; default: all")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--measured_steps", type=int, default=2, help="of each iterative denoising; 0: none")
    parser.add_argument("--compile", action="store_true", help="also compiled: takes minutes before")
    parser.add_argument("--peak_side", type=int, help="of the matrices that the peak is measured with")
    parser.add_argument("--output", type=Path, help="also write the results to this JSON file")
    arguments = parser.parse_args()

    device = PartialState().device
    pipe = load_model(arguments.model, device)
    size = pipe.config.image_size
    pictures = torch.rand(max([1, *arguments.batch_sizes]), 3, size, size, generator=torch.Generator().manual_seed(0))
    on_device = pictures[:1].to(device)
    pipes = variants(pipe, arguments.compile)
    pipes = {name: form for name, form in pipes.items() if name in (arguments.forms or pipes)}
    results: dict[str, Any] = {"machine": machine(device), "model": arguments.model, "image_size": size}
    print(f"{arguments.model}, {size} px, {results['machine']}, medians of {arguments.rounds}\n")

    def call(name: str, batch_size: int) -> Callable[[], object]:
        return lambda: pipes[name](pictures[:batch_size], batch_size=batch_size, output_type="pt")

    # 1. Latency of one picture.
    def inference_mode() -> None:
        with torch.inference_mode():
            authors_way(pipe, on_device)

    methods: dict[str, Callable[[], object]] = {
        AUTHORS: lambda: authors_way(pipe, on_device),
        INFERENCE_MODE: inference_mode,
        **{f"pipeline, {name}": call(name, 1) for name in pipes},
    }
    if arguments.measured_steps:
        methods["denoising steps"] = lambda: iterative(pipe, on_device, arguments.measured_steps)
    timings = in_turns(methods, arguments.rounds, device)
    for count in (50, 1000) if arguments.measured_steps else ():
        scale = count / arguments.measured_steps
        timings[f"{count} denoising steps, extrapolated from {arguments.measured_steps}"] = Timing(
            *(scale * s for s in timings["denoising steps"])
        )
    timings.pop("denoising steps", None)
    rows: list[tuple[Any, ...]] = []
    results["latency"] = {}
    for name, timing in timings.items():
        times = timings[AUTHORS].median / timing.median, timings[INFERENCE_MODE].median / timing.median
        memory = peak_memory(methods[name], device) if name in methods else None
        results["latency"][name] = {**timing._asdict(), "speedup": times, "peak_memory": memory}
        shown = "" if memory is None else f"{memory / GIB:.2f}"
        rows.append((name, timing, *(f"{t:.3g}" for t in times), shown))
    print_table(("one picture", "seconds", "times the authors'", "times inference mode", "peak memory, GiB"), rows)

    if not arguments.batch_sizes:
        write_json(arguments.output, results)
        return

    # 2. Throughput by batch size.
    methods = {f"{name}|{b}": call(name, b) for name in pipes for b in arguments.batch_sizes}
    timings = in_turns(methods, arguments.rounds, device)
    rows, fastest = [], ("", 0, 0.0)
    results["throughput"] = {}
    for name in pipes:
        for batch_size in arguments.batch_sizes:
            timing = timings[f"{name}|{batch_size}"]
            rate = batch_size / timing.median
            fastest = max(fastest, (name, batch_size, rate), key=lambda candidate: candidate[2])
            memory = peak_memory(methods[f"{name}|{batch_size}"], device)
            times = rate * results["latency"][AUTHORS]["median"], rate * results["latency"][INFERENCE_MODE]["median"]
            results["throughput"][f"{name}, batch {batch_size}"] = {
                **timing._asdict(), "pictures_per_second": rate, "speedup": times, "peak_memory": memory,
            }  # fmt: skip
            shown = "" if memory is None else f"{memory / GIB:.2f}"
            rows.append((name, batch_size, f"{rate:.3g}", *(f"{t:.3g}" for t in times), shown))
    columns = "pipeline", "batch", "pictures a second", "times the authors'", "times inference mode", "peak memory, GiB"
    print_table(columns, rows)

    # 3. The share of the peak that each network reaches.
    best, batch_size, _ = fastest
    unet, segmentation = pipes[best].unet, pipes[best].segmentation
    noised = torch.randn(2 * batch_size, 3, size, size, device=device).to(unet.dtype)
    pairs = torch.rand(batch_size, 6, size, size, device=device).to(segmentation.dtype)
    timesteps = torch.full((2 * batch_size,), 200, device=device)
    plain = {
        "UNet": lambda: pipe.unet(noised.float(), timesteps),
        "segmentation": lambda: pipe.segmentation(pairs.float()),
    }
    flops = {name: count_flops(network) for name, network in plain.items()}
    networks: dict[str, Callable[[], object]] = {
        "UNet": lambda: unet(noised, timesteps),
        "segmentation": lambda: segmentation(pairs),
    }
    with torch.inference_mode():
        timings = in_turns(networks, arguments.rounds, device)
    peak = matrix_peak(device, unet.dtype, arguments.peak_side)
    synchronize(device)
    rows = []
    results["share_of_peak"] = {"variant": best, "batch_size": batch_size, "peak_flops": peak}
    for name, timing in timings.items():
        rate = flops[name] / timing.median
        results["share_of_peak"][name] = {"flops": flops[name], "flops_per_second": rate, "share": rate / peak}
        rows.append((name, f"{flops[name] / 1e9:.4g}", timing, f"{rate / 1e12:.3g}", f"{rate / peak:.0%}"))
    print(f"{best}, batch {batch_size}; measured peak of a matrix product {peak / 1e12:.3g} TFLOP/s\n")
    print_table(("network", "GFLOP", "seconds", "TFLOP/s", "of the peak"), rows)
    write_json(arguments.output, results)


if __name__ == "__main__":
    main()
