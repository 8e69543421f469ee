"""Measure a pipeline on the test pictures of one or several categories.

Predictions are stored picture by picture: an interrupted evaluation goes on where it was, several processes share the
work, and metrics are computed again without the model. Nothing is chosen here: no threshold, no checkpoint.
"""

import hashlib
import json
import os
import resource
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

import datasets
import numpy as np
import torch
import torch.nn.functional as F
from accelerate import PartialState
from PIL import Image, ImageOps
from sklearn.exceptions import UndefinedMetricWarning
from tqdm.auto import tqdm

from .acceleration import join_processes
from .data import load_anomaly_dataset
from .image_files import ImageFileError, open_cell, write_atomically
from .image_processor import DiffusionADImageProcessor
from .masks import read_mask
from .metrics import measure, rank_pixels
from .metrics_streaming import StreamingAnomalyMetrics
from .operating_points import rank
from .pipeline_diffusionad import DiffusionADPipeline
from .prediction import fingerprint
from .scored_pictures import check_pictures

PROTOCOLS = ("exact", "reference")
Curve: TypeAlias = tuple[np.ndarray, np.ndarray]
REFERENCE_TOP_K = 50  # pixels whose mean is the authors' image score


class Prediction(NamedTuple):
    """What a model said of one test picture.

    Args:
        score: image score.
        anomaly_map: `[S, S]` float32 at the model's size.
        reconstruction: `[S, S, 3]` uint8.
        size: (height, width) of the picture in pixels.
        seconds: its share of the time that its batch took in the pipeline.
        memory: the most bytes that its process had held until then, of a GPU's memory where it ran on one.
    """

    score: float
    anomaly_map: np.ndarray
    reconstruction: np.ndarray
    size: tuple[int, int]
    seconds: float
    memory: int


class CategoryResult(NamedTuple):
    """Metrics of one category and what they were computed from.

    Args:
        category: its name.
        metrics: names of `METRIC_NAMES`; NaN where one is not defined.
        image_threshold: the model's, or None.
        rows: one for each picture that was judged: path, defect_type, label (0 good, 1 defective), score, decision and
            index, its row in the test split.
        unmasked: defective pictures without a usable mask, which the pixel metrics leave out.
        failures: sentences on pictures that could not be read.
        remarks: sentences on what the metrics leave out, and on why one is not defined.
        f1_max_thresholds: `"image"` and `"pixel"` → the threshold of the largest F1, from which on a score counts as
            anomalous; NaN where it is not defined. It is chosen on test pictures: to describe, never to decide.
        seconds: median time of a picture in the pipeline.
        metrics_seconds: time of all metrics and curves, without reading maps and masks.
        memory: the most bytes that a process held while predicting.
        roc: `"image"` and `"pixel"` → (false-positive rate, true-positive rate), thinned for drawing.
        precision_recall: the same → (recall, precision).
        pro: (false-positive rate, mean overlap of the regions).
    """

    category: str
    metrics: dict[str, float]
    image_threshold: float | None
    rows: list[dict[str, Any]]
    unmasked: int
    failures: list[str]
    remarks: list[str]
    f1_max_thresholds: dict[str, float]
    seconds: float
    metrics_seconds: float
    memory: int
    roc: dict[str, Curve]
    precision_recall: dict[str, Curve]
    pro: Curve


