"""Exact detection and localisation metrics. Knows no files, and nothing is normalised or clamped before a metric."""

from collections.abc import Sequence

import numpy as np
from scipy import ndimage
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score

EIGHT_CONNECTED = np.ones((3, 3), dtype=int)


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
    lower = thresholds[best - 1] if best > 0 else min(0.0, float(thresholds[0]))
    return float(f1[best]), float((thresholds[best] + lower) / 2)


def au_pro(anomaly_maps: Sequence[np.ndarray], masks: Sequence[np.ndarray], fpr_limit: float = 0.3) -> float:
    """Exact area under the per-region-overlap curve (Bergmann et al., MVTec AD, IJCV 2021).

    Regions are 8-connected. The false-positive rate counts all background pixels of the set, the overlap is the
    mean over all regions, every distinct score is a threshold, and the curve is interpolated at the limit.

    Args:
        anomaly_maps: float `[H, W]` each.
        masks: boolean `[H, W]` each.
        fpr_limit: where integration ends; the area is divided by it, so that 1 is perfect.

    Returns:
        The area in [0, 1]; NaN without regions or without background.
    """
    # Each pixel adds either to the false-positive rate or to the overlap of its region when the threshold passes it.
    background_gain, region_gain, scores = [], [], []
    regions = 0
    for anomaly_map, mask in zip(anomaly_maps, masks, strict=True):
        labels, count = ndimage.label(mask, structure=EIGHT_CONNECTED)
        sizes = np.bincount(labels.ravel())
        region_gain.append(np.where(labels > 0, 1.0 / np.maximum(sizes, 1)[labels], 0.0).ravel())
        background_gain.append((labels == 0).ravel())
        scores.append(np.asarray(anomaly_map).ravel())
        regions += count
    is_background, score = np.concatenate(background_gain), np.concatenate(scores)
    if regions == 0 or not is_background.any():
        return float("nan")

    order = np.argsort(-score, kind="stable")
    last_of_tie = np.append(np.diff(score[order]) != 0, True)
    fpr = np.cumsum(is_background[order])[last_of_tie] / is_background.sum()
    pro = np.cumsum(np.concatenate(region_gain)[order])[last_of_tie] / regions
    fpr, pro = np.insert(fpr, 0, 0.0), np.insert(pro, 0, 0.0)

    # Where the curve rises straight up at the limit, it is cut at the foot of that rise.
    end = int(np.searchsorted(fpr, fpr_limit))  # the first point at the limit or beyond
    curve_fpr = np.append(fpr[:end], fpr_limit)
    curve_pro = np.append(pro[:end], np.interp(fpr_limit, fpr[: end + 1], pro[: end + 1]))
    return float(np.trapezoid(curve_pro, curve_fpr) / fpr_limit)


def evaluate_maps(
    anomaly_maps: Sequence[np.ndarray],
    masks: Sequence[np.ndarray | None],
    image_scores: Sequence[float] | np.ndarray,
    labels: Sequence[int] | np.ndarray | None = None,
    *,
    fpr_limits: Sequence[float] = (0.3, 0.05),
) -> dict[str, float]:
    """All metrics of one category.

    Args:
        anomaly_maps: float `[H, W]` each, larger is more anomalous.
        masks: boolean `[H, W]` each, of the maps' sizes; None where nobody marked the pixels: such a picture counts
            in the image metrics and is left out of the pixel metrics.
        image_scores: `[N]`.
        labels: `[N]`, 1 where the picture is anomalous; None takes pictures with a mask that is not empty.
        fpr_limits: limits for the AU-PRO.

    Returns:
        image_auroc, image_ap, image_f1_max, pixel_auroc, pixel_ap, pixel_f1_max, and au_pro_<limit> for each.

    Raises:
        ValueError: when sizes differ, a score is NaN, one of the two classes is absent, no pixel is marked as
            anomalous, or a mask and the labels are None.
    """
    if labels is None:
        unmasked = [index for index, mask in enumerate(masks) if mask is None]
        if unmasked:
            raise ValueError(f"picture {unmasked[0]} has no mask that would tell if it is anomalous: give labels")
        labels = [int(np.asarray(mask, dtype=bool).any()) for mask in masks]
    image_labels = np.asarray(labels).astype(int)
    scores = np.asarray(image_scores, dtype=np.float64)
    measured_maps, measured_masks = [], []  # those of the pixel metrics
    for index, (anomaly_map, mask) in enumerate(zip(anomaly_maps, masks, strict=True)):
        if mask is not None:
            mask = np.asarray(mask, dtype=bool)
            if np.shape(anomaly_map) != mask.shape:
                raise ValueError(
                    f"map {index} is {np.shape(anomaly_map)} and its mask {mask.shape}: resize the mask (nearest)"
                )
            measured_maps.append(anomaly_map)
            measured_masks.append(mask)
        if not (np.isfinite(anomaly_map).all() and np.isfinite(scores[index])):
            raise ValueError(f"map or score {index} is not finite")
    if len(set(image_labels)) < 2:
        raise ValueError("metrics need good and defective pictures; here is only one of the two")
    if not any(mask.any() for mask in measured_masks):
        raise ValueError("all masks are empty or missing: pixel metrics need at least one defective pixel")
    pixel_scores = np.concatenate([np.ravel(m) for m in measured_maps])
    pixel_labels = np.concatenate([mask.ravel() for mask in measured_masks])
    return {
        "image_auroc": float(roc_auc_score(image_labels, scores)),
        "image_ap": float(average_precision_score(image_labels, scores)),
        "image_f1_max": f1_max(image_labels, scores)[0],
        "pixel_auroc": float(roc_auc_score(pixel_labels, pixel_scores)),
        "pixel_ap": float(average_precision_score(pixel_labels, pixel_scores)),
        "pixel_f1_max": f1_max(pixel_labels, pixel_scores)[0],
    } | {f"au_pro_{limit:.2f}": au_pro(measured_maps, measured_masks, limit) for limit in fpr_limits}
