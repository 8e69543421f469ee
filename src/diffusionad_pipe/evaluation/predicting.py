"""Predict the test pictures of one category, and keep what comes out."""

import re
import time
from collections.abc import Iterator, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object

from ..image_processor import DiffusionADImageProcessor, ImageInput
from ..images.files import ImageFileError
from ..pipeline_diffusionad import DiffusionADPipeline
from ..pipeline_output import DiffusionADPipelineOutput
from ..prediction.fingerprint import fingerprint
from ..runtime.acceleration import explained_out_of_memory
from ..runtime.progress import tracked
from .kept_predictions import Prediction, StoredPredictions
from .reference_protocol import REFERENCE_TOP_K, resize_8_bit
from .settings import EvaluationSettings
from .test_set import TestImages


def predict_category(
    pipe: DiffusionADPipeline, images: TestImages, predictions: StoredPredictions, settings: EvaluationSettings
) -> dict[int, str]:
    """Store a [`Prediction`] of every picture. Those that another run left are kept if it would give the same.

    Batches are the same whoever computes them, since in batches of other sizes the last bits differ: one of which a
    prediction is missing is computed whole.

    Args:
        pipe: with its tiling.
        images: of the category.
        predictions: of them.
        settings: how.

    Returns:
        Index of a picture → why it could not be judged, of all processes.
    """
    state = PartialState()
    contents = _begin(pipe, images, predictions, settings)
    indices = sorted(contents)
    together = 1 if pipe.tiling is not None else settings.batch_size  # a batch of tiles is of one picture
    starts = range(0, len(indices), together)[state.process_index :: state.num_processes]
    batches = [indices[start : start + together] for start in starts]
    missing = {index for index in chain(*batches) if predictions.read(contents[index]) is None}
    batches = [batch for batch in batches if missing.intersection(batch)]

    failures: dict[int, str] = {}
    results = _predict(pipe, images, contents, batches, settings)
    shown = state.is_main_process
    for batch in tracked(batches, images.category, "picture" if together == 1 else "batch", shown=shown):
        for index, result in zip(batch, next(results)):
            if isinstance(result, ImageFileError):
                failures[index] = str(result)
            elif isinstance(result, Exception):
                failures[index] = f"{images.paths[index]}: {result}"
            elif index in missing:
                predictions.write(contents[index], result)
    return dict(gather_object(list(failures.items())))


def _begin(
    pipe: DiffusionADPipeline, images: TestImages, predictions: StoredPredictions, settings: EvaluationSettings
) -> dict[int, str]:
    """Say what the predictions depend on; the same in every process.

    Returns:
        Index of a picture → its content, each content once, with the first picture that has it.
    """
    state = PartialState()
    contents: dict[int, str] = {}
    if state.is_main_process:
        depends_on = {
            "model": fingerprint(pipe),
            "protocol": settings.protocol,
            "num_noise_samples": settings.num_noise_samples,
            "batch_size": settings.batch_size,
            "device": pipe.device.type,
        }
        if pipe.tiling is not None:
            depends_on["tiling"] = list(pipe.tiling)
        thresholds = {name: pipe.config[name] for name in ("image_threshold", "pixel_threshold")}
        predictions.begin(depends_on, thresholds)
        first = {content: index for index, content in reversed(list(enumerate(images.contents)))}
        contents = {index: content for content, index in reversed(first.items()) if content is not None}
    contents, predictions.settings = broadcast_object_list([contents, predictions.settings])
    if not state.is_main_process:
        predictions.folder.read_record()
    return contents


def _predict(
    pipe: DiffusionADPipeline,
    images: TestImages,
    contents: dict[int, str],
    batches: Sequence[Sequence[int]],
    settings: EvaluationSettings,
) -> Iterator[list[Prediction | Exception]]:
    """The predictions of each batch, or the error of a picture in its place, while the next are read."""
    sizes: dict[int, tuple[int, int]] = {}

    def read_all() -> Iterator[Any]:
        for index in chain(*batches):
            read: ImageInput | ValueError
            try:
                read, sizes[index] = _read(images, index, pipe.config.image_size, settings)
                if images.content(index) != contents[index]:
                    raise ImageFileError(
                        f"{images.paths[index]}: it was changed while it was read; run the command again"
                    )
            except ValueError as error:
                read = error
            yield read

    outputs = pipe.stream(
        read_all(),
        batch_size=settings.batch_size,
        output_type="pt",
        num_noise_samples=settings.num_noise_samples,
        match_input_resolution=False,
        return_exceptions=True,
    )
    before = time.perf_counter()
    for batch in batches:
        with explained_out_of_memory(f"batch_size={settings.batch_size} (--batch-size)", "a lower one"):
            results = list(islice(outputs, len(batch)))
        now = time.perf_counter()
        seconds, before = (now - before) / len(batch), now
        memory = peak_memory(pipe.device)
        yield [
            result
            if isinstance(result, Exception)
            else _prediction(result, sizes[index], seconds, memory, settings.is_reference)
            for index, result in zip(batch, results)
        ]


def _read(
    images: TestImages, index: int, side: int, settings: EvaluationSettings
) -> tuple[np.ndarray | torch.Tensor, tuple[int, int]]:
    """A test picture as the pipeline takes it, and its own (height, width).

    It is resized here, since two batches wait for the networks: with tiling, two pictures.

    Raises:
        ValueError: for a picture that cannot be used.
    """
    processor = DiffusionADImageProcessor(max_aspect_ratio=settings.max_aspect_ratio)
    array = processor.decode(images.image(index))
    size = processor.size(array)
    if settings.tiling is not None:
        return array, size
    if settings.is_reference:
        return resize_8_bit(processor.to_rgb(array)[None].clamp(0, 1), (side, side))[0], size
    return processor.preprocess(array, side, side)[0][0], size


def _prediction(
    output: DiffusionADPipelineOutput, size: tuple[int, int], seconds: float, memory: int, is_reference: bool
) -> Prediction:
    """What is kept of the output of one picture."""
    score = output.anomaly_scores[0]
    if is_reference:
        score = output.anomaly_maps.flatten(1).topk(REFERENCE_TOP_K).values.mean(1)[0]
    return Prediction(
        score=score.item(),
        anomaly_map=output.anomaly_maps[0, 0].numpy(),
        reconstruction=(output.reconstructions[0].permute(1, 2, 0) * 255).round().byte().numpy(),
        size=size,
        seconds=seconds,
        memory=memory,
    )


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
