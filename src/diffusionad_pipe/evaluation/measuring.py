"""Measure a pipeline on the test pictures of one or several categories.

Predictions are stored picture by picture: an interrupted evaluation goes on where it was, several processes share the
work, and metrics are computed again without the model. Nothing is chosen here: no threshold, no checkpoint.
"""

import math
import os
import re
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
import psutil
import torch
import torch.nn.functional as F
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from PIL import Image, ImageOps
from sklearn.exceptions import UndefinedMetricWarning

from ..files.output_folder import OutputError, OutputFolder, safe_name
from ..image_processor import DiffusionADImageProcessor
from ..images.files import MAX_PIXELS, shown
from ..metrics.exact import measure, rank_pixels
from ..metrics.operating_points import rank
from ..metrics.scored_images import check_images
from ..metrics.streaming import StreamingAnomalyMetrics
from ..pipeline_diffusionad import DiffusionADPipeline
from ..prediction.predict import fingerprint
from ..runtime.acceleration import explained_out_of_memory, join_processes
from ..runtime.batch_failures import TooFewPredictedError, run_batch
from ..runtime.progress import tracked
from .kept_predictions import SETTINGS, Prediction, StoredPredictions, name_predictions
from .test_set import TestImages, load_test_images

PROTOCOLS = ("exact", "reference")
Curve: TypeAlias = tuple[np.ndarray, np.ndarray]
REFERENCE_TOP_K = 50  # pixels whose mean is the authors' image score


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


def evaluate(
    model: str | os.PathLike[str] | None,
    data: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    category: str | None = None,
    protocol: str = "exact",
    method: Literal["exact", "streaming"] = "exact",
    at_model_size: bool = False,
    num_noise_samples: int = 1,
    batch_size: int = 8,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device | None = None,
    max_pixels: int = MAX_PIXELS,
) -> list[CategoryResult]:
    """Predict every test picture and compute the metrics of each category.

    Under `accelerate launch` the processes share the batches; the results are the same for any number of them, and
    only the main process computes metrics.

    Args:
        model: a pipeline's folder or Hub id, or a folder with one pipeline a category, named like it. None computes
            the metrics anew from the predictions in `output`.
        data: any layout of [`load_anomaly_dataset`].
        output: folder for the predictions, in `predictions/<category>`.
        category: one category, `"all"`, or None where `data` holds only one.
        protocol: `"exact"`, or `"reference"` for the authors' way: pictures resized without antialiasing, masks
            resized bilinearly and only what is exactly 1 kept, the mean of 50 pixels as the score, and their PRO.
        method: of the metrics, `"exact"` or `"streaming"`, see [`evaluate_maps`]; the reference protocol has its own.
        at_model_size: compare maps and masks (nearest) at the model's size, not at the pictures' own.
        num_noise_samples: independent noises that every prediction is the mean of: an ensemble.
        batch_size: pictures in one pass.
        dtype: of the networks; predictions of another one are made anew.
        device: None takes a GPU where there is one.
        max_pixels: pictures and masks of more are refused before they are decoded.

    Returns:
        One result a category; none in the processes that are not the main one. A category whose model cannot be loaded,
        or of whose pictures none could be judged, has no metrics.

    Raises:
        OutputError: when `output` cannot be written to, or another run writes into it.
        TooFewPredictedError: when none of all pictures could be judged.
        ValueError: names what is missing.
    """
    join_processes()
    categories = load_test_images(data, category, max_pixels)
    models = None if model is None else find_models(model, [images.category for images in categories])
    return evaluate_categories(
        categories,
        models,
        OutputFolder(output, "evaluate"),
        protocol=protocol,
        method=method,
        at_model_size=at_model_size,
        num_noise_samples=num_noise_samples,
        batch_size=batch_size,
        dtype=dtype,
        device=device,
    )


