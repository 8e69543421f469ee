"""Train DiffusionAD on pictures of good parts.

    accelerate launch training/train.py --config training/configs/hazelnut.yaml --output_dir runs/hazelnut

One loop, top to bottom: read the pictures, build the networks, train, validate on good pictures that were held out,
calibrate both thresholds on them, and save a pipeline that `DiffusionADPipeline.from_pretrained` loads. Test
pictures are never read. Everything random is a function of --seed, so a run that was resumed ends like one that
was not.
"""

import argparse
import dataclasses
import difflib
import json
import logging
import math
import os
import shutil
import signal
import sys
import time
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch.utils.data import DataLoader, Subset
from tqdm.auto import tqdm

from diffusionad_pipe import (
    DiffusionADImageProcessor,
    DiffusionADPipeline,
    DiffusionADUNet2DModel,
    ImageFileError,
    NormGuidedOneStepScheduler,
    SegmentationUNet2DModel,
    open_image,
)
from diffusionad_pipe.data import load_anomaly_dataset
from diffusionad_pipe.foreground import FOREGROUND_PROVIDERS
from diffusionad_pipe.image_files import find_images, write_atomically
from diffusionad_pipe.metrics import evaluate_maps, f1_max
from diffusionad_pipe.model_card import write_model_card
from diffusionad_pipe.objective import training_losses
from diffusionad_pipe.synthetic_dataset import SyntheticAnomalyDataset
from diffusionad_pipe.unet_2d_diffusionad import ATTENTION_SIZES

logger = logging.getLogger("train")

SHIPPED_TEXTURES = Path(sys.modules["diffusionad_pipe"].__file__ or "").parent / "textures"


@dataclass
class TrainingConfig:
    """Every setting; each is a key of the YAML file and a flag, and the flag wins."""

    # Data
    train_data_dir: str = ""  # folder of good pictures, or of one category (train/good)
    category: str | None = None  # sub-folder, where the folder holds several
    output_dir: str = "runs/diffusionad"  # where the pipeline, checkpoints and logs go
    resolution: int = 256  # side in pixels that the networks see
    horizontal_flip: bool = False  # flip half of the pictures left to right
    vertical_flip: bool = False  # flip half of the pictures upside down
    validation_fraction: float = 0.15  # share of the good pictures held out
    validation_repeats: int = 4  # good and anomalous validation samples made of each

    # Synthetic anomalies
    texture_dir: str | None = None  # textures; default: the shipped CC0 ones; "none": self-augmentation only
    foreground: str = "threshold"  # where anomalies may be: none, random (textures), threshold (objects)
    anomaly_probability: float = 0.5  # share of anomalous draws
    texture_probability: float = 0.5  # share of anomalies that are textures: 0.5 for objects, 1 for textures

    # Networks and noise. The paper: epsilon, patch 1, (128, 128, 256, 256, 512, 512), 64, batch
    prediction_type: str = "sample"  # what the UNet predicts: epsilon, sample or v_prediction
    patch_size: int = 4  # side of the patches that become channels
    block_out_channels: tuple[int, ...] = (64, 128, 192)  # width of each level of the UNet
    num_attention_heads: int = 4
    segmentation_channels: int = 16  # width of the segmentation network
    segmentation_norm: str = "group"  # batch or group
    small_timestep: int = 200  # noise scales at inference
    large_timestep: int = 400
    guidance_scale: float = 1.0
    timestep_boundary: int = 300  # training: small scale below, large scale from here on
    timestep_maximum: int = 1000  # training: end of the large scale

    # Optimisation
    train_batch_size: int = 8  # pictures a step and process
    gradient_accumulation_steps: int = 1
    max_train_steps: int = 1000  # optimizer steps
    learning_rate: float = 4e-4  # of the UNet
    segmentation_learning_rate: float = 4e-4
    lr_scheduler: str = "cosine"  # of diffusers.optimization: cosine, constant_with_warmup, linear, ...
    lr_warmup_steps: int = 50
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0  # 0: no clipping
    ema_decay: float = 0.995  # of the averaged weights that are saved; 0: no average
    mixed_precision: str = "bf16"  # no, fp16 or bf16
    gradient_checkpointing: bool = False  # less memory, more time

    # Bookkeeping
    seed: int = 0
    logging_steps: int = 10
    validation_steps: int = 100  # also a picture grid in samples/
    checkpointing_steps: int = 100
    checkpoints_total_limit: int = 2
    resume_from_checkpoint: str | None = None  # a checkpoint folder, or "latest"
    overwrite: bool = False  # throw away what output_dir holds
    dataloader_num_workers: int = 0
    save_dtype: str = "fp16"  # of the saved weights: fp32, fp16 or bf16
    report_to: str | None = None  # tensorboard or wandb, beside log.jsonl

    # For the model card
    dataset_title: str | None = None  # what the pictures are; default: the name of their folder
    licence: str | None = None  # of the weights, as the Hub names it: apache-2.0, cc-by-4.0, ...
    licence_note: str | None = None  # a sentence on it, with the attribution that the pictures ask for


