"""How a model is measured: the settings of an evaluation, which travel as one."""

from dataclasses import dataclass
from math import inf
from typing import Any, Literal

import torch

from ..images.files import MAX_PIXELS
from ..images.pixels import MAX_ASPECT_RATIO
from ..tiling import Tiling

PROTOCOLS = ("exact", "reference")


@dataclass(frozen=True)
class EvaluationSettings:
    """What an evaluation depends on, besides the model and the test pictures.

    Args:
        protocol: `"exact"`, or `"reference"` for the authors' way: pictures resized without antialiasing, masks
            resized bilinearly and only what is exactly 1 kept, the mean of 50 pixels as the score, and their PRO.
        method: of the metrics, `"exact"` or `"streaming"`, see [`evaluate_maps`]; the reference protocol has its own.
        at_model_size: compare maps and masks (nearest) at the size of the networks' maps, not at the pictures' own.
        num_noise_samples: independent noises that every prediction is the mean of: an ensemble.
        batch_size: pictures in one pass of the networks, or tiles.
        tiling: how pictures larger than a tile are cut; None resizes every picture to the networks' size.
        dtype: of the networks; predictions of another one are made anew.
        device: None takes a GPU where there is one.
        max_pixels: pictures and masks of more are refused before they are decoded.

    Raises:
        ValueError: for settings that do not exist, or not together.
    """

    protocol: str = "exact"
    method: Literal["exact", "streaming"] = "exact"
    at_model_size: bool = False
    num_noise_samples: int = 1
    batch_size: int = 8
    tiling: Tiling | None = None
    dtype: torch.dtype = torch.float32
    device: str | torch.device | None = None
    max_pixels: int = MAX_PIXELS

    def __post_init__(self) -> None:
        if self.protocol not in PROTOCOLS:
            raise ValueError(f"protocol must be {' or '.join(PROTOCOLS)}, not {self.protocol!r}")
        if self.tiling is not None and self.protocol == "reference":
            raise ValueError("the reference protocol resizes whole pictures: use the protocol exact for tiles")

    @property
    def is_reference(self) -> bool:
        """Whether everything is done in the authors' way."""
        return self.protocol == "reference"

    @property
    def max_aspect_ratio(self) -> float:
        """Longer pictures are refused; tiles are square, whatever the shape of the whole."""
        return MAX_ASPECT_RATIO if self.tiling is None else inf

    def described(self) -> dict[str, Any]:
        """As plain JSON, for tables."""
        described: dict[str, Any] = {
            "protocol": self.protocol, "method": self.method, "at_model_size": self.at_model_size,
            "num_noise_samples": self.num_noise_samples, "batch_size": self.batch_size,
        }  # fmt: skip
        if self.tiling is not None:
            described |= {"tile_size": self.tiling.tile_size, "tile_overlap": self.tiling.overlap}
        return described | {"dtype": str(self.dtype).removeprefix("torch.")}
