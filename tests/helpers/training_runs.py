"""Runs of the training script on real images at a tiny size."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file

from tests.helpers.script_processes import run_script

ROOT = Path(__file__).parents[2]
HAZELNUT = ROOT / "training" / "data" / "hazelnut_toy" / "hazelnut"
TINY = {
    "train_data_dir": str(HAZELNUT),
    "resolution": 32,
    "block_out_channels": [32, 32],
    "segmentation_channels": 8,
    "train_batch_size": 4,
    "max_train_steps": 6,
    "lr_warmup_steps": 2,
    "validation_steps": 3,
    "checkpointing_steps": 2,
    "logging_steps": 1,
    "save_dtype": "fp32",
    "mixed_precision": "no",
    "cpu_threads": 1,
}
MODEL_ID = ["--hub_model_id", "user/model"]
ENVIRONMENT = os.environ | {"ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1"}


def command(config: Path, output: Path, *flags: str) -> list[str]:
    return [str(ROOT / "training" / "train.py"), "--config", str(config), "--output_dir", str(output), *flags]


def run(arguments: list[str], limits: Mapping[int, int] | None = None) -> subprocess.CompletedProcess[str]:
    return run_script(arguments, ENVIRONMENT, limits)


def launch(processes: int, arguments: list[str]) -> subprocess.CompletedProcess[str]:
    """As a user starts it."""
    # `--multi_gpu` is accelerate's word for several processes; the environment keeps them on the CPU.
    several = ["--multi_gpu"] if processes > 1 else []
    start = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", str(processes), *several]
    return subprocess.run(
        [*start, *arguments], capture_output=True, text=True, timeout=300, env=ENVIRONMENT, check=False
    )


def losses(output: Path, name: str) -> list[float]:
    entries = map(json.loads, (output / "log.jsonl").read_text().splitlines())
    return [entry[name] for entry in entries if name in entry]


def assert_same_weights(one: Path, other: Path) -> None:
    for network in ("unet", "segmentation"):
        file = f"{network}/diffusion_pytorch_model.safetensors"
        expected, found = load_file(one / file), load_file(other / file)
        assert expected.keys() == found.keys()
        assert all(torch.equal(value, found[key]) for key, value in expected.items())
    assert json.loads((one / "model_index.json").read_text()) == json.loads((other / "model_index.json").read_text())
