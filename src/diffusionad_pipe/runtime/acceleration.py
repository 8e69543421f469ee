"""What the hardware offers for inference: several processes, the fastest dtype, a compiler, and how much memory there
was."""

import logging
import os
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
from torch.distributed.distributed_c10d import _set_pg_timeout

logger = logging.getLogger(__name__)

# Where a program that starts several processes says how many there are, and which one this is.
SIZE_VARIABLES = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")
LAUNCHER_VARIABLES = ("MASTER_ADDR", "MASTER_PORT")  # without which they cannot find each other
RANK_VARIABLES = (
    *SIZE_VARIABLES, "RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "MV2_COMM_WORLD_RANK",
    "LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID", "MV2_COMM_WORLD_LOCAL_RANK",
    "LOCAL_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS", "MV2_COMM_WORLD_LOCAL_SIZE",
)  # fmt: skip


JOINING = timedelta(minutes=10)  # in which all processes must have started
WAITING = timedelta(days=365)  # for one that has more to do


def join_processes() -> PartialState:
    """The processes that `accelerate launch` or `torchrun` started, this one alone without them.

    It must be called before anything else asks for accelerate's `PartialState`, which by itself finds several processes
    on GPUs only, and lets a process wait half an hour at most for one that has more to do.

    Raises:
        ValueError: for variables of a cluster that do not say which processes there are, or speak of some that do not
            come; names them.
    """
    with checked_cluster():
        on_cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
        state = PartialState(cpu=on_cpu, timeout=JOINING)
    if state.num_processes > 1:
        _set_pg_timeout(WAITING)
    return state


@contextmanager
def checked_cluster() -> Iterator[None]:
    """Where accelerate is asked which processes there are: what schedulers and other programs left in the environment
    must not decide it. A process that says it is one of one is alone.

    Raises:
        ValueError: names the variables that keep the processes from being joined.
    """
    set_here = [
        name for name in os.environ if name in RANK_VARIABLES or name.startswith(("ACCELERATE_", "FORK_LAUNCHED"))
    ]
    for name in set_here:
        if name in RANK_VARIABLES and not os.environ[name].strip().lstrip("-").isdigit():
            raise ValueError(f"the variable {name}={os.environ[name]} is no number: unset it")
    hidden = {}
    if missing := [name for name in LAUNCHER_VARIABLES if not os.environ.get(name)]:
        for name in SIZE_VARIABLES:
            if int(os.environ.get(name, 1)) > 1:
                raise ValueError(
                    f"the variable {name}={os.environ[name]} says that this is one of several processes, but "
                    f"{' and '.join(missing)} are not set: start them with accelerate launch, or unset {name}"
                )
        hidden = {name: os.environ.pop(name) for name in set_here if name in RANK_VARIABLES}
    try:
        yield
    except Exception as error:  # accelerate and torch have many kinds
        found = [name for name in set_here if name not in hidden]
        if not found:
            raise
        cause = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(
            f"the processes cannot be joined as the variables {', '.join(found)} say ({cause}): unset them, or start "
            "with accelerate launch"
        ) from error
    finally:
        os.environ.update(hidden)


def find_device(name: str | None = None) -> torch.device:
    """The device of a name, which must be here and compute.

    Args:
        name: such as "cpu", "cuda" or "cuda:1". None is a GPU where there is one; under `accelerate launch`, that of
            this process.

    Raises:
        ValueError: where there is no such device; says which there are.
        MemoryError: where it has no memory left.
    """
    if name is None:
        return join_processes().device
    try:
        device = torch.device(name)
        torch.ones(1, dtype=torch.float32, device=device).item()  # torch learns only then whether it is there
    except Exception as error:  # every kind of device raises errors of its own kind
        if is_out_of_memory(error):
            raise MemoryError(
                f"the device {name} has no memory left: end what else uses it, or take another"
            ) from error
        kind, count = torch.accelerator.current_accelerator(), torch.accelerator.device_count()
        here = ["cpu", *(f"{kind.type}:{number}" for number in range(count) if kind is not None)]
        raise ValueError(
            f"there is no device {name!r} here, only {', '.join(here)}: give another name, or none"
        ) from error
    return device


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
        torch.compile(lambda x: x + number, **options)(torch.zeros(8, dtype=torch.float32, device=device))
    except Exception as error:  # what is missing raises an error of its own kind inside torch
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
