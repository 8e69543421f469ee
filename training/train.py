"""Train DiffusionAD on pictures of good parts.

    accelerate launch training/train.py --train_data_dir my_good_pictures --output_dir runs/mine
    accelerate launch training/train.py --config training/configs/hazelnut.yaml --output_dir runs/hazelnut

One loop, top to bottom: read the pictures, build the networks, train, validate on good pictures that were held out,
calibrate both thresholds on them, and keep the best averaged weights as a pipeline that
`DiffusionADPipeline.from_pretrained` loads. Test pictures are never read. Everything random is a function of --seed, so
a run that was resumed ends like one that was not: bit for bit on a CPU, and on a GPU as far as its kernels repeat.
"""

import logging
import math
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers.training_utils import EMAModel
from torch import nn
from torch.utils.data import DataLoader, Subset

from diffusionad_pipe import DiffusionADPipeline, NormGuidedOneStepScheduler
from diffusionad_pipe.evaluation.calibration import validate
from diffusionad_pipe.files.output_folder import OutputFolder
from diffusionad_pipe.hub.model_card import write_model_card
from diffusionad_pipe.hub.push import push_model
from diffusionad_pipe.runtime.progress import ProgressBar
from diffusionad_pipe.training.config import TrainingConfig, parse_arguments
from diffusionad_pipe.training.launch import (
    StopSignals,
    end_with_launcher,
    explain,
    outlive_sigterm,
    start_accelerator,
)
from diffusionad_pipe.training.losses import distillation_losses, training_losses
from diffusionad_pipe.training.networks import DTYPES, TrainedNetworks, averaged_pipeline
from diffusionad_pipe.training.optimization import build_optimizer, build_schedules
from diffusionad_pipe.training.plots import plot_losses, validation_grid
from diffusionad_pipe.training.run_folder import (
    INDEX,
    LOSSES,
    empty_run,
    is_resumed,
    require_run_folder,
    require_same_images,
    save_checkpoint,
    save_pipeline,
    start_run,
    store_run,
)
from diffusionad_pipe.training.run_images import describe_images
from diffusionad_pipe.training.run_log import LOG, RunLog
from diffusionad_pipe.training.samples import (
    SampleInputs,
    held_out_samples,
    read_inputs,
    training_samples,
    warn_of_few_held_out,
)
from diffusionad_pipe.training.setup import build_networks, load_teacher, prepare_for_training, start_from_pretrained

logger = logging.getLogger("train")


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


def main(config: TrainingConfig) -> int:
    """A run in its folder; returns the exit code."""
    config, accelerator = start_accelerator(config)
    folder = OutputFolder(config.output_dir, "train", "--output_dir")
    if accelerator.is_main_process:
        require_run_folder(folder)
    with folder if accelerator.is_main_process else nullcontext():  # the first process has it for itself, and writes
        return train(config, accelerator, folder)


