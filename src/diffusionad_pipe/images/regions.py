"""The defects of an anomaly map one by one: how large, how sure, and where."""

from typing import Any, NamedTuple

import numpy as np
import torch
from scipy import ndimage

from ..metrics.scored_images import EIGHT_CONNECTED


class DefectRegion(NamedTuple):
    """Pixels above the threshold that touch each other, corners included.

    Args:
        area: number of pixels, 1 or more.
        peak: largest value of the map in it, in [0, 1].
        box: (left, top, right, bottom) in pixels, the last two beyond the region, as Pillow's `crop` takes it.
    """

    area: int
    peak: float
    box: tuple[int, int, int, int]


def find_defect_regions(anomaly_map: np.ndarray | torch.Tensor, threshold: float) -> list[DefectRegion]:
    """The connected regions in which an anomaly map is above a threshold.

    Args:
        anomaly_map: floats `[H, W]`, in [0, 1].
        threshold: the pixel threshold, in [0, 1]; a pixel that equals it is normal, as in `predicted_masks`.

    Returns:
        The regions, the largest first; those of equal size in reading order.

    Raises:
        ValueError: for a map of another shape.
    """
    values: Any = anomaly_map.detach().cpu().numpy() if isinstance(anomaly_map, torch.Tensor) else anomaly_map
    if values.ndim != 2:
        raise ValueError(f"the anomaly map has shape {values.shape}: give one map, [H, W]")
    labels, count = ndimage.label(values > threshold, structure=EIGHT_CONNECTED)
    if not count:
        return []
    areas = np.bincount(labels.ravel(), minlength=count + 1)[1:]
    peaks = ndimage.maximum(values, labels, np.arange(1, count + 1))
    boxes = [(across.start, down.start, across.stop, down.stop) for down, across in ndimage.find_objects(labels)]
    regions = [DefectRegion(int(a), float(p), box) for a, p, box in zip(areas, peaks, boxes)]
    return sorted(regions, key=lambda region: -region.area)
