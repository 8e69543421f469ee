"""What a training configuration asks for: the networks, with weights to start from, and the data."""

import logging
import math
from typing import Any

import torch
from accelerate.utils import parse_flag_from_env

from .. import (
    DiffusionADPipeline,
    DiffusionADUNet2DModel,
    NormGuidedOneStepScheduler,
    SegmentationUNet2DModel,
)
from ..evaluation.calibration import split_held_out
from ..files.output_folder import OutputFolder
from ..runtime.acceleration import fastest_dtype
from ..unet_2d_diffusionad import ATTENTION_SIZES
from .config import TrainingConfig
from .dataset import SyntheticAnomalyDataset, validation_samples
from .images import foreground_mattes, read_good_images, read_textures
from .run_images import describe_images

logger = logging.getLogger("train")


def build_networks(
    config: TrainingConfig, teacher: DiffusionADPipeline | None = None
) -> tuple[DiffusionADUNet2DModel, SegmentationUNet2DModel, NormGuidedOneStepScheduler]:
    """The pipeline's three components as the configuration describes them; noise scales and guidance are a teacher's
    where there is one."""
    sides = [config.resolution // config.patch_size // 2**level for level in range(len(config.block_out_channels))]
    unet = DiffusionADUNet2DModel(
        sample_size=config.resolution,
        patch_size=config.patch_size,
        block_out_channels=config.block_out_channels,
        attention=tuple(min(ATTENTION_SIZES) <= side <= config.attention_size for side in sides),
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
    divisor = math.lcm(unet.size_divisor, segmentation.size_divisor)
    if teacher is not None:
        scheduler = NormGuidedOneStepScheduler.from_config(
            teacher.scheduler.config, prediction_type=config.prediction_type, distilled=True
        )
        divisor = math.lcm(divisor, teacher.unet.size_divisor)
    for name, side in (("resolution", config.resolution), ("resize_to", config.resize_to or config.resolution)):
        if side % divisor or side < config.resolution:
            raise ValueError(f"--{name} {side} must be a multiple of {divisor} for these networks, and no crop larger")
    return unet, segmentation, scheduler


def start_from_pretrained(networks: dict[str, torch.nn.Module], source: str) -> None:
    """Take over the weights of a saved pipeline that have the same name and shape; the others stay as they are."""
    pretrained = DiffusionADPipeline.from_pretrained(source).components
    for name, network in networks.items():
        state, found = network.state_dict(), pretrained[name].state_dict()
        fitting = {key: value for key, value in found.items() if key in state and value.shape == state[key].shape}
        network.load_state_dict(state | fitting)
        logger.info("%s: %d of %d weights start from %s", name, len(fitting), len(state), source)


def fastest_precision() -> str:
    """What --mixed_precision auto stands for here: "bf16" or "no". A CPU without instructions for bfloat16 emulates it,
    and a step of 3 s took 80."""
    on_gpu = torch.cuda.is_available() and not parse_flag_from_env("ACCELERATE_USE_CPU")
    return "bf16" if fastest_dtype("cuda" if on_gpu else "cpu") == torch.bfloat16 else "no"


def load_teacher(source: str, config: TrainingConfig, device: torch.device) -> DiffusionADPipeline:
    """The pipeline of --distill, its UNet in bfloat16 where the run is.

    Raises:
        ValueError: when it is distilled itself and has no two scales to teach, when it works at another size, or when
            it cannot be loaded.
    """
    # Weights in float16 might overflow; under autocast those in float32 are as fast.
    dtype = torch.bfloat16 if config.mixed_precision == "bf16" else torch.float32
    teacher = DiffusionADPipeline.from_pretrained(source, dtype=dtype)
    if teacher.scheduler.config.distilled:
        raise ValueError(f"--distill {source} is distilled itself: give the model that it was distilled from")
    size = config.resize_to or config.resolution
    if teacher.config.image_size != size:
        raise ValueError(
            f"--distill {source} works at {teacher.config.image_size} pixels and this run at {size}: it would "
            f"teach what it has not learned; use --resolution {teacher.config.image_size}"
        )
    teacher.unet.to(device)
    return teacher


def build_datasets(
    config: TrainingConfig,
    draws: int,
    device: torch.device,
    folder: OutputFolder,
    teacher: DiffusionADPipeline | None = None,
) -> tuple[SyntheticAnomalyDataset, list[dict[str, torch.Tensor]], dict[str, Any]]:
    """Training draws, validation samples, and what [`describe_images`] says of the pictures.

    Args:
        config: the settings.
        draws: how many there are.
        device: that they are made on.
        folder: of the run, where mattes are cached.
        teacher: of a student.
    """
    side = config.resize_to or config.resolution
    images = read_good_images(
        config.train_data_dir,
        side,
        category=config.category,
        dataset_name=config.dataset_name,
        image_column=config.image_column,
        streaming=config.streaming,
        max_unreadable=config.max_unreadable,
        max_pixels=config.max_pixels,
    )
    is_held_out = split_held_out(len(images.names), config.validation_fraction)
    mattes = foreground_mattes(
        config.foreground,
        images,
        folder=config.foreground_dir,
        model=config.foreground_model,
        cache=folder,
        max_pixels=config.max_pixels,
    )

    def sources(chosen: torch.Tensor, sample_side: int) -> dict[str, Any]:
        """What both kinds of draws are made from: chosen pictures, textures of the draws' size, shares."""
        limits: dict[str, Any] = {"max_unreadable": config.max_unreadable, "max_pixels": config.max_pixels}
        textures = read_textures(config.texture_dir, sample_side, **limits)
        return {
            "images": images.pixels[chosen].to(device),
            "textures": None if textures is None else textures.to(device),
            "foregrounds": mattes[chosen].to(device) if isinstance(mattes, torch.Tensor) else mattes,
            "texture_probability": config.texture_probability,
            "procedural_probability": config.procedural_probability,
            "grayscale_anomalies": config.grayscale_anomalies,
            "thin_line_probability": config.thin_line_probability,
            "soft_edge_probability": config.soft_edge_probability,
        }

    training = SyntheticAnomalyDataset(
        **sources(~is_held_out, config.resolution),
        length=draws,
        seed=config.seed,
        anomaly_probability=config.anomaly_probability,
        horizontal_flip=config.horizontal_flip,
        vertical_flip=config.vertical_flip,
        rotation=config.rotation,
        crop_size=config.resolution,
        timestep_boundary=config.timestep_boundary,
        timestep_maximum=config.timestep_maximum,
    )
    validation = validation_samples(
        **sources(is_held_out, side), repeats=config.validation_repeats, seed=config.seed + 1
    )
    return training, validation, describe_images(config, images, is_held_out, teacher)
