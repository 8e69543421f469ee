"""Judge pictures and write what belongs to each: a drawing, and the map and the mask where they are wanted."""

import hashlib
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from ..files.output_error import OutputError
from ..files.output_folder import OutputFolder
from ..image_processor import DiffusionADImageProcessor
from ..images.files import MAX_PIXELS, ImageFileError, shown
from ..images.pixels import MAX_ASPECT_RATIO
from ..images.sources import ImageSource
from ..pipeline_diffusionad import DiffusionADPipeline, DiffusionADPipelineOutput
from .folder import COLUMNS, Row


class MapFormat(StrEnum):
    """How anomaly maps are stored: 16-bit PNG (65535 is 1), or float32 NumPy."""

    png16 = "png16"
    npy = "npy"


class OutputFiles(NamedTuple):
    """What is written for each picture.

    Args:
        panels: picture, reconstruction and heatmap side by side; else one overlay.
        maps: also the anomaly map.
        masks: also the predicted mask, a PNG with 255 where a pixel is defective; needs a pixel threshold.
        max_pixels: pictures of more are refused before they are decoded.
        max_aspect_ratio: longer ones are refused too.
    """

    panels: bool = False
    maps: MapFormat | None = None
    masks: bool = False
    max_pixels: int = MAX_PIXELS
    max_aspect_ratio: float = MAX_ASPECT_RATIO

    @property
    def endings(self) -> list[str]:
        """Of the files that each picture has."""
        maps = {None: [], MapFormat.png16: ["_map.png"], MapFormat.npy: ["_map.npy"]}[self.maps]
        return [*maps, *(["_mask.png"] if self.masks else []), ".png"]


def fingerprint(pipe: DiffusionADPipeline) -> str:
    """A hash of a pipeline's weights and noise: predictions of equal ones are equal."""
    digest = hashlib.sha256()
    for network in (pipe.unet, pipe.segmentation):
        for name, tensor in network.state_dict().items():
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    settings = {k: pipe.config[k] for k in ("image_size", "score_top_k", "noise_seed")}
    digest.update(json.dumps([settings, dict(pipe.scheduler.config)], sort_keys=True, default=str).encode())
    return digest.hexdigest()


def predict_images(
    pipe: DiffusionADPipeline,
    sources: Sequence[ImageSource],
    names: Mapping[str, str],
    folder: OutputFolder,
    drawings: OutputFiles,
    batch_size: int,
) -> list[Row]:
    """Judge some pictures in one pass of the networks, and write their files. It depends on nothing else, so processes
    can share a list of pictures among them.

    Args:
        pipe: with its thresholds.
        sources: the pictures.
        names: name of a picture → the name that its files begin with.
        folder: where they go.
        drawings: what they are.
        batch_size: at least the number of pictures; with tiling, of tiles in one pass.

    Returns:
        A row each picture, in order; what could not be read, judged or written has an error instead of a decision.
    """
    rows: dict[str, Row] = {}
    images: dict[str, Image.Image] = {}
    started = time.perf_counter()
    for source in sources:
        row = dict.fromkeys(COLUMNS) | {"path": source.name, "threshold": pipe.config.image_threshold}
        rows[source.name] = row | {"output": names[source.name]}
        try:
            images[source.name], rows[source.name]["sha256"] = _read(source, drawings)
        except ImageFileError as error:
            rows[source.name]["error"] = str(error)

    places = {source.name: source.place for source in sources}
    for name, result in _detect(pipe, images, batch_size):
        try:
            if isinstance(result, ValueError):
                raise ImageFileError(f"{shown(name)}: {result}")
            score = float(result.anomaly_scores[0])
            threshold = pipe.config.image_threshold
            decision = None if threshold is None else ("defective" if score > threshold else "good")
            title = f"{shown(places[name].name)}: {decision or 'score'} {score:.3f}"
            _write(images.pop(name), result, folder, names[name], drawings, title)
            rows[name] |= {"score": score, "decision": decision}
        except (ImageFileError, OutputError) as error:
            rows[name]["error"] = str(error)
    seconds = (time.perf_counter() - started) / len(sources)
    for row in rows.values():
        if not row["error"]:
            row["seconds"] = round(seconds, 4)
    return list(rows.values())


def _read(source: ImageSource, drawings: OutputFiles) -> tuple[Image.Image, str]:
    """A picture, and the hash of what it was decoded from.

    Raises:
        ImageFileError: for a picture that cannot be used, or that somebody writes just now.
    """
    before = _state(source.file)
    image = source.read(drawings.max_pixels, drawings.max_aspect_ratio)
    try:
        sha256 = source.sha256()
    except OSError as error:
        raise ImageFileError(
            f"{shown(source.name)}: the file cannot be read ({error.strerror}); check the path"
        ) from error
    if _state(source.file) != before:
        raise ImageFileError(f"{shown(source.name)}: the file was changed while it was read; judge it again")
    return image, sha256


def _state(file: Path | None) -> tuple[int, int] | None:
    try:
        status = None if file is None else os.stat(file)
    except OSError:
        return None
    return None if status is None else (status.st_size, status.st_mtime_ns)


def _detect(
    pipe: DiffusionADPipeline, images: Mapping[str, Image.Image], batch_size: int
) -> Iterator[tuple[str, DiffusionADPipelineOutput | ValueError]]:
    """The output of each picture, at its own size and one at a time, or the error that belongs to it."""
    done: set[str] = set()
    try:
        for name, output in zip(
            list(images), pipe.stream(list(images.values()), batch_size=batch_size, output_type="np")
        ):
            done.add(name)
            yield name, output
    except ValueError:  # the networks gave NaN for one of them: which, a call of its own tells
        for name in [name for name in images if name not in done]:
            try:
                yield name, pipe(images[name], batch_size=batch_size, output_type="np")
            except ValueError as error:
                yield name, error


def _write(
    image: Image.Image,
    result: DiffusionADPipelineOutput,
    folder: OutputFolder,
    name: str,
    drawings: OutputFiles,
    title: str,
) -> None:
    """Write the files of one picture, the drawing last."""
    anomaly_map = result.anomaly_maps[0, ..., 0]  # [h, w]
    mask = None if result.predicted_masks is None else result.predicted_masks[0, ..., 0]
    if drawings.maps is MapFormat.png16:
        map_16 = Image.fromarray((anomaly_map * 65535).round().astype(np.uint16))
        folder.write(f"{name}_map.png", map_16.save)
    elif drawings.maps is MapFormat.npy:
        folder.write(f"{name}_map.npy", partial(np.save, arr=anomaly_map))
    if drawings.masks and mask is not None:
        folder.write(f"{name}_mask.png", Image.fromarray(mask.astype(np.uint8) * 255).save)
    processor = DiffusionADImageProcessor(max_aspect_ratio=drawings.max_aspect_ratio)
    if drawings.panels:
        drawing = processor.panel(image, result.reconstructions[0], anomaly_map, mask, title=title)
    else:
        drawing = processor.visualize_anomaly_map(image, anomaly_map, mask)
    folder.write(f"{name}.png", drawing.save)
