"""A small data set and a model to measure on it."""

from pathlib import Path

import pytest

from diffusionad_pipe import DiffusionADPipeline
from tests.helpers.small_data import write_small_data


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Of one category."""
    return write_small_data(tmp_path / "data" / "part")


@pytest.fixture
def model(tiny_pipeline: DiffusionADPipeline, tmp_path: Path) -> Path:
    """The tiny pipeline with thresholds, saved."""
    tiny_pipeline.register_to_config(image_threshold=0.5, pixel_threshold=0.5)
    tiny_pipeline.save_pretrained(tmp_path / "model")
    return tmp_path / "model"
