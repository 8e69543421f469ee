"""What was measured of one category."""

import math
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from .kept_predictions import StoredPredictions
from .test_set import TestImages

Curve: TypeAlias = tuple[np.ndarray, np.ndarray]


class CategoryResult(NamedTuple):
    """Metrics of one category and what they were computed from.

    Args:
        category: its name.
        metrics: names of `METRIC_NAMES`; NaN where one is not defined.
        image_threshold: the model's, or None.
        rows: one for each picture that was judged: path, defect_type, label (0 good, 1 defective), score, decision and
            index, its row in the test split. Without any there are no metrics.
        unmasked: pictures without a usable mask, which the pixel metrics leave out.
        failures: sentences on pictures that could not be judged.
        mask_failures: sentences on masks that cannot be used.
        remarks: sentences on what the metrics leave out, and on why one is not defined.
        f1_max_thresholds: `"image"` and `"pixel"` → the threshold of the largest F1, from which on a score counts as
            anomalous; NaN where it is not defined. It is chosen on test pictures: to describe, never to decide.
        seconds: median time of a picture in the pipeline.
        metrics_seconds: time of all metrics and curves, without reading maps and masks.
        memory: the most bytes that a process held while predicting.
        roc: `"image"` and `"pixel"` → (false-positive rate, true-positive rate), thinned for drawing.
        precision_recall: the same → (recall, precision).
        pro: (false-positive rate, mean overlap of the regions).
        images: that it was measured on.
        predictions: that it was computed from.
    """

    category: str
    metrics: dict[str, float]
    image_threshold: float | None
    rows: list[dict[str, Any]]
    unmasked: int
    failures: list[str]
    mask_failures: list[str]
    remarks: list[str]
    f1_max_thresholds: dict[str, float]
    seconds: float
    metrics_seconds: float
    memory: int
    roc: dict[str, Curve]
    precision_recall: dict[str, Curve]
    pro: Curve
    images: TestImages
    predictions: StoredPredictions


def unmeasured(images: TestImages, predictions: StoredPredictions, failures: list[str]) -> CategoryResult:
    """The result of a category of which no picture could be judged, for these reasons."""
    nothing = (np.empty(0), np.empty(0))
    return CategoryResult(
        category=images.category,
        metrics={},
        image_threshold=None,
        rows=[],
        unmasked=0,
        failures=failures,
        mask_failures=[],
        remarks=[f"not measured: none of its {len(images)} test pictures could be judged"],
        f1_max_thresholds={},
        seconds=math.nan,
        metrics_seconds=0,
        memory=0,
        roc={},
        precision_recall={},
        pro=nothing,
        images=images,
        predictions=predictions,
    )
