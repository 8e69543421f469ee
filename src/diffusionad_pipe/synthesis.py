"""Synthetic anomalies: DRAEM's recipe (Zavrtanik et al., ICCV 2021) with DiffusionAD's changes (section III-D).

    S = (1 − M) ⊙ N + M ⊙ (β · N + (1 − β) · A)

N is a normal picture, A the anomaly source, M a Perlin mask inside the foreground and β the opacity of the
original. Everything is torch, and every random draw comes from the generator that is passed in: the same
generator state gives the same sample on every machine and in every worker.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import kornia
import numpy as np
import torch
import torch.nn.functional as F

# k in "a Perlin resolution of 2^k cells per axis", drawn from 0 ... 5.
MAX_PERLIN_EXPONENT = 5
PERLIN_THRESHOLD = 0.5
MASK_TRIES = 50
SHUFFLE_GRID = 8


class AnomalySample(NamedTuple):
    """One training sample.

    Args:
        image: the picture, anomalous or not, `[3, H, W]` in [0, 1].
        mask: the soft anomaly mask M, `[1, H, W]` in [0, 1]; all zero for a normal picture.
        label: 1.0 if the mask is not empty, else 0.0.
    """

    image: torch.Tensor
    mask: torch.Tensor
    label: float


def sample_generator(*key: int) -> torch.Generator:
    """A CPU generator that is a function of the key alone, e.g. of (seed, epoch, index).

    Args:
        key: non-negative integers. Zeros at the end do not count: (3,) and (3, 0) are one key.
    """
    state = np.random.SeedSequence(key).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state >> np.uint64(1)))


def uniform(low: float, high: float, generator: torch.Generator) -> float:
    """One draw from U[low, high)."""
    return low + (high - low) * torch.rand((), generator=generator, dtype=torch.float64).item()


def integer(low: int, high: int, generator: torch.Generator) -> int:
    """One draw from {low, ..., high}."""
    return int(torch.randint(low, high + 1, (), generator=generator))


def rotate(image: torch.Tensor, degrees: float, padding_mode: str = "zeros") -> torch.Tensor:
    """Rotate `[C, H, W]` about its centre, bilinearly, keeping the size."""
    height, width = image.shape[-2:]
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    # The grid is in units of half a side, so a rotation of a picture that is not square needs the aspect ratio.
    theta = torch.tensor([[[cos, -sin * height / width, 0.0], [sin * width / height, cos, 0.0]]])
    grid = F.affine_grid(theta.to(image), [1, *image.shape], align_corners=False)
    return F.grid_sample(image[None], grid, padding_mode=padding_mode, align_corners=False)[0]


# ----------------------------------------------------------------------------------------------------------------
# Masks


def perlin_noise(height: int, width: int, cells: tuple[int, int], generator: torch.Generator) -> torch.Tensor:
    """Perlin noise `[H, W]`, about in [-1, 1], with `cells` gradient cells per axis (rows, columns)."""
    angles = 2 * math.pi * torch.rand(cells[0] + 1, cells[1] + 1, generator=generator)
    gradients = torch.stack([angles.cos(), angles.sin()])  # [2, rows + 1, columns + 1]

    y = torch.arange(height) * (cells[0] / height)
    x = torch.arange(width) * (cells[1] / width)
    row, column = y.long()[:, None], x.long()[None, :]
    dy, dx = (y - y.floor())[:, None], (x - x.floor())[None, :]

    def corner(down: int, right: int) -> torch.Tensor:
        """Dot product of one corner's gradient with the offset from that corner, `[H, W]`."""
        gradient = gradients[:, row + down, column + right]
        return gradient[0] * (dy - down) + gradient[1] * (dx - right)

    fade_y, fade_x = (t**3 * (t * (6 * t - 15) + 10) for t in (dy, dx))
    top = torch.lerp(corner(0, 0), corner(0, 1), fade_x.expand(height, width))
    bottom = torch.lerp(corner(1, 0), corner(1, 1), fade_x.expand(height, width))
    return math.sqrt(2) * torch.lerp(top, bottom, fade_y.expand(height, width))


