"""Both networks as one module, as accelerate wraps it."""

from collections.abc import Callable
from typing import Any

from torch import nn

from .. import DiffusionADUNet2DModel, SegmentationUNet2DModel
from .losses import TrainingLosses


class TrainedNetworks(nn.Module):
    """The UNet and the segmentation network in one forward pass, around which several processes add up their gradients.

    Args:
        unet: the reconstruction network.
        segmentation: the segmentation network.
    """

    def __init__(self, unet: DiffusionADUNet2DModel, segmentation: SegmentationUNet2DModel) -> None:
        super().__init__()
        self.unet = unet
        self.segmentation = segmentation

    def forward(self, losses: Callable[..., TrainingLosses], *args: Any, **kwargs: Any) -> TrainingLosses:
        """`losses(unet, segmentation, *args, **kwargs)`, one of `losses`."""
        return losses(self.unet, self.segmentation, *args, **kwargs)
