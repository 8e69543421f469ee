"""The training script, run as a user runs it, on real pictures at a tiny size."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from diffusionad_pipe import DiffusionADPipeline, open_image

ROOT = Path(__file__).parents[1]
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
}


def command(config: Path, output: Path, *flags: str, launch: bool = False) -> list[str]:
    start = (
        [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1"]
        if launch
        else [sys.executable]
    )
    return [*start, str(ROOT / "training" / "train.py"), "--config", str(config), "--output_dir", str(output), *flags]


def run(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(arguments, capture_output=True, text=True, timeout=300, env=environment, check=False)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("config") / "tiny.yaml"
    path.write_text(yaml.safe_dump(TINY))
    return path


@pytest.fixture(scope="module")
def trained(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("runs") / "whole"
    result = run(command(config, output, launch=True))
    assert result.returncode == 0, result.stderr
    return output


def test_a_run_leaves_a_pipeline_that_decides(trained: Path) -> None:
    pipe = DiffusionADPipeline.from_pretrained(trained)
    assert 0 < pipe.config.image_threshold < 1 and 0 < pipe.config.pixel_threshold < 1
    assert pipe.scheduler.config.prediction_type == "sample" and pipe.unet.config.patch_size == 4
    output = pipe(open_image(next((HAZELNUT / "test" / "good").iterdir())))
    assert output.is_anomalous is not None and output.predicted_masks[0].size == (512, 512)


def test_a_run_is_documented(trained: Path) -> None:
    log = [json.loads(line) for line in (trained / "log.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in log if "noise_loss" in entry] == [1, 2, 3, 4, 5, 6]
    assert all("validation_pixel_ap" in entry for entry in log if "noise_loss" not in entry)
    stored = yaml.safe_load((trained / "training_config.yaml").read_text())
    assert stored["max_train_steps"] == 6 and stored["output_dir"] == str(trained)
    assert Image.open(trained / "samples" / "step-0000006.png").size == (8 * 32, 3 * 32)
    card = (trained / "README.md").read_text()
    assert "library_name: diffusers" in card and "24 good ones; 4 more held out" in card and str(ROOT) not in card
    assert sorted(p.name for p in trained.glob("checkpoint-*")) == ["checkpoint-0000004", "checkpoint-0000006"]


def test_resuming_after_a_kill_is_bit_exact(trained: Path, config: Path, tmp_path: Path) -> None:
    output = tmp_path / "killed"
    process = subprocess.Popen(
        command(config, output),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=os.environ | {"ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1"},
    )
    deadline = time.monotonic() + 240
    while not (output / "checkpoint-0000002").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (output / "model_index.json").exists()
    result = run(command(config, output, "--resume_from_checkpoint", "latest"))
    assert result.returncode == 0 and "resumed from" in result.stderr, result.stderr
    for network in ("unet", "segmentation"):
        file = f"{network}/diffusion_pytorch_model.safetensors"
        whole, resumed = load_file(trained / file), load_file(output / file)
        assert all(torch.equal(value, resumed[key]) for key, value in whole.items())
    assert json.loads((trained / "model_index.json").read_text()) == json.loads(
        (output / "model_index.json").read_text()
    )


def test_sigterm_saves_and_leaves(config: Path, tmp_path: Path) -> None:
    output = tmp_path / "stopped"
    process = subprocess.Popen(
        command(config, output, "--max_train_steps", "100000", "--checkpointing_steps", "100000"),
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1"},
    )
    deadline = time.monotonic() + 240
    while not (output / "log.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM and "go on with --resume_from_checkpoint latest" in errors
    assert len(list(output.glob("checkpoint-*"))) == 1


@pytest.mark.parametrize(
    "flags, cause",
    [
        (["--train_data_dir", "no/such/folder"], "not a folder"),
        (["--texture_dir", "no/such/folder"], "no/such/folder"),
        (["--resume_from_checkpoint", "latest"], "no checkpoint to resume from"),
        (["--foreground", "salient"], "none, random, threshold"),
        (["--block_out_channels", "30", "60"], "divisible"),
        (["--resolution", "40"], "multiple of 32"),
        (["--config", "no/such.yaml"], "cannot be read"),
    ],
)
def test_wrong_settings_end_with_one_sentence(config: Path, tmp_path: Path, flags: list[str], cause: str) -> None:
    result = run(command(config, tmp_path / "wrong", *flags))
    assert result.returncode != 0 and cause in result.stderr and "Traceback" not in result.stderr, result.stderr


def test_unknown_setting_and_occupied_folder(config: Path, trained: Path, tmp_path: Path) -> None:
    typo = tmp_path / "typo.yaml"
    typo.write_text("trian_data_dir: x\n")
    result = run(command(typo, tmp_path / "out"))
    assert result.returncode == 2 and "did you mean 'train_data_dir'" in result.stderr
    result = run(command(config, trained))
    assert result.returncode == 1 and "is not empty" in result.stderr
    assert (trained / "model_index.json").exists()
    result = run(command(config, tmp_path / "none", "--help"))
    assert result.returncode == 0 and "share of the good pictures held out" in result.stdout
