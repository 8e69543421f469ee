"""Synthetic anomalies: DRAEM's recipe (Zavrtanik et al., ICCV 2021) with DiffusionAD's changes (section III-D).

    S = (1 − M) ⊙ N + M ⊙ (β · N + (1 − β) · A)

N is a normal picture, A the anomaly source, M a Perlin mask inside the foreground and β the opacity of the
original. Everything is batched torch and runs where the pictures are; every random number comes from the sample's own
generator: the same sample on every machine, in every worker and in every batch.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import kornia
import torch

from .augmenters import augment, rotate
from .config import SynthesisConfig
from .sampling import integers, uniform

Generators = Sequence[torch.Generator]

# k in "a Perlin resolution of 2^k cells per axis", sampled from 0 ... 5.
MAX_PERLIN_EXPONENT = 5
PERLIN_THRESHOLD = 0.5
MASK_TRIES = 50
SHUFFLE_GRID = 8
# Width of a thin line, as a share of the picture's shorter side: 1 to 5 pixels at 256.
LINE_WIDTHS = 1 / 256, 5 / 256
# k of the noise whose level lines they are: finer noise has rings and no lines.
MAX_LINE_EXPONENT = 3
# Standard deviation of a softened edge at most, as a share of the picture's shorter side.
MAX_SOFTENING = 0.04
# Gray pictures have equal channels; a few levels more are JPEG's rounding.
GRAY_TOLERANCE = 4 / 255


class AnomalySamples(NamedTuple):
    """A batch of training samples.

    Args:
        images: the pictures, anomalous or not, `[B, 3, H, W]` in [0, 1].
        masks: the soft anomaly masks M, `[B, 1, H, W]` in [0, 1]; all zero for a normal picture.
        labels: `[B]`, 1 where the mask is not empty, else 0.
    """

    images: torch.Tensor
    masks: torch.Tensor
    labels: torch.Tensor


def perlin_noise(height: int, width: int, cells: torch.Tensor, generators: Generators) -> torch.Tensor:
    """Perlin noise `[B, 1, H, W]`, about in [-1, 1], with `cells` gradient cells per axis, `[B, 2]` (rows, columns)."""
    corners = 2**MAX_PERLIN_EXPONENT + 1  # as many as the finest noise needs; coarser ones leave most unused
    angles = uniform(0, 2 * math.pi, generators, corners * corners).to(cells.device)
    gradients = torch.stack([angles.cos(), angles.sin()], dim=1)  # [B, 2, corners²]

    rows, columns = (torch.arange(n, dtype=torch.float32, device=cells.device) for n in (height, width))
    y = rows * (cells[:, :1].float() / height)  # [B, H]
    x = columns * (cells[:, 1:].float() / width)  # [B, W]
    row, column = y.long()[:, :, None], x.long()[:, None, :]
    dy, dx = y.frac()[:, :, None], x.frac()[:, None, :]

    def corner(down: int, right: int) -> torch.Tensor:
        """Dot product of one corner's gradient with the offset from that corner, `[B, H, W]`."""
        index = ((row + down) * corners + column + right).flatten(1)[:, None].expand(-1, 2, -1)
        gradient = gradients.gather(2, index).unflatten(2, (height, width))
        return gradient[:, 0] * (dy - down) + gradient[:, 1] * (dx - right)

    fade_y, fade_x = (t**3 * (t * (6 * t - 15) + 10) for t in (dy, dx))
    top = torch.lerp(corner(0, 0), corner(0, 1), fade_x)
    bottom = torch.lerp(corner(1, 0), corner(1, 1), fade_x)
    return math.sqrt(2) * torch.lerp(top, bottom, fade_y)[:, None]


def perlin_masks(foregrounds: torch.Tensor, generators: Generators) -> torch.Tensor:
    """Random blobby masks inside the foreground: Perlin noise, rotated, thresholded, times the soft matte.

    Args:
        foregrounds: mattes `[B, 1, H, W]` in [0, 1].
        generators: one a sample.

    Returns:
        M `[B, 1, H, W]` in [0, 1]; after 50 tries that hit no foreground, all zero.
    """
    height, width = foregrounds.shape[-2:]
    cells = 2 ** integers(0, MAX_PERLIN_EXPONENT, generators, 2).to(foregrounds.device)
    masks = torch.zeros_like(foregrounds)
    empty = [i for i, foreground in enumerate(foregrounds) if foreground.any()]
    for _ in range(MASK_TRIES):
        if not empty:
            break
        chosen = [generators[i] for i in empty]
        noise = rotate(perlin_noise(height, width, cells[empty], chosen), uniform(-90, 90, chosen))
        masks[empty] = (noise > PERLIN_THRESHOLD) * foregrounds[empty]
        empty = [i for i in empty if not masks[i].any()]
    return masks


