"""Scores and decisions, which the pipeline, exported detectors, predictions and evaluations share. Without torch."""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image


def score_pixels(score_top_k: float, area: int, score_area: int | None = None) -> int:
    """How many of a map's largest pixels the image score is the mean of (paper, section IV-A).

    Args:
        score_top_k: a number of pixels, or a share below 1.
        area: the map's pixels.
        score_area: the pixels that a share is taken of; None is `area`.

    Returns:
        1 to `area`.
    """
    pixels = int(score_top_k) if score_top_k >= 1 else round(score_top_k * (score_area or area))
    return min(max(pixels, 1), area)


def decide(score: float, image_threshold: float | None) -> str | None:
    """What people read: `"defective"` where the score is above the threshold, else `"good"`; None without one."""
    if image_threshold is None:
        return None
    return "defective" if score > image_threshold else "good"


def to_16_bits(anomaly_map: NDArray[Any]) -> Image.Image:
    """An anomaly map `[h, w]` in [0, 1] as a 16-bit grey image, in which 65535 is 1."""
    return Image.fromarray((anomaly_map * 65535).round().astype(np.uint16))
