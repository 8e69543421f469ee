"""Validation of a pipeline on held-out good pictures with synthetic anomalies, and thresholds from good pictures.

Test pictures are never needed: what is chosen here is chosen on pictures that the model could have had to train on.
"""

import hashlib
import json
import math
import os
from collections.abc import Iterator, Sequence
from math import inf
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from ..files.single_files import edit_file
from ..image_processor import DiffusionADImageProcessor
from ..images.files import MAX_PIXELS, ImageFileError
from ..images.pixels import MAX_ASPECT_RATIO
from ..images.sources import ImageSource
from ..metrics.exact import evaluate_maps, f1_max
from ..pipeline_diffusionad import DiffusionADPipeline
from ..runtime.acceleration import explained_out_of_memory
from ..runtime.progress import tracked
from .pixel_levels import PixelLevels
from .too_few_predicted import TooFewPredictedError

HASHED_ROWS = 256  # of a picture at once


class Validation(NamedTuple):
    """What a pipeline does on held-out pictures.

    Args:
        metrics: of [`evaluate_maps`].
        image_threshold: as [`calibrate_image_threshold`] sets it.
        pixel_threshold: as [`calibrate_pixel_threshold`] sets it.
        anomaly_maps: `[N, 1, H, W]`.
        reconstructions: `[N, 3, H, W]`.
    """

    metrics: dict[str, float]
    image_threshold: float
    pixel_threshold: float
    anomaly_maps: torch.Tensor
    reconstructions: torch.Tensor


class Calibration(NamedTuple):
    """Thresholds from good pictures alone.

    Args:
        image_threshold: as [`calibrate_image_threshold`] sets it.
        pixel_threshold: as [`calibrate_pixel_threshold`] sets it.
        image_count: good pictures that they rest on.
        false_positive_rate: α, which these are enough for.
        failures: sentences on pictures that could not be judged.
        duplicates: sentences on pictures that are another one again, and count for nothing.
    """

    image_threshold: float
    pixel_threshold: float
    image_count: int
    false_positive_rate: float
    failures: list[str]
    duplicates: list[str]