def evaluate_categories(
    categories: Sequence[TestImages],
    models: Sequence[str] | None,
    folder: OutputFolder,
    *,
    protocol: str = "exact",
    method: Literal["exact", "streaming"] = "exact",
    at_model_size: bool = False,
    num_noise_samples: int = 1,
    batch_size: int = 8,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device | None = None,
) -> list[CategoryResult]:
    """[`evaluate`] for pictures and models that have been found.

    Args:
        categories: of [`load_test_images`].
        models: of [`find_models`]; None computes the metrics anew from the predictions in `folder`.
        folder: for the predictions.
        protocol, method, at_model_size, num_noise_samples, batch_size, dtype, device: as of [`evaluate`].
    """
    state = join_processes()
    if protocol not in PROTOCOLS:
        raise ValueError(f"protocol must be {' or '.join(PROTOCOLS)}, not {protocol!r}")
    names = name_predictions([images.category for images in categories])
    several = len(set(models or ())) > 1
    pipe = None
    results = []
    with held_by_main(folder, *(f"{name}/{SETTINGS}" for name in names)):
        stored = [StoredPredictions(folder, name) for name in names]
        outcomes: list[dict[int, str] | str] = [{} for _ in categories]
        for place, path in enumerate(models or ()):
            if pipe is None or several:
                try:
                    pipe = DiffusionADPipeline.from_pretrained(path, dtype=dtype).to(device or state.device)
                except (OSError, ValueError) as error:
                    if not several:
                        raise
                    outcomes[place] = f"{categories[place].category}: its model cannot be loaded: {error}"
                    continue
                pipe.set_progress_bar_config(disable=True)
            outcomes[place] = predict_category(
                pipe, categories[place], stored[place], protocol, num_noise_samples, batch_size
            )
        if not state.is_main_process:
            return []
        folder.read_record()
        for images, predictions, outcome in zip(categories, stored, outcomes):
            if isinstance(outcome, str):
                results.append(unmeasured(images, predictions, [outcome]))
            else:
                results.append(measure_category(images, predictions, protocol, method, at_model_size, outcome))
    if not any(result.rows for result in results):
        sentences = [sentence for result in results for sentence in result.failures]
        raise TooFewPredictedError("none of the test pictures could be judged, so nothing was measured", sentences)
    return results


@contextmanager
def held_by_main(folder: OutputFolder, *names: str) -> Iterator[None]:
    """Let no other run write into a folder: the main process has its lock, and where it cannot get it all fail.

    Args:
        folder: of the output.
        names: files in it that are going to be written.

    Raises:
        OutputError: in every process.
    """
    error = None
    with ExitStack() as stack:
        if PartialState().is_main_process:
            try:
                stack.enter_context(folder)
                folder.require_free(*names)
            except OutputError as caught:
                error = str(caught)
        (error,) = broadcast_object_list([error])
        if error is not None:
            raise OutputError(error)
        yield


def find_models(model: str | os.PathLike[str], categories: Sequence[str]) -> list[str]:
    """The pipeline of each category: one for all of them, or the sub-folder of the category's name.

    A category is text, which may hold slashes: a sub-folder is the category's where both give the same [`safe_name`].

    Raises:
        ValueError: names every category without a pipeline.
    """
    folder = Path(model)
    if not folder.is_dir() or (folder / "model_index.json").is_file():
        return [os.fspath(model)] * len(categories)
    pipelines = {
        safe_name(shown(entry.name)): entry for entry in folder.iterdir() if (entry / "model_index.json").is_file()
    }
    missing = [name for name in categories if safe_name(name) not in pipelines]
    if missing:
        folders = [f"{name} (as {safe_name(name)})" if safe_name(name) != name else name for name in missing]
        raise ValueError(f"{folder} is neither a pipeline nor has it one for {', '.join(folders)}: train them first")
    return [os.fspath(pipelines[safe_name(name)]) for name in categories]


def predict_category(
    pipe: DiffusionADPipeline,
    images: TestImages,
    predictions: StoredPredictions,
    protocol: str,
    num_noise_samples: int,
    batch_size: int,
) -> dict[int, str]:
    """Store a [`Prediction`] of every picture. Those that another run left are kept if it would give the same.

    Batches are the same whoever computes them, since in batches of other sizes the last bits differ: one of which a
    prediction is missing is computed whole.

    Returns:
        Index of a picture → why it could not be judged, of all processes.
    """
    state = PartialState()
    settings = {
        "model": fingerprint(pipe),
        "protocol": protocol,
        "num_noise_samples": num_noise_samples,
        "batch_size": batch_size,
        "device": pipe.device.type,
    }
    contents: dict[int, str] = {}  # each once, with the first picture that has it
    if state.is_main_process:
        predictions.begin(settings, {name: pipe.config[name] for name in ("image_threshold", "pixel_threshold")})
        first = {content: index for index, content in reversed(list(enumerate(images.contents)))}
        contents = {index: content for content, index in reversed(first.items()) if content is not None}
    contents, predictions.settings = broadcast_object_list([contents, predictions.settings])
    if not state.is_main_process:
        predictions.folder.read_record()

    failures: dict[int, str] = {}
    indices = sorted(contents)
    starts = range(0, len(indices), batch_size)[state.process_index :: state.num_processes]
    for start in tracked(starts, images.category, "batch", shown=state.is_main_process):
        batch = indices[start : start + batch_size]
        missing = [index for index in batch if predictions.read(contents[index]) is None]
        if not missing:
            continue
        prepared: dict[int, tuple[torch.Tensor, tuple[int, int]]] = {}
        for index in batch:
            try:
                prepared[index] = _preprocess(images.image(index), pipe.config.image_size, protocol)
            except ValueError as error:
                failures[index] = str(error)
                continue
            if images.content(index) != contents[index]:
                del prepared[index]
                failures[index] = f"{images.paths[index]}: it was changed while it was read; run the command again"
        if not prepared:
            continue

        predict = partial(_predict, pipe, prepared, protocol, num_noise_samples)
        for index, result in zip(prepared, run_batch(predict, list(prepared))):
            if isinstance(result, ValueError):
                failures[index] = f"{images.paths[index]}: {result}"
            elif index in missing:
                predictions.write(contents[index], result)
    return dict(gather_object(list(failures.items())))


