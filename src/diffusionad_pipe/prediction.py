"""Judge pictures and write what belongs to each: a drawing, and the map and the mask where they are wanted."""

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from .image_files import ImageFileError, write_atomically
from .picture_sources import PictureSource
from .pipeline_diffusionad import DiffusionADPipeline
from .prediction_folder import COLUMNS, Row


class MapFormat(StrEnum):
    """How anomaly maps are stored: 16-bit PNG (65535 is 1), or float32 NumPy."""

    png16 = "png16"
    npy = "npy"


class Drawings(NamedTuple):
    """What is written for each picture.

    Args:
        panels: picture, reconstruction and heatmap side by side; else one overlay.
        maps: also the anomaly map.
        masks: also the predicted mask, a PNG with 255 where a pixel is defective; needs a pixel threshold.
        max_pixels: pictures of more are refused before they are decoded.
    """

    panels: bool = False
    maps: MapFormat | None = None
    masks: bool = False
    max_pixels: int = 100_000_000


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


def judge(
    pipe: DiffusionADPipeline,
    sources: Sequence[PictureSource],
    names: Mapping[str, str],
    folder: Path,
    drawings: Drawings,
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
        A row each picture, in order; what could not be read or written has an error instead of a decision.
    """
    threshold = pipe.config.image_threshold
    rows: dict[str, Row] = {}
    readable: list[tuple[PictureSource, Image.Image]] = []
    started = time.perf_counter()
    for source in sources:
        rows[source.name] = dict.fromkeys(COLUMNS) | {"path": source.name, "threshold": threshold}
        rows[source.name]["output"] = names[source.name]
        try:
            picture = source.read(drawings.max_pixels)
            pipe.image_processor.preprocess(picture, 32, 32)  # finds here, by itself, what the pipeline would refuse
            readable.append((source, picture))
        except ImageFileError as error:
            rows[source.name]["error"] = str(error)
        except ValueError as error:
            rows[source.name]["error"] = f"{source.name}: {error}"
    if not readable:
        return list(rows.values())

    result = pipe([picture for _, picture in readable], batch_size=batch_size, output_type="np")
    processor = pipe.image_processor
    for index, (source, picture) in enumerate(readable):
        score = float(result.anomaly_scores[index])
        anomaly_map = np.asarray(result.anomaly_maps[index])[..., 0]  # [h, w]
        mask = None if result.predicted_masks is None else np.asarray(result.predicted_masks[index])[..., 0]
        decision = None if threshold is None else ("defective" if score > threshold else "good")
        start = folder / names[source.name]
        try:
            if drawings.maps is MapFormat.png16:
                map_16 = Image.fromarray((anomaly_map * 65535).round().astype(np.uint16))
                write_atomically(Path(f"{start}_map.png"), map_16.save)
            elif drawings.maps is MapFormat.npy:
                write_atomically(Path(f"{start}_map.npy"), partial(np.save, arr=anomaly_map))
            if drawings.masks and mask is not None:
                write_atomically(Path(f"{start}_mask.png"), Image.fromarray(mask.astype(np.uint8) * 255).save)
            if drawings.panels:
                title = f"{source.place.name}: {decision or 'score'} {score:.3f}"
                drawing = processor.panel(picture, result.reconstructions[index], anomaly_map, mask, title=title)
            else:
                drawing = processor.visualize_anomaly_map(picture, anomaly_map, mask)
            write_atomically(Path(f"{start}.png"), drawing.save)  # the last: its time says when all was done
            rows[source.name] |= {"score": score, "decision": decision}
        except OSError as error:
            rows[source.name]["error"] = f"{start}: could not be written ({error.strerror}): free some space"
    seconds = (time.perf_counter() - started) / len(readable)
    for source, _ in readable:
        rows[source.name]["seconds"] = round(seconds, 4)
    return list(rows.values())
