"""One training step of the paper's networks: how long it takes and how much memory it needs.

    python benchmarks/training_step.py --peak_tflops 989
    python benchmarks/training_step.py --channels_last
    python benchmarks/training_step.py --memory

The first times forward, backward and optimizer step in two forms: ours, as train.py takes it, with both noise scales
in one call of the UNet under bf16 autocast, and the plain one, with a call for each scale in float32. (A GPU still
multiplies in TF32 inside convolutions, PyTorch's default.) That both compute the same loss is asserted in float32
before. Each form has a process of its own, so that on a CPU glibc gives the memory back that the plain one frees, as
it does in plain programs; `--keep_memory` keeps it there too. Steps are taken in turns, A B A B, and medians
reported. On a GPU also the peak of allocated memory, and the share of the card's bf16 peak that the step's floating-
point operations make, recomputation not counted; 989 TFLOP/s are an H100's or H200's.

The second, `--memory`, needs neither a GPU nor time: it runs float32 steps, as the preset `paper` does, on fake tensors
that have shapes and no numbers, and adds up what there would be. "Saved for backward" is what autograd keeps at the
end of the forward pass, each storage once and no parameters; "peak" is the most that lives at one moment of the whole
step, parameters and Adam's averages included, without the convolutions' work space and the allocator's rest.
"""

import argparse
import statistics
import time
import weakref
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from multiprocessing import get_context
from typing import Any

import torch
from accelerate import PartialState
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from tqdm.auto import tqdm

from diffusionad_pipe import (
    DiffusionADUNet2DModel,
    DiffusionADUNet2DOutput,
    NormGuidedOneStepScheduler,
    SegmentationUNet2DModel,
    paper_unet_config,
)
from diffusionad_pipe.freed_memory import keep_freed_memory
from diffusionad_pipe.runtime.acceleration import train_channels_last
from diffusionad_pipe.training.losses import sample_timesteps, training_losses

Batch = dict[str, torch.Tensor]
GIB = 2**30
PLAIN = "two calls, float32"
WARM_UP = 3  # steps until no new memory is taken


class TwoCalls(nn.Module):
    """The plain form of the UNet: one call for each noise scale."""

    def __init__(self, unet: DiffusionADUNet2DModel):
        super().__init__()
        self.unet = unet

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> DiffusionADUNet2DOutput:
        scales = zip(sample.chunk(2), timestep.chunk(2))
        return DiffusionADUNet2DOutput(torch.cat([self.unet(noised, t).sample for noised, t in scales]))


class Training:
    """The paper's networks and Adam.

    Args:
        scheduler: made before a fake mode is entered, as its numbers are checked when it is made.
        gradient_checkpointing: of both networks.
        device: where they are.
        channels_last: memory layout of the weights.
    """

    def __init__(
        self,
        scheduler: NormGuidedOneStepScheduler,
        gradient_checkpointing: bool,
        device: torch.device | str,
        channels_last: bool = False,
    ):
        torch.manual_seed(0)
        with torch.device(device):
            self.unet = DiffusionADUNet2DModel(**paper_unet_config(256))
            self.segmentation = SegmentationUNet2DModel()
        if gradient_checkpointing:
            self.unet.enable_gradient_checkpointing()
            self.segmentation.enable_gradient_checkpointing()
        self.parameters = [*self.unet.parameters(), *self.segmentation.parameters()]
        # The network begins as zero, and two forms of it would agree whatever they compute.
        with torch.no_grad():
            for parameter in self.unet.parameters():
                parameter += 0.02 * torch.randn_like(parameter)
        if channels_last:
            train_channels_last(self.unet, self.segmentation)
        self.scheduler = scheduler
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-5, weight_decay=0.0, fused=True)

    def loss(self, batch: Batch, plain: bool = False) -> torch.Tensor:
        unet = TwoCalls(self.unet) if plain else self.unet
        return training_losses(
            unet,
            self.segmentation,
            self.scheduler,
            batch["images"],
            batch["masks"],
            batch["labels"],
            batch["noise"],
            batch["timesteps"],
        ).loss

    def step(self, batch: Batch, plain: bool = False) -> None:
        device = batch["images"].device.type
        with torch.autocast(device, torch.bfloat16, enabled=not plain):
            loss = self.loss(batch, plain)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def training_batch(batch_size: int, resolution: int, device: torch.device | str) -> Batch:
    """Random inputs of [`training_losses`], every other picture anomalous."""
    generator = torch.Generator().manual_seed(0)
    labels = (torch.arange(batch_size) % 2).float()
    batch = {
        "images": torch.rand(batch_size, 3, resolution, resolution, generator=generator),
        "masks": labels.view(-1, 1, 1, 1) * torch.rand(batch_size, 1, resolution, resolution, generator=generator),
        "labels": labels,
        "noise": torch.randn(2, batch_size, 3, resolution, resolution, generator=generator),
        "timesteps": sample_timesteps(batch_size, generator),
    }
    return {name: tensor.to(device) for name, tensor in batch.items()}


