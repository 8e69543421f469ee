"""The import paths that the documentation has named, which stay wherever their code lies."""

import importlib
import subprocess
import sys

import pytest

import diffusionad_pipe

NAMES = {
    "diffusionad_pipe": diffusionad_pipe.__all__,
    "diffusionad_pipe.cli": ["app"],
    "diffusionad_pipe.data": ["export_parquet", "find_categories", "load_anomaly_dataset"],
    "diffusionad_pipe.exported": ["ExportedDetector", "ExportedDetectorOutput", "ExportedFileError"],
    "diffusionad_pipe.freed_memory": ["keep_freed_memory"],
    "diffusionad_pipe.metrics": ["StreamingAnomalyMetrics", "au_pro", "evaluate_maps", "f1_max", "mean_metrics"],
}


@pytest.mark.parametrize("module", NAMES)
def test_names_stay(module: str) -> None:
    for name in NAMES[module]:
        assert getattr(importlib.import_module(module), name) is not None


def test_exported_detectors_need_neither_torch_nor_diffusers() -> None:
    code = """
import sys
sys.modules.update(dict.fromkeys(["torch", "diffusers", "transformers", "accelerate"]))  # cannot be imported
from diffusionad_pipe import open_image
from diffusionad_pipe.exported import ExportedDetector
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