def train(config: TrainingConfig, accelerator: Accelerator, folder: OutputFolder) -> int:
    # 1. Networks from the seed, and pictures
    set_seed(config.seed)
    teacher = load_teacher(config.distill, config, accelerator.device) if config.distill else None
    unet, segmentation, scheduler = build_networks(config, teacher)
    if source := config.pretrained_model_name_or_path or config.distill:
        start_from_pretrained({"unet": unet, "segmentation": segmentation}, source)
    resume_from = start_run(config, accelerator, folder)
    # Mattes of a model are made once; the other processes find them in the folder.
    with accelerator.main_process_first() if config.foreground == "transformers" else nullcontext():
        inputs = read_inputs(config, folder)
    samples_per_step = config.train_batch_size * config.gradient_accumulation_steps * accelerator.num_processes
    # Workers are on the CPU.
    device = accelerator.device if config.dataloader_num_workers == 0 else torch.device("cpu")
    dataset = training_samples(config, inputs, config.max_train_steps * samples_per_step, device)
    held_out = held_out_samples(config, inputs, device)
    images = describe_images(config, inputs.images, inputs.is_held_out, teacher)
    if resume_from is not None:
        require_same_images(config, resume_from.parent, images)
    if accelerator.is_main_process and not is_resumed(folder, resume_from):
        empty_run(folder)
    warn_of_few_held_out(config, inputs.held_out_count)

    # 2. Optimizer, schedules, the average of the weights, and what a checkpoint says of them
    prepare_for_training(config, unet, segmentation, accelerator.device)
    optimizer = build_optimizer(config, unet, segmentation)
    lr_scheduler = build_schedules(config, optimizer)
    plain_networks = TrainedNetworks(unet, segmentation)
    networks, optimizer = accelerator.prepare(plain_networks, optimizer)
    ema = EMAModel(networks.parameters(), decay=config.ema_decay, foreach=True)
    progress = Progress(accelerator.num_processes)
    accelerator.register_for_checkpointing(ema, lr_scheduler, progress)
    if resume_from is not None:
        resume(config, accelerator, resume_from, ema, progress)
    if accelerator.is_main_process:
        store_run(config, folder, images, progress.step)
    log = RunLog(config, accelerator, folder)
    loader = accelerator.prepare(  # which brings all pictures of an optimizer step at once
        DataLoader(
            Subset(dataset, range(progress.step * samples_per_step, len(dataset))),
            config.train_batch_size * config.gradient_accumulation_steps,
            num_workers=config.dataloader_num_workers,
            drop_last=True,
            worker_init_fn=outlive_sigterm,
        )
    )

    # 3. Train. Ctrl-C and SIGTERM end the step, save and leave.
    stop = StopSignals()
    steps, is_shown = config.max_train_steps, accelerator.is_main_process
    bar = ProgressBar(steps, "training", "step", progress.step, shown=is_shown, kept=True)
    skipped_in_a_row, since, since_step = 0, time.perf_counter(), progress.step
    started = time.perf_counter() - progress.seconds
    for batch in loader:
        losses = add_gradients(config, accelerator, networks, scheduler, teacher, batch)
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
        progress.step = step = progress.step + 1
        if skipped_in_a_row == 0 and config.ema_decay > 0:
            ema.step(networks.parameters())
        if skipped_in_a_row >= config.max_skipped_steps:
            raise ArithmeticError(
                f"{skipped_in_a_row} steps in a row had no finite gradient, the last at {step}; checkpoints before are "
                "kept. Lower --learning_rate or use --mixed_precision bf16"
            )
        bar.update()

        if step % config.logging_steps == 0 or step == steps:
            noise_loss, mask_loss = accelerator.reduce(losses, "mean").tolist()
            now = time.perf_counter()
            seconds = (now - since) / (step - since_step)
            since, since_step = now, step
            speed = samples_per_step / seconds
            bar.update(0, noise=f"{noise_loss:.4f}", mask=f"{mask_loss:.4f}", images_per_second=f"{speed:.1f}")
            entry = {"noise_loss": noise_loss, "mask_loss": mask_loss, "gradient_norm": norm.item()}
            entry |= {"learning_rate": lr_scheduler.get_last_lr()[0], "skipped_steps": progress.skipped}
            log.write(step, entry | {"seconds_per_step": seconds, "images_per_second": speed})
        paused = time.perf_counter()
        if step % config.validation_steps == 0 or step == steps:
            if accelerator.is_main_process:
                pipeline = averaged_pipeline(config, plain_networks, ema, scheduler)
                validate_and_save(config, pipeline, held_out, folder, log, progress)
            accelerator.wait_for_everyone()
        stopping = accelerator.reduce(torch.tensor(stop.count, device=accelerator.device)) > 0
        progress.seconds = time.perf_counter() - started
        if stopping or step % config.checkpointing_steps == 0 or step == steps:
            save_checkpoint(accelerator, folder, step, config.checkpoints_total_limit)
        since += time.perf_counter() - paused  # the speed is that of training alone
        if stopping:
            log.end()
            logger.info("stopped at step %d; go on with --resume_from_checkpoint latest", step)
            return stop.exit_code
    bar.close()
    stop.restore()  # nothing is lost from here on

    # 4. The best weights are in place; their card and a plot of the run beside them
    if accelerator.is_main_process:
        document(config, accelerator, folder, inputs, progress)
    log.end()
    return 0


def resume(
    config: TrainingConfig, accelerator: Accelerator, checkpoint: Path, ema: EMAModel, progress: Progress
) -> None:
    """Load all that was registered for checkpoints, and the networks and their optimizer."""
    accelerator.load_state(str(checkpoint))
    ema.to(accelerator.device)
    logger.info("resumed from %s at step %d", checkpoint, progress.step)
    if progress.processes != accelerator.num_processes and not config.allow_config_changes:
        raise ValueError(
            f"{checkpoint} was written by {progress.processes} processes, here are {accelerator.num_processes}, "
            "so that a step would have another batch: launch as many, or give --allow_config_changes"
        )
    progress.processes = accelerator.num_processes


