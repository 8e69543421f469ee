"""What is asked of a run of predictions, besides its pictures."""

from dataclasses import dataclass
from enum import StrEnum
from math import inf
from typing import Any

from ..images.files import MAX_PIXELS
from ..images.pixels import MAX_ASPECT_RATIO
from ..pipeline_diffusionad import DiffusionADPipeline
from ..tiling import Tiling
from .fingerprint import fingerprint


class MapFormat(StrEnum):
    """How anomaly maps are stored: 16-bit PNG (65535 is 1), or float32 NumPy."""

    png16 = "png16"
    npy = "npy"


@dataclass(frozen=True)
class PredictionSettings:
    """One object from the command to the files of each picture.

    Args:
        image_threshold: a picture is defective above this score; None takes the model's own.
        pixel_threshold: the same for a pixel.
        batch_size: pictures, or tiles, in one pass of the networks.
        panels: picture, reconstruction and heatmap side by side; else one overlay.
        maps: also the anomaly map.
        masks: also the predicted mask, a PNG with 255 where a pixel is defective; needs a pixel threshold.
        parquet: the table as Parquet too.
        tiling: how larger pictures are cut; None resizes them.
        max_pixels: pictures of more are refused before they are decoded.

    Raises:
        ValueError: for thresholds outside [0, 1].
    """

    image_threshold: float | None = None
    pixel_threshold: float | None = None
    batch_size: int = 8
    panels: bool = False
    maps: MapFormat | None = None
    masks: bool = False
    parquet: bool = False
    tiling: Tiling | None = None
    max_pixels: int = MAX_PIXELS

    def __post_init__(self) -> None:
        for option, value in (("--threshold", self.image_threshold), ("--pixel-threshold", self.pixel_threshold)):
            if value is not None and not 0 <= value <= 1:  # NaN too
                raise ValueError(f"{option} {value:g} must lie between 0 and 1, as scores do")

    @property
    def max_aspect_ratio(self) -> float:
        """Pictures that are a longer strip are refused, but for those in tiles, which are square."""
        return MAX_ASPECT_RATIO if self.tiling is None else inf

    @property
    def endings(self) -> list[str]:
        """Of the files that each picture has."""
        maps = {None: [], MapFormat.png16: ["_map.png"], MapFormat.npy: ["_map.npy"]}[self.maps]
        return [*maps, *(["_mask.png"] if self.masks else []), ".png"]

    def apply_to(self, pipe: DiffusionADPipeline, name: str) -> None:
        """Give a pipeline these thresholds and this tiling.

        Args:
            pipe: to be changed.
            name: what messages call it.

        Raises:
            ValueError: for masks without any pixel threshold.
        """
        if self.tiling is not None:
            pipe.enable_tiling(*self.tiling)
        thresholds = {"image_threshold": self.image_threshold, "pixel_threshold": self.pixel_threshold}
        pipe.register_to_config(**{name: value for name, value in thresholds.items() if value is not None})
        if self.masks and pipe.config.pixel_threshold is None:
            raise ValueError(f"{name} has no pixel threshold for masks: calibrate it, or give --pixel-threshold")

    def kept_with(self, pipe: DiffusionADPipeline) -> dict[str, Any]:
        """All that results depend on besides the pictures, as plain JSON: under others they are not kept."""
        return {
            "model": fingerprint(pipe),
            "threshold": pipe.config.image_threshold,
            "pixel-threshold": pipe.config.pixel_threshold,
            "panels": self.panels,
            "maps": self.maps,
            "masks": self.masks,
            "dtype": str(pipe.unet.dtype).removeprefix("torch."),
            "tiling": pipe.tiling and list(pipe.tiling),
        }
