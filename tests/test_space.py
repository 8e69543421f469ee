"""The Gradio app as its visitors meet it: a server with a tiny real model, called over the network."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from diffusionad_pipe import (
    DiffusionADPipeline,
    DiffusionADUNet2DModel,
    NormGuidedOneStepScheduler,
    SegmentationUNet2DModel,
)

pytest.importorskip("gradio", reason="gradio is not installed: pip install diffusionad_pipe[demo]")

from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError

ROOT = Path(__file__).parents[1]
APP = ROOT / "spaces_demo" / "app.py"
EXAMPLE = ROOT / "spaces_demo" / "examples" / "hazelnut_defective_1.jpg"
START_SECONDS = 120  # on a busy machine; it takes about 10


def save_model(folder: Path, image_threshold: float | None) -> Path:
    torch.manual_seed(0)
    blocks = {"block_out_channels": (32, 64), "attention": (False, True)}
    unet = DiffusionADUNet2DModel(sample_size=64, patch_size=4, **blocks)
    segmentation = SegmentationUNet2DModel(base_channels=8, norm_type="group")
    scheduler = NormGuidedOneStepScheduler(prediction_type="sample")
    pipe = DiffusionADPipeline(
        unet.eval(), segmentation.eval(), scheduler, image_size=64, image_threshold=image_threshold
    )
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """The address of the app with a tiny model whose threshold is 0.4."""
    folder = tmp_path_factory.mktemp("space")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {
        **os.environ,
        "DIFFUSIONAD_MODEL": str(save_model(folder / "model", image_threshold=0.4)),
        "GRADIO_SERVER_NAME": "127.0.0.1",
        "GRADIO_SERVER_PORT": str(port),
        "GRADIO_TEMP_DIR": str(folder / "uploads"),
        "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    log = folder / "log.txt"
    with log.open("w") as file:
        command = [sys.executable, APP]
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=file, stderr=file)
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


@pytest.fixture
def client(server, tmp_path):
    return Client(
        server,
        verbose=False,
        analytics_enabled=False,
        download_files=tmp_path / "downloads",
        httpx_kwargs={"timeout": START_SECONDS},
    )


def test_detect_answers_with_a_verdict_and_two_pairs_of_pictures(client):
    verdict, heatmap, reconstruction = client.predict(handle_file(EXAMPLE), api_name="/detect")
    assert set(verdict) == {"verdict", "explanation", "score", "threshold"}
    assert 0 <= verdict["score"] <= 1 and verdict["threshold"] == 0.4
    assert verdict["verdict"] == ("Defective" if verdict["score"] > 0.4 else "Looks good")
    assert f"{verdict['score']:.3f}" in verdict["explanation"]
    for pair in (heatmap, reconstruction):
        assert [Image.open(path).size for path in pair] == [(512, 512)] * 2
        assert [Image.open(path).format for path in pair] == ["PNG"] * 2


def test_detect_is_the_pipeline_and_its_settings_reach_it(client, server, tmp_path):
    pipe = DiffusionADPipeline.from_pretrained(save_model(tmp_path / "model", image_threshold=0.4))
    settings = {"small_timestep": 100, "large_timestep": 300, "guidance_scale": 0.5, "num_noise_samples": 2}
    expected = pipe(Image.open(EXAMPLE), **settings).anomaly_scores[0]
    verdict, *_ = client.predict(handle_file(EXAMPLE), 0.4, *settings.values(), api_name="/detect")
    assert verdict["score"] == pytest.approx(expected, abs=1e-6)


def test_another_threshold_changes_the_verdict_on_the_same_score(client):
    score = client.predict(handle_file(EXAMPLE), api_name="/detect")[0]["score"]
    decisions = [client.predict(t, api_name="/decide") for t in (0.9 * score, score, 1.1 * score, 0)]
    verdicts = [decision["verdict"] for decision in decisions]
    assert verdicts == ["Defective", "Looks good", "Looks good", "Not decided"]
    assert [decision["score"] for decision in decisions] == [score] * 4


def test_no_picture_is_no_result(client):
    verdict, heatmap, reconstruction = client.predict(None, api_name="/detect")
    assert verdict["verdict"] == "No result yet" and heatmap is None and reconstruction is None


def test_errors_say_what_is_wrong_and_the_app_goes_on(client, tmp_path):
    page, cut, strip = tmp_path / "page.png", tmp_path / "cut.jpg", tmp_path / "strip.png"
    page.write_text("<!DOCTYPE html><title>not a picture</title>")
    cut.write_bytes(EXAMPLE.read_bytes()[:50_000])
    Image.new("RGB", (400, 4)).save(strip)
    for path, reason in ((page, "an HTML page"), (cut, "truncated"), (strip, "sides of at least 8")):
        with pytest.raises(AppError, match=reason) as error:
            client.predict(handle_file(path), api_name="/detect")
        assert path.name not in str(error.value)  # and no path of the server
    for settings, reason in (((500, 400, 1, 1), "must be in order"), ((200, 400, 1, 9), "at most 8 noise")):
        with pytest.raises(AppError, match=reason):
            client.predict(handle_file(EXAMPLE), 0.4, *settings, api_name="/detect")
    verdict, *_ = client.predict(handle_file(EXAMPLE), api_name="/detect")
    assert verdict["verdict"] in ("Defective", "Looks good")


def test_16_bit_and_large_pictures_are_shown_right(client, tmp_path):
    ramp = np.linspace(0, 65535, 900 * 1200).reshape(900, 1200).astype(np.uint16)
    Image.fromarray(ramp).save(tmp_path / "ramp.png")
    _, (shown, heatmap), _ = client.predict(handle_file(tmp_path / "ramp.png"), api_name="/detect")
    assert Image.open(shown).size == Image.open(heatmap).size == (768, 576)
    assert np.asarray(Image.open(shown)).mean() == pytest.approx(127.5, abs=1)


def test_only_two_endpoints_are_public(client):
    assert set(client.view_api(return_format="dict")["named_endpoints"]) == {"/detect", "/decide"}