class TestPictures:
    """The test pictures of one category, opened when they are asked for.

    Args:
        split: the split `test` of [`load_anomaly_dataset`].
        category: whose pictures.
    """

    __test__ = False  # pytest takes it for a test

    def __init__(self, split: datasets.Dataset, category: str) -> None:
        self.category = category
        self.indices = [index for index, name in enumerate(split["category"]) if name == category]
        rows = split.select(self.indices)
        self.paths, self.labels, self.defect_types = rows["path"], rows["label"], rows["defect_type"]
        self.cells = rows.cast_column("image", datasets.Image(decode=False)).cast_column(
            "mask", datasets.Image(decode=False)
        )

    def __len__(self) -> int:
        return len(self.paths)

    @cached_property
    def digest(self) -> str:
        """A hash of the files' contents, wherever they lie: stored predictions of other pictures are worth nothing."""
        digest = hashlib.sha256()
        for cell in self.cells["image"]:
            try:
                content = Path(cell["path"]).read_bytes() if cell["bytes"] is None else cell["bytes"]
            except OSError:  # said when the picture is to be judged
                content = b""
            digest.update(hashlib.sha256(content).digest())
        return digest.hexdigest()

    def picture(self, index: int) -> Image.Image:
        """Decoded; raises ImageFileError."""
        return open_cell(self.cells[index]["image"], self.paths[index])

    def mask(self, index: int, size: tuple[int, int]) -> np.ndarray | None:
        """Booleans `[h, w]`: nothing for a good picture; None where nobody marked the defect of a defective one, so
        that nothing is known of its pixels and calling them all good would be wrong; raises ValueError for another
        size."""
        cell = self.cells[index]["mask"]
        if cell is None:
            return None if self.labels[index] else np.zeros(size, dtype=bool)
        mask = read_mask(cell, f"the mask of {self.paths[index]}")
        if mask.shape != size:
            (height, width), (own_height, own_width) = size, mask.shape
            raise ValueError(
                f"{self.paths[index]} has {width} x {height} pixels and its mask {cell['path']} {own_width} x "
                f"{own_height}; make the mask again at the picture's size"
            )
        return None if self.labels[index] and not mask.any() else mask


