"""What the hardware offers for inference: several processes, the fastest dtype, a compiler, and how much memory there
was."""

import logging
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from diffusers.models.resnet import ResnetBlock2D
from torch import nn

logger = logging.getLogger(__name__)


def join_processes() -> PartialState:
    """The processes that `accelerate launch` or `torchrun` started, this one alone without them.

    It must be called before anything else asks for accelerate's `PartialState`, which by itself finds several processes
    on GPUs only, and lets a process wait half an hour at most for one that has more to do.
    """
    on_cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    return PartialState(cpu=on_cpu, timeout=timedelta(days=365))


def fastest_dtype(device: torch.device | str) -> torch.dtype:
    """bfloat16 where the device multiplies in it natively, float32 elsewhere.

    float16 is not considered: activations of the paper's networks may leave its range.

    Args:
        device: on a CPU, AMX or the AVX-512 BF16 instructions are looked for; a GPU is asked.
    """
    device = torch.device(device)
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    elif device.type == "cpu":
        native = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    else:
        native = False
    return torch.bfloat16 if native else torch.float32


def compile_networks(networks: Iterable[nn.Module], device: torch.device, **options: Any) -> bool:
    """Compile networks in place with `torch.compile`, if this machine can.

    Args:
        networks: compiled at their first call; their parameters and names stay as they are.
        device: where they run.
        options: of `torch.compile`.

    Returns:
        False, after a warning with the cause, where nothing can be compiled; the networks stay as they are.
    """
    try:
        # A missing compiler shows at the first call of something compiled: of one addition here, not of a network. The
        # number is never the same, so that nothing compiled earlier is found in torch's cache.
        number = time.time_ns() % 10**9
        torch.compile(lambda x: x + number, **options)(torch.zeros(8, device=device))
    except Exception as error:  # whatever is missing fails in a way of its own, in the depths of torch
        cause = str(error).strip().splitlines()[0]
        logger.warning(
            f"torch.compile does not work for {device.type} here ({cause}): the networks stay uncompiled, with the "
            "same results. A CPU needs a C++ compiler (g++, clang, MSVC), a GPU Triton"
        )
        return False
    for network in networks:
        network.compile(**options)
    return True


def train_channels_last(unet: nn.Module, segmentation: nn.Module) -> None:
    """Lay the weights out channels last, for networks in train mode.

    diffusers' residual blocks copy what they add to another layout while they are in train mode, against a warning of
    DDP, and gradients of both layouts meet then: a fifth of a step of the paper's networks. They have no dropout, which
    is all else that the mode decides.
    """
    for network in (unet, segmentation):
        network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    for block in unet.modules():
        if isinstance(block, ResnetBlock2D):
            block.training = False


def is_out_of_memory(error: BaseException) -> bool:
    """Whether that is what an error says. torch has no class of its own for it on a CPU, nor for CUDA's libraries, nor
    for more bytes than a number can hold."""
    said = ("DefaultCPUAllocator", "out of memory", "ALLOC_FAILED", "Storage size calculation overflowed")
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(words in str(error) for words in said)


@contextmanager
def explained_out_of_memory(used: str, cure: str) -> Iterator[None]:
    """Turn running out of memory into one sentence.

    Args:
        used: the settings that asked for the memory.
        cure: what to try instead.

    Raises:
        MemoryError: in place of torch's errors.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:  # torch.OutOfMemoryError is a RuntimeError
        if is_out_of_memory(error):
            raise MemoryError(f"out of memory with {used}: use {cure}") from error
        raise