def thin_lines(
    masks: torch.Tensor, foregrounds: torch.Tensor, generators: Generators, probability: float
) -> torch.Tensor:
    """Put curved lines in the place of some masks, inside the foreground: scratches, cracks, hairs. Not in the paper.

    Perlin masks are blobs and have no thin lines. A line is where Perlin noise n crosses zero: |n| / ‖∇n‖ is, to first
    order, the distance to it in pixels. A second noise cuts it into pieces, so that lines end.

    Args:
        masks: M `[B, 1, H, W]` in [0, 1]; stays what it is where the foreground has no room for a line.
        foregrounds: mattes `[B, 1, H, W]` in [0, 1].
        generators: one a sample.
        probability: share of the masks that become lines.

    Returns:
        M `[B, 1, H, W]` in [0, 1].
    """
    chosen = (uniform(0, 1, generators) < probability).nonzero()[:, 0].tolist()
    if not chosen:
        return masks
    own = [generators[i] for i in chosen]
    height, width = masks.shape[-2:]
    noise, cut = (
        perlin_noise(height, width, 2 ** integers(0, MAX_LINE_EXPONENT, own, 2).to(masks.device), own) for _ in range(2)
    )
    distance = noise.abs() / torch.hypot(*torch.gradient(noise, dim=(2, 3))).clamp(min=1e-6)
    half_width = uniform(*LINE_WIDTHS, own).view(-1, 1, 1, 1).to(masks) * min(height, width) / 2
    lines = (half_width + 0.5 - distance).clamp(0, 1) * (cut > 0) * foregrounds[chosen]  # half a pixel of soft edge
    result = masks.clone()
    result[chosen] = torch.where(lines.flatten(1).any(1).view(-1, 1, 1, 1), lines, masks[chosen])
    return result


def soften_edges(
    masks: torch.Tensor, foregrounds: torch.Tensor, generators: Generators, probability: float
) -> torch.Tensor:
    """Blur the edges of some masks by a Gaussian of random width, inside the foreground. Not in the paper.

    The edges of Perlin masks are sharp, by which a pasted texture is known however faint it is. Stains, frays and
    shades have no such edges.

    Args:
        masks: M `[B, 1, H, W]` in [0, 1].
        foregrounds: mattes `[B, 1, H, W]` in [0, 1].
        generators: one a sample.
        probability: share of the masks that are blurred.

    Returns:
        M `[B, 1, H, W]` in [0, 1].
    """
    chosen = (uniform(0, 1, generators) < probability).nonzero()[:, 0].tolist()
    if not chosen:
        return masks
    widest = MAX_SOFTENING * min(masks.shape[-2:])
    sigma = uniform(min(0.5, widest), widest, [generators[i] for i in chosen], 1).expand(-1, 2).to(masks)
    shapes = (masks[chosen] > 0).to(masks)  # without the matte, which is as soft as it is
    blurred = kornia.filters.gaussian_blur2d(shapes, 2 * math.ceil(3 * widest) + 1, sigma, border_type="reflect")
    blurred = blurred / blurred.amax((2, 3), keepdim=True).clamp(min=1e-6)  # up to 1 again, also where it was thin
    softened = masks.clone()
    # What is fainter than a gray level is no anomaly.
    softened[chosen] = torch.where(blurred < 1 / 255, 0.0, blurred.clamp(max=1)) * foregrounds[chosen]
    return softened


def shuffle_tiles(images: torch.Tensor, generators: Generators, grid: int = SHUFFLE_GRID) -> torch.Tensor:
    """Cut each of `[B, C, H, W]` into grid × grid tiles and put them back in random order. Sides that the grid does not
    divide keep their last rows and columns in place."""
    batch, channels = images.shape[:2]
    height, width = images.shape[-2] // grid, images.shape[-1] // grid
    core = images[..., : grid * height, : grid * width]
    tiles = core.reshape(batch, channels, grid, height, grid, width).permute(0, 2, 4, 1, 3, 5).flatten(1, 2)
    orders = torch.stack([torch.randperm(grid * grid, generator=generator, device="cpu") for generator in generators])
    tiles = tiles[torch.arange(batch, device="cpu")[:, None], orders]  # [B, g · g, C, h, w]
    shuffled = images.clone()
    shuffled[..., : grid * height, : grid * width] = (
        tiles.reshape(batch, grid, grid, channels, height, width).permute(0, 3, 1, 4, 2, 5).reshape(core.shape)
    )
    return shuffled


