"""What the benchmarks of inference share: timing in turns, the machine's peak, memory, tables and JSON."""

import ctypes
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from diffusers.utils import logging as diffusers_logging
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from tqdm.auto import tqdm

from diffusionad_pipe import DiffusionADPipeline
from diffusionad_pipe.files.single_files import write_file

GIB = 2**30
PRESETS = ("tiny", "small", "base", "paper")


class Timing(NamedTuple):
    """Seconds of one call.

    Args:
        median: of all rounds.
        lowest: the fastest round.
        highest: the slowest round.
    """

    median: float
    lowest: float
    highest: float

    def __str__(self) -> str:
        return f"{self.median:.4g} ({self.lowest:.4g} ... {self.highest:.4g})"


def in_turns(
    methods: dict[str, Callable[[], object]],
    rounds: int,
    device: torch.device,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Timing]:
    """Time methods in turns, A B A B, so that whatever else the machine does meets all alike.

    Args:
        methods: by name; each is called once before, not counted, and three times on a GPU: what is compiled runs at
            the first call, is recorded as a CUDA graph at the second, and replayed from the third on.
        rounds: how often each is timed.
        device: waited for before and after each call.
        clock: in seconds. `time.process_time` leaves out what other programs took of the processor; with several
            threads it is the sum of theirs.
    """
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    before = 3 if device.type == "cuda" else 1
    for turn in tqdm(range(before + rounds), desc=f"rounds, {before} of them not counted", leave=False):
        for name, method in methods.items():
            synchronize(device)
            started = clock()
            method()
            synchronize(device)
            if turn >= before:
                seconds[name].append(clock() - started)
    return {name: Timing(statistics.median(values), min(values), max(values)) for name, values in seconds.items()}


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def matrix_peak(
    device: torch.device,
    dtype: torch.dtype,
    side: int | None = None,
    rounds: int = 5,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """The most floating-point operations a second that a product of two square matrices reached here.

    Args:
        device: where.
        dtype: of the matrices.
        side: of the matrices; None is 2048 on a CPU and 8192 on a GPU.
        rounds: the fastest counts.
        clock: as [`in_turns`] takes it.
    """
    side = side or (8192 if device.type == "cuda" else 2048)
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    in_tf32 = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True  # as a GPU's convolutions are by default
    with torch.inference_mode():
        timing = in_turns({"product": lambda: left @ right}, rounds, device, clock)["product"]
    torch.backends.cuda.matmul.allow_tf32 = in_tf32
    return 2 * side**3 / timing.lowest


def count_flops(function: Callable[[], object]) -> int:
    """Floating-point operations of a call in convolutions and matrix products; multiply and add are two."""
    # The counter knows attention as matrix products, not as a fused kernel.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def peak_memory(function: Callable[[], object], device: torch.device) -> float | None:
    """The most memory in bytes that a call needed above what was in use before it: allocated by torch on a GPU,
    resident pages of the process on Linux, None elsewhere."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        synchronize(device)
        return float(torch.cuda.max_memory_allocated(device) - before)
    if sys.platform != "linux":
        function()
        return None
    # What earlier calls left unused in glibc's heap would be taken again unseen.
    with suppress(AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak starts again at what is in use now
    before = _resident("VmRSS")
    function()
    return float(_resident("VmHWM") - before)


def _resident(field: str) -> int:
    status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    return 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith(f"{field}:")))


def machine(device: torch.device) -> dict[str, Any]:
    """What the numbers were measured on."""
    processor = platform.processor() or platform.machine()
    if sys.platform == "linux":
        names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        processor = names[0].split(":", 1)[1].strip() if names else processor
    found = {"device": torch.cuda.get_device_name(device) if device.type == "cuda" else processor}
    found |= {"cpu": processor, "threads": str(torch.get_num_threads()), "python": platform.python_version()}
    for package in ("torch", "diffusers", "onnxruntime", "openvino", "nncf"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = ""
    amx, bf16 = torch.cpu._is_amx_tile_supported(), torch.cpu._is_avx512_bf16_supported()
    return {**found, "amx": amx, "avx512_bf16": bf16}


def print_table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """A Markdown table, to be pasted into README.md."""
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for row in rows:
        print(f"| {' | '.join(str(cell) for cell in row)} |")
    print()


def write_json(path: Path | None, results: dict[str, Any]) -> None:
    if path is not None:
        text = json.dumps(results, indent=2) + "\n"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, lambda file: file.write_text(text, encoding="utf-8"), "benchmark")


def compile_all(pipe: DiffusionADPipeline) -> bool:
    """`pipe.compile()`, for more sizes and dtypes than torch compiles before it gives a class of networks up."""
    torch._dynamo.config.recompile_limit = 64
    return pipe.compile()


def load_model(name: str, device: torch.device, dtype: torch.dtype = torch.float32) -> DiffusionADPipeline:
    """A saved pipeline, or one of `PRESETS`: networks with random weights, which are as fast as trained ones."""
    diffusers_logging.set_verbosity_error()  # its warnings would stand between the tables
    if name in PRESETS:
        from diffusionad_pipe.training.config import PRESETS_FOLDER, TrainingConfig
        from diffusionad_pipe.training.setup import build_networks

        settings = yaml.safe_load((PRESETS_FOLDER / f"{name}.yaml").read_text(encoding="utf-8"), "benchmark")
        config = TrainingConfig(**settings)
        torch.manual_seed(0)
        unet, segmentation, scheduler = build_networks(config)
        randomize(unet)
        networks = unet.to(dtype).eval(), segmentation.cast(dtype).eval()
        pipe = DiffusionADPipeline(*networks, scheduler, image_size=config.resolution)
    else:
        pipe = DiffusionADPipeline.from_pretrained(name, dtype=dtype)
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)


def randomize(network: nn.Module) -> None:
    # The network begins as zero; zeros might be multiplied faster than other numbers.
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