def load_test_pictures(data: str | os.PathLike[str], category: str | None) -> list[TestPictures]:
    """The test pictures of each category that has some; arguments and errors as of [`evaluate`]."""
    splits = load_anomaly_dataset(data, category=category)
    if "test" not in splits:
        raise ValueError(f"{data} has no test pictures, only good ones to train on: add test/good and test/<defect>")
    tested = set(splits["test"]["category"])
    untested = sorted({name for rows in splits.values() for name in rows.unique("category")} - tested)
    if untested:
        warnings.warn(f"without test pictures, and so not measured: {', '.join(untested)}", stacklevel=1)
    return [TestPictures(splits["test"], name) for name in sorted(tested)]


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

    Returns:
        One result a category; none in the processes that are not the main one.

    Raises:
        ValueError: names what is missing, what cannot be written to, or the pictures that the networks give NaN for.
    """
    state = join_processes()
    if protocol not in PROTOCOLS:
        raise ValueError(f"protocol must be {' or '.join(PROTOCOLS)}, not {protocol!r}")
    categories = load_test_pictures(data, category)
    _require_writable(Path(output))
    if model is not None:
        models = find_models(model, [pictures.category for pictures in categories])
        pipe = None
        for pictures, path in zip(categories, models):
            if pipe is None or len(set(models)) > 1:
                pipe = DiffusionADPipeline.from_pretrained(path, dtype=dtype).to(device or state.device)
                pipe.set_progress_bar_config(disable=True)
            folder = Path(output) / "predictions" / pictures.category
            predict_category(pipe, pictures, folder, protocol, num_noise_samples, batch_size)
    state.wait_for_everyone()
    if not state.is_main_process:
        return []
    results = []
    for pictures in categories:
        folder = Path(output) / "predictions" / pictures.category
        results.append(measure_category(pictures, folder, protocol, method, at_model_size))
    return results


def find_models(model: str | os.PathLike[str], categories: Sequence[str]) -> list[str]:
    """The pipeline of each category: one for all of them, or the sub-folder of the category's name.

    Raises:
        ValueError: names every category without a pipeline.
    """
    folder = Path(model)
    if not folder.is_dir() or (folder / "model_index.json").is_file():
        return [os.fspath(model)] * len(categories)
    missing = [name for name in categories if not (folder / name / "model_index.json").is_file()]
    if missing:
        raise ValueError(f"{folder} is neither a pipeline nor has it one for {', '.join(missing)}: train them first")
    return [os.fspath(folder / name) for name in categories]


def predict_category(
    pipe: DiffusionADPipeline,
    pictures: TestPictures,
    folder: Path,
    protocol: str,
    num_noise_samples: int,
    batch_size: int,
) -> None:
    """Store a [`Prediction`] of every picture. Those that another run left are kept if it would give the same.

    Batches are the same whoever computes them, since in batches of other sizes the last bits differ.
    """
    state = PartialState()
    settings = {
        "model": fingerprint(pipe),
        "protocol": protocol,
        "num_noise_samples": num_noise_samples,
        "batch_size": batch_size,
        "device": pipe.device.type,
    }
    stored = folder / "settings.json"
    if state.is_main_process:
        settings["pictures"] = pictures.digest
        folder.mkdir(parents=True, exist_ok=True)
        kept = json.loads(stored.read_text(encoding="utf-8")) if stored.is_file() else {}
        if {name: kept.get(name) for name in settings} != settings:
            for old in folder.glob("[0-9]*.*"):
                old.unlink()
        text = json.dumps(
            settings | {name: pipe.config[name] for name in ("image_threshold", "pixel_threshold")}, indent=1
        )
        write_atomically(stored, lambda path: path.write_text(text, encoding="utf-8"))
    state.wait_for_everyone()

    starts = range(0, len(pictures), batch_size)[state.process_index :: state.num_processes]
    for start in tqdm(starts, desc=pictures.category, unit="batch", disable=not state.is_main_process):
        batch = range(start, min(start + batch_size, len(pictures)))
        if all(_stored(folder, index).is_file() for index in batch):
            continue
        readable: dict[int, tuple[int, int]] = {}
        tensors = []
        for index in batch:
            failure = _stored(folder, index).with_suffix(".txt")
            failure.unlink(missing_ok=True)
            try:
                tensor, readable[index] = _preprocess(pictures.picture(index), pipe.config.image_size, protocol)
                tensors.append(tensor)
            except (ImageFileError, ValueError) as error:
                failure.write_text(f"{error}", encoding="utf-8")
        if not readable:
            continue
        started = time.perf_counter()
        try:
            output = pipe(
                torch.cat(tensors), output_type="pt", num_noise_samples=num_noise_samples, batch_size=len(readable)
            )
        except ValueError as error:  # which pictures, it cannot know
            raise ValueError(f"{', '.join(pictures.paths[index] for index in readable)}: {error}") from error
        seconds = (time.perf_counter() - started) / len(readable)
        scores = output.anomaly_scores
        if protocol == "reference":
            scores = output.anomaly_maps.flatten(1).topk(REFERENCE_TOP_K).values.mean(1)
        for row, (index, size) in enumerate(readable.items()):
            arrays = Prediction(
                score=scores[row].item(),
                anomaly_map=output.anomaly_maps[row, 0].numpy(),
                reconstruction=(output.reconstructions[row].permute(1, 2, 0) * 255).round().byte().numpy(),
                size=size,
                seconds=seconds,
                memory=peak_memory(pipe.device),
            )._asdict()
            write_atomically(_stored(folder, index), partial(np.savez, allow_pickle=False, **arrays))


def read_prediction(folder: Path, index: int) -> Prediction:
    """The stored [`Prediction`] of one picture of a category."""
    with np.load(_stored(folder, index), allow_pickle=False) as arrays:
        values = {name: arrays[name] for name in Prediction._fields}
    return Prediction(
        score=float(values["score"]),
        anomaly_map=values["anomaly_map"],
        reconstruction=values["reconstruction"],
        size=(int(values["size"][0]), int(values["size"][1])),
        seconds=float(values["seconds"]),
        memory=int(values["memory"]),
    )


def peak_memory(device: torch.device) -> int:
    """The most bytes that this process has held: of the GPU's memory where `device` is one, else resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def measure_category(
    pictures: TestPictures, folder: Path, protocol: str, method: Literal["exact", "streaming"], at_model_size: bool
) -> CategoryResult:
    """Metrics of one category from its stored predictions; arguments as of [`evaluate`].

    Raises:
        ValueError: when predictions are missing.
    """
    settings_file = folder / "settings.json"
    settings = json.loads(settings_file.read_text(encoding="utf-8")) if settings_file.is_file() else {}
    if settings.get("protocol") != protocol:
        raise ValueError(f"{folder} has no predictions under the protocol {protocol}: give the model")
    if settings["pictures"] != pictures.digest:
        raise ValueError(f"{folder} has predictions of other pictures than these test pictures: give the model")
    threshold = settings["image_threshold"]
    processor = DiffusionADImageProcessor()
    reference = protocol == "reference"
    streaming = StreamingAnomalyMetrics() if method == "streaming" and not reference else None
    rows: list[dict[str, Any]] = []
    maps: list[np.ndarray] = []
    masks: list[np.ndarray | None] = []
    failures, seconds, memory = [], [], 0
    unmasked, metrics_seconds = 0, 0.0
    for index, path in enumerate(pictures.paths):
        failure = _stored(folder, index).with_suffix(".txt")
        if failure.is_file():
            failures.append(failure.read_text(encoding="utf-8"))
            continue
        if not _stored(folder, index).is_file():
            raise ValueError(f"{folder} has no prediction for {path}: give the model to go on")
        prediction = read_prediction(folder, index)
        anomaly_map = torch.from_numpy(prediction.anomaly_map)[None, None]  # [1, 1, S, S]
        mask = pictures.mask(index, prediction.size)
        if reference or at_model_size:
            size = prediction.anomaly_map.shape
            if mask is not None:
                mask = _resize_mask(mask, size, eroded=reference)
        else:
            anomaly_map = processor.resize_to(anomaly_map, [prediction.size])[0][None]
        label, score = pictures.labels[index], prediction.score
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
            {"path": path, "defect_type": pictures.defect_types[index], "label": label, "score": score}
            | {"decision": decision, "index": index}
        )
        seconds.append(prediction.seconds)
        memory = max(memory, prediction.memory)
    if not rows:
        raise ValueError(f"none of the {len(failures)} test pictures of {pictures.category} could be read")
    scores, labels = np.array([row["score"] for row in rows]), np.array([row["label"] for row in rows], dtype=bool)
    remarks = []
    if unmasked:
        remarks.append(
            f"{unmasked} of {len(rows)} pictures are defective without a usable mask: not in the pixel metrics"
        )
    if failures:
        remarks.append(f"{len(failures)} of {len(pictures)} test pictures could not be read: not in any metric")
    started = time.perf_counter()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UndefinedMetricWarning)
        if streaming is not None:
            metrics, pixels = streaming.compute(), streaming.operating_points()
        else:
            checked = check_pictures(maps, masks, scores, labels)
            pixels = rank_pixels(checked)
            metrics = measure(checked, pixels, reference=reference)
    remarks += [str(warning.message) for warning in caught]
    points = {"image": rank(scores[labels], scores[~labels]), "pixel": pixels}
    roc = {name: its.roc_curve() for name, its in points.items()}
    precision_recall = {name: its.precision_recall_curve() for name, its in points.items()}
    metrics_seconds += time.perf_counter() - started
    if threshold is not None:
        metrics["right_decisions"] = float(((scores > threshold) == labels).mean())
    return CategoryResult(
        category=pictures.category,
        metrics=metrics,
        image_threshold=threshold,
        rows=rows,
        unmasked=unmasked,
        failures=failures,
        remarks=remarks,
        f1_max_thresholds={name: its.f1_max_threshold() for name, its in points.items()},
        seconds=float(np.median(seconds)),
        metrics_seconds=metrics_seconds,
        memory=memory,
        roc=roc,
        precision_recall=precision_recall,
        pro=pixels.pro_curve(),
    )