def parse_arguments(arguments: list[str] | None = None) -> TrainingConfig:
    """Defaults, then the YAML file of --config, then flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, help="YAML file with any of the settings below")
    comments = {
        line.split(":")[0].strip(): line.partition("#")[2].strip()
        for line in Path(__file__).read_text(encoding="utf-8").splitlines()
        if ":" in line and "=" in line
    }
    fields = {field.name: field for field in dataclasses.fields(TrainingConfig)}
    kinds = typing.get_type_hints(TrainingConfig)
    for name, field in fields.items():
        kind = kinds[name]
        if isinstance(kind, types.UnionType):
            kind = typing.get_args(kind)[0]
        options: dict[str, typing.Any] = {"help": f"{comments.get(name, '')} (default: {field.default})".strip()}
        if kind is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif typing.get_origin(kind) is tuple:
            options |= {"type": int, "nargs": "+"}
        else:
            options["type"] = kind
        parser.add_argument(f"--{name}", default=None, **options)
    flags = vars(parser.parse_args(arguments))

    config_file = flags.pop("config")
    try:
        settings = yaml.safe_load(config_file.read_text(encoding="utf-8")) or {} if config_file else {}
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        parser.error(f"--config {config_file} cannot be read: {error}")
    for name in settings:
        if name not in fields:
            near = difflib.get_close_matches(name, fields, n=1)
            parser.error(f"{config_file}: unknown setting {name!r}" + (f", did you mean {near[0]!r}?" if near else ""))
    settings |= {name: value for name, value in flags.items() if value is not None}
    for name in settings:
        kind = kinds[name]
        if typing.get_origin(kind) is tuple:
            settings[name] = tuple(settings[name])
        elif kind is float and isinstance(settings[name], (int, str)):
            settings[name] = float(settings[name])  # YAML reads 1e-4 as a string
    config = TrainingConfig(**settings)
    if config.foreground not in FOREGROUND_PROVIDERS:
        parser.error(f"--foreground must be one of {', '.join(FOREGROUND_PROVIDERS)}, not {config.foreground!r}")
    if not config.train_data_dir:
        parser.error("--train_data_dir is needed: the folder with pictures of good parts")
    return config


def read_pictures(paths: Sequence[str | Path], resolution: int, what: str) -> torch.Tensor:
    """Decode pictures once, `[N, 3, H, W]` uint8. Unreadable ones are listed and left out."""
    processor = DiffusionADImageProcessor()
    pictures, failures = [], []
    for path in tqdm(paths, desc=f"reading {what}", unit="picture", leave=False):
        try:
            picture, _ = processor.preprocess(open_image(path), resolution, resolution)
            pictures.append((picture[0] * 255).round().byte())
        except ImageFileError as error:
            failures.append(str(error))
        except ValueError as error:
            failures.append(f"{path}: {error}")
    for failure in failures:
        logger.warning("left out: %s", failure)
    if not pictures:
        sys.exit(f"none of the {len(paths)} {what} could be read")
    return torch.stack(pictures)


def build_networks(
    config: TrainingConfig,
) -> tuple[DiffusionADUNet2DModel, SegmentationUNet2DModel, NormGuidedOneStepScheduler]:
    """The pipeline's three components as the configuration describes them."""
    levels = range(len(config.block_out_channels))
    try:
        unet = DiffusionADUNet2DModel(
            sample_size=config.resolution,
            patch_size=config.patch_size,
            block_out_channels=config.block_out_channels,
            attention=tuple(config.resolution // config.patch_size // 2**level in ATTENTION_SIZES for level in levels),
            num_attention_heads=config.num_attention_heads,
        )
        segmentation = SegmentationUNet2DModel(
            base_channels=config.segmentation_channels, norm_type=config.segmentation_norm
        )
        scheduler = NormGuidedOneStepScheduler(
            prediction_type=config.prediction_type,
            small_timestep=config.small_timestep,
            large_timestep=config.large_timestep,
            guidance_scale=config.guidance_scale,
        )
    except ValueError as error:
        sys.exit(str(error))
    divisor = math.lcm(unet.size_divisor, segmentation.size_divisor)
    if config.resolution % divisor:
        sys.exit(f"--resolution {config.resolution} must be a multiple of {divisor} for these networks")
    return unet, segmentation, scheduler


def latest_checkpoint(output_dir: Path) -> Path | None:
    checkpoints = sorted(output_dir.glob("checkpoint-*"))
    return checkpoints[-1] if checkpoints else None


def save_checkpoint(accelerator: Accelerator, config: TrainingConfig, step: int) -> None:
    """Write the whole state beside its final name and rename it, so that a kill never leaves half a checkpoint."""
    output_dir = Path(config.output_dir)
    temporary, final = output_dir / ".checkpoint-writing", output_dir / f"checkpoint-{step:07d}"
    if accelerator.is_main_process:
        shutil.rmtree(temporary, ignore_errors=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(temporary))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process and not final.exists():
        os.replace(temporary, final)
        for old in sorted(output_dir.glob("checkpoint-*"))[: -config.checkpoints_total_limit]:
            shutil.rmtree(old)


def validate(
    pipeline: DiffusionADPipeline, validation: list[dict[str, torch.Tensor]], batch_size: int
) -> tuple[dict[str, float], dict[str, float], torch.Tensor, torch.Tensor]:
    """Metrics and F1-optimal thresholds on held-out good pictures, half of them with synthetic anomalies."""
    images = torch.stack([sample["images"] for sample in validation])
    masks = torch.stack([sample["masks"] for sample in validation])[:, 0].numpy() >= 0.5
    pipeline.set_progress_bar_config(disable=True)
    output = pipeline(images, output_type="pt", batch_size=batch_size)
    maps, scores = output.anomaly_maps[:, 0].numpy(), output.anomaly_scores.numpy()
    labels = torch.stack([sample["labels"] for sample in validation]).numpy()
    metrics = evaluate_maps(list(maps), list(masks), scores, labels)
    thresholds = {
        "image_threshold": f1_max(labels, scores)[1],
        "pixel_threshold": f1_max(masks.ravel(), maps.ravel())[1],
    }
    return metrics, thresholds, output.anomaly_maps, output.reconstructions


def save_grid(path: Path, images: torch.Tensor, reconstructions: torch.Tensor, maps: torch.Tensor) -> None:
    """Rows: pictures, reconstructions, anomaly maps; at most eight columns, evenly chosen."""
    columns = torch.linspace(0, len(images) - 1, min(8, len(images))).long()
    rows = [images[columns], reconstructions[columns], maps[columns].expand(-1, 3, -1, -1)]
    grid = torch.cat([torch.cat(list(row), dim=2) for row in rows], dim=1)[None]  # [1, 3, 3 * H, 8 * W]
    picture = DiffusionADImageProcessor().postprocess(grid, "pil")[0]
    path.parent.mkdir(exist_ok=True)
    write_atomically(path, picture.save)


def main(config: TrainingConfig) -> int:
    accelerator = Accelerator(
        mixed_precision=config.mixed_precision,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        log_with=config.report_to,
        project_dir=config.output_dir,
    )
    logging.basicConfig(
        format="%(asctime)s %(message)s",
        level=logging.INFO if accelerator.is_main_process else logging.ERROR,
        force=True,
    )
    output_dir = Path(config.output_dir)
    resume_from = None
    if config.resume_from_checkpoint:
        latest = config.resume_from_checkpoint == "latest"
        resume_from = latest_checkpoint(output_dir) if latest else Path(config.resume_from_checkpoint)
        if resume_from is None or not resume_from.is_dir():
            sys.exit(f"there is no checkpoint to resume from: {resume_from or output_dir}")
    elif accelerator.is_main_process and output_dir.is_dir() and any(output_dir.iterdir()):
        if not config.overwrite:
            sys.exit(f"{output_dir} is not empty: use --resume_from_checkpoint latest, --overwrite, or another folder")
        shutil.rmtree(output_dir)
    if accelerator.is_main_process:
        output_dir.mkdir(parents=True, exist_ok=True)
        settings = yaml.safe_dump(json.loads(json.dumps(dataclasses.asdict(config))), sort_keys=False)
        write_atomically(output_dir / "training_config.yaml", lambda path: path.write_text(settings, encoding="utf-8"))
    accelerator.wait_for_everyone()

    # 1. Pictures. Every k-th good picture, in the order of their names, is held out for validation.
    try:
        paths = load_anomaly_dataset(config.train_data_dir, category=config.category)["train"]["path"]
        no_textures = config.texture_dir == "none"
        texture_paths = [] if no_textures else find_images([config.texture_dir or SHIPPED_TEXTURES])
    except ValueError as error:
        sys.exit(str(error))
    pictures = read_pictures(paths, config.resolution, "good pictures")
    textures = list(read_pictures(texture_paths, config.resolution, "textures")) if texture_paths else []
    if len(pictures) < 2:
        sys.exit(f"{config.train_data_dir} has one readable picture: training needs some, and some to hold out")
    held_out_count = min(max(1, round(config.validation_fraction * len(pictures))), len(pictures) - 1)
    is_held_out = torch.zeros(len(pictures), dtype=torch.bool)
    is_held_out[torch.linspace(0, len(pictures) - 1, held_out_count + 2)[1:-1].round().long()] = True

    synthesis: dict[str, typing.Any] = {
        "textures": textures,
        "foreground": config.foreground,
        "texture_probability": config.texture_probability,
        "horizontal_flip": config.horizontal_flip,
        "vertical_flip": config.vertical_flip,
        "timestep_boundary": config.timestep_boundary,
        "timestep_maximum": config.timestep_maximum,
    }
    draws_per_step = config.train_batch_size * config.gradient_accumulation_steps * accelerator.num_processes
    dataset = SyntheticAnomalyDataset(
        pictures[~is_held_out],
        length=config.max_train_steps * draws_per_step,
        seed=config.seed,
        anomaly_probability=config.anomaly_probability,
        **synthesis,
    )
    validation = [
        sample
        for probability in (0.0, 1.0)
        for sample in SyntheticAnomalyDataset(
            pictures[is_held_out],
            length=held_out_count * config.validation_repeats,
            seed=config.seed + 1,
            anomaly_probability=probability,
            **synthesis,
        )
        if sample["labels"] == probability
    ]
    logger.info(
        "%d good pictures to train on, %d held out, %d textures",
        int((~is_held_out).sum()),
        held_out_count,
        len(textures),
    )

    # 2. Networks, started from the seed
    set_seed(config.seed)
    unet, segmentation, scheduler = build_networks(config)
    unet.train()
    segmentation.train()
    if config.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
        segmentation.enable_gradient_checkpointing()
    ema = EMAModel([*unet.parameters(), *segmentation.parameters()], decay=config.ema_decay, foreach=True)
    ema.to(accelerator.device)

    # 3. Optimizer: one, with a learning rate for each network
    optimizer = torch.optim.AdamW(
        [
            {"params": list(unet.parameters()), "lr": config.learning_rate},
            {"params": list(segmentation.parameters()), "lr": config.segmentation_learning_rate},
        ],
        weight_decay=config.weight_decay,
        fused=True,
    )
    processes = accelerator.num_processes  # accelerate steps the schedule once for each process
    lr_scheduler = get_scheduler(
        config.lr_scheduler,
        optimizer,
        num_warmup_steps=config.lr_warmup_steps * processes,
        num_training_steps=config.max_train_steps * processes,
    )
    unet, segmentation, optimizer, lr_scheduler = accelerator.prepare(unet, segmentation, optimizer, lr_scheduler)
    accelerator.register_for_checkpointing(ema)
    if config.report_to:
        accelerator.init_trackers("diffusionad", config={k: str(v) for k, v in dataclasses.asdict(config).items()})

    first_step = 0
    if resume_from is not None:
        accelerator.load_state(str(resume_from))
        first_step = int(resume_from.name.rsplit("-", 1)[1])
        logger.info("resumed from %s at step %d", resume_from, first_step)
    remaining = Subset(dataset, range(first_step * draws_per_step, len(dataset)))
    loader = accelerator.prepare(
        DataLoader(remaining, config.train_batch_size, num_workers=config.dataloader_num_workers, drop_last=True)
    )

    def averaged_pipeline() -> DiffusionADPipeline:
        """A pipeline around copies of the averaged weights, in eval mode and float32."""
        networks = [accelerator.unwrap_model(unet), accelerator.unwrap_model(segmentation)]
        copies = [type(n).from_config(n.config) for n in networks]
        for copy, network in zip(copies, networks):
            copy.load_state_dict(network.state_dict())
        if config.ema_decay > 0:
            ema.copy_to([parameter for copy in copies for parameter in copy.parameters()])
        copies = [copy.to(accelerator.device).eval() for copy in copies]
        return DiffusionADPipeline(copies[0], copies[1], scheduler, image_size=config.resolution)

    def log(entry: dict[str, float]) -> None:
        if accelerator.is_main_process:
            with open(output_dir / "log.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")
            accelerator.log({k: v for k, v in entry.items() if k != "step"}, step=int(entry["step"]))

    def validate_and_log(step: int, pipeline: DiffusionADPipeline) -> dict[str, float]:
        metrics, thresholds, maps, reconstructions = validate(pipeline, validation, config.train_batch_size)
        log({"step": step} | {f"validation_{name}": value for name, value in metrics.items()})
        logger.info("step %d, held-out pictures: %s", step, {k: round(v, 4) for k, v in metrics.items()})
        images = torch.stack([sample["images"] for sample in validation])
        save_grid(output_dir / "samples" / f"step-{step:07d}.png", images, reconstructions, maps)
        return thresholds

    # 4. Train. Ctrl-C and SIGTERM end the step, save and leave.
    stop_signals: list[int] = []
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, lambda number, frame: stop_signals.append(number))
    progress = tqdm(
        total=config.max_train_steps, initial=first_step, unit="step", disable=not accelerator.is_local_main_process
    )
    parameters = [*unet.parameters(), *segmentation.parameters()]
    step, since = first_step, time.perf_counter()
    for batch in loader:
        with accelerator.accumulate(unet, segmentation):
            with accelerator.autocast():
                losses = training_losses(
                    unet,
                    segmentation,
                    scheduler,
                    batch["images"],
                    batch["masks"],
                    batch["labels"],
                    batch["noise"].transpose(0, 1),  # [2, B, 3, H, W]
                    batch["timesteps"].T,  # [2, B]
                )
            accelerator.backward(losses.loss)
            if accelerator.sync_gradients and config.max_grad_norm > 0:
                accelerator.clip_grad_norm_(parameters, config.max_grad_norm)
            optimizer.step()
            lr_scheduler.step()
            optimizer.zero_grad()
        if not accelerator.sync_gradients:
            continue
        step += 1
        ema.step(parameters)
        progress.update()

        if step % config.logging_steps == 0 or step == config.max_train_steps:
            now = time.perf_counter()
            noise_loss, mask_loss = losses.noise_loss.item(), losses.mask_loss.item()
            if not torch.isfinite(losses.loss):
                sys.exit(f"the loss is not finite at step {step}: lower --learning_rate or use --mixed_precision bf16")
            progress.set_postfix(noise=f"{noise_loss:.4f}", mask=f"{mask_loss:.4f}")
            log(
                {
                    "step": step,
                    "noise_loss": noise_loss,
                    "mask_loss": mask_loss,
                    "learning_rate": lr_scheduler.get_last_lr()[0],
                    "seconds_per_step": (now - since) / config.logging_steps,
                }
            )
            since = now
        if step % config.validation_steps == 0 and accelerator.is_main_process:
            validate_and_log(step, averaged_pipeline())
        if stop_signals or step % config.checkpointing_steps == 0 or step == config.max_train_steps:
            save_checkpoint(accelerator, config, step)
        if stop_signals:
            logger.info("stopped at step %d; go on with --resume_from_checkpoint latest", step)
            return 128 + stop_signals[0]
    progress.close()

    # 5. Round to the saved precision first: the thresholds must fit the weights that people will load.
    if accelerator.is_main_process:
        dtype = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[config.save_dtype]
        pipeline = averaged_pipeline().to(dtype).to(torch.float32)
        thresholds = validate_and_log(step, pipeline)
        pipeline.register_to_config(**thresholds)
        pipeline.to(dtype).save_pretrained(output_dir)
        write_model_card(output_dir, dataclasses.asdict(config), len(pictures), held_out_count)
        logger.info("saved %s, thresholds %s", output_dir, {k: round(v, 4) for k, v in thresholds.items()})
    accelerator.end_training()
    return 0


if __name__ == "__main__":
    sys.exit(main(parse_arguments()))
