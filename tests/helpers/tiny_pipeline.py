"""A pipeline of a few thousand parameters that works at 32 pixels."""

import torch
from torch import nn

from diffusionad_pipe import (
    DiffusionADPipeline,
    DiffusionADUNet2DModel,
    NormGuidedOneStepScheduler,
    SegmentationUNet2DModel,
)


def randomize(network: nn.Module) -> None:
    """Random numbers where a new network has zeros or ones, so that outputs vary and no tensor can be left out."""
    with torch.no_grad():
        for name, tensor in network.state_dict().items():
            if name.endswith("running_var"):
                tensor.uniform_(0.5, 1.5)
            elif tensor.is_floating_point() and tensor.unique().numel() == 1:
                tensor.add_(torch.randn_like(tensor), alpha=0.1)


def build_tiny_pipeline() -> DiffusionADPipeline:
    """What the fixture `tiny_pipeline` returns, for fixtures of a wider scope."""
    torch.manual_seed(0)
    unet = DiffusionADUNet2DModel(
        sample_size=32, block_out_channels=(8, 8), attention=(False, True), num_attention_heads=2, norm_num_groups=4
    )
    segmentation = SegmentationUNet2DModel(base_channels=4)
    randomize(unet)
    randomize(segmentation)
    return DiffusionADPipeline(unet.eval(), segmentation.eval(), NormGuidedOneStepScheduler(), image_size=32)