def _predict(
    pipe: DiffusionADPipeline,
    prepared: Mapping[int, tuple[torch.Tensor, tuple[int, int]]],
    protocol: str,
    num_noise_samples: int,
    batch: Sequence[int],
) -> list[Prediction]:
    """The predictions of some of the prepared pictures in one pass of the networks."""
    started = time.perf_counter()
    tensors = torch.cat([prepared[index][0] for index in batch])
    with explained_out_of_memory(f"batch_size={len(batch)} (--batch-size)", "a lower one"):
        output = pipe(tensors, output_type="pt", num_noise_samples=num_noise_samples, batch_size=len(batch))
    seconds = (time.perf_counter() - started) / len(batch)
    scores = output.anomaly_scores
    if protocol == "reference":
        scores = output.anomaly_maps.flatten(1).topk(REFERENCE_TOP_K).values.mean(1)
    return [
        Prediction(
            score=scores[row].item(),
            anomaly_map=output.anomaly_maps[row, 0].numpy(),
            reconstruction=(output.reconstructions[row].permute(1, 2, 0) * 255).round().byte().numpy(),
            size=prepared[index][1],
            seconds=seconds,
            memory=peak_memory(pipe.device),
        )
        for row, index in enumerate(batch)
    ]


def peak_memory(device: torch.device) -> int:
    """The most bytes that this process has held: of the GPU's memory where `device` is one, else resident.

    Where the system keeps no record of the most (macOS), what it holds now.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    most = re.search(r"VmHWM:\s*(\d+) kB", status.read_text(encoding="utf-8")) if status.is_file() else None
    if most is not None:
        return int(most[1]) * 1024
    memory = psutil.Process().memory_info()
    return getattr(memory, "peak_wset", memory.rss)


def measure_category(
    images: TestImages,
    predictions: StoredPredictions,
    protocol: str,
    method: Literal["exact", "streaming"],
    at_model_size: bool,
    failed: Mapping[int, str],
) -> CategoryResult:
    """Metrics of one category from its stored predictions.

    Args:
        images: of the category.
        predictions: of them.
        protocol, method, at_model_size: as of [`evaluate`].
        failed: index of a picture → why it could not be judged, of [`predict_category`].

    Raises:
        ValueError: when predictions are missing.
    """
    folder = predictions.folder.path / predictions.name
    if predictions.settings.get("protocol") != protocol:
        raise ValueError(f"{folder} has no predictions under the protocol {protocol}: give the model")
    threshold = predictions.settings["thresholds"]["image_threshold"]
    processor = DiffusionADImageProcessor()
    reference = protocol == "reference"
    streaming = StreamingAnomalyMetrics() if method == "streaming" and not reference else None
    rows: list[dict[str, Any]] = []
    maps: list[np.ndarray] = []
    masks: list[np.ndarray | None] = []
    failures: list[str] = list(images.left_out)
    mask_failures: list[str] = list(images.unclear_masks)
    seconds, memory = [], 0
    unmasked, metrics_seconds = 0, 0.0
    for index, path in enumerate(images.paths):
        content = images.contents[index]
        prediction = None if content is None else predictions.read(content)
        if prediction is None:
            failures.append(failed.get(index) or _failure(images, index, failed, folder))
            continue
        anomaly_map = torch.from_numpy(prediction.anomaly_map)[None, None]  # [1, 1, S, S]
        try:
            mask = images.mask(index, prediction.size)
        except ValueError as error:
            mask = None
            mask_failures.append(str(error))
        if reference or at_model_size:
            size = prediction.anomaly_map.shape
            if mask is not None:
                mask = _resize_mask(mask, size, eroded=reference)
        else:
            anomaly_map = processor.resize_to(anomaly_map, [prediction.size])[0][None]
        label, score = images.labels[index], prediction.score
        if streaming is not None:
            started = time.perf_counter()
            streaming.update(anomaly_map[0, 0], mask, score, label)
            metrics_seconds += time.perf_counter() - started
        else:
            maps.append(anomaly_map[0, 0].numpy())
            masks.append(mask)
        unmasked += mask is None
        decision = None if threshold is None else ("defective" if score > threshold else "good")
        rows.append(
            {"path": path, "defect_type": images.defect_types[index], "label": label, "score": score}
            | {"decision": decision, "index": index}
        )
        seconds.append(prediction.seconds)
        memory = max(memory, prediction.memory)
    if not rows:
        return unmeasured(images, predictions, failures)
    scores, labels = np.array([row["score"] for row in rows]), np.array([row["label"] for row in rows], dtype=bool)
    remarks = []
    if unmasked > len(mask_failures):
        remarks.append(
            f"{unmasked - len(mask_failures)} of {len(rows)} pictures are defective without a usable mask: not in the "
            "pixel metrics"
        )
    if mask_failures:
        remarks.append(
            f"{len(mask_failures)} of {len(rows)} pictures have a mask that cannot be used: not in the pixel metrics"
        )
    if failures:
        count = len(images) + len(images.left_out)
        remarks.append(f"{len(failures)} of {count} test pictures could not be judged: not in any metric")
    started = time.perf_counter()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UndefinedMetricWarning)
        if streaming is not None:
            metrics, pixels = streaming.compute(), streaming.operating_points()
        else:
            checked = check_images(maps, masks, scores, labels)
            pixels = rank_pixels(checked)
            metrics = measure(checked, pixels, reference=reference)
    remarks += [str(warning.message) for warning in caught]
    points = {"image": rank(scores[labels], scores[~labels]), "pixel": pixels}
    roc = {name: ranked.roc_curve() for name, ranked in points.items()}
    precision_recall = {name: ranked.precision_recall_curve() for name, ranked in points.items()}
    metrics_seconds += time.perf_counter() - started
    if threshold is not None:
        metrics["right_decisions"] = float(((scores > threshold) == labels).mean())
    return CategoryResult(
        category=images.category,
        metrics=metrics,
        image_threshold=threshold,
        rows=rows,
        unmasked=unmasked,
        failures=failures,
        mask_failures=mask_failures,
        remarks=remarks,
        f1_max_thresholds={name: ranked.f1_max_threshold() for name, ranked in points.items()},
        seconds=float(np.median(seconds)),
        metrics_seconds=metrics_seconds,
        memory=memory,
        roc=roc,
        precision_recall=precision_recall,
        pro=pixels.pro_curve(),
        images=images,
        predictions=predictions,
    )


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


def _preprocess(image: Image.Image, side: int, protocol: str) -> tuple[torch.Tensor, tuple[int, int]]:
    """`[1, 3, side, side]` and the picture's (height, width)."""
    processor = DiffusionADImageProcessor()
    if protocol == "exact":
        tensor, sizes = processor.preprocess(image, side, side)
        return tensor, sizes[0]
    image = ImageOps.exif_transpose(image)
    tensor, sizes = processor.preprocess(image, image.height, image.width)
    return _resize_8_bit(tensor, (side, side)), sizes[0]


def _resize_mask(mask: np.ndarray, size: tuple[int, ...], *, eroded: bool) -> np.ndarray:
    tensor = torch.from_numpy(mask).float()[None, None]
    if not eroded:
        return F.interpolate(tensor, size, mode="nearest-exact")[0, 0].bool().numpy()
    return (_resize_8_bit(tensor, size)[0, 0] == 1).numpy()


def _resize_8_bit(tensor: torch.Tensor, size: tuple[int, ...]) -> torch.Tensor:
    """Bilinear, without antialiasing and with 8 bits, as the authors' `cv2.resize` of pictures and masks."""
    return F.interpolate(tensor, size, mode="bilinear", align_corners=False).mul(255).round().div(255)
