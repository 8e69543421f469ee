"""Compute the metrics of one category from its predictions that are kept."""

import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.exceptions import UndefinedMetricWarning

from ..image_processor import DiffusionADImageProcessor
from ..metrics.exact import measure, rank_pixels
from ..metrics.operating_points import OperatingPoints, rank
from ..metrics.scored_images import check_images
from ..metrics.streaming import StreamingAnomalyMetrics
from ..scoring import decide
from .kept_predictions import Prediction, StoredPredictions
from .reference_protocol import eroded_mask
from .results import CategoryResult, unmeasured
from .settings import EvaluationSettings
from .test_set import TestImages


@dataclass
class ReadPredictions:
    """The predictions of a category beside its masks, and what is missing of both.

    Args:
        streaming: takes maps and masks one by one, which are then not held; None holds them.
        rows: one for each picture, as in [`CategoryResult`].
        maps: `[h, w]` float32 each, at the size that is compared.
        masks: bool of the same sizes; None where there is none that can be used.
        unmasked: how many of these there are.
        failures: sentences on pictures without a prediction.
        mask_failures: sentences on masks that cannot be used.
        seconds: time of each picture.
        memory: the most bytes that a process held.
        streaming_seconds: that `streaming` took.
    """

    streaming: StreamingAnomalyMetrics | None
    failures: list[str]
    mask_failures: list[str]
    rows: list[dict[str, Any]] = field(default_factory=list)
    maps: list[np.ndarray] = field(default_factory=list)
    masks: list[np.ndarray | None] = field(default_factory=list)
    unmasked: int = 0
    seconds: list[float] = field(default_factory=list)
    memory: int = 0
    streaming_seconds: float = 0.0

    def add(
        self, prediction: Prediction, anomaly_map: np.ndarray, mask: np.ndarray | None, row: dict[str, Any]
    ) -> None:
        """Take in one picture."""
        if self.streaming is None:
            self.maps.append(anomaly_map)
            self.masks.append(mask)
        else:
            started = time.perf_counter()
            self.streaming.update(anomaly_map, mask, prediction.score, row["label"])
            self.streaming_seconds += time.perf_counter() - started
        self.unmasked += mask is None
        self.rows.append(row)
        self.seconds.append(prediction.seconds)
        self.memory = max(self.memory, prediction.memory)


def measure_category(
    images: TestImages, predictions: StoredPredictions, settings: EvaluationSettings, failed: Mapping[int, str]
) -> CategoryResult:
    """Metrics of one category from its stored predictions.

    Args:
        images: of the category.
        predictions: of them.
        settings: how.
        failed: index of a picture → why it could not be judged, of [`predict_category`].

    Raises:
        ValueError: when predictions are missing.
    """
    read = _read_predictions(images, predictions, settings, failed)
    if not read.rows:
        return unmeasured(images, predictions, read.failures)
    threshold = predictions.settings["thresholds"]["image_threshold"]
    scores = np.array([row["score"] for row in read.rows])
    labels = np.array([row["label"] for row in read.rows], dtype=bool)

    started = time.perf_counter()
    metrics, pixels, undefined = _compute(read, scores, labels, settings.is_reference)
    points = {"image": rank(scores[labels], scores[~labels]), "pixel": pixels}
    roc = {name: ranked.roc_curve() for name, ranked in points.items()}
    precision_recall = {name: ranked.precision_recall_curve() for name, ranked in points.items()}
    metrics_seconds = read.streaming_seconds + time.perf_counter() - started
    if threshold is not None:
        metrics["right_decisions"] = float(((scores > threshold) == labels).mean())
    return CategoryResult(
        category=images.category,
        metrics=metrics,
        image_threshold=threshold,
        rows=read.rows,
        unmasked=read.unmasked,
        failures=read.failures,
        mask_failures=read.mask_failures,
        remarks=_remarks(read, len(images) + len(images.left_out)) + undefined,
        f1_max_thresholds={name: ranked.f1_max_threshold() for name, ranked in points.items()},
        seconds=float(np.median(read.seconds)),
        metrics_seconds=metrics_seconds,
        memory=read.memory,
        roc=roc,
        precision_recall=precision_recall,
        pro=pixels.pro_curve(),
        images=images,
        predictions=predictions,
    )