def count_flops(batch_size: int, resolution: int) -> int:
    """Floating-point operations of one step, forward and backward."""
    # The counter knows attention as matrix products, not as the CPU's fused kernel.
    scheduler, fake = NormGuidedOneStepScheduler(), FakeTensorMode(allow_non_fake_inputs=True)
    with fake, sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        training = Training(scheduler, gradient_checkpointing=False, device="cpu")
        training.loss(training_batch(batch_size, resolution, "cpu")).backward()
    return counter.get_total_flops()


class TimedForm:
    """One form of the step, to be taken in a process of its own.

    Args:
        plain: two calls of the UNet in float32 instead of one in bf16.
        keep_memory: call `keep_freed_memory`, as train.py does.
        arguments: of the command line.
    """

    def __init__(self, plain: bool, keep_memory: bool, arguments: argparse.Namespace):
        if keep_memory:
            keep_freed_memory()
        self.plain, self.device = plain, PartialState().device
        checkpointing, channels_last = arguments.gradient_checkpointing, arguments.channels_last and not plain
        self.training = Training(NormGuidedOneStepScheduler(), checkpointing, self.device, channels_last)
        self.small = training_batch(2, 64, self.device)
        self.batch = training_batch(arguments.batch_size, arguments.resolution, self.device)

    def small_loss(self) -> float:
        """In float32, for the comparison of both forms."""
        with torch.backends.cudnn.flags(enabled=False), torch.no_grad():  # cuDNN would take TF32 for float32
            return self.training.loss(self.small, self.plain).item()

    def step(self) -> tuple[float, float | None]:
        """Seconds of one step, and on a GPU the peak of its memory in GiB."""
        on_gpu = self.device.type == "cuda"
        if on_gpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        started = time.perf_counter()
        self.training.step(self.batch, self.plain)
        if on_gpu:
            torch.cuda.synchronize()
        return time.perf_counter() - started, torch.cuda.max_memory_allocated() / GIB if on_gpu else None


here: TimedForm  # of a process that times a form


def prepare(*settings: Any) -> None:
    global here
    here = TimedForm(*settings)


def call(method: str) -> Any:
    return getattr(here, method)()


def print_times(arguments: argparse.Namespace) -> None:
    device = PartialState().device
    on_gpu = device.type == "cuda"
    settings = {PLAIN: (True, arguments.keep_memory), "ours: one call, bf16": (False, True)}
    seconds: dict[str, list[float]] = {name: [] for name in settings}
    peaks: dict[str, float | None] = {}
    with ExitStack() as stack:
        processes = {}
        for name, form in settings.items():
            executor = ProcessPoolExecutor(1, get_context("spawn"), prepare, (*form, arguments))
            processes[name] = stack.enter_context(executor)
        plain, ours = (process.submit(call, "small_loss").result() for process in processes.values())
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-5)
        for turn in tqdm(range(arguments.rounds + WARM_UP), desc=f"rounds, {WARM_UP} not counted"):
            for name, process in processes.items():
                taken, peaks[name] = process.submit(call, "step").result()
                if turn >= WARM_UP:
                    seconds[name].append(taken)

    flops = count_flops(arguments.batch_size, arguments.resolution)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    where = torch.cuda.get_device_name() if on_gpu else f"{torch.get_num_threads()} CPU threads"
    checkpointing = "with" if arguments.gradient_checkpointing else "without"
    print(
        f"batch {arguments.batch_size} of {arguments.resolution} px, {checkpointing} gradient checkpointing, {where}, "
        f"{flops / 1e12:.2f} TFLOP a step, medians of {arguments.rounds}\n"
    )
    print("| form | seconds a step | times plain | TFLOP/s | of the bf16 peak | peak memory, GiB |")
    print("|---|---|---|---|---|---|")
    for name, median in medians.items():
        rate = flops / median / 1e12
        share = f"{rate / arguments.peak_tflops:.1%}" if arguments.peak_tflops else ""
        memory = "" if peaks[name] is None else f"{peaks[name]:.2f}"
        times = medians[PLAIN] / median
        print(f"| {name} | {median:.3f} | {times:.2f} | {rate:.2f} | {share} | {memory} |")