def _require_writable(folder: Path) -> None:
    """Fail before hours of work rather than after them."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ValueError(f"{folder} cannot be written to ({error.strerror}): choose another output folder") from error


def _stored(folder: Path, index: int) -> Path:
    return folder / f"{index:06d}.npz"


def _preprocess(picture: Image.Image, side: int, protocol: str) -> tuple[torch.Tensor, tuple[int, int]]:
    """`[1, 3, side, side]` and the picture's (height, width)."""
    processor = DiffusionADImageProcessor()
    if protocol == "exact":
        tensor, sizes = processor.preprocess(picture, side, side)
        return tensor, sizes[0]
    picture = ImageOps.exif_transpose(picture)
    tensor, sizes = processor.preprocess(picture, picture.height, picture.width)
    return _resize_8_bit(tensor, (side, side)), sizes[0]


def _resize_mask(mask: np.ndarray, size: tuple[int, ...], *, eroded: bool) -> np.ndarray:
    tensor = torch.from_numpy(mask).float()[None, None]
    if not eroded:
        return F.interpolate(tensor, size, mode="nearest-exact")[0, 0].bool().numpy()
    return (_resize_8_bit(tensor, size)[0, 0] == 1).numpy()


def _resize_8_bit(tensor: torch.Tensor, size: tuple[int, ...]) -> torch.Tensor:
    """Bilinear, without antialiasing and with 8 bits, as the authors' `cv2.resize` of pictures and masks."""
    return F.interpolate(tensor, size, mode="bilinear", align_corners=False).mul(255).round().div(255)