def split_held_out(count: int, fraction: float) -> torch.Tensor:
    """Which of `count` pictures are held out, `[count]` bool: evenly spread in their order, at least one, never all.

    Raises:
        ValueError: for fewer than two pictures.
    """
    if count < 2:
        raise ValueError(f"{count} readable picture: training needs some good pictures, and some to hold out")
    held_out = min(max(1, round(fraction * count)), count - 1)
    is_held_out = torch.zeros(count, dtype=torch.bool, device="cpu")
    is_held_out[torch.arange(1, held_out + 1, device="cpu") * count // (held_out + 1)] = True
    return is_held_out


def smallest_rate(good_count: int) -> float:
    """The smallest false-positive rate that `good_count` calibration pictures can guarantee."""
    return 1 / (good_count + 1)


def calibrate_image_threshold(scores: np.ndarray, labels: np.ndarray, false_positive_rate: float) -> float:
    """The split-conformal quantile of the good pictures' scores (Vovk et al.; Angelopoulos and Bates, 2021).

    With n good pictures it is their ⌈(n + 1)(1 − α)⌉-th smallest score, so that a new good picture, exchangeable with
    them, scores above it with probability at most α. Where n is too small for α the largest good score guarantees
    1 / (n + 1); the threshold with the best F1 against the synthetic anomalies is then taken if it is larger still.

    Args:
        scores: `[N]` image scores.
        labels: `[N]`, 0 for good pictures, each there once, and 1 for synthetic anomalies.
        false_positive_rate: α in (0, 1).
    """
    good = np.sort(scores[labels == 0])
    rank = math.ceil((len(good) + 1) * (1 - false_positive_rate))
    if rank <= len(good):
        return float(good[rank - 1])
    return max(float(good[-1]), f1_max(labels, scores)[1])


def _pixel_share(count: int, false_positive_rate: float) -> float:
    """The share of their pixels that may lie above the threshold of `count` good pictures: (α (n + 1) − 1) / n."""
    return false_positive_rate - (1 - false_positive_rate) / count


def calibrate_pixel_threshold(
    maps: np.ndarray, masks: np.ndarray, labels: np.ndarray, false_positive_rate: float
) -> float:
    """Conformal risk control of the share of a good picture's pixels that are called defective (Angelopoulos et al.,
    2022): the smallest threshold with (n · share + 1) / (n + 1) ≤ α on n good pictures.

    Where n is too small for α it is the 1 − α quantile of the good pictures' pixels, without a guarantee, or the
    threshold with the best F1 against the synthetic masks if that is larger.

    Args:
        maps: `[N, H, W]`.
        masks: `[N, H, W]` bool.
        labels: `[N]`, 0 for good pictures, each there once.
        false_positive_rate: α in (0, 1).
    """
    good = maps[labels == 0]
    share = _pixel_share(len(good), false_positive_rate)
    if share >= 0:
        return float(np.quantile(good, 1 - share, method="higher"))
    return max(float(np.quantile(good, 1 - false_positive_rate)), f1_max(masks.ravel(), maps.ravel())[1])


class _DuplicateError(ValueError):
    """A picture that was there before."""


def calibrate(
    pipeline: DiffusionADPipeline,
    sources: Sequence[ImageSource],
    *,
    batch_size: int = 8,
    false_positive_rate: float = 0.01,
    max_pixels: int = MAX_PIXELS,
) -> Calibration:
    """Set both thresholds from good pictures that the pipeline was not trained on.

    Both are computed at the model's size; enlarging a map to its picture's size raises none of its levels. With tiling
    they come from the blended maps, at the size that was cut. A picture that is there twice, in whatever format, counts
    once: the same one again is no further evidence.

    Args:
        pipeline: in eval mode. Its thresholds are for the tiling that it has, or for whole pictures without.
        sources: the good pictures; of those that cannot be judged, nothing but a sentence comes back.
        batch_size: pictures in one pass of the networks, or tiles.
        false_positive_rate: α in (0, 1), of good pictures and of their pixels.
        max_pixels: larger pictures are refused before they are decoded.

    Returns:
        [`Calibration`].

    Raises:
        TooFewPredictedError: when there are too few pictures for α: fewer than 1 / α − 1 guarantee nothing.
    """
    _refuse_few(len(sources), false_positive_rate, [], [])
    failures: list[str] = []
    duplicates: list[str] = []
    maps: list[np.ndarray] = []
    levels = None if pipeline.tiling is None else PixelLevels()  # maps of all sizes, too large to be held
    scores: list[float] = []
    outputs = pipeline.stream(
        _read_each_once(sources, max_pixels, pipeline.config.image_size if pipeline.tiling is None else None),
        batch_size=batch_size,
        output_type="np",
        match_input_resolution=False,
        return_exceptions=True,
    )
    with explained_out_of_memory(f"batch_size={batch_size} (--batch-size)", "a lower one"):
        for output, source in tracked(zip(outputs, sources), "calibrating", "picture", total=len(sources)):
            if isinstance(output, _DuplicateError):
                duplicates.append(str(output))
            elif isinstance(output, ImageFileError):
                failures.append(str(output))
            elif isinstance(output, Exception):
                failures.append(f"{source.name}: {output}")
            else:
                scores.append(float(output.anomaly_scores[0]))
                if levels is None:
                    maps.append(output.anomaly_maps[0, ..., 0])  # [S, S]
                else:
                    levels.add(output.anomaly_maps)
    _refuse_few(len(scores), false_positive_rate, failures, duplicates)
    image_threshold = calibrate_image_threshold(np.array(scores), np.zeros(len(scores)), false_positive_rate)
    if levels is None:
        stacked, labels = np.stack(maps), np.zeros(len(maps))  # [N, S, S], [N]
        no_masks = np.zeros_like(stacked, dtype=bool)
        pixel_threshold = calibrate_pixel_threshold(stacked, no_masks, labels, false_positive_rate)
    else:
        pixel_threshold = levels.threshold(max(_pixel_share(len(scores), false_positive_rate), 0))
    return Calibration(image_threshold, pixel_threshold, len(scores), false_positive_rate, failures, duplicates)


def _read_each_once(sources: Sequence[ImageSource], max_pixels: int, side: int | None) -> Iterator[Any]:
    """Each picture as the pipeline takes it, or in its place the error of one that cannot be read or was there before.

    Args:
        sources: of the pictures.
        max_pixels: larger ones are refused.
        side: to which they are resized, since two batches wait for the networks; None leaves them whole, for tiles.
    """
    ratio = inf if side is None else MAX_ASPECT_RATIO
    processor = DiffusionADImageProcessor(max_aspect_ratio=ratio)
    names: dict[str, str] = {}  # hash of a picture's pixels → its name
    for source in sources:
        read: Any
        try:
            read = processor.decode(source.read(max_pixels, ratio))
            name = names.setdefault(_pixel_hash(processor, read), source.name)
            if name != source.name:
                raise _DuplicateError(f"{source.name}: the same picture as {name}")
            if side is not None:
                read = processor.preprocess(read, side, side)[0][0]
        except ValueError as error:
            read = error
        yield read


def _pixel_hash(processor: DiffusionADImageProcessor, array: Any) -> str:
    """The sha256 of a picture's size and RGB floats, some rows after the other: the whole may be large."""
    height, width = processor.size(array)
    digest = hashlib.sha256(f"{height} x {width}".encode())
    for top in range(0, height, HASHED_ROWS):
        rows = processor.to_rgb(array, (top, 0, min(HASHED_ROWS, height - top), width))
        digest.update(rows.numpy().tobytes())
    return digest.hexdigest()


def store_thresholds(folder: str | os.PathLike[str], image_threshold: float, pixel_threshold: float) -> None:
    """Write both thresholds into the `model_index.json` of a saved pipeline; all else stays as it is.

    Raises:
        OutputError: when it cannot be written.
    """
    path = Path(folder) / "model_index.json"
    index = json.loads(path.read_text(encoding="utf-8"))
    index |= {"image_threshold": image_threshold, "pixel_threshold": pixel_threshold}
    edit_file(path, json.dumps(index, indent=2, sort_keys=True) + "\n")  # as diffusers writes it


def _refuse_few(count: int, false_positive_rate: float, failures: Sequence[str], duplicates: Sequence[str]) -> None:
    if smallest_rate(count) > false_positive_rate * (1 + 1e-9):
        needed = math.ceil(1 / false_positive_rate - 1e-9) - 1
        possible = math.ceil(1e4 * smallest_rate(count)) / 1e4
        causes = [f"{len(failures)} that cannot be read"] if failures else []
        causes += [f"{len(duplicates)} that are there twice"] if duplicates else []
        besides = f", besides {' and '.join(causes)}," if causes else ""
        raise TooFewPredictedError(
            f"{count} good pictures{besides} cannot promise a false-positive rate of {false_positive_rate:g}: "
            f"give at least {needed}, or --false-positive-rate {possible:g} or more",
            [*failures, *duplicates],
        )


def validate(
    pipeline: DiffusionADPipeline,
    samples: Sequence[dict[str, torch.Tensor]],
    *,
    batch_size: int,
    false_positive_rate: float = 0.01,
) -> Validation:
    """Run a pipeline on held-out good pictures and synthetic anomalies on them.

    Args:
        pipeline: in eval mode.
        samples: of a [`SyntheticAnomalyDataset`], both kinds; the good pictures without augmentation, each once.
        batch_size: of the pipeline's call.
        false_positive_rate: for the thresholds.

    Returns:
        [`Validation`].
    """
    images = torch.stack([sample["images"] for sample in samples])
    masks = torch.stack([sample["masks"] for sample in samples])[:, 0].cpu().numpy() >= 0.5
    labels = torch.stack([sample["labels"] for sample in samples]).cpu().numpy()
    pipeline.set_progress_bar_config(disable=True)
    output = pipeline(images, output_type="pt", batch_size=batch_size)
    maps, scores = output.anomaly_maps[:, 0].cpu().numpy(), output.anomaly_scores.cpu().numpy()
    return Validation(
        evaluate_maps(list(maps), list(masks), scores, labels),
        calibrate_image_threshold(scores, labels, false_positive_rate),
        calibrate_pixel_threshold(maps, masks, labels, false_positive_rate),
        output.anomaly_maps,
        output.reconstructions,
    )
