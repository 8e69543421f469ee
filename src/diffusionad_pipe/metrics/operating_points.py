"""True and false positives at every threshold, and the metrics that follow from their counts alone."""

import warnings
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from sklearn.exceptions import UndefinedMetricWarning

CURVE_POINTS = 500


class OperatingPoints(NamedTuple):
    """What is called anomalous, `score >= threshold`, at each distinct score of a positive, from the highest down.

    Between two of these thresholds only false positives are added, so no metric needs the others.

    Args:
        thresholds: `[K]` falling.
        true_positives: `[K]` counts, strictly rising to `positives`.
        false_positives: `[K]` counts.
        false_positives_above: `[K]` counts of the negatives above the threshold, without those tied with it.
        overlap: `[K]` in [0, 1], the mean share of a region that is called anomalous.
        positives: number of all positives.
        negatives: number of all negatives.

    Example:
        >>> import numpy as np
        >>> from diffusionad_pipe.metrics.operating_points import rank
        >>> points = rank(positive=np.array([0.9, 0.8, 0.4]), negative=np.array([0.5, 0.3, 0.2, 0.1]))
        >>> points.true_positives.tolist(), points.false_positives.tolist()
        ([1, 2, 3], [0, 0, 1])
        >>> round(points.auroc(), 4), points.f1_max_threshold()
        (0.9167, 0.4)
    """

    thresholds: np.ndarray
    true_positives: np.ndarray
    false_positives: np.ndarray
    false_positives_above: np.ndarray
    overlap: np.ndarray
    positives: int
    negatives: int

    @property
    def defined(self) -> bool:
        """Whether there are positives and negatives, without both of which every metric here is NaN."""
        return self.positives > 0 and self.negatives > 0

    def added(self, rising: np.ndarray) -> np.ndarray:
        """What each threshold adds to one of the rising arrays, `[K]`."""
        return np.diff(rising, prepend=0)

    def auroc(self) -> float:
        """The probability that a positive scores above a negative, ties counted half."""
        if not self.defined:
            return float("nan")
        below = self.negatives - (self.false_positives_above + self.false_positives) / 2
        return float(self.added(self.true_positives) @ below / self.positives / self.negatives)

    def average_precision(self) -> float:
        """The mean over the positives of the precision at their own scores."""
        if not self.defined:
            return float("nan")
        precision = self.true_positives / (self.true_positives + self.false_positives)
        return float(self.added(self.true_positives) @ precision / self.positives)

    def f1_max(self) -> float:
        """The largest F1 over all thresholds."""
        return float(self._f1().max()) if self.defined else float("nan")

    def f1_max_threshold(self) -> float:
        """The threshold of [`f1_max`], the highest where several have it: anomalous is `score >= threshold`."""
        return float(self.thresholds[self._f1().argmax()]) if self.defined else float("nan")

    def _f1(self) -> np.ndarray:
        return 2 * self.true_positives / (self.true_positives + self.false_positives + self.positives)

    def au_pro(self, fpr_limit: float) -> float:
        """The area under the overlap over the false-positive rate up to a limit in (0, 1], divided by the limit."""
        if not 0 < fpr_limit <= 1:
            raise ValueError(f"the limit of the false-positive rate is {fpr_limit}: give one above 0, and at most 1")
        if not self.defined:
            return float("nan")
        false_positives, _, pro = self.corners()
        fpr = false_positives / self.negatives
        # Where the curve rises straight up at the limit, it is cut at the foot of that rise.
        end = int(np.searchsorted(fpr, fpr_limit))  # the first point at the limit or beyond
        curve_fpr = np.append(fpr[:end], fpr_limit)
        curve_pro = np.append(pro[:end], np.interp(fpr_limit, fpr[: end + 1], pro[: end + 1]))
        return float(np.trapezoid(curve_pro, curve_fpr) / fpr_limit)

    def corners(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Where the curves bend, from the threshold that calls nothing anomalous to the one that calls everything.

        Returns:
            False positives, true positives and overlap, `[2K + 2]` each; the curves are straight in between.
        """
        tied = np.stack([self.false_positives_above, self.false_positives], axis=1).ravel()
        false_positives = np.concatenate([[0], tied, [self.negatives]])
        true_positives, overlap = (np.repeat(np.insert(a, 0, 0), 2) for a in (self.true_positives, self.overlap))
        return false_positives, true_positives, overlap

    def roc_curve(self) -> tuple[np.ndarray, np.ndarray]:
        """The ROC curve, thinned for drawing.

        Returns:
            False-positive rate and true-positive rate, at most 500 points each, both rising from 0 to 1; none without
            positives or without negatives.
        """
        false_positives, true_positives, _ = self.corners()
        return self._thin(false_positives / max(self.negatives, 1), true_positives / max(self.positives, 1))

    def precision_recall_curve(self) -> tuple[np.ndarray, np.ndarray]:
        """The precision-recall curve, thinned for drawing.

        Returns:
            Recall, rising from 0 to 1, and precision, from 1 where nothing is called anomalous; at most 500 points
            each; none without positives or without negatives.
        """
        false_positives, true_positives, _ = self.corners()
        called = false_positives + true_positives
        precision = np.where(called > 0, true_positives / np.maximum(called, 1), 1.0)
        return self._thin(true_positives / max(self.positives, 1), precision)

    def pro_curve(self) -> tuple[np.ndarray, np.ndarray]:
        """The curve under which [`au_pro`] takes the area, thinned for drawing.

        Returns:
            False-positive rate and mean overlap of the regions, at most 500 points each, both rising from 0 to 1; none
            without regions or without background.
        """
        false_positives, _, overlap = self.corners()
        return self._thin(false_positives / max(self.negatives, 1), overlap)

    def _thin(self, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """At most 500 points of a curve, evenly spaced along it, the first and the last among them."""
        if not self.defined:
            return np.empty(0), np.empty(0)
        if len(x) <= CURVE_POINTS:
            return x, y
        length = np.concatenate([[0], np.cumsum(np.abs(np.diff(x)) + np.abs(np.diff(y)))])
        kept = np.unique(np.searchsorted(length, np.linspace(0, length[-1], CURVE_POINTS)))
        return x[kept], y[kept]


def rank(positive: np.ndarray, negative: np.ndarray, gain: np.ndarray | None = None) -> OperatingPoints:
    """Operating points of scores.

    Args:
        positive: `[P]` scores of the positives.
        negative: `[N]` scores of the negatives.
        gain: `[P]`, what each positive adds to the overlap, 1 / P unless told.
    """
    order = np.argsort(positive)[::-1]
    ranked = positive[order]
    last_of_tie = np.append(ranked[1:] != ranked[:-1], True)[: len(ranked)]
    thresholds = ranked[last_of_tie]
    true_positives = np.flatnonzero(last_of_tie) + 1
    # Only the few positives need an order; of the negatives it is enough to know how many lie above each of them.
    negative = np.sort(negative)
    return OperatingPoints(
        thresholds,
        true_positives,
        len(negative) - np.searchsorted(negative, thresholds, side="left"),
        len(negative) - np.searchsorted(negative, thresholds, side="right"),
        true_positives / len(ranked) if gain is None else np.cumsum(gain[order])[last_of_tie],
        len(positive),
        len(negative),
    )


def warn_if_undefined(kind: str, counted: str, points: OperatingPoints, stacklevel: int) -> None:
    """Say why metrics are NaN, where they are.

    Args:
        kind: of the metrics, "image" or "pixel".
        counted: what the positives and negatives are.
        points: of these metrics.
        stacklevel: as in `warnings.warn`, counted from the caller.
    """
    if not points.defined:
        warnings.warn(
            f"{kind} metrics are NaN: of the {counted} {points.positives} are defective and {points.negatives} good, "
            "and both are needed",
            UndefinedMetricWarning,
            stacklevel=stacklevel + 1,
        )


def image_metrics(scores: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """image_auroc, image_ap and image_f1_max, NaN with a warning unless there are good and defective pictures.

    Args:
        scores: `[N]`.
        labels: `[N]`, true where the picture is anomalous.
    """
    points = rank(scores[labels], scores[~labels])
    warn_if_undefined("image", "pictures with a score", points, stacklevel=3)
    return {
        "image_auroc": points.auroc(),
        "image_ap": points.average_precision(),
        "image_f1_max": points.f1_max(),
    }


def pixel_metrics(points: OperatingPoints, fpr_limits: Sequence[float]) -> dict[str, float]:
    """pixel_auroc, pixel_ap, pixel_f1_max and au_pro_<limit> for each limit, NaN with a warning where undefined."""
    warn_if_undefined("pixel", "pixels with a mask", points, stacklevel=3)
    return {
        "pixel_auroc": points.auroc(),
        "pixel_ap": points.average_precision(),
        "pixel_f1_max": points.f1_max(),
    } | {f"au_pro_{limit:.2f}": points.au_pro(limit) for limit in fpr_limits}
