"""Tiny pictures, and what tests of the image processor do with them."""

import io

import numpy as np
import torch
from PIL import Image

from diffusionad_pipe.image_processor import DiffusionADImageProcessor

HEIGHT, WIDTH = 12, 16
RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
UNIT = torch.from_numpy(PIXELS).permute(2, 0, 1).float() / 255  # [3, H, W]
COLOR = (200, 100, 50)


def read(image, height=HEIGHT, width=WIDTH, **options) -> torch.Tensor:
    """Preprocess one picture: `[3, height, width]`."""
    return DiffusionADImageProcessor(**options).preprocess(image, height, width)[0][0]


def stored(image: Image.Image, kind: str = "PNG", **options) -> Image.Image:
    """Write a picture to memory and open it again."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return Image.open(file)


def plain(mode: str, color) -> Image.Image:
    return Image.new(mode, (WIDTH, HEIGHT), color)


def shade(image: torch.Tensor) -> tuple[int, ...]:
    """The colour of a plain picture, 0 to 255."""
    assert (image == image[:, :1, :1]).all()
    return tuple((image[:, 0, 0] * 255).round().int().tolist())
