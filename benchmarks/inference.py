"""The speed of the pipeline: latency, throughput, memory, and the share of the machine's peak.

    python benchmarks/inference.py --model pretrained/hazelnut
    python benchmarks/inference.py --model paper --compile

A picture is a tensor of the networks' size; what is timed ends with its map and score. Compared are

- the authors' way: float32, eager, a UNet call for each noise scale, autograd left on, one picture at a time;
- the same in inference mode;
- iterative denoising with the same UNet in inference mode, 50 and 1000 steps. `--measured_steps` of them are run and
  the time is scaled up, which the table says: all steps cost the same;
- the pipeline, in float32 and bfloat16, with the memory layout channels_last, with batch norm folded, distilled into
  one call of the UNet (`training/train.py --distill`; here with the same networks, as fast as a student's), and,
  with `--compile`, compiled.

On a CPU glibc gives freed memory back, as it does in most programs. With `--keep_memory` all rows keep it, as our
command line does and programs that call `keep_freed_memory`.

All are timed in turns, A B C A B C; given are medians, and the fastest and the slowest round. The peak is that of a
product of two large matrices, measured in the same run; shares of it count the convolutions and matrix products of each
network alone, at the smallest and the largest batch size.
"""

import argparse
import time
from collections.abc import Callable
from copy import copy, deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from diffusers import DDIMScheduler
from measure import (
    GIB,
    Timing,
    compile_all,
    count_flops,
    in_turns,
    load_model,
    machine,
    matrix_peak,
    peak_memory,
    print_table,
    write_json,
)

from diffusionad_pipe import DiffusionADPipeline, NormGuidedOneStepScheduler
from diffusionad_pipe.freed_memory import keep_freed_memory

AUTHORS, INFERENCE_MODE = "authors' way", "the same in inference mode"


def authors_way(pipe: DiffusionADPipeline, images: torch.Tensor) -> torch.Tensor:
    """Maps `[B, 1, H, W]` as the authors' evaluation computes them; autograd records if it is on."""
    scheduler = pipe.scheduler
    noised, outputs, both = [], [], []
    for timestep in (scheduler.config.small_timestep, scheduler.config.large_timestep):
        timesteps = torch.full((len(images),), timestep, device=images.device)
        noised.append(scheduler.add_noise(images, torch.randn_like(images), timesteps))
        outputs.append(pipe.unet(noised[-1], timesteps).sample)
        both.append(timesteps)
    guided = scheduler.step(torch.cat(outputs), torch.cat(both), torch.cat(noised)).prev_sample
    maps = pipe.segmentation(torch.cat([images, guided], dim=1)).logits.sigmoid()
    maps.flatten(1).topk(50).values.mean(1)
    return maps.detach().cpu()


@torch.inference_mode()
def iterative(pipe: DiffusionADPipeline, images: torch.Tensor, steps: int) -> None:
    """So many DDIM steps, each a call of the UNet."""
    scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    scheduler.set_timesteps(scheduler.config.num_train_timesteps)
    sample = torch.randn_like(images)
    for timestep in scheduler.timesteps[-steps:]:
        sample = scheduler.step(pipe.unet(sample, timestep.to(images.device)).sample, timestep, sample).prev_sample


def variants(pipe: DiffusionADPipeline, with_compile: bool) -> dict[str, DiffusionADPipeline]:
    """The pipeline in every form that may be faster."""

    def variant(
        dtype: torch.dtype, fold: bool = False, channels_last: bool = False, distilled: bool = False
    ) -> DiffusionADPipeline:
        changed = copy(pipe)
        changed.register_modules(unet=deepcopy(pipe.unet), segmentation=deepcopy(pipe.segmentation))
        if fold:
            changed.fold_batch_norm()
        if distilled:
            config = pipe.scheduler.config
            scheduler = NormGuidedOneStepScheduler.from_config(config, prediction_type="sample", distilled=True)
            changed.register_modules(scheduler=scheduler)
        layout = torch.channels_last if channels_last else torch.preserve_format
        changed.unet.to(dtype=dtype, memory_format=layout)
        getattr(changed.segmentation, "cast", changed.segmentation.to)(dtype).to(memory_format=layout)
        return changed

    found = {
        "float32": variant(torch.float32),
        "float32, channels_last": variant(torch.float32, channels_last=True),
        "bfloat16": variant(torch.bfloat16),
        "bfloat16, channels_last": variant(torch.bfloat16, channels_last=True),
        "bfloat16, channels_last, distilled": variant(torch.bfloat16, channels_last=True, distilled=True),
    }
    if getattr(pipe.segmentation.config, "norm_type", None) == "batch":
        found["bfloat16, folded"] = variant(torch.bfloat16, fold=True)
    if with_compile:
        for name, dtype in (("float32, compiled", torch.float32), ("bfloat16, compiled", torch.bfloat16)):
            compiled = variant(dtype, fold=True)
            if compile_all(compiled):
                found[name] = compiled
    return found


