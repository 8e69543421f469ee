"""What tests of saved pipelines share: a payload that must never run, and errors that must name their file."""

import json
import os
import resource
from pathlib import Path

import pytest

from diffusionad_pipe import DiffusionADPipeline, WeightsFileError

WEIGHTS = "diffusion_pytorch_model.safetensors"
HUGE = 10**9
NAN = float("nan")  # Python's json writes and reads it


class Payload:
    """A pickle of this makes a folder when it is loaded carelessly."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def edit_json(path: Path, **values) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def public(config: dict) -> dict:
    return {key: value for key, value in sorted(config.items()) if not key.startswith("_")}


def refused(folder: Path, message: str, names: str | Path = "", **options) -> None:
    """Loading must fail with an error that names a file and tells the cause, before much memory is taken."""
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(WeightsFileError, match=message) as caught:
        DiffusionADPipeline.from_pretrained(folder, **options)
    assert str(names) in str(caught.value)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 200_000  # kilobytes
