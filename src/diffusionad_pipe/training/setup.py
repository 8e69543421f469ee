"""The networks that a training configuration asks for, with weights to start from."""

import logging
import math
from typing import Literal

import torch
from accelerate.utils import parse_flag_from_env

from .. import (
    DiffusionADPipeline,
    DiffusionADUNet2DModel,
    NormGuidedOneStepScheduler,
    SegmentationUNet2DModel,
)
from ..runtime.acceleration import compile_networks, fastest_dtype, train_channels_last
from ..unet_2d_diffusionad import ATTENTION_SIZES
from .config import TrainingConfig

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


def fastest_precision() -> Literal["bf16", "no"]:
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


def prepare_for_training(
    config: TrainingConfig, unet: DiffusionADUNet2DModel, segmentation: SegmentationUNet2DModel, device: torch.device
) -> None:
    """Put both networks into training mode, with what saves time or memory."""
    unet.train()
    segmentation.train()
    if config.channels_last:
        train_channels_last(unet, segmentation)
    if config.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
        segmentation.enable_gradient_checkpointing()
    if config.torch_compile:
        compile_networks((unet, segmentation), device)