def perlin_mask(foreground: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """A random blobby mask inside the foreground: Perlin noise, rotated, thresholded, times the soft matte.

    Args:
        foreground: matte `[1, H, W]` in [0, 1].
        generator: source of every draw.

    Returns:
        M `[1, H, W]` in [0, 1]; after 50 tries that hit no foreground, all zero.
    """
    height, width = foreground.shape[-2:]
    cells = (2 ** integer(0, MAX_PERLIN_EXPONENT, generator), 2 ** integer(0, MAX_PERLIN_EXPONENT, generator))
    mask = torch.zeros_like(foreground)
    for _ in range(MASK_TRIES):
        noise = perlin_noise(height, width, cells, generator)
        noise = rotate(noise[None], uniform(-90, 90, generator))
        mask = (noise > PERLIN_THRESHOLD).float() * foreground
        if mask.max() > 0:
            break
    return mask


# ----------------------------------------------------------------------------------------------------------------
# Anomaly sources


def gamma_contrast(image: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    return image ** torch.empty(3, 1, 1).uniform_(0.5, 2.0, generator=generator)


def brightness(image: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    return (image * uniform(0.8, 1.2, generator) + uniform(-30, 30, generator) / 255).clamp(0, 1)


def sharpness(image: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    return kornia.enhance.sharpness(image[None], uniform(0, 2, generator))[0]


def hue_and_saturation(image: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    hue, saturation, value = kornia.color.rgb_to_hsv(image)
    hue = (hue + 2 * math.pi * uniform(-50, 50, generator) / 255) % (2 * math.pi)
    saturation = (saturation + uniform(-50, 50, generator) / 255).clamp(0, 1)
    return kornia.color.hsv_to_rgb(torch.stack([hue, saturation, value])).clamp(0, 1)


def solarize(image: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    threshold, apply = uniform(32, 128, generator) / 255, uniform(0, 1, generator) < 0.5
    return torch.where(image > threshold, 1 - image, image) if apply else image


def posterize(image: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    return kornia.enhance.posterize(image[None], integer(1, 8, generator))[0]


def invert(image: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    return 1 - image


def autocontrast(image: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    low, high = image.amin((1, 2), keepdim=True), image.amax((1, 2), keepdim=True)
    return (image - low) / (high - low).clamp(min=1 / 255)


def equalize(image: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    return kornia.enhance.equalize(image[None])[0]


def rotate_45(image: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    return rotate(image, uniform(-45, 45, generator))


AUGMENTERS: tuple[Callable[[torch.Tensor, torch.Generator], torch.Tensor], ...] = (
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


def augment(image: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Apply three different augmenters of the ten, in random order, to `[3, H, W]` in [0, 1]."""
    for index in torch.randperm(len(AUGMENTERS), generator=generator)[:3]:
        image = AUGMENTERS[int(index)](image, generator)
    return image


def shuffle_tiles(image: torch.Tensor, generator: torch.Generator, grid: int = SHUFFLE_GRID) -> torch.Tensor:
    """Cut `[C, H, W]` into grid × grid tiles and put them back in random order. Sides that the grid does not divide
    keep their last rows and columns in place."""
    height, width = image.shape[-2] // grid, image.shape[-1] // grid
    core = image[:, : grid * height, : grid * width]
    tiles = core.reshape(-1, grid, height, grid, width).permute(1, 3, 0, 2, 4).flatten(0, 1)  # [g * g, C, h, w]
    tiles = tiles[torch.randperm(grid * grid, generator=generator)]
    shuffled = image.clone()
    shuffled[:, : grid * height, : grid * width] = (
        tiles.reshape(grid, grid, -1, height, width).permute(2, 0, 3, 1, 4).reshape(core.shape)
    )
    return shuffled


def synthesize_anomaly(
    image: torch.Tensor,
    foreground: torch.Tensor,
    textures: Sequence[torch.Tensor],
    generator: torch.Generator,
    *,
    anomaly_probability: float = 0.5,
    texture_probability: float = 0.5,
) -> AnomalySample:
    """Leave a normal picture as it is, or put a synthetic anomaly on it.

    Args:
        image: a normal picture `[3, H, W]` in [0, 1].
        foreground: where anomalies may be, a matte `[1, H, W]` in [0, 1].
        textures: texture pictures `[3, H, W]` uint8, of the same size.
        generator: source of every draw.
        anomaly_probability: how often a picture gets an anomaly; 0.5 in the paper.
        texture_probability: how often the anomaly is a texture; otherwise it is the picture itself, augmented and
            shuffled. 0.5 for objects and 1 for texture categories in the paper; without textures it is 0.

    Returns:
        [`AnomalySample`].
    """
    normal = AnomalySample(image, torch.zeros_like(foreground), 0.0)
    if uniform(0, 1, generator) >= anomaly_probability:
        return normal
    mask = perlin_mask(foreground, generator)
    if mask.max() == 0:
        return normal

    if textures and uniform(0, 1, generator) < texture_probability:
        texture = textures[integer(0, len(textures) - 1, generator)]
        anomaly = augment(texture.float() / 255, generator)
    else:
        anomaly = shuffle_tiles(augment(image, generator), generator)

    opacity = uniform(0.2, 0.8, generator)  # β: of the original
    blended = opacity * image + (1 - opacity) * anomaly
    return AnomalySample((1 - mask) * image + mask * blended, mask, 1.0)
