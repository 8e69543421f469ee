"""Train DiffusionAD on pictures of good parts.

    accelerate launch training/train.py --train_data_dir my_good_pictures --output_dir runs/mine
    accelerate launch training/train.py --config training/configs/hazelnut.yaml --output_dir runs/hazelnut

One loop, top to bottom: read the pictures, build the networks, train, validate on good pictures that were held out,
calibrate both thresholds on them, and keep the best averaged weights as a pipeline that
`DiffusionADPipeline.from_pretrained` loads. Test pictures are never read. Everything random is a function of --seed, so
a run that was resumed ends like one that was not: bit for bit on a CPU, and on a GPU as far as its kernels repeat.
"""

import ctypes
import json
import logging
import math
import os
import signal
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict, replace
from datetime import timedelta
from functools import partial
from typing import Any

import numpy as np
import psutil
import torch
from accelerate import Accelerator
from accelerate.utils import GradientAccumulationPlugin, InitProcessGroupKwargs, parse_flag_from_env, set_seed
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from diffusers.utils import logging as diffusers_logging
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, Subset

from diffusionad_pipe import DiffusionADPipeline, DiffusionADUNet2DModel, SegmentationUNet2DModel
from diffusionad_pipe.evaluation.calibration import Validation, smallest_rate, validate
from diffusionad_pipe.files.output_error import OutputError
from diffusionad_pipe.files.output_folder import OutputFolder
from diffusionad_pipe.freed_memory import keep_freed_memory
from diffusionad_pipe.hub.model_card import write_model_card
from diffusionad_pipe.hub.push import push_model
from diffusionad_pipe.runtime.acceleration import (
    checked_cluster,
    compile_networks,
    is_out_of_memory,
    train_channels_last,
)
from diffusionad_pipe.runtime.progress import ProgressBar, silence_libraries
from diffusionad_pipe.training.config import TrainingConfig, parse_arguments
from diffusionad_pipe.training.losses import distillation_losses, training_losses
from diffusionad_pipe.training.networks import TrainedNetworks
from diffusionad_pipe.training.plots import plot_losses, validation_grid
from diffusionad_pipe.training.run_folder import (
    INDEX,
    LOG,
    LOSSES,
    empty_run,
    is_resumed,
    record_trackers,
    require_run_folder,
    require_same_images,
    save_checkpoint,
    save_pipeline,
    start_run,
    store_run,
    tracker_files,
)
from diffusionad_pipe.training.run_images import describe_images
from diffusionad_pipe.training.samples import held_out_samples, read_inputs, training_samples
from diffusionad_pipe.training.setup import (
    build_networks,
    fastest_precision,
    load_teacher,
    start_from_pretrained,
)

logger = logging.getLogger("train")

PR_SET_PDEATHSIG = 1  # of Linux's prctl
SHARDING = {  # how accelerate launch asks for it
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
}
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class Progress:
    """What a checkpoint remembers beside the networks."""

    def __init__(self, processes: int) -> None:
        self.step = 0
        self.processes = processes  # that share a step; not in checkpoints of before
        self.skipped = 0  # steps whose gradient was not finite
        self.best_score, self.best_step = -math.inf, 0
        self.best_metrics: dict[str, float] = {}
        self.seconds = 0.0  # of training, over all resumptions

    def state_dict(self) -> dict[str, Any]:
        return dict(vars(self))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        vars(self).update(state)


def reference_schedule(step: int) -> float:
    """The authors' schedule of the segmentation network: CosineAnnealingLR(T_max=10), stepped every iteration."""
    return (1 + math.cos(math.pi * step / 10)) / 2


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


