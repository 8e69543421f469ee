"""Predict pictures and write what belongs to each, while the next are read."""

import os
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from ..files.output_error import OutputError
from ..files.output_folder import OutputFolder
from ..images.files import ImageFileError, shown
from ..images.sources import ImageSource
from ..pipeline_diffusionad import DiffusionADPipeline
from ..pipeline_output import DiffusionADPipelineOutput
from ..runtime.acceleration import explained_out_of_memory
from ..scoring import decide
from .files import write_files
from .folder import COLUMNS, Row
from .settings import PredictionSettings


class ReadImage(NamedTuple):
    """A picture and the hash of what it was decoded from."""

    image: Image.Image
    sha256: str


def predict_images(
    pipe: DiffusionADPipeline,
    sources: Sequence[ImageSource],
    names: Mapping[str, str],
    folder: OutputFolder,
    settings: PredictionSettings,
) -> Iterator[list[Row]]:
    """Predict pictures and write their files. It depends on nothing else, so processes can share a list of pictures.

    Args:
        pipe: with its thresholds and tiling.
        sources: the pictures; those of a batch follow each other.
        names: name of a picture → the name that its files begin with.
        folder: where they go.
        settings: what they are.

    Yields:
        The rows of a batch, one each picture, in order; what could not be read, predicted or written has an error
        instead of a decision.

    Raises:
        MemoryError: names the option to change.
    """
    # From the thread that reads to here, where the files are written.
    waiting: deque[ReadImage | ImageFileError] = deque()

    def read() -> Iterator[Image.Image | Exception]:
        for source in sources:
            found = read_image(source, settings)
            waiting.append(found)
            yield found.image if isinstance(found, ReadImage) else found

    outputs = pipe.stream(read(), batch_size=settings.batch_size, output_type="np", return_exceptions=True)
    pairs = zip(sources, outputs)
    while True:
        started = time.perf_counter()
        with explained_out_of_memory(f"--batch-size {settings.batch_size}", "a lower one; what is done is kept"):
            rows = [
                _row(source, waiting.popleft(), output, names[source.name], folder, settings, pipe.config)
                for source, output in islice(pairs, settings.batch_size)
            ]
        if not rows:
            return
        seconds = (time.perf_counter() - started) / len(rows)
        yield [row | {"seconds": None if row["error"] else round(seconds, 4)} for row in rows]


def read_image(source: ImageSource, settings: PredictionSettings) -> ReadImage | ImageFileError:
    """Read a picture, unless somebody writes it just now; or why it cannot be used."""
    try:
        before = _state(source.file)
        image = source.read(settings.max_pixels, settings.max_aspect_ratio)
        try:
            sha256 = source.sha256()
        except OSError as error:
            cause = f"the file cannot be read ({error.strerror}); check the path"
            raise ImageFileError(f"{shown(source.name)}: {cause}") from error
        if _state(source.file) != before:
            raise ImageFileError(f"{shown(source.name)}: the file was changed while it was read; predict it again")
    except ImageFileError as error:
        return error
    return ReadImage(image, sha256)


def _state(file: Path | None) -> tuple[int, int] | None:
    try:
        status = None if file is None else os.stat(file)
    except OSError:
        return None
    return None if status is None else (status.st_size, status.st_mtime_ns)


def _row(
    source: ImageSource,
    read: ReadImage | ImageFileError,
    output: DiffusionADPipelineOutput | Exception,
    name: str,
    folder: OutputFolder,
    settings: PredictionSettings,
    config: Any,
) -> Row:
    """The row of a picture, once its files are written."""
    row = dict.fromkeys(COLUMNS) | {"path": source.name, "threshold": config.image_threshold, "output": name}
    try:
        if isinstance(read, ImageFileError):
            raise read
        row["sha256"] = read.sha256
        if isinstance(output, Exception):
            raise ImageFileError(f"{shown(source.name)}: {output}")
        score = float(output.anomaly_scores[0])
        decision = decide(score, config.image_threshold)
        title = f"{shown(source.place.name)}: {decision or 'score'} {score:.3f}"
        write_files(read.image, output, folder, name, settings, title)
        row |= {"score": score, "decision": decision}
    except (ImageFileError, OutputError) as error:
        row["error"] = str(error)
    return row
