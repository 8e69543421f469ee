"""Where the time of a network goes, layer by layer, against the machine's measured peak.

    python benchmarks/layers.py --model paper --dtype bfloat16

Every layer is timed by itself in one call of the network, without the layers inside it, eagerly; the table gives the
median over the rounds, summed over layers of a kind. The peak is that of a product of two large matrices, measured in
the same run. On a GPU each layer is waited for, so that the sum is above the time of a whole call, which is given too.
"""

import argparse
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import PartialState
from diffusers.models.attention_processor import Attention
from measure import in_turns, load_model, machine, matrix_peak, module_flops, print_table, synchronize, write_json
from torch import nn

from diffusionad_pipe.freed_memory import keep_freed_memory

KINDS = {
    nn.Conv2d: "convolution",
    nn.Linear: "linear layer",
    nn.GroupNorm: "group norm",
    nn.BatchNorm2d: "batch norm",
    nn.SiLU: "SiLU",
    nn.ReLU: "ReLU",
    Attention: "attention, but its linear layers",
}


class Layer(NamedTuple):
    """One layer in one call.

    Args:
        kind: what it is.
        detail: the same with its sizes.
        seconds: outside the layers inside it.
        flops: likewise, of convolutions and matrix products.
    """

    kind: str
    detail: str
    seconds: float
    flops: int


def measure_layers(network: nn.Module, call: Callable[[], object], rounds: int, device: torch.device) -> list[Layer]:
    """Every layer of a network; what a block does itself (sums, concatenations) counts as a layer of the block's kind.

    Args:
        network: whose layers.
        call: calls it once.
        rounds: the median of so many is taken; one more before is not counted.
        device: waited for at each layer.
    """
    names = {module: name for name, module in network.named_modules()}
    details: dict[str, str] = {}
    seconds: dict[str, list[float]] = defaultdict(list)
    running: list[list[float]] = []  # when each module that runs began, and the seconds of the modules inside it

    def begin(module: nn.Module, inputs: Any) -> None:
        synchronize(device)
        running.append([time.perf_counter(), 0.0])

    def end(module: nn.Module, inputs: Any, output: Any) -> None:
        synchronize(device)
        began, inside = running.pop()
        total = time.perf_counter() - began
        this_round[names[module]] += total - inside
        if running:
            running[-1][1] += total
        details[names[module]] = describe(module, output)

    handles = [hook for m in names for hook in (m.register_forward_pre_hook(begin), m.register_forward_hook(end))]
    for turn in range(rounds + 1):
        this_round: dict[str, float] = defaultdict(float)
        call()
        for name, value in this_round.items() if turn > 0 else ():
            seconds[name].append(value)
    for handle in handles:
        handle.remove()
    flops = module_flops(call)
    modules = dict(network.named_modules())
    return [
        Layer(kind(modules[name]), details[name], statistics.median(values), flops.get(name, 0))
        for name, values in seconds.items()
    ]


def kind(module: nn.Module) -> str:
    known = [name for type_, name in KINDS.items() if isinstance(module, type_)]
    name = type(module).__name__
    return known[0] if known else f"rest of {name}" if any(module.children()) else name


def describe(module: nn.Module, output: Any) -> str:
    if isinstance(module, nn.Conv2d):
        side, (height, width) = module.kernel_size[0], output.shape[-2:]
        return f"{side} x {side}, {module.in_channels} to {module.out_channels} channels, {height} x {width} px"
    return kind(module)


def summarize(layers: Iterable[Layer], by: str, peak: float) -> list[dict[str, Any]]:
    """Sums over all layers with the same `kind` or `detail`, the longest first."""
    groups: dict[str, list[Layer]] = defaultdict(list)
    for layer in layers:
        groups[getattr(layer, by)].append(layer)
    whole = sum(layer.seconds for members in groups.values() for layer in members)
    sums = []
    for name, members in groups.items():
        seconds, flops = sum(layer.seconds for layer in members), sum(layer.flops for layer in members)
        share = seconds / whole
        sums.append({"layer": name, "count": len(members), "seconds": seconds, "share_of_time": share, "flops": flops,
                     "flops_per_second": flops / seconds, "share_of_peak": flops / seconds / peak})  # fmt: skip
    return sorted(sums, key=lambda row: -row["seconds"])


