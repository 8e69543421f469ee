"""The metrics of any number of pictures in constant memory, with bounds on what that costs in accuracy.

Scores are counted in bins that keep their order at every scale: a bin is the upper half of a float32's bits (sign,
exponent, 7 bits of mantissa), so scores squeezed near 0 stay as far apart as any others. Inside a bin the order is
lost; the metrics take its pixels as tied, and the error bounds are those of the best and the worst order in each bin.
"""

from collections.abc import Sequence

import numpy as np
import torch

from .operating_points import OperatingPoints, image_metrics, pixel_metrics
from .scored_images import Array, check_images, label_regions, where_it_is_fastest

BINS = 2**16
# A region's share is counted in whole numbers of this, so that sums do not depend on their order.
WHOLE_REGION = 2**32


class StreamingAnomalyMetrics:
    """Metrics of pictures that come one after the other, in less than 2 MB whatever their number.

    Only the image scores are kept, one number a picture; the image metrics are exact.

    Args:
        fpr_limits: limits for the AU-PRO.

    Example:
        >>> import numpy as np
        >>> from diffusionad_pipe.metrics import StreamingAnomalyMetrics
        >>> metrics = StreamingAnomalyMetrics()
        >>> for label in (0, 1, 0, 1):
        ...     mask = np.zeros((32, 32), dtype=bool)
        ...     mask[:4, :4] = label
        ...     anomaly_map = 0.9 * mask + 0.1
        ...     metrics.update(anomaly_map, mask, image_scores=anomaly_map.max(), labels=label)
        >>> results = metrics.compute()
        >>> round(results["image_auroc"], 4), round(results["pixel_auroc"], 4), round(results["au_pro_0.30"], 4)
        (1.0, 1.0, 1.0)
    """

    def __init__(self, fpr_limits: Sequence[float] = (0.3, 0.05)) -> None:
        self.fpr_limits = tuple(fpr_limits)
        self.images = 0
        self.regions = 0
        self.defective = np.zeros(BINS, dtype=np.int64)  # pixels of each bin, the lowest scores first
        self.good = np.zeros(BINS, dtype=np.int64)
        self.overlap = np.zeros(BINS, dtype=np.int64)  # shares of regions, of WHOLE_REGION each
        self.scores: list[float] = []
        self.labels: list[bool] = []

    def update(
        self,
        anomaly_maps: Sequence[Array] | Array,
        masks: Sequence[Array | None] | Array | None,
        image_scores: Sequence[float] | Array | float | None = None,
        labels: Sequence[int] | Array | int | None = None,
    ) -> None:
        """Count one picture or several. Nothing is counted when it raises.

        Args:
            anomaly_maps: `[H, W]`, `[B, H, W]` or a sequence of `[H, W]`, NumPy or torch; a tensor is binned on its
                device.
            masks: of the maps' sizes, not zero where defective; None where nobody marked the pixels: such a picture
                counts in the image metrics alone.
            image_scores: `[B]`, or one number for one picture; None leaves the pictures out of the image metrics.
            labels: as the scores, 1 where the picture is anomalous; None takes pictures with a mask that is not empty.

        Raises:
            ValueError: as [`check_images`], pictures numbered over all updates.
        """
        if isinstance(anomaly_maps, Array) and anomaly_maps.ndim == 2:
            anomaly_maps, masks = anomaly_maps[None], None if masks is None else [masks]  # type: ignore[list-item]
        images = check_images(anomaly_maps, masks, image_scores, labels, first=self.images)
        self.images += len(images.maps)
        self.scores += images.scores.tolist()
        self.labels += images.labels.tolist()
        for anomaly_map, mask in zip(images.maps, images.masks):
            if mask is not None:
                self._count(score_bins(where_it_is_fastest(anomaly_map)), mask)

    def _count(self, bins: Array, mask: np.ndarray) -> None:
        if isinstance(bins, torch.Tensor):
            self.good += torch.bincount(bins.flatten(), minlength=BINS).cpu().numpy()
            defective = bins[torch.from_numpy(mask).to(bins.device)].cpu().numpy()
        else:
            self.good += np.bincount(bins.ravel(), minlength=BINS)
            defective = bins[mask]
        if not mask.any():
            return
        regions, sizes = label_regions(mask)
        # The cells are sorted by region, then by bin.
        cells, pixels = np.unique(regions * BINS + defective, return_counts=True)
        region, cell_bin = np.divmod(cells, BINS)
        passed = np.cumsum(pixels) - (np.cumsum(sizes) - sizes)[region]  # pixels of the region up to this bin
        share = passed * WHOLE_REGION // sizes[region] - (passed - pixels) * WHOLE_REGION // sizes[region]
        np.add.at(self.overlap, cell_bin, share)
        np.add.at(self.defective, cell_bin, pixels)
        np.subtract.at(self.good, cell_bin, pixels)
        self.regions += len(sizes)

    def merge(self, other: "StreamingAnomalyMetrics") -> None:
        """Count what another one has counted, exactly as if its pictures had come here."""
        self.images += other.images
        self.regions += other.regions
        self.defective += other.defective
        self.good += other.good
        self.overlap += other.overlap
        self.scores += other.scores
        self.labels += other.labels

    def compute(self) -> dict[str, float]:
        """The metrics so far.

        Returns:
            Names and values of [`evaluate_maps`], the image metrics where there were image scores, and
            <metric>_error for every pixel metric: the exact value is no further away, rounding (1e-9) aside. What is
            undefined is NaN, with a warning.
        """
        points = self.operating_points()
        metrics = image_metrics(np.array(self.scores), np.array(self.labels)) if self.scores else {}
        return metrics | pixel_metrics(points, self.fpr_limits) | error_bounds(points, self.fpr_limits)

    def operating_points(self) -> OperatingPoints:
        """Operating points of the pixels so far, one for each bin with positives, at the bin's lowest score."""
        occupied = self.defective[::-1] > 0
        defective, good, overlap = (np.cumsum(a[::-1]) for a in (self.defective, self.good, self.overlap))
        return OperatingPoints(
            lowest_scores(np.flatnonzero(occupied[::-1])[::-1]),
            defective[occupied],
            good[occupied],
            (good - self.good[::-1])[occupied],
            overlap[occupied] / max(self.regions, 1) / WHOLE_REGION,
            int(defective[-1]),
            int(good[-1]),
        )