def add_gradients(
    config: TrainingConfig,
    accelerator: Accelerator,
    networks: nn.Module,
    scheduler: NormGuidedOneStepScheduler,
    teacher: DiffusionADPipeline | None,
    batch: dict[str, torch.Tensor],
) -> torch.Tensor:
    """Forward and backward passes of one optimizer step.

    Args:
        config: the settings.
        accelerator: of this process.
        networks: [`TrainedNetworks`], as accelerate has wrapped them.
        scheduler: says what the UNet predicts.
        teacher: of a student.
        batch: samples of all passes, see [`SyntheticAnomalyDataset`].

    Returns:
        Noise loss and mask loss `[2]`, means over the passes.
    """
    # Each pass counts its normal pictures by the mean count of all passes of this step on all processes, so that
    # accumulation and several processes give the gradient of one big batch.
    normal = torch.ones_like(batch["labels"]) if config.restore_anomalies else (batch["labels"] == 0).float()
    normal_count = accelerator.reduce(normal.sum(), "mean") / config.gradient_accumulation_steps
    step_losses = torch.zeros(2, device=accelerator.device)
    for start in range(0, len(batch["labels"]), config.train_batch_size):
        part = {key: value[start : start + config.train_batch_size] for key, value in batch.items()}
        noise = part["noise"].transpose(0, 1)  # [2, B, 3, H, W]
        with accelerator.accumulate(networks):
            with accelerator.autocast():
                if teacher is not None:
                    losses = networks(
                        distillation_losses,
                        scheduler,
                        part["images"],
                        part["masks"],
                        noise,
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
                        noise,
                        part["timesteps"].T,  # [2, B]
                        normal_count=normal_count,
                        originals=part["originals"] if config.restore_anomalies else None,
                    )
            accelerator.backward(losses.loss)
        both = torch.stack([losses.noise_loss, losses.mask_loss]).detach()
        step_losses += both / config.gradient_accumulation_steps
    return step_losses


def validate_and_save(
    config: TrainingConfig,
    pipeline: DiffusionADPipeline,
    held_out: Sequence[dict[str, torch.Tensor]],
    folder: OutputFolder,
    log: RunLog,
    progress: Progress,
) -> None:
    """Validate, and save the pipeline if it is the best so far; at the end save the last one too."""
    step = progress.step
    result = validate(
        pipeline, held_out, batch_size=config.train_batch_size, false_positive_rate=config.false_positive_rate
    )
    score = (result.metrics["image_auroc"] + result.metrics["pixel_ap"]) / 2
    log.write(step, {f"validation_{name}": value for name, value in result.metrics.items()})
    logger.info("step %d, held-out pictures: %s", step, {k: round(v, 4) for k, v in result.metrics.items()})
    log.write_grid(step, validation_grid(pipeline, held_out, result))

    pipeline.register_to_config(image_threshold=result.image_threshold, pixel_threshold=result.pixel_threshold)
    pipeline.to(DTYPES[config.save_dtype])
    # A run that goes on from another folder's checkpoint has no pipeline yet.
    if score > progress.best_score or not (folder.path / INDEX).is_file():
        progress.best_score, progress.best_step, progress.best_metrics = score, step, result.metrics
        save_pipeline(pipeline, folder)
    if step == config.max_train_steps:
        save_pipeline(pipeline, folder, "last")


def document(
    config: TrainingConfig, accelerator: Accelerator, folder: OutputFolder, inputs: SampleInputs, progress: Progress
) -> None:
    """Write the model card and the plot of a finished run, and publish it if that is wanted."""
    on_gpu = accelerator.device.type == "cuda"
    hardware = torch.cuda.get_device_name() if on_gpu else f"{torch.get_num_threads()} CPU threads"
    write_model_card(
        folder.path,
        asdict(config),
        image_count=len(inputs.is_held_out),
        held_out_count=inputs.held_out_count,
        best_step=progress.best_step,
        hours=progress.seconds / 3600,
        hardware=f"{accelerator.num_processes} x {hardware}",
        validation=progress.best_metrics,
    )
    folder.write(LOSSES, partial(plot_losses, folder.path / LOG))
    logger.info("saved %s: the best of the validated weights, of step %d", folder.path, progress.best_step)
    if config.push_to_hub:
        repository = push_model(folder.path, config.hub_model_id or folder.path.resolve().name)
        logger.info("uploaded to %s", repository)


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