class LivePeak(TorchDispatchMode):
    """The most bytes of storage that live at one moment; `live` is those that live now."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.known: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(results):
            if isinstance(tensor, torch.Tensor) and (storage := tensor.untyped_storage()) not in self.known:
                self.known.add(storage)
                self.live += storage.nbytes()
                weakref.finalize(storage, self._free, storage.nbytes())
        self.peak = max(self.peak, self.live)
        return results

    def _free(self, size: int) -> None:
        self.live -= size


@contextmanager
def saved_storages(without: list[nn.Parameter]) -> Iterator[dict[int, torch.UntypedStorage]]:
    """The storages that autograd saves for the backward pass, by their addresses."""
    known = {parameter.untyped_storage()._cdata for parameter in without}
    storages: dict[int, torch.UntypedStorage] = {}

    def save(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in known:
            storages[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        yield storages


def step_memory(batch_size: int, resolution: int, gradient_checkpointing: bool) -> dict[str, float]:
    """What one float32 step would hold in memory, in bytes."""
    scheduler = NormGuidedOneStepScheduler()
    with FakeTensorMode(allow_non_fake_inputs=True), LivePeak() as tracker:
        training = Training(scheduler, gradient_checkpointing, "cpu")
        batch = training_batch(batch_size, resolution, "cpu")
        parameters = sum(parameter.nbytes for parameter in training.parameters)
        # A step on a small batch first: gradients come and go, Adam's averages stay.
        training.loss(training_batch(2, 64, "cpu")).backward()
        training.optimizer.step()
        training.optimizer.zero_grad()
        with saved_storages(training.parameters) as storages:
            loss = training.loss(batch)
        activations = sum(storage.nbytes() for storage in storages.values())
        storages.clear()
        loss.backward()
        training.optimizer.step()
        gradients = sum(p.grad.nbytes for p in training.parameters if p.grad is not None)
        averages = sum(
            tensor.nbytes for state in training.optimizer.state.values() for tensor in state.values() if tensor.ndim
        )
    return {
        "parameters": parameters,
        "gradients": gradients,
        "Adam's averages": averages,
        "saved for backward": activations,
        "sum": parameters + gradients + averages + activations,
        "peak": tracker.peak,
    }


def print_memory(batch_size: int, resolution: int) -> None:
    plain, checkpointed = (step_memory(batch_size, resolution, checkpointing) for checkpointing in (False, True))
    print(f"the preset paper, float32, batch {batch_size} of {resolution} px, GiB\n")
    print("| memory | without gradient checkpointing | with |\n|---|---|---|")
    for name in plain:
        print(f"| {name} | {plain[name] / GIB:.2f} | {checkpointed[name] / GIB:.2f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--resolution", type=int, default=256, help="a multiple of 32")
    parser.add_argument("--batch_size", type=int, help="default: 1, and 16 with --memory as in the paper")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--gradient_checkpointing", action="store_true", help="in both forms")
    parser.add_argument("--channels_last", action="store_true", help="memory layout of the weights in our form")
    parser.add_argument("--keep_memory", action="store_true", help="in the plain form too")
    parser.add_argument("--peak_tflops", type=float, help="bf16 peak of the GPU, dense")
    parser.add_argument("--memory", action="store_true", help="add up the memory of a step, and time nothing")
    arguments = parser.parse_args()
    arguments.batch_size = arguments.batch_size or (16 if arguments.memory else 1)
    if arguments.memory:
        print_memory(arguments.batch_size, arguments.resolution)
    else:
        print_times(arguments)


if __name__ == "__main__":
    main()