def procedural_textures(height: int, width: int, generators: Generators, device: torch.device) -> torch.Tensor:
    """Fractal noise between two random colors, `[B, 3, H, W]` in [0, 1]. Not in the paper.

    The power spectrum falls with the frequency f as 1 / f^2α, α ~ U[0, 3): from white noise over clouds to plain
    color, which no photographed texture has. The second color is between the first and any other.
    """
    slope = uniform(0, 3, generators)[:, None, None]
    noise = torch.stack(
        [torch.randn(height, width, generator=generator, dtype=torch.float32, device="cpu") for generator in generators]
    )
    first, second = uniform(0, 1, generators, 3, 1, 1), uniform(0, 1, generators, 3, 1, 1)
    second = torch.lerp(first, second, uniform(0, 1, generators)[:, None, None, None])

    plain = {"dtype": torch.float32, "device": torch.device("cpu")}
    frequency = torch.hypot(torch.fft.fftfreq(height, **plain)[:, None], torch.fft.rfftfreq(width, **plain)[None, :])
    frequency[0, 0] = 1.0
    spectrum = torch.fft.rfft2(noise.to(device)) / (frequency**slope).to(device)
    noise = torch.fft.irfft2(spectrum, s=(height, width))[:, None]
    low, high = noise.amin((2, 3), keepdim=True), noise.amax((2, 3), keepdim=True)
    return torch.lerp(first.to(device), second.to(device), (noise - low) / (high - low))


def anomaly_sources(
    images: torch.Tensor,
    textures: torch.Tensor | None,
    generators: Generators,
    config: SynthesisConfig,
) -> torch.Tensor:
    """A of each picture, `[B, 3, H, W]` in [0, 1]: a texture, or the picture itself cut into tiles; augmented."""
    kind, source = uniform(0, 1, generators), uniform(0, 1, generators)
    no_textures = textures is None and config.procedural_probability == 0
    itself = (kind >= config.texture_probability) | no_textures
    procedural = ~itself & ((source < config.procedural_probability) | (textures is None))

    sources = images.clone()
    chosen = (~itself & ~procedural).nonzero()[:, 0].tolist()
    if chosen and textures is not None:
        picks = integers(0, len(textures) - 1, [generators[i] for i in chosen]).to(textures.device)
        sources[chosen] = textures[picks].to(images) / 255
    chosen = procedural.nonzero()[:, 0].tolist()
    if chosen:
        height, width = images.shape[-2:]
        sources[chosen] = procedural_textures(height, width, [generators[i] for i in chosen], images.device)
    sources = augment(sources, generators)
    chosen = itself.nonzero()[:, 0].tolist()
    if chosen:
        sources[chosen] = shuffle_tiles(sources[chosen], [generators[i] for i in chosen])
    return sources


def synthesize_anomalies(
    images: torch.Tensor,
    foregrounds: torch.Tensor,
    textures: torch.Tensor | None,
    generators: Generators,
    config: SynthesisConfig,
) -> AnomalySamples:
    """Leave each normal picture as it is, or put a synthetic anomaly on it.

    Args:
        images: normal pictures `[B, 3, H, W]` in [0, 1].
        foregrounds: where anomalies may be, mattes `[B, 1, H, W]` in [0, 1].
        textures: texture pictures `[T, 3, H, W]` uint8, of the same size, or None.
        generators: one a picture, which everything random on it comes from.
        config: how often there is an anomaly, and of what kind; which textures and foregrounds it names, is decided
            already.

    Returns:
        [`AnomalySamples`].
    """
    masks = torch.zeros_like(foregrounds)
    chosen = (uniform(0, 1, generators) < config.anomaly_probability).nonzero()[:, 0].tolist()
    if chosen:
        own = [generators[i] for i in chosen]
        masks[chosen] = perlin_masks(foregrounds[chosen], own)
        if config.thin_line_probability > 0:  # else no random number is taken, as in the paper
            masks[chosen] = thin_lines(masks[chosen], foregrounds[chosen], own, config.thin_line_probability)
        if config.soft_edge_probability > 0:
            masks[chosen] = soften_edges(masks[chosen], foregrounds[chosen], own, config.soft_edge_probability)
    labels = masks.flatten(1).any(1)
    chosen = labels.nonzero()[:, 0].tolist()
    if not chosen:
        return AnomalySamples(images, masks, labels.float())

    anomalous, own = images[chosen], [generators[i] for i in chosen]
    sources = anomaly_sources(anomalous, textures, own, config)
    if config.grayscale_anomalies:
        gray = (anomalous.amax(1) - anomalous.amin(1)).flatten(1).amax(1) <= GRAY_TOLERANCE
        sources[gray] = sources[gray].mean(1, keepdim=True).expand(-1, 3, -1, -1)
    opacity = uniform(0.2, 0.8, own).view(-1, 1, 1, 1).to(images)  # β: of the original
    blended = opacity * anomalous + (1 - opacity) * sources
    result = images.clone()
    result[chosen] = (1 - masks[chosen]) * anomalous + masks[chosen] * blended
    return AnomalySamples(result, masks, labels.float())
