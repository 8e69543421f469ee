"""Both networks as one module, and the average of their weights; whole, or sharded over processes (FSDP)."""

from collections.abc import Callable
from typing import Any

import torch
from diffusers.training_utils import EMAModel
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor

from .. import DiffusionADUNet2DModel, SegmentationUNet2DModel
from .losses import TrainingLosses


class TrainedNetworks(nn.Module):
    """The UNet and the segmentation network in one, as FSDP wants them: it gathers weights around this forward pass.

    Args:
        unet: the reconstruction network.
        segmentation: the segmentation network.
    """

    # What `accelerate launch --fsdp_auto_wrap_policy TRANSFORMER_BASED_WRAP` gathers one at a time.
    _no_split_modules = ("ResnetBlock2D", "SegmentationUNet2DModel")

    def __init__(self, unet: DiffusionADUNet2DModel, segmentation: SegmentationUNet2DModel) -> None:
        super().__init__()
        self.unet = unet
        self.segmentation = segmentation

    def forward(self, losses: Callable[..., TrainingLosses], *args: Any, **kwargs: Any) -> TrainingLosses:
        """`losses(unet, segmentation, *args, **kwargs)`, one of `diffusionad_pipe.objective`."""
        return losses(self.unet, self.segmentation, *args, **kwargs)


class AveragedWeights(EMAModel):
    """The moving average of parameters, each sharded as its parameter is; checkpoints hold it whole."""

    shadow_params: list[torch.Tensor]

    def whole(self) -> list[torch.Tensor]:
        """All averages unsharded. Every process must ask."""
        return [shard.full_tensor() if isinstance(shard, DTensor) else shard for shard in self.shadow_params]

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"shadow_params": self.whole()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        before = self.shadow_params
        super().load_state_dict(state_dict)
        # What was loaded is whole and on the CPU.
        self.shadow_params = [
            distribute_tensor(loaded.to(shard.device), shard.device_mesh, shard.placements)
            if isinstance(shard, DTensor)
            else loaded.to(shard.device)
            for shard, loaded in zip(before, self.shadow_params)
        ]