def require_stored(predictions: StoredPredictions, settings: EvaluationSettings) -> None:
    """Raise a ValueError where the predictions that are kept are of another protocol, or of other tiles."""
    folder = predictions.folder.path / predictions.name
    if predictions.settings.get("protocol") != settings.protocol:
        raise ValueError(f"{folder} has no predictions under the protocol {settings.protocol}: give the model")
    stored = predictions.settings.get("tiling")
    if stored != (None if settings.tiling is None else list(settings.tiling)):
        kind = "of whole pictures" if stored is None else f"in tiles of {stored[0]} pixels that share {stored[1]:g}"
        raise ValueError(f"{folder} has predictions {kind}: give the same --tile-size and --tile-overlap, or the model")


def _read_predictions(
    images: TestImages, predictions: StoredPredictions, settings: EvaluationSettings, failed: Mapping[int, str]
) -> ReadPredictions:
    """Every prediction beside its mask."""
    streaming = StreamingAnomalyMetrics() if settings.method == "streaming" and not settings.is_reference else None
    read = ReadPredictions(streaming, list(images.left_out), list(images.unclear_masks))
    threshold = predictions.settings["thresholds"]["image_threshold"]
    for index, path in enumerate(images.paths):
        content = images.contents[index]
        prediction = None if content is None else predictions.read(content)
        if prediction is None:
            folder = predictions.folder.path / predictions.name
            read.failures.append(failed.get(index) or _failure(images, index, failed, folder))
            continue
        try:
            mask = images.mask(index, prediction.size)
        except ValueError as error:
            mask = None
            read.mask_failures.append(str(error))
        score, label = prediction.score, images.labels[index]
        decision = decide(score, threshold)
        row = {"path": path, "defect_type": images.defect_types[index], "label": label, "score": score}
        read.add(prediction, *_at_one_size(prediction, mask, settings), row | {"decision": decision, "index": index})
    return read


def _at_one_size(
    prediction: Prediction, mask: np.ndarray | None, settings: EvaluationSettings
) -> tuple[np.ndarray, np.ndarray | None]:
    """Map and mask at the size at which they are compared."""
    anomaly_map, size = prediction.anomaly_map, prediction.anomaly_map.shape
    if settings.is_reference:
        return anomaly_map, None if mask is None else eroded_mask(mask, size)
    if settings.at_model_size:
        if mask is not None:
            tensor = torch.from_numpy(mask).float()[None, None]
            mask = F.interpolate(tensor, size, mode="nearest-exact")[0, 0].bool().numpy()
        return anomaly_map, mask
    whole = torch.from_numpy(anomaly_map)[None, None]  # [1, 1, h, w]
    return DiffusionADImageProcessor().resize_to(whole, [prediction.size])[0][0].numpy(), mask


def _compute(
    read: ReadPredictions, scores: np.ndarray, labels: np.ndarray, is_reference: bool
) -> tuple[dict[str, float], OperatingPoints, list[str]]:
    """The metrics, the ranked pixels, and sentences on metrics that are not defined."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UndefinedMetricWarning)
        if read.streaming is not None:
            metrics, pixels = read.streaming.compute(), read.streaming.operating_points()
        else:
            checked = check_images(read.maps, read.masks, scores, labels)
            pixels = rank_pixels(checked)
            metrics = measure(checked, pixels, reference=is_reference)
    return metrics, pixels, [str(warning.message) for warning in caught]


def _remarks(read: ReadPredictions, count: int) -> list[str]:
    """Sentences on what the metrics leave out, of `count` test pictures."""
    remarks, judged = [], len(read.rows)
    without_mask = read.unmasked - len(read.mask_failures)
    if without_mask > 0:
        remarks.append(
            f"{without_mask} of {judged} pictures are defective without a usable mask: not in the pixel metrics"
        )
    if read.mask_failures:
        remarks.append(
            f"{len(read.mask_failures)} of {judged} pictures have a mask that cannot be used: not in the pixel metrics"
        )
    if read.failures:
        remarks.append(f"{len(read.failures)} of {count} test pictures could not be judged: not in any metric")
    return remarks


def _failure(images: TestImages, index: int, failed: Mapping[int, str], folder: Path) -> str:
    """Why a picture has no prediction, if not for want of a model.

    Raises:
        ValueError: when it is for that.
    """
    path, content = images.paths[index], images.contents[index]
    for other in failed:
        if content is not None and images.contents[other] == content:
            return f"{path}: the same picture as {images.paths[other]}, which could not be judged"
    try:
        images.image(index)
    except ValueError as error:
        return str(error)
    if content is None:
        return f"{path}: it could not be read before; run the command again"
    raise ValueError(f"{folder} has no prediction for {path}: give the model to go on")
