"""Detection and localisation metrics. Knows no files, and nothing is normalised or clamped before a metric.

What is undefined, such as the AUROC of good pictures alone, is NaN with an `UndefinedMetricWarning` that says why.
"""

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
from scipy import ndimage
from sklearn.exceptions import UndefinedMetricWarning
from sklearn.metrics import precision_recall_curve

from .operating_points import OperatingPoints, image_metrics, pixel_metrics, rank, warn_if_undefined
from .scored_images import EIGHT_CONNECTED, Array, ScoredImages, check_images, label_regions
from .streaming import StreamingAnomalyMetrics

REFERENCE_THRESHOLDS = 1000


def evaluate_maps(
    anomaly_maps: Sequence[Array] | Array,
    masks: Sequence[Array | None] | Array | None,
    image_scores: Sequence[float] | Array | None = None,
    labels: Sequence[int] | Array | None = None,
    *,
    fpr_limits: Sequence[float] = (0.3, 0.05),
    method: Literal["exact", "streaming", "reference"] = "exact",
) -> dict[str, float]:
    """All metrics of one category.

    Args:
        anomaly_maps: `[H, W]` each, NumPy or torch, larger is more anomalous.
        masks: `[H, W]` each, of the maps' sizes, not zero where defective; None where nobody marked the pixels: such a
            picture counts in the image metrics and is left out of the pixel metrics.
        image_scores: `[N]`; without them there are no image metrics.
        labels: `[N]`, 1 where the picture is anomalous; None takes pictures with a mask that is not empty.
        fpr_limits: limits for the AU-PRO.
        method: "exact" takes every distinct score as a threshold; "streaming" bins the scores as
            [`StreamingAnomalyMetrics`] does; "reference" is exact but for the AU-PRO, that of [`reference_au_pro`].

    Returns:
        image_auroc, image_ap, image_f1_max, pixel_auroc, pixel_ap, pixel_f1_max, and au_pro_<limit> for each; when
        streaming also <metric>_error for each pixel metric, a bound. NaN, with a warning, are the image metrics without
        good or without defective pictures, and the pixel metrics without good or without defective pixels.

    Raises:
        ValueError: for a method or a limit that does not exist, and as [`check_images`].
    """
    if method not in ("exact", "streaming", "reference"):
        raise ValueError(f"there is no method {method!r}: use exact, streaming or reference")
    if method == "streaming":
        streaming = StreamingAnomalyMetrics(fpr_limits)
        streaming.update(anomaly_maps, masks, image_scores, labels)
        return streaming.compute()
    images = check_images(anomaly_maps, masks, image_scores, labels)
    return measure(images, rank_pixels(images), fpr_limits, reference=method == "reference")


def measure(
    images: ScoredImages,
    points: OperatingPoints,
    fpr_limits: Sequence[float] = (0.3, 0.05),
    *,
    reference: bool = False,
) -> dict[str, float]:
    """[`evaluate_maps`] for who needs the operating points as well, which take most of its time.

    Args:
        images: checked; with scores, or there are no image metrics.
        points: of their pixels, by [`rank_pixels`].
        fpr_limits: limits for the AU-PRO.
        reference: whether that is [`reference_au_pro`].
    """
    metrics = image_metrics(images.scores, images.labels) if len(images.scores) else {}
    metrics |= pixel_metrics(points, fpr_limits)
    if reference and points.defined:
        limits = {f"au_pro_{limit:.2f}": limit for limit in fpr_limits}
        metrics |= {name: reference_au_pro(images.maps, images.masks, limit) for name, limit in limits.items()}
    return metrics


