"""What a model will learn from: a contact sheet of synthetic anomalies, made before any training.

It needs the extra `train`, which the rest of the command line does without.
"""

from typing import NamedTuple

import torch
from PIL import Image, ImageDraw, ImageFont

from ..evaluation.calibration import split_held_out
from ..image_processor import DiffusionADImageProcessor
from ..images.files import MAX_PIXELS
from ..images.panels import PANEL_INK
from .dataset import SyntheticAnomalyDataset
from .images import foreground_mattes, read_good_images, read_textures

ROWS = ("picture", "foreground", "mask", "composite")
BATCH = 8  # draws that are made at once; they do not depend on it


class Preview(NamedTuple):
    """Anomalous draws of a training run.

    Args:
        sheet: columns: draws 0, 1, ...; rows: picture after augmentation, foreground matte, mask and composite.
        image_count: pictures that are trained on; held-out ones are not among them.
        draw_count: draws that the two figures below are of.
        empty_share: share of them with an empty mask, in [0, 1].
        coverage: mean of the other masks, a share of the area in [0, 1]; NaN where there is none.
    """

    sheet: Image.Image
    image_count: int
    sample_count: int
    empty_share: float
    coverage: float


def preview_synthesis(
    folder: str,
    *,
    category: str | None = None,
    resolution: int = 256,
    resize_to: int | None = None,
    max_unreadable: float = 0.1,
    max_pixels: int = MAX_PIXELS,
    validation_fraction: float = 0.15,
    horizontal_flip: bool = False,
    vertical_flip: bool = False,
    rotation: float = 0.0,
    texture_dir: str | None = None,
    foreground: str = "threshold",
    foreground_dir: str | None = None,
    foreground_model: str | None = None,
    texture_probability: float = 0.5,
    procedural_probability: float = 0.0,
    grayscale_anomalies: bool = True,
    thin_line_probability: float = 0.0,
    soft_edge_probability: float = 0.0,
    seed: int = 0,
    count: int = 8,
    draws: int = 200,
) -> Preview:
    """Make the first draws of a training run, all of them anomalous.

    A draw that the run itself would make anomalous is the same there, up to rounding: it depends on its number, the
    seed and the pictures that are not held out, and the choice between normal and anomalous takes one random number
    however it ends.

    Args:
        folder: any layout of [`load_anomaly_dataset`].
        count: columns of the sheet, at least 1.
        draws: draws that are counted; if there are more columns, all of those.

    The others are the settings of these names in training/training_config.py.

    Returns:
        [`Preview`].

    Raises:
        ValueError: names what is missing or cannot be used.
    """
    side = resize_to or resolution
    if side < resolution:
        raise ValueError(f"--resize-to {side} is smaller than --resolution {resolution}: crops cannot be larger")
    images = read_good_images(folder, side, category=category, max_unreadable=max_unreadable, max_pixels=max_pixels)
    # As in training, where what a draw becomes depends on the number of its picture among those not held out.
    trained = ~split_held_out(len(images.names), validation_fraction)
    mattes = foreground_mattes(foreground, images, folder=foreground_dir, model=foreground_model, max_pixels=max_pixels)
    dataset = SyntheticAnomalyDataset(
        images.pixels[trained],
        read_textures(texture_dir, resolution, max_unreadable=max_unreadable, max_pixels=max_pixels),
        length=max(draws, count),
        seed=seed,
        foregrounds=mattes[trained] if isinstance(mattes, torch.Tensor) else mattes,
        anomaly_probability=1.0,
        texture_probability=texture_probability,
        procedural_probability=procedural_probability,
        grayscale_anomalies=grayscale_anomalies,
        thin_line_probability=thin_line_probability,
        soft_edge_probability=soft_edge_probability,
        horizontal_flip=horizontal_flip,
        vertical_flip=vertical_flip,
        rotation=rotation,
        crop_size=resolution,
    )

    columns, coverages = [], []
    for start in range(0, len(dataset), BATCH):
        numbers = range(start, min(start + BATCH, len(dataset)))
        samples = dataset.__getitems__(numbers)
        coverages += [sample["masks"].mean().item() for sample in samples]
        if start < count:
            plain, foregrounds, _ = dataset.sample_images(numbers)
            for image, matte, sample in zip(plain, foregrounds, samples):
                rows = image, matte, sample["masks"], sample["images"]
                columns.append(torch.cat([row.expand(3, -1, -1) for row in rows], dim=1))  # [3, 4 · H, W]
    filled = torch.tensor([coverage for coverage in coverages if coverage > 0], dtype=torch.float32, device="cpu")
    return Preview(
        sheet=_with_captions(torch.cat(columns[:count], dim=2)),
        image_count=int(trained.sum()),
        sample_count=len(coverages),
        empty_share=1 - len(filled) / len(coverages),
        coverage=filled.mean().item(),
    )


def _with_captions(grid: torch.Tensor) -> Image.Image:
    """A grid `[3, 4 · H, W]` as a picture, with the name of each row to its left."""
    image = DiffusionADImageProcessor().postprocess(grid[None], "pil")[0]
    side, gap = image.height // len(ROWS), 6
    font = ImageFont.load_default(max(13, side // 20))
    left = round(max(font.getlength(row) for row in ROWS)) + 2 * gap
    sheet = Image.new("RGB", (left + image.width, image.height), (255, 255, 255))
    sheet.paste(image, (left, 0))
    draw = ImageDraw.Draw(sheet)
    for index, row in enumerate(ROWS):
        draw.text((left - gap, (index + 0.5) * side), row, PANEL_INK, font, anchor="rm")
    return sheet
