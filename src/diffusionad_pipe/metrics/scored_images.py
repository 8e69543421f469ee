"""Anomaly maps, masks, image scores and labels as the metrics take them: checked, and the defects' regions found."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy import ndimage

EIGHT_CONNECTED = np.ones((3, 3), dtype=int)

Array = np.ndarray | torch.Tensor


class ScoredImages(NamedTuple):
    """Checked pictures.

    Args:
        maps: float32 or float64 `[H, W]` each, on the device they came on.
        masks: boolean `[H, W]` each; None where nobody marked the pixels.
        scores: float64 `[N]`, or `[0]` where none were given.
        labels: boolean of the scores' size, true where the picture is anomalous.
    """

    maps: list[torch.Tensor]
    masks: list[np.ndarray | None]
    scores: np.ndarray
    labels: np.ndarray


def check_images(
    anomaly_maps: Sequence[Array] | Array,
    masks: Sequence[Array | None] | Array | None,
    image_scores: Sequence[float] | Array | float | None = None,
    labels: Sequence[int] | Array | int | None = None,
    *,
    first: int = 0,
) -> ScoredImages:
    """Pictures whose parts belong together.

    Args:
        anomaly_maps: `[H, W]` each, any real dtype, NumPy or torch.
        masks: `[H, W]` each, not zero where defective; None for a picture, or for all, where nobody marked the pixels.
        image_scores: `[N]` or None.
        labels: `[N]`; None takes pictures with a mask that is not empty.
        first: the number of the first picture, for the errors.

    Raises:
        ValueError: when numbers or sizes differ, a map or score is NaN or infinite, or, where image scores are given,
            a picture has neither label nor mask.
    """
    maps = [_as_tensor(anomaly_map) for anomaly_map in anomaly_maps]
    marked = [None] * len(maps) if masks is None else masks
    checked: list[np.ndarray | None] = [None if mask is None else _on_cpu(mask).astype(bool) for mask in marked]
    scores = np.empty(0) if image_scores is None else np.atleast_1d(_on_cpu(image_scores)).astype(np.float64)
    given: dict[str, Any] = {"masks": checked} if image_scores is None else {"masks": checked, "scores": scores}
    if labels is not None:
        given["labels"] = np.atleast_1d(_on_cpu(labels)).astype(bool)
    for name, parts in given.items():
        if len(parts) != len(maps):
            raise ValueError(f"there are {len(maps)} maps and {len(parts)} {name}: give one to each picture")

    broken = set(np.flatnonzero(~np.isfinite(scores)).tolist())
    for index, (anomaly_map, mask) in enumerate(zip(maps, checked)):
        size = tuple(anomaly_map.shape)
        if len(size) != 2 or (mask is not None and mask.shape != size):
            of_mask = "" if mask is None else f" and its mask {mask.shape}"
            raise ValueError(f"map {first + index} is {size}{of_mask}: give both as [H, W], the mask resized (nearest)")
        values = where_it_is_fastest(anomaly_map)
        if not (np.isfinite(values) if isinstance(values, np.ndarray) else values.isfinite()).all():
            broken.add(index)
    if broken:
        names = ", ".join(str(first + index) for index in sorted(broken))
        raise ValueError(f"map or score {names} is not finite: NaN and infinity have no rank")
    if image_scores is None:
        return ScoredImages(maps, checked, scores, np.empty(0, dtype=bool))
    if labels is not None:
        return ScoredImages(maps, checked, scores, given["labels"])
    for index, mask in enumerate(checked):
        if mask is None:
            raise ValueError(f"picture {first + index} has no mask that would tell if it is anomalous: give labels")
    return ScoredImages(maps, checked, scores, np.array([mask.any() for mask in checked if mask is not None]))


def label_regions(mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The 8-connected regions of a mask with P > 0 defective pixels.

    Args:
        mask: boolean `[H, W]`.

    Returns:
        `[P]` the region of each defective pixel in the order of `map[mask]`, from 0; `[R]` the regions' pixels.
    """
    (box,) = ndimage.find_objects(mask.view(np.int8))  # labelling costs by the pixel, and defects are small
    labels, _ = ndimage.label(mask[box], structure=EIGHT_CONNECTED)
    regions = labels[mask[box]].astype(np.int64) - 1
    return regions, np.bincount(regions)


def where_it_is_fastest(values: torch.Tensor) -> Array:
    """The same numbers for NumPy where they are on the CPU: on a busy machine torch's threads wait for each other many
    times longer than the few operations on a map take."""
    return values.numpy() if values.is_cpu else values


def _as_tensor(values: Any) -> torch.Tensor:
    # torch can only share memory that is contiguous and writable.
    tensor = (
        values.detach() if isinstance(values, torch.Tensor) else torch.from_numpy(np.require(values, None, ["C", "W"]))
    )
    # Integers above 2**24 would tie in float32.
    least = torch.float32 if tensor.is_floating_point() else torch.float64
    return tensor.to(torch.promote_types(tensor.dtype, least))


def _on_cpu(values: Any) -> np.ndarray:
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu()
        return (values.double() if values.is_floating_point() else values).numpy()  # NumPy has no bfloat16
    if isinstance(values, list | tuple):
        values = [value.item() if isinstance(value, torch.Tensor) else value for value in values]
    return np.asarray(values)
