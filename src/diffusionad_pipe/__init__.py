"""DiffusionAD: find defects in pictures with a one-step, norm-guided diffusion model (arXiv 2303.08730).

Names are imported when they are first used, so that `diffusionad_pipe.exported` runs where torch is not installed.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .image_processor import DiffusionADImageProcessor
    from .images.files import ImageFileError, find_images, open_image
    from .loading import WeightsFileError
    from .pipeline_diffusionad import DiffusionADPipeline
    from .pipeline_output import DiffusionADPipelineOutput
    from .scheduling_norm_guided_one_step import NormGuidedOneStepScheduler, NormGuidedOneStepSchedulerOutput
    from .unet_2d_diffusionad import DiffusionADUNet2DModel, DiffusionADUNet2DOutput, paper_unet_config
    from .unet_2d_segmentation import SegmentationUNet2DModel, SegmentationUNet2DOutput

__version__ = "0.1.0"

__all__ = [
    "DiffusionADImageProcessor",
    "DiffusionADPipeline",
    "DiffusionADPipelineOutput",
    "DiffusionADUNet2DModel",
    "DiffusionADUNet2DOutput",
    "ImageFileError",
    "NormGuidedOneStepScheduler",
    "NormGuidedOneStepSchedulerOutput",
    "SegmentationUNet2DModel",
    "SegmentationUNet2DOutput",
    "WeightsFileError",
    "find_images",
    "open_image",
    "paper_unet_config",
]

_MODULES = {
    "images.files": ("ImageFileError", "find_images", "open_image"),
    "image_processor": ("DiffusionADImageProcessor",),
    "pipeline_diffusionad": ("DiffusionADPipeline",),
    "pipeline_output": ("DiffusionADPipelineOutput",),
    "scheduling_norm_guided_one_step": ("NormGuidedOneStepScheduler", "NormGuidedOneStepSchedulerOutput"),
    "unet_2d_diffusionad": ("DiffusionADUNet2DModel", "DiffusionADUNet2DOutput", "paper_unet_config"),
    "unet_2d_segmentation": ("SegmentationUNet2DModel", "SegmentationUNet2DOutput"),
    "loading": ("WeightsFileError",),
}


def __getattr__(name: str) -> Any:
    for module, names in _MODULES.items():
        if name in names:
            value = globals()[name] = getattr(importlib.import_module(f".{module}", __name__), name)
            return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
