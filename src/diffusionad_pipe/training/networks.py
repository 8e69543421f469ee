"""Both networks as one module, as accelerate wraps it, and the pipeline around their averaged weights."""

from collections.abc import Callable
from typing import Any

import torch
from diffusers.training_utils import EMAModel
from torch import nn

from .. import DiffusionADPipeline, DiffusionADUNet2DModel, NormGuidedOneStepScheduler, SegmentationUNet2DModel
from .config import TrainingConfig
from .losses import TrainingLosses

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class TrainedNetworks(nn.Module):
    """The UNet and the segmentation network in one forward pass, around which several processes add up their gradients.

    Args:
        unet: the reconstruction network.
        segmentation: the segmentation network.

    Example:
        >>> from diffusionad_pipe import DiffusionADUNet2DModel, SegmentationUNet2DModel
        >>> unet = DiffusionADUNet2DModel(sample_size=32, block_out_channels=(32, 32), attention=(False, False))
        >>> networks = TrainedNetworks(unet, SegmentationUNet2DModel(base_channels=4))
        >>> sorted({name.partition(".")[0] for name in networks.state_dict()})
        ['segmentation', 'unet']
    """

    def __init__(self, unet: DiffusionADUNet2DModel, segmentation: SegmentationUNet2DModel) -> None:
        super().__init__()
        self.unet = unet
        self.segmentation = segmentation

    def forward(self, losses: Callable[..., TrainingLosses], *args: Any, **kwargs: Any) -> TrainingLosses:
        """`losses(unet, segmentation, *args, **kwargs)`, one of `losses`."""
        return losses(self.unet, self.segmentation, *args, **kwargs)


def averaged_pipeline(
    config: TrainingConfig, networks: TrainedNetworks, ema: EMAModel, scheduler: NormGuidedOneStepScheduler
) -> DiffusionADPipeline:
    """A pipeline around copies of the networks with averaged weights, rounded to the precision that they are saved in.

    Args:
        config: the settings of the run.
        networks: as they are trained; their statistics are taken as they are.
        ema: the averages of their parameters.
        scheduler: of the pipeline.
    """
    weights = networks.state_dict()
    if config.ema_decay > 0:
        weights |= {name: average for (name, _), average in zip(networks.named_parameters(), ema.shadow_params)}
    copies = TrainedNetworks(
        DiffusionADUNet2DModel.from_config(networks.unet.config),
        SegmentationUNet2DModel.from_config(networks.segmentation.config),
    )
    copies.load_state_dict(weights)
    device = next(networks.parameters()).device
    copies = copies.to(device, DTYPES[config.save_dtype]).float().eval()
    size = config.resize_to or config.resolution
    return DiffusionADPipeline(copies.unet, copies.segmentation, scheduler, image_size=size)
