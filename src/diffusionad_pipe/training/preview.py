"""What a model will learn from: a contact sheet of synthetic anomalies, made before any training.

It needs the extra `train`, which the rest of the command line does without.
"""

from dataclasses import replace
from typing import NamedTuple

import torch
from PIL import Image, ImageDraw, ImageFont

from ..image_processor import DiffusionADImageProcessor
from ..images.panels import PANEL_INK
from .config import TrainingConfig
from .samples import read_inputs, training_samples

ROWS = ("picture", "foreground", "mask", "composite")
BATCH = 8  # samples that are made at once; they do not depend on it
SMALLEST = 16  # pixels


class Preview(NamedTuple):
    """Anomalous samples of a training run.

    Args:
        sheet: columns: samples 0, 1, ...; rows: picture after augmentation, foreground matte, mask and composite.
        image_count: pictures that are trained on; held-out ones are not among them.
        sample_count: samples that the two figures below are of.
        empty_share: share of them with an empty mask, in [0, 1].
        coverage: mean of the other masks, a share of the area in [0, 1]; NaN where there is none.
    """

    sheet: Image.Image
    image_count: int
    sample_count: int
    empty_share: float
    coverage: float


def preview_synthesis(config: TrainingConfig, count: int = 8, sample_count: int = 200) -> Preview:
    """Make the first samples of a training run, all of them anomalous.

    A sample that the run itself would make anomalous is the same there, up to rounding: it depends on its number, the
    seed and the pictures that are not held out, and the choice between normal and anomalous takes one random number
    however it ends.

    Args:
        config: the settings of the run.
        count: columns of the sheet, at least 1.
        sample_count: samples that are counted, at least 1; if there are more columns, all of those.

    Returns:
        [`Preview`].

    Raises:
        ValueError: names what is missing or cannot be used.
    """
    if min(count, sample_count) < 1:
        raise ValueError("--count and --samples must be at least 1")
    if config.resolution < SMALLEST:
        raise ValueError(f"--resolution {config.resolution} is too small: give at least {SMALLEST}")
    if (config.resize_to or config.resolution) < config.resolution:
        raise ValueError(
            f"--resize-to {config.resize_to} is smaller than --resolution {config.resolution}: crops cannot be larger"
        )
    inputs = read_inputs(config)
    everywhere = replace(config, anomaly_probability=1.0)
    dataset = training_samples(everywhere, inputs, max(sample_count, count), torch.device("cpu"))

    columns, coverages = [], []
    for start in range(0, len(dataset), BATCH):
        numbers = range(start, min(start + BATCH, len(dataset)))
        samples = dataset.__getitems__(numbers)
        coverages += [sample["masks"].mean().item() for sample in samples]
        if start < count:
            plain, foregrounds, _ = dataset.augmented_images(numbers)
            for image, matte, sample in zip(plain, foregrounds, samples):
                rows = image, matte, sample["masks"], sample["images"]
                columns.append(torch.cat([row.expand(3, -1, -1) for row in rows], dim=1))  # [3, 4 · H, W]
    filled = torch.tensor([coverage for coverage in coverages if coverage > 0], dtype=torch.float32, device="cpu")
    return Preview(
        sheet=_with_captions(torch.cat(columns[:count], dim=2)),
        image_count=len(dataset.images),
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
    canvas = ImageDraw.Draw(sheet)
    for index, row in enumerate(ROWS):
        canvas.text((left - gap, (index + 0.5) * side), row, PANEL_INK, font, anchor="rm")
    return sheet
