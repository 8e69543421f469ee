"""The process of a run: how accelerate and torch are set up, which signals end it, and what is said of its errors."""

import ctypes
import logging
import os
import signal
import sys
from dataclasses import replace
from datetime import timedelta

import psutil
import torch
from accelerate import Accelerator
from accelerate.utils import GradientAccumulationPlugin, InitProcessGroupKwargs, parse_flag_from_env
from diffusers.utils import logging as diffusers_logging

from ..files.output_error import OutputError
from ..freed_memory import keep_freed_memory
from ..runtime.acceleration import checked_cluster, is_out_of_memory
from ..runtime.progress import silence_libraries
from .config import TrainingConfig
from .setup import fastest_precision

logger = logging.getLogger("train")

PR_SET_PDEATHSIG = 1  # of Linux's prctl
SHARDING = {  # how accelerate launch asks for it
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
}


def start_accelerator(config: TrainingConfig) -> tuple[TrainingConfig, Accelerator]:
    """Set up this process, logging and the others that it trains with.

    Returns:
        The settings, with a precision in the place of `auto`, and the accelerator.

    Raises:
        ValueError: when what is asked for cannot be had here.
    """
    keep_freed_memory()
    silence_libraries()
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it its products are not repeatable
    with checked_cluster():
        for variable, name in SHARDING.items():
            if parse_flag_from_env(variable):
                raise ValueError(f"{name} is not supported: launch with --multi_gpu, whole networks fit on any card")
        if config.mixed_precision == "auto":
            config = replace(config, mixed_precision=fastest_precision())
        accelerator = Accelerator(
            mixed_precision=config.mixed_precision,
            gradient_accumulation_plugin=GradientAccumulationPlugin(
                num_steps=config.gradient_accumulation_steps, sync_with_dataloader=False
            ),
            log_with=config.report_to,
            project_dir=config.output_dir,
            # The others wait while one process validates, and ten minutes may be too few for that.
            kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(hours=2))],
        )
    level = logging.INFO if accelerator.is_main_process else logging.ERROR
    logging.basicConfig(format="%(asctime)s %(message)s", level=level, force=True)
    logging.getLogger("accelerate").setLevel(logging.WARNING)
    diffusers_logging.set_verbosity_error()  # it warns of every change of precision
    if accelerator.device.type == "cpu":
        _set_up_cpu(config, accelerator.num_processes)
    if accelerator.device.type == "cuda":
        torch.use_deterministic_algorithms(True, warn_only=True)
    return config, accelerator


def _set_up_cpu(config: TrainingConfig, processes: int) -> None:
    if config.mixed_precision == "fp16":  # accelerate would train in float32 and not say so
        raise ValueError(
            "--mixed_precision fp16 needs a GPU, and there is none: use bf16 where the processor has AMX or "
            "AVX-512 BF16, else no"
        )
    if config.mixed_precision == "bf16" and fastest_precision() == "no":
        logger.warning("this processor emulates bfloat16, which is slow: use --mixed_precision no")
    # accelerate launch would leave us one thread.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    torch.set_num_threads(config.cpu_threads or max(1, cores // processes))


class StopSignals:
    """Ctrl-C and SIGTERM, which from now on end nothing: the loop asks for them after each step."""

    def __init__(self) -> None:
        self.received: list[int] = []
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda number, frame: self.received.append(number))

    @property
    def count(self) -> int:
        return len(self.received)

    @property
    def exit_code(self) -> int:
        """As a shell has it; where another process was stopped, that of SIGTERM."""
        return 128 + (self.received or [signal.SIGTERM])[0]

    def restore(self) -> None:
        """Let them end the process again."""
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def outlive_sigterm(worker: int) -> None:
    """Let a worker go on for a minute: who stops a job signals all its processes, and the loop must end its step.
    Windows knows no such signal."""
    if hasattr(signal, "alarm"):
        signal.signal(signal.SIGTERM, lambda number, frame: signal.alarm(60))


def end_with_launcher() -> None:
    """Let SIGTERM come when `diffusionad train`, which has launched this, dies of a SIGKILL: it could not say so."""
    launcher = os.environ.get("DIFFUSIONAD_LAUNCHER", "")
    if launcher.isdecimal() and sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        try:
            is_gone = psutil.Process(int(launcher)).status() == psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            is_gone = True
        if is_gone:
            sys.exit(128 + signal.SIGTERM)


def explain(error: BaseException) -> str | None:
    """One sentence for what a user can mend; None for a fault of ours."""
    if is_out_of_memory(error):
        return (
            "out of memory: lower --train_batch_size (raise --gradient_accumulation_steps to make up for it), "
            "use --gradient_checkpointing, or lower --resolution"
        )
    if isinstance(error, OutputError):
        return str(error)
    if any(sign in str(error) for sign in ("No space left", "File too large", "code: 28", "code: 27")):
        return f"the disk is full ({error}): free some space and --resume_from_checkpoint latest"
    # A worker that dies while it hands a batch over is a broken connection.
    if "DataLoader worker" in str(error) or isinstance(error, ConnectionError | EOFError):
        return (
            f"a worker that makes synthetic anomalies died ({error}): there may be too little memory; "
            "lower --dataloader_num_workers and --resume_from_checkpoint latest"
        )
    return str(error) if isinstance(error, ValueError | ArithmeticError | OSError) else None
