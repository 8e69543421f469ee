"""The Space as a server of its own process, for the tests that call it and those that look at it."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from diffusionad_pipe import (
    DiffusionADPipeline,
    DiffusionADUNet2DModel,
    NormGuidedOneStepScheduler,
    SegmentationUNet2DModel,
)

ROOT = Path(__file__).parents[2]
APP = ROOT / "spaces_demo" / "app.py"
EXAMPLES = ROOT / "spaces_demo" / "examples"
START_SECONDS = 300  # on a busy machine; it takes about 10


def save_model(folder: Path, image_threshold: float | None = 0.4, pixel_threshold: float | None = 0.5) -> Path:
    """A pipeline whose scores are near 0.5."""
    torch.manual_seed(0)
    blocks = {"block_out_channels": (32, 64), "attention": (False, True)}
    unet = DiffusionADUNet2DModel(sample_size=64, patch_size=4, **blocks)
    torch.nn.init.normal_(unet.conv_out.weight, std=0.1)  # it begins as zero, whatever the noise scale
    segmentation = SegmentationUNet2DModel(base_channels=8, norm_type="group")
    scheduler = NormGuidedOneStepScheduler(prediction_type="sample")
    thresholds = {"image_threshold": image_threshold, "pixel_threshold": pixel_threshold}
    DiffusionADPipeline(unet.eval(), segmentation.eval(), scheduler, image_size=64, **thresholds).save_pretrained(
        folder
    )
    return folder


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def environment(folder: Path, port: int, **variables: str) -> dict[str, str]:
    return {
        **os.environ,
        "GRADIO_SERVER_NAME": "127.0.0.1",
        "GRADIO_SERVER_PORT": str(port),
        "GRADIO_TEMP_DIR": str(folder / "uploads"),
        "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        **variables,
    }


@contextmanager
def serve(folder: Path, app: Path = APP, **variables: str) -> Iterator[str]:
    """Run the Space with these environment variables; its address, and its output in folder/log.txt."""
    port = free_port()
    log = folder / "log.txt"
    with log.open("w") as file:
        command = [sys.executable, app]
        env = environment(folder, port, **variables)
        process = subprocess.Popen(command, cwd=folder, env=env, stdout=file, stderr=file)
    try:
        for _ in range(10 * START_SECONDS):
            with socket.socket() as connection:
                if connection.connect_ex(("127.0.0.1", port)) == 0:
                    break
            assert process.poll() is None, log.read_text()
            time.sleep(0.1)
        else:
            pytest.fail(f"the app did not start in {START_SECONDS} s: {log.read_text()}")
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()