def mean_metrics(categories: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The mean of each metric over the categories where it is not NaN; NaN where it is so in all of them.

    Args:
        categories: results of [`evaluate_maps`].
    """
    means = {}
    for name in dict.fromkeys(name for metrics in categories for name in metrics):
        values = [metrics[name] for metrics in categories if not math.isnan(metrics.get(name, math.nan))]
        means[name] = sum(values) / len(values) if values else math.nan
    return means


def f1_max(labels: np.ndarray, scores: np.ndarray) -> tuple[float, float]:
    """The largest F1 over all thresholds, and the threshold in the middle of the gap that separates best.

    Args:
        labels: `[N]`, true where anomalous; at least one.
        scores: `[N]`, larger is more anomalous.

    Returns:
        (F1, threshold): anomalous is `score > threshold`.
    """
    precision, recall, thresholds = precision_recall_curve(labels, scores)
    f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-12)
    best = int(np.argmax(f1[:-1]))
    # Every score from thresholds[best] on is called anomalous; the next lower one is not.
    upper = float(thresholds[best])
    lower = float(thresholds[best - 1]) if best > 0 else min(0.0, float(np.nextafter(upper, -np.inf)))
    middle = (upper + lower) / 2
    return float(f1[best]), middle if middle < upper else lower  # of neighbouring numbers the middle is one of them


def au_pro(
    anomaly_maps: Sequence[Array] | Array, masks: Sequence[Array | None] | Array, fpr_limit: float = 0.3
) -> float:
    """Exact area under the per-region-overlap curve (Bergmann et al., MVTec AD, IJCV 2021).

    Regions are 8-connected. The false-positive rate counts all background pixels of the set, the overlap is the
    mean over all regions, every distinct score is a threshold, and the curve is interpolated at the limit.

    Args:
        anomaly_maps: `[H, W]` each.
        masks: `[H, W]` each, not zero where defective.
        fpr_limit: where integration ends; the area is divided by it, so that 1 is perfect.

    Returns:
        The area in [0, 1]; NaN, with a warning, without regions or without background.
    """
    points = rank_pixels(check_images(anomaly_maps, masks))
    warn_if_undefined("pixel", "pixels with a mask", points, stacklevel=2)
    return points.au_pro(fpr_limit)


def reference_au_pro(
    anomaly_maps: Sequence[Array] | Array, masks: Sequence[Array | None] | Array | None, fpr_limit: float = 0.3
) -> float:
    """The AU-PRO as the authors' evaluation computes it, to compare with their figures (HuiZhang0812/DiffusionAD).

    Thresholds are 1000 even steps down from the largest score, in the maps' precision; holes of a region count as
    called or not but not in its size, so its overlap can exceed 1; the curve ends at the last threshold within the
    limit and is stretched to a width of 1, however little of the limit it covers.

    Args:
        anomaly_maps: `[H, W]` each.
        masks: `[H, W]` each, not zero where defective.
        fpr_limit: the largest false-positive rate that is kept.

    Returns:
        The area. NaN, with a warning, without regions, without background, or when no threshold has a false-positive
        rate above 0 and within the limit, as when all scores are equal.
    """
    images = check_images(anomaly_maps, masks)
    measured = [(m.cpu().numpy(), mask) for m, mask in zip(images.maps, images.masks) if mask is not None]
    high = max((m.max() for m, _ in measured), default=np.float32(0))
    low = min((m.min() for m, _ in measured), default=high)
    step = (high - low) / REFERENCE_THRESHOLDS
    rising = (high - np.arange(REFERENCE_THRESHOLDS, dtype=high.dtype) * step)[::-1]
    # What is called from each threshold on, the highest first; the last entry is of pixels that none of them calls.
    bins = REFERENCE_THRESHOLDS + 1
    good, overlap, regions = np.zeros(bins), np.zeros(bins), 0
    for anomaly_map, mask in measured:
        first = REFERENCE_THRESHOLDS - np.searchsorted(rising, anomaly_map)
        good += np.bincount(first[~mask], minlength=bins)
        labels, count = ndimage.label(mask, structure=EIGHT_CONNECTED)
        for number, box in enumerate(ndimage.find_objects(labels), start=1):
            region = labels[box] == number
            filled = ndimage.binary_fill_holes(region, structure=EIGHT_CONNECTED)
            overlap += np.bincount(first[box][filled], minlength=bins) / region.sum()
        regions += count
    fpr = np.cumsum(good)[:-1] / max(good.sum(), 1)
    pro = np.cumsum(overlap)[:-1] / max(regions, 1)
    fpr, pro = fpr[fpr <= fpr_limit], pro[fpr <= fpr_limit]
    if regions == 0 or fpr[-1] == 0:
        warnings.warn(
            f"the reference's AU-PRO is NaN: there are {regions} regions, and its thresholds with a false-positive "
            f"rate up to {fpr_limit} reach {fpr[-1]}",
            UndefinedMetricWarning,
            stacklevel=2,
        )
        return float("nan")
    return float(np.trapezoid(pro, fpr / fpr[-1]))


def rank_pixels(images: ScoredImages) -> OperatingPoints:
    """Operating points of all pixels of the pictures with masks."""
    defective, gain, good = ([np.empty(0, dtype=np.float32)] for _ in range(3))
    regions = 0
    for anomaly_map, mask in zip(images.maps, images.masks):
        if mask is None:
            continue
        scores = anomaly_map.cpu().numpy()
        good.append(scores[~mask])
        if mask.any():
            region, sizes = label_regions(mask)
            defective.append(scores[mask])
            gain.append(1 / sizes[region])
            regions += len(sizes)
    return rank(np.concatenate(defective), np.concatenate(good), np.concatenate(gain) / max(regions, 1))
