"""Predictions that are kept, each under what it is of: a picture's content, by a model under some settings."""

import hashlib
import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..files.names import safe_name, unique_names
from ..files.output_folder import OutputFolder

logger = logging.getLogger(__name__)

SETTINGS = "settings.json"  # what the predictions depend on, besides the pictures, and the model's thresholds


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


class StoredPredictions:
    """The predictions of one category, a NumPy archive each, named after the picture's content and the settings.

    So they are found wherever the picture lies now, and never taken for those of another model. Only files that are as
    they were written count.

    Args:
        folder: the evaluation's.
        name: of the sub-folder, one of [`name_predictions`].
    """

    def __init__(self, folder: OutputFolder, name: str) -> None:
        self.folder = folder
        self.name = name
        self.settings: dict[str, Any] = {}
        if folder.owns(f"{name}/{SETTINGS}"):
            self.settings = json.loads((folder.path / name / SETTINGS).read_text(encoding="utf-8"))

    def begin(self, settings: Mapping[str, Any], thresholds: Mapping[str, float | None]) -> None:
        """Say what the predictions depend on, and delete those of other settings.

        Args:
            settings: plain JSON.
            thresholds: of the model, on which they do not depend.
        """
        for name in list(self.folder.record):
            if name.startswith(f"{self.name}/") and name.endswith(".npz") and f"-{_ending(settings)}" not in name:
                self.folder.remove(name)
        self.settings = {**settings, "thresholds": dict(thresholds)}
        self.folder.write_text(f"{self.name}/{SETTINGS}", json.dumps(self.settings, indent=1))

    def read(self, content: str) -> Prediction | None:
        """The prediction of a picture's content; None where there is none, or it is damaged, which is said."""
        changed: list[Path] = []
        for name in self._names(content):
            file = self.folder.path / name
            if not self.folder.owns(name):
                if not os.path.lexists(file):
                    break
                changed.append(file)
                continue
            try:
                with np.load(file, allow_pickle=False) as arrays:
                    values = {field: arrays[field] for field in Prediction._fields}
            except Exception as error:  # damaged files fail in many ways in the depths of zipfile and NumPy
                logger.warning(f"{file} is damaged ({error}), and is not used")
                return None
            return Prediction(
                score=float(values["score"]),
                anomaly_map=values["anomaly_map"],
                reconstruction=values["reconstruction"],
                size=(int(values["size"][0]), int(values["size"][1])),
                seconds=float(values["seconds"]),
                memory=int(values["memory"]),
            )
        for file in changed:
            logger.warning(f"{file} is not as it was written, and is not used")
        return None

    def write(self, content: str, prediction: Prediction) -> None:
        """Store the prediction of a picture's content."""
        name = next(name for name in self._names(content) if self.folder.is_free(name))
        self.folder.write(name, partial(np.savez, allow_pickle=False, **prediction._asdict()))

    def _names(self, content: str) -> Iterator[str]:
        """The file's name, and others where that one is damaged: such a file might be somebody else's now."""
        settings = {name: value for name, value in self.settings.items() if name != "thresholds"}
        first = f"{self.name}/{content}-{_ending(settings)}"
        yield f"{first}.npz"
        for number in count(2):
            yield f"{first}-{number}.npz"


def name_predictions(categories: Sequence[str]) -> list[str]:
    """The sub-folder of each category's predictions, whatever its name."""
    return [f"predictions/{name}" for name in unique_names(map(safe_name, categories), [""], lambda name: False)]


def _ending(settings: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