def print_layers(rows: Iterable[dict[str, Any]]) -> None:
    shown = []
    for row in rows:
        speed = (f"{row['flops_per_second'] / 1e9:.3g}", f"{row['share_of_peak']:.0%}") if row["flops"] else ("", "")
        gflops = f"{row['flops'] / 1e9:.4g}" if row["flops"] else ""
        shown.append(
            (row["layer"], row["count"], f"{row['seconds']:.4g}", f"{row['share_of_time']:.1%}", gflops, *speed)
        )
    print_table(("layers", "number", "seconds", "of the time", "GFLOP", "GFLOP/s", "of the peak"), shown)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="paper", help="a folder, a Hub id, or a preset: tiny, small, base, paper")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--channels_last", action="store_true", help="memory layout of the weights")
    parser.add_argument("--batch_size", type=int, default=1, help="pictures; the UNet sees each at two noise scales")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--shapes", type=int, default=12, help="of convolutions in the second table")
    parser.add_argument("--peak_side", type=int, help="of the matrices that the peak is measured with")
    parser.add_argument("--output", type=Path, help="also write the results to this JSON file")
    arguments = parser.parse_args()
    keep_freed_memory()  # as the command line does

    device, dtype = PartialState().device, getattr(torch, arguments.dtype)
    pipe = load_model(arguments.model, device)
    size, batch_size = pipe.config.image_size, arguments.batch_size
    layout = torch.channels_last if arguments.channels_last else torch.preserve_format
    for network in (pipe.unet, pipe.segmentation):
        network.to(dtype=dtype, memory_format=layout)
    noised = torch.randn(2 * batch_size, 3, size, size, device=device, dtype=dtype)
    pairs = torch.rand(batch_size, 6, size, size, device=device, dtype=dtype)
    timesteps = torch.full((2 * batch_size,), 200, device=device)
    calls: dict[str, tuple[nn.Module, Callable[[], object]]] = {
        "UNet": (pipe.unet, lambda: pipe.unet(noised, timesteps)),
        "segmentation": (pipe.segmentation, lambda: pipe.segmentation(pairs)),
    }
    results: dict[str, Any] = {"machine": machine(device), **vars(arguments), "image_size": size}
    results["output"] = None
    print(f"{arguments.model}, {size} px, {arguments.dtype}, batch {batch_size}, {results['machine']}\n")
    with torch.inference_mode():
        peak = results["peak_flops"] = matrix_peak(device, dtype, arguments.peak_side)
        for name, (network, call) in calls.items():
            whole = in_turns({name: call}, arguments.rounds, device)[name]
            layers = measure_layers(network, call, arguments.rounds, device)
            flops = sum(layer.flops for layer in layers)
            kinds = summarize(layers, "kind", peak)
            shapes = summarize((layer for layer in layers if layer.kind == "convolution"), "detail", peak)
            results[name] = {**whole._asdict(), "flops": flops, "kinds": kinds, "convolutions": shapes}
            rate, alone = flops / whole.median, sum(layer.seconds for layer in layers)
            print(
                f"{name}: {whole} s a call, {alone:.4g} s layer by layer; {flops / 1e9:.4g} GFLOP, "
                f"{rate / 1e9:.4g} GFLOP/s, {rate / peak:.0%} of the measured peak of {peak / 1e9:.4g} GFLOP/s\n"
            )
            print_layers(kinds)
            print_layers(shapes[: arguments.shapes])
    write_json(arguments.output, results)


if __name__ == "__main__":
    main()
