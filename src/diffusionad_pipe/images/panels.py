"""Drawings for people: anomaly maps over their pictures, contours, and panels of three columns."""

from bisect import bisect
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

from .colors import COLOR_SCALE

CONTOUR_COLOR = (0, 229, 255)  # not a colour of the scale, and rare on surfaces
PANEL_SIDES = (256, 512)  # the longest side of a picture in a panel
PANEL_INK = (32, 32, 32)


def to_pil(image: torch.Tensor) -> Image.Image:
    """Turn `[1|3, h, w]` in [0, 1] into a PIL image, to the nearest of 256 values."""
    pixels = image.mul(255).round_().to(torch.uint8).permute(1, 2, 0).contiguous().numpy()
    return Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)


def colorize(level: torch.Tensor) -> torch.Tensor:
    """Look `[h, w]` in [0, 1] up in the colour scale: RGB `[3, h, w]` in [0, 1]."""
    colors = torch.frombuffer(bytearray.fromhex(COLOR_SCALE), dtype=torch.uint8).view(-1, 3).float().div(255)
    position = level * (len(colors) - 1)
    below = position.long().clamp(max=len(colors) - 2)
    return torch.lerp(colors[below], colors[below + 1], (position - below)[..., None]).permute(2, 0, 1)


def overlay_map(image: torch.Tensor, level: torch.Tensor, opacity: float, vmin: float, vmax: float) -> torch.Tensor:
    """Blend a map over its picture, the more the higher its value.

    Args:
        image: RGB `[3, h, w]` in [0, 1].
        level: the map `[h, w]`.
        opacity: weight of the colours in [0, 1] where the map reaches `vmax`.
        vmin: value of the scale's first colour.
        vmax: value of the scale's last colour.

    Raises:
        ValueError: when the scale is empty.
    """
    if not vmin < vmax:
        raise ValueError(f"vmin must be below vmax, not {vmin} and {vmax}")
    level = (level - vmin).div(vmax - vmin).clamp(0, 1)
    weight = opacity * level
    return image * (1 - weight) + colorize(level) * weight


def inner_border(region: torch.Tensor) -> torch.Tensor:
    """The inner border of regions, both bool `[h, w]`, 1 to 3 pixels wide."""
    width = min(3, 1 + min(region.shape) // 384)
    # Eroded as if all beyond the picture were normal, so that a region at its edge is closed there.
    outside = F.pad((~region).float()[None], [width] * 4, value=1.0)
    return region & F.max_pool2d(outside, 2 * width + 1, stride=1)[0].bool()


def draw_contours(image: torch.Tensor, border: torch.Tensor) -> torch.Tensor:
    """Draw a border, bool `[h, w]`, on RGB `[3, h, w]`."""
    color = torch.tensor(CONTOUR_COLOR, dtype=torch.float32, device="cpu").div(255)[:, None, None]
    return torch.where(border, color, image)


def panel_size(height: int, width: int) -> tuple[int, int]:
    """The size in a panel of a picture of this size."""
    longest = max(height, width)
    scale = min(max(longest, PANEL_SIDES[0]), PANEL_SIDES[1]) / longest
    return round(height * scale), round(width * scale)


def lay_out_panel(columns: Mapping[str, torch.Tensor], title: str | None, vmin: float, vmax: float) -> Image.Image:
    """Pictures side by side, with captions and the colour scale.

    Args:
        columns: caption → RGB `[3, h, w]` in [0, 1], all of one size.
        title: one line above; shortened where it is too long.
        vmin: value of the scale's first colour.
        vmax: value of the scale's last colour.
    """
    height, width = next(iter(columns.values())).shape[-2:]
    text_size = max(13, max(height, width) // 30)
    font, title_font = ImageFont.load_default(text_size), ImageFont.load_default(round(text_size * 1.25))
    line, gap, margin = round(text_size * 1.7), 6, 16
    column = max(width, *(round(font.getlength(caption)) for caption in columns))
    row = max(height, 5 * text_size)  # beside a strip of a picture there is still room for the legend
    top = margin + line + (round(line * 1.3) if title else 0)
    right = margin + len(columns) * (column + gap) + gap
    ends = (f"{vmax:.3g}", top, "lt"), (f"{vmin:.3g}", top + row, "lb")
    full_width = right + text_size + gap + max(round(font.getlength(end)) for end, *_ in ends) + margin
    canvas = Image.new("RGB", (full_width, top + row + margin), (255, 255, 255))
    draw = ImageDraw.Draw(canvas)
    if title:
        draw.text((margin, margin), _shortened(title, title_font, full_width - 2 * margin), PANEL_INK, title_font)
    for index, (caption, tensor) in enumerate(columns.items()):
        left = margin + index * (column + gap)
        draw.text((left + column / 2, top - gap), caption, PANEL_INK, font, anchor="md")
        canvas.paste(to_pil(tensor), (left + (column - width) // 2, top + (row - height) // 2))
    falling = torch.linspace(1, 0, row, dtype=torch.float32, device="cpu")[:, None].expand(row, text_size)
    canvas.paste(to_pil(colorize(falling)), (right, top))
    for end, y, anchor in ends:
        draw.text((right + text_size + gap, y), end, PANEL_INK, font, anchor=anchor)
    return canvas


def _shortened(title: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, room: int) -> str:
    """One line of at most so many pixels."""
    text = " ".join(title.split())
    if font.getlength(text) > room:
        fits = bisect(range(len(text)), room, key=lambda n: round(font.getlength(text[:n] + "...")))
        text = text[: fits - 1] + "..."
    return text