def score_bins(scores: Array) -> Array:
    """Bins in [0, 65536) of finite scores of any shape: a higher score is never in a lower bin."""
    # The sum makes -0.0, which equals 0.0, the same bits.
    bits: Array
    if isinstance(scores, torch.Tensor):
        bits = (scores.float() + 0.0).view(torch.int32)
    else:
        with np.errstate(over="ignore"):  # float64 beyond float32 is infinite, the highest score
            bits = (scores.astype(np.float32) + np.float32(0)).view(np.int32)
    # The bits of negative floats fall as the floats rise.
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (ordered >> 16) + BINS // 2


def lowest_scores(bins: np.ndarray) -> np.ndarray:
    """The lowest float32 score of each bin, the inverse of [`score_bins`]."""
    ordered = ((bins.astype(np.int64) - BINS // 2) << 16).astype(np.int32)
    lowest = (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).view(np.float32)
    return np.where(np.isnan(lowest), np.float32(-np.inf), lowest)  # below minus infinity there are only NaNs


def error_bounds(points: OperatingPoints, fpr_limits: Sequence[float]) -> dict[str, float]:
    """How far the metrics of binned scores can be from the exact ones.

    Args:
        points: one for each bin with positives.
        fpr_limits: limits for the AU-PRO.

    Returns:
        pixel_auroc_error, pixel_ap_error, pixel_f1_max_error, and au_pro_<limit>_error for each.
    """
    names = ["pixel_auroc", "pixel_ap", "pixel_f1_max"] + [f"au_pro_{limit:.2f}" for limit in fpr_limits]
    if not points.defined:
        return {f"{name}_error": float("nan") for name in names}
    after, above, below = points.true_positives, points.false_positives_above, points.false_positives
    positives = points.added(after)
    before = after - positives

    auroc = positives @ (below - above) / 2 / points.positives / points.negatives  # each pair of a bin counts half
    # A positive's precision is at most that of its bin's positives above all the bin's negatives.
    ap_best = positives @ (after / (after + above)) / points.positives
    # At least, they come one by one after all the negatives. f(j) = (before + j) / (before + j + below) is concave in
    # j, so its sum over j = 1 .. p is no less than its integral from ½ to p + ½.
    ap_worst = np.sum(positives - below * np.log1p(positives / (before + 0.5 + below))) / points.positives
    ap = points.average_precision()
    # The thresholds between bins are among the true ones, so the exact F1 is not smaller.
    f1_best = np.max(2 * after / (after + above + points.positives))

    # How the exact PRO curve rises inside a bin is not known; the metric takes the diagonal.
    rise = points.added(points.overlap)
    width = (below - above) / points.negatives
    au_pro = []
    for limit in fpr_limits:
        inside = np.clip(limit - above / points.negatives, 0, width)
        over_diagonal = inside - inside**2 / (2 * np.maximum(width, 1e-300))
        au_pro.append(rise @ over_diagonal / limit + 1 / WHOLE_REGION)
    bounds = [auroc, max(ap_best - ap, ap - ap_worst), f1_best - points.f1_max(), *au_pro]
    return {f"{name}_error": float(bound) for name, bound in zip(names, bounds)}
