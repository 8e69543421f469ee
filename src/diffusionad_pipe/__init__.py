"""DiffusionAD: find defects in pictures with a one-step, norm-guided diffusion model (arXiv 2303.08730)."""

from .image_files import ImageFileError, find_images, open_image
from .image_processor import DiffusionADImageProcessor
from .pipeline_diffusionad import DiffusionADPipeline, DiffusionADPipelineOutput
from .scheduling_norm_guided_one_step import NormGuidedOneStepScheduler, NormGuidedOneStepSchedulerOutput
from .unet_2d_diffusionad import DiffusionADUNet2DModel, DiffusionADUNet2DOutput, paper_unet_config
from .unet_2d_segmentation import SegmentationUNet2DModel, SegmentationUNet2DOutput
from .weights_files import WeightsFileError

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