def time_networks(
    pipe: DiffusionADPipeline,
    pipes: dict[str, DiffusionADPipeline],
    batch_sizes: list[int],
    rounds: int,
    side: int | None,
) -> list[dict[str, Any]]:
    """Print and return the time of each network alone, in every form, and the share of the peak that it reaches. On a
    CPU with one thread it is the processor's time, without what other programs took.

    Args:
        pipe: in float32 and not compiled, to count with.
        pipes: the forms.
        batch_sizes: pictures; the UNet sees each at two noise scales, a distilled one at one: its row is left out.
        rounds: of each.
        side: of the matrices that the peak is measured with.
    """
    device, size = pipe.device, pipe.config.image_size
    pipes = {name: form for name, form in pipes.items() if form.scheduler.num_scales == 2}
    methods: dict[str, Callable[[], object]] = {}
    rows: list[dict[str, Any]] = []
    for batch_size in batch_sizes:
        inputs = {
            "UNet": (torch.randn(2 * batch_size, 3, size, size, device=device), torch.tensor(200, device=device)),
            "segmentation": (torch.rand(batch_size, 6, size, size, device=device),),
        }
        for network, (images, *timestep) in inputs.items():
            part = "unet" if network == "UNet" else network
            flops = count_flops(partial(getattr(pipe, part), images, *timestep))
            for form, changed in pipes.items():
                module = getattr(changed, part)
                rows.append({"network": network, "batch": batch_size, "form": form, "flops": flops})
                images = images.to(getattr(module, "input_dtype", module.dtype))
                methods[f"{network}|{batch_size}|{form}"] = partial(module, images, *timestep)
    alone = device.type == "cpu" and torch.get_num_threads() == 1
    clock = time.process_time if alone else time.perf_counter
    with torch.inference_mode():
        timings = in_turns(methods, rounds, device, clock)
    peaks = {d: matrix_peak(device, d, side, clock=clock) for d in {p.unet.dtype for p in pipes.values()}}
    for row, timing in zip(rows, timings.values()):
        peak = peaks[pipes[row["form"]].unet.dtype]
        rate = row["flops"] / timing.median
        row |= {**timing._asdict(), "flops_per_second": rate, "peak_flops": peak, "share_of_peak": rate / peak}
    columns = "network", "batch", "form", "GFLOP", "seconds", "GFLOP/s", "of the peak"
    shown = []
    for row, timing in zip(rows, timings.values()):
        numbers = f"{row['flops'] / 1e9:.4g}", timing, f"{row['flops_per_second'] / 1e9:.3g}"
        shown.append((row["network"], row["batch"], row["form"], *numbers, f"{row['share_of_peak']:.0%}"))
    print_table(columns, shown)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", default="pretrained/hazelnut", help="a folder, a Hub id, or a preset: tiny, small, base, paper"
    )
    parser.add_argument("--batch_sizes", type=int, nargs="*", default=[1, 2, 4, 8, 16], help="none: latency only")
    parser.add_argument("--forms", nargs="+", metavar="FORM", help="of the pipeline, such as bfloat16; default: all")
    parser.add_argument("--networks_only", action="store_true", help="only the last table, of each network alone")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--measured_steps", type=int, default=2, help="of each iterative denoising; 0: none")
    parser.add_argument("--compile", action="store_true", help="also compiled: takes minutes before")
    parser.add_argument("--keep_memory", action="store_true", help="that is freed, as the command line does")
    parser.add_argument("--peak_side", type=int, help="of the matrices that the peak is measured with")
    parser.add_argument("--output", type=Path, help="also write the results to this JSON file")
    arguments = parser.parse_args()

    if arguments.keep_memory:
        keep_freed_memory()
    device = PartialState().device
    pipe = load_model(arguments.model, device)
    if pipe.scheduler.config.distilled:
        parser.error("--model is distilled: give its teacher, which all forms are made of")
    size = pipe.config.image_size
    images = torch.rand(max([1, *arguments.batch_sizes]), 3, size, size, generator=torch.Generator().manual_seed(0))
    on_device = images[:1].to(device)
    pipes = variants(pipe, arguments.compile)
    pipes = {name: form for name, form in pipes.items() if name in (arguments.forms or pipes)}
    results: dict[str, Any] = {"machine": machine(device), "model": arguments.model, "image_size": size}
    print(f"{arguments.model}, {size} px, {results['machine']}, medians of {arguments.rounds}\n")

    def call(name: str, batch_size: int) -> Callable[[], object]:
        return lambda: pipes[name](images[:batch_size], batch_size=batch_size, output_type="pt")

    def memory_of(name: str) -> float | None:
        recorded = device.type == "cuda" and "compiled" in name  # a CUDA graph keeps its memory between the calls
        return None if recorded or name not in methods else peak_memory(methods[name], device)

    ends = sorted({min(arguments.batch_sizes), max(arguments.batch_sizes)}) if arguments.batch_sizes else []
    if arguments.networks_only:
        results["networks"] = time_networks(pipe, pipes, ends, arguments.rounds, arguments.peak_side)
        write_json(arguments.output, results)
        return

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
        memory = memory_of(name)
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
    rows = []
    results["throughput"] = {}
    for name in pipes:
        for batch_size in arguments.batch_sizes:
            timing = timings[f"{name}|{batch_size}"]
            rate = batch_size / timing.median
            memory = memory_of(f"{name}|{batch_size}")
            times = rate * results["latency"][AUTHORS]["median"], rate * results["latency"][INFERENCE_MODE]["median"]
            results["throughput"][f"{name}, batch {batch_size}"] = {
                **timing._asdict(), "images_per_second": rate, "speedup": times, "peak_memory": memory,
            }  # fmt: skip
            shown = "" if memory is None else f"{memory / GIB:.2f}"
            rows.append((name, batch_size, f"{rate:.3g}", *(f"{t:.3g}" for t in times), shown))
    columns = "pipeline", "batch", "pictures a second", "times the authors'", "times inference mode", "peak memory, GiB"
    print_table(columns, rows)

    # 3. Each network alone.
    results["networks"] = time_networks(pipe, pipes, ends, arguments.rounds, arguments.peak_side)
    write_json(arguments.output, results)


if __name__ == "__main__":
    main()
