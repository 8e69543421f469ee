"""The ten augmenters of DRAEM's recipe (Zavrtanik et al., ICCV 2021), three of which make an anomaly's appearance.

Each takes a batch `[B, 3, H, W]` in [0, 1] and one generator a sample, and returns the same shape and range. The
batch may be on a GPU; the random numbers come from the CPU.
"""

import math
from collections.abc import Callable, Sequence

import kornia
import torch
import torch.nn.functional as F

from .sampling import integers, uniform

Generators = Sequence[torch.Generator]


def rotate(images: torch.Tensor, degrees: torch.Tensor, mode: str = "bilinear", padding: str = "zeros") -> torch.Tensor:
    """Rotate each of `[B, C, H, W]` about its center by its own angle `[B]`, keeping the size."""
    height, width = images.shape[-2:]
    cos, sin, zero = degrees.deg2rad().cos(), degrees.deg2rad().sin(), torch.zeros_like(degrees)
    # The grid is in units of half a side, so a rotation of a picture that is not square needs the aspect ratio.
    rows = [torch.stack(row, 1) for row in ((cos, -sin * height / width, zero), (sin * width / height, cos, zero))]
    grid = F.affine_grid(torch.stack(rows, 1).to(images), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, mode=mode, padding_mode=padding, align_corners=False)


def _each(values: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    """Values `[B]` as `[B, 1, 1, 1]` beside the pictures."""
    return values.view(-1, 1, 1, 1).to(images)


def gamma_contrast(images: torch.Tensor, generators: Generators) -> torch.Tensor:
    return images ** uniform(0.5, 2.0, generators, 3, 1, 1).to(images)


def brightness(images: torch.Tensor, generators: Generators) -> torch.Tensor:
    factor, offset = uniform(0.8, 1.2, generators), uniform(-30, 30, generators) / 255
    return (images * _each(factor, images) + _each(offset, images)).clamp(0, 1)


def sharpness(images: torch.Tensor, generators: Generators) -> torch.Tensor:
    return kornia.enhance.sharpness(images, uniform(0, 2, generators).to(images))


def hue_and_saturation(images: torch.Tensor, generators: Generators) -> torch.Tensor:
    hue, saturation, value = kornia.color.rgb_to_hsv(images).split(1, dim=1)
    hue = (hue + 2 * math.pi * _each(uniform(-50, 50, generators) / 255, images)) % (2 * math.pi)
    saturation = (saturation + _each(uniform(-50, 50, generators) / 255, images)).clamp(0, 1)
    return kornia.color.hsv_to_rgb(torch.cat([hue, saturation, value], dim=1)).clamp(0, 1)


def solarize(images: torch.Tensor, generators: Generators) -> torch.Tensor:
    threshold, apply = uniform(32, 128, generators) / 255, uniform(0, 1, generators) < 0.5
    threshold[~apply] = 1.0  # nothing is brighter
    return torch.where(images > _each(threshold, images), 1 - images, images)


def posterize(images: torch.Tensor, generators: Generators) -> torch.Tensor:
    return kornia.enhance.posterize(images, integers(1, 8, generators))


def invert(images: torch.Tensor, generators: Generators) -> torch.Tensor:
    return 1 - images


def autocontrast(images: torch.Tensor, generators: Generators) -> torch.Tensor:
    low, high = images.amin((2, 3), keepdim=True), images.amax((2, 3), keepdim=True)
    return (images - low) / (high - low).clamp(min=1 / 255)


def equalize(images: torch.Tensor, generators: Generators) -> torch.Tensor:
    return kornia.enhance.equalize(images)


def rotate_45(images: torch.Tensor, generators: Generators) -> torch.Tensor:
    return rotate(images, uniform(-45, 45, generators))


AUGMENTERS: tuple[Callable[[torch.Tensor, Generators], torch.Tensor], ...] = (
    gamma_contrast,
    brightness,
    sharpness,
    hue_and_saturation,
    solarize,
    posterize,
    invert,
    autocontrast,
    equalize,
    rotate_45,
)


def augment(images: torch.Tensor, generators: Generators) -> torch.Tensor:
    """Apply to each of `[B, 3, H, W]` in [0, 1] three different augmenters of the ten, in random order."""
    images = images.clone()
    orders = torch.stack(
        [torch.randperm(len(AUGMENTERS), generator=generator, device="cpu")[:3] for generator in generators]
    )
    for turn in orders.T:  # [B]
        for index in turn.unique().tolist():
            chosen = (turn == index).nonzero()[:, 0].tolist()
            images[chosen] = AUGMENTERS[index](images[chosen], [generators[i] for i in chosen])
    return images