def main(config: TrainingConfig) -> int:
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
    logging.basicConfig(
        format="%(asctime)s %(message)s",
        level=logging.INFO if accelerator.is_main_process else logging.ERROR,
        force=True,
    )
    logging.getLogger("accelerate").setLevel(logging.WARNING)
    diffusers_logging.set_verbosity_error()  # it warns of every change of precision
    if accelerator.device.type == "cpu":
        if config.mixed_precision == "fp16":  # accelerate would train in float32 and not say so
            raise ValueError(
                "--mixed_precision fp16 needs a GPU, and there is none: use bf16 where the processor has AMX or "
                "AVX-512 BF16, else no"
            )
        if config.mixed_precision == "bf16" and fastest_precision() == "no":
            logger.warning("this processor emulates bfloat16, which is slow: use --mixed_precision no")
        # accelerate launch would leave us one thread.
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        torch.set_num_threads(config.cpu_threads or max(1, cores // accelerator.num_processes))
    if accelerator.device.type == "cuda":
        torch.use_deterministic_algorithms(True, warn_only=True)
    folder = OutputFolder(config.output_dir, "train", "--output_dir")
    if accelerator.is_main_process:
        require_run_folder(folder)
    with folder if accelerator.is_main_process else nullcontext():  # the first process has it for itself, and writes
        return train(config, accelerator, folder)


def train(config: TrainingConfig, accelerator: Accelerator, folder: OutputFolder) -> int:
    """The run itself; returns the exit code."""
    output_dir = folder.path

    # 1. Networks from the seed, and pictures
    set_seed(config.seed)
    teacher = load_teacher(config.distill, config, accelerator.device) if config.distill else None
    unet, segmentation, scheduler = build_networks(config, teacher)
    if source := config.pretrained_model_name_or_path or config.distill:
        start_from_pretrained({"unet": unet, "segmentation": segmentation}, source)
    resume_from = start_run(config, accelerator, folder)
    samples_per_step = config.train_batch_size * config.gradient_accumulation_steps * accelerator.num_processes
    # Mattes of a model are made once; the other processes find them in the folder.
    with accelerator.main_process_first() if config.foreground == "transformers" else nullcontext():
        inputs = read_inputs(config, folder)
    # Workers on the CPU cannot make samples on a GPU.
    device = accelerator.device if config.dataloader_num_workers == 0 else torch.device("cpu")
    dataset = training_samples(config, inputs, config.max_train_steps * samples_per_step, device)
    validation = held_out_samples(config, inputs, device)
    images = describe_images(config, inputs.images, inputs.is_held_out, teacher)
    good_count = len(images["pictures"])
    held_out_count = sum(row["held_out"] for row in images["pictures"])
    if resume_from is not None:
        require_same_images(config, resume_from.parent, images)
    if accelerator.is_main_process and not is_resumed(folder, resume_from):
        empty_run(folder)
    logger.info("%d good pictures to train on, %d held out", good_count - held_out_count, held_out_count)
    if smallest_rate(held_out_count) > config.false_positive_rate:
        logger.warning(
            "%d held-out pictures guarantee at best %.0f %% false alarms, not %g %%: the thresholds also use the "
            "synthetic anomalies; hold out %d pictures or more for the guarantee",
            held_out_count,
            100 * smallest_rate(held_out_count),
            100 * config.false_positive_rate,
            math.ceil(1 / config.false_positive_rate) - 1,
        )

    # 2. One optimizer with a learning rate for each network, schedules, the average of the weights
    unet.train()
    segmentation.train()
    if config.channels_last:
        train_channels_last(unet, segmentation)
    if config.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
        segmentation.enable_gradient_checkpointing()
    if config.torch_compile:
        compile_networks((unet, segmentation), accelerator.device)
    optimizer = torch.optim.AdamW(  # Adam, where the weight decay is 0
        [
            {"params": list(unet.parameters()), "lr": config.learning_rate},
            {"params": list(segmentation.parameters()), "lr": config.segmentation_learning_rate},
        ],
        weight_decay=config.weight_decay,
        fused=True,
    )
    schedule = get_scheduler(
        config.lr_scheduler,
        optimizer,
        num_warmup_steps=config.lr_warmup_steps,
        num_training_steps=config.max_train_steps,
    ).lr_lambdas[0]
    seg_schedule = reference_schedule if config.seg_schedule == "reference" else schedule
    lr_scheduler = LambdaLR(optimizer, [schedule, seg_schedule])
    networks = TrainedNetworks(unet, segmentation)
    names = [name for name, _ in networks.named_parameters()]
    networks, optimizer = accelerator.prepare(networks, optimizer)
    ema = EMAModel(networks.parameters(), decay=config.ema_decay, foreach=True)
    progress = Progress(accelerator.num_processes)
    accelerator.register_for_checkpointing(ema, lr_scheduler, progress)
    if resume_from is not None:
        accelerator.load_state(str(resume_from))
        ema.to(accelerator.device)
        logger.info("resumed from %s at step %d", resume_from, progress.step)
        if progress.processes != accelerator.num_processes and not config.allow_config_changes:
            raise ValueError(
                f"{resume_from} was written by {progress.processes} processes, here are {accelerator.num_processes}, "
                "so that a step would have another batch: launch as many, or give --allow_config_changes"
            )
        progress.processes = accelerator.num_processes
    if accelerator.is_main_process:
        store_run(config, folder, images, progress.step)
    known_files = tracker_files(folder)
    if config.report_to:
        settings = {name: str(value) for name, value in asdict(config).items()}
        # wandb alone would write into the working folder, pictures too.
        accelerator.init_trackers("diffusionad", settings, {"wandb": {"dir": str(output_dir)}})

    # The loader brings all pictures of an optimizer step at once.
    remaining = Subset(dataset, range(progress.step * samples_per_step, len(dataset)))
    loader = accelerator.prepare(
        DataLoader(
            remaining,
            config.train_batch_size * config.gradient_accumulation_steps,
            num_workers=config.dataloader_num_workers,
            drop_last=True,
            worker_init_fn=outlive_sigterm,
        )
    )

    def averaged_weights() -> dict[str, torch.Tensor]:
        """Both networks' weights, averaged."""
        weights = accelerator.get_state_dict(networks)
        return weights | dict(zip(names, ema.shadow_params)) if config.ema_decay > 0 else weights

    def pipeline_of(weights: dict[str, torch.Tensor]) -> DiffusionADPipeline:
        """A pipeline around copies of the weights, rounded to the precision that they are saved in."""
        copies = TrainedNetworks(
            DiffusionADUNet2DModel.from_config(unet.config), SegmentationUNet2DModel.from_config(segmentation.config)
        )
        copies.load_state_dict(weights)
        copies = copies.to(accelerator.device, DTYPES[config.save_dtype]).float().eval()
        size = config.resize_to or config.resolution
        return DiffusionADPipeline(copies.unet, copies.segmentation, scheduler, image_size=size)

    def log(step: int, entry: dict[str, float]) -> None:
        if not accelerator.is_main_process:
            return
        folder.append(LOG, json.dumps({"step": step} | entry) + "\n")
        accelerator.log(entry, step=step)

    def validate_and_save(step: int, weights: dict[str, torch.Tensor]) -> None:
        """Validate, and save the pipeline if it is the best so far; at the end save the last one too."""
        pipeline = pipeline_of(weights)
        result: Validation = validate(
            pipeline,
            validation,
            batch_size=config.train_batch_size,
            false_positive_rate=config.false_positive_rate,
        )
        score = (result.metrics["image_auroc"] + result.metrics["pixel_ap"]) / 2
        log(step, {f"validation_{name}": value for name, value in result.metrics.items()})
        logger.info("step %d, held-out pictures: %s", step, {k: round(v, 4) for k, v in result.metrics.items()})
        grid = validation_grid(pipeline, validation, result)
        folder.write(f"samples/step-{step:07d}.png", grid.save)
        for tracker in accelerator.trackers:
            if hasattr(tracker, "log_images"):
                # [1, H, W, 3], which tensorboard alone must be told.
                layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
                tracker.log_images({"held_out": np.asarray(grid)[None]}, step=step, **layout)
        record_trackers(folder, known_files)

        pipeline.register_to_config(image_threshold=result.image_threshold, pixel_threshold=result.pixel_threshold)
        pipeline.to(DTYPES[config.save_dtype])
        # A run that goes on from another folder's checkpoint has no pipeline yet.
        if score > progress.best_score or not (output_dir / INDEX).is_file():
            progress.best_score, progress.best_step, progress.best_metrics = score, step, result.metrics
            save_pipeline(pipeline, folder)
        if step == config.max_train_steps:
            save_pipeline(pipeline, folder, "last")

    def end_trackers() -> None:
        accelerator.end_training()  # they write what they hold
        if accelerator.is_main_process:
            record_trackers(folder, known_files)

    # 3. Train. Ctrl-C and SIGTERM end the step, save and leave.
    stop_signals: list[int] = []
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, lambda number, frame: stop_signals.append(number))
    bar = ProgressBar(
        config.max_train_steps, "training", "step", progress.step, shown=accelerator.is_main_process, kept=True
    )
    skipped_in_a_row, since, since_step = 0, time.perf_counter(), progress.step
    started = time.perf_counter() - progress.seconds
    for batch in loader:
        # Each pass counts its normal pictures by the mean count of all passes of this step on all processes, so that
        # accumulation and several processes give the gradient of one big batch.
        normal = torch.ones_like(batch["labels"]) if config.restore_anomalies else (batch["labels"] == 0).float()
        normal_count = accelerator.reduce(normal.sum(), "mean")
        normal_count = normal_count / config.gradient_accumulation_steps
        step_losses = torch.zeros(2, device=accelerator.device)  # noise and mask loss, means over the passes
        for start in range(0, len(batch["labels"]), config.train_batch_size):
            part = {key: value[start : start + config.train_batch_size] for key, value in batch.items()}
            with accelerator.accumulate(networks):
                with accelerator.autocast():
                    if teacher is not None:
                        losses = networks(
                            distillation_losses,
                            scheduler,
                            part["images"],
                            part["masks"],
                            part["noise"].transpose(0, 1),  # [2, B, 3, H, W]
                            teacher.unet,
                            teacher.scheduler,
                        )
                    else:
                        losses = networks(
                            training_losses,
                            scheduler,
                            part["images"],
                            part["masks"],
                            part["labels"],
                            part["noise"].transpose(0, 1),  # [2, B, 3, H, W]
                            part["timesteps"].T,  # [2, B]
                            normal_count=normal_count,
                            originals=part["originals"] if config.restore_anomalies else None,
                        )
                accelerator.backward(losses.loss)
            both = torch.stack([losses.noise_loss, losses.mask_loss]).detach()
            step_losses += both / config.gradient_accumulation_steps
        norm = accelerator.clip_grad_norm_(networks.parameters(), config.max_grad_norm or math.inf)
        if torch.isfinite(norm):
            optimizer.step()
            skipped_in_a_row = 0
        else:
            # With fp16 the scaler must hear of the overflow: it skips the step itself and lowers its scale.
            if accelerator.scaler is not None:
                optimizer.step()
            skipped_in_a_row += 1
            progress.skipped += 1
            logger.warning("step %d skipped: its loss or gradient is not finite", progress.step + 1)
        lr_scheduler.step()
        optimizer.zero_grad()
        progress.step += 1
        if skipped_in_a_row == 0 and config.ema_decay > 0:
            ema.step(networks.parameters())
        if skipped_in_a_row >= config.max_skipped_steps:
            raise ArithmeticError(
                f"{skipped_in_a_row} steps in a row had no finite gradient, the last at {progress.step}; checkpoints "
                "before are kept. Lower --learning_rate or use --mixed_precision bf16"
            )
        bar.update()

        step = progress.step
        if step % config.logging_steps == 0 or step == config.max_train_steps:
            noise_loss, mask_loss = accelerator.reduce(step_losses, "mean").tolist()
            now = time.perf_counter()
            seconds = (now - since) / (step - since_step)
            since, since_step = now, step
            speed = samples_per_step / seconds
            bar.update(0, noise=f"{noise_loss:.4f}", mask=f"{mask_loss:.4f}", images_per_second=f"{speed:.1f}")
            entry = {"noise_loss": noise_loss, "mask_loss": mask_loss, "gradient_norm": norm.item()}
            entry |= {"learning_rate": lr_scheduler.get_last_lr()[0], "skipped_steps": progress.skipped}
            log(step, entry | {"seconds_per_step": seconds, "images_per_second": speed})
        paused = time.perf_counter()
        if step % config.validation_steps == 0 or step == config.max_train_steps:
            if accelerator.is_main_process:
                validate_and_save(step, averaged_weights())
            accelerator.wait_for_everyone()
        stopping = accelerator.reduce(torch.tensor(len(stop_signals), device=accelerator.device)) > 0
        progress.seconds = time.perf_counter() - started
        if stopping or step % config.checkpointing_steps == 0 or step == config.max_train_steps:
            save_checkpoint(accelerator, folder, step, config.checkpoints_total_limit)
        since += time.perf_counter() - paused  # the speed is that of training alone
        if stopping:
            end_trackers()
            logger.info("stopped at step %d; go on with --resume_from_checkpoint latest", step)
            return 128 + (stop_signals or [signal.SIGTERM])[0]
    bar.close()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # nothing is lost from here on
    signal.signal(signal.SIGTERM, signal.SIG_DFL)

    # 4. The best weights are in place; their card and a plot of the run beside them
    if accelerator.is_main_process:
        on_gpu = accelerator.device.type == "cuda"
        hardware = torch.cuda.get_device_name() if on_gpu else f"{torch.get_num_threads()} CPU threads"
        write_model_card(
            output_dir,
            asdict(config),
            image_count=good_count,
            held_out_count=held_out_count,
            best_step=progress.best_step,
            hours=progress.seconds / 3600,
            hardware=f"{accelerator.num_processes} x {hardware}",
            validation=progress.best_metrics,
        )
        folder.write(LOSSES, partial(plot_losses, output_dir / LOG))
        logger.info("saved %s: the best of the validated weights, of step %d", output_dir, progress.best_step)
        if config.push_to_hub:
            repository = push_model(output_dir, config.hub_model_id or output_dir.resolve().name)
            logger.info("uploaded to %s", repository)
    end_trackers()
    return 0


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


if __name__ == "__main__":
    end_with_launcher()
    settings = parse_arguments(sys.argv[1:], __doc__)
    try:
        sys.exit(main(settings))
    except KeyboardInterrupt:  # before the first step or after the last; in between the loop sees it
        sys.exit(130)
    except Exception as error:
        if (sentence := explain(error)) is None:
            raise
        sys.exit(f"Error: {sentence}")
