"""The Space's endpoints, called over the network with a tiny real model."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import zipfile
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image

from diffusionad_pipe import DiffusionADPipeline, open_image
from tests.helpers.script_processes import run_script
from tests.helpers.space_server import APP, EXAMPLES, ROOT, START_SECONDS, environment, free_port, save_model, serve

pytest.importorskip("gradio", reason="gradio is not installed: pip install diffusionad_pipe[demo]")

from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError

EXAMPLE = EXAMPLES / "hazelnut_defective_1.jpg"
ENDPOINTS = {"/detect", "/decide", "/files", "/explain", "/batch", "/batch_csv", "/choose_model"}
DEFAULTS = (0.4, 0.5, 200, 400, 1, 1)  # thresholds and settings of the tiny model


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("space")


@pytest.fixture(scope="module")
def server(folder):
    """The address of the app, in a folder of its own as a Space is, with three models more than its own."""
    space = folder / "space"
    shutil.copytree(APP.parent, space, ignore=shutil.ignore_patterns("__pycache__"))
    model = save_model(space / "pretrained" / "tiny")
    (model / "README.md").write_text("---\nlicense: mit\n---\n# Tiny\n![p](http://elsewhere/p.png)Not trained.")
    undecided = save_model(folder / "elsewhere" / "undecided", image_threshold=None, pixel_threshold=None)
    pickled = Path(shutil.copytree(undecided, folder / "elsewhere" / "pickled"))
    weights = pickled / "unet" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    with serve(folder, space / "app.py", DIFFUSIONAD_MODELS=f"{undecided}, {pickled},user/missing") as address:
        yield address


@pytest.fixture
def client(server, tmp_path):
    return Client(
        server,
        verbose=False,
        analytics_enabled=False,
        download_files=tmp_path / "downloads",
        httpx_kwargs={"timeout": START_SECONDS},
    )


def test_detect_answers_with_a_verdict_images_and_regions(client):
    verdict, heatmap, reconstruction, contours, regions = client.predict(handle_file(EXAMPLE), api_name="/detect")
    assert set(verdict) == {"verdict", "explanation", "score", "threshold"}
    assert 0 <= verdict["score"] <= 1 and verdict["threshold"] == 0.4
    assert verdict["verdict"] == ("Defective" if verdict["score"] > 0.4 else "Looks good")
    assert f"{verdict['score']:.3f}" in verdict["explanation"]
    for path in (*heatmap, *reconstruction, contours):
        assert Image.open(path).size == (512, 512) and Image.open(path).format == "PNG"
    assert regions["headers"] == ["no.", "px", "%", "peak", "x, y, w × h"]


def test_detect_is_the_pipeline_and_its_settings_reach_it(client, folder):
    pipe = DiffusionADPipeline.from_pretrained(folder / "space" / "pretrained" / "tiny")
    settings = {"small_timestep": 100, "large_timestep": 300, "guidance_scale": 0.5, "num_noise_samples": 2}
    expected = pipe(Image.open(EXAMPLE), **settings).anomaly_scores[0]
    verdict, *_ = client.predict(handle_file(EXAMPLE), "tiny", 0.4, 0.5, *settings.values(), api_name="/detect")
    assert verdict["score"] == pytest.approx(expected, abs=1e-6)


def test_other_thresholds_change_verdict_and_mask_on_the_same_score(client):
    score = client.predict(handle_file(EXAMPLE), api_name="/detect")[0]["score"]
    answers = [client.predict(t, m, api_name="/decide") for t, m in ((0.9 * score, 0.01), (score, 1), (0, 0))]
    assert [verdict["verdict"] for verdict, *_ in answers] == ["Defective", "Looks good", "Not decided"]
    assert [verdict["score"] for verdict, *_ in answers] == [score] * 3
    tables = [table["data"] for *_, table in answers]
    assert tables[0] == [[1, 512 * 512, 100, pytest.approx(score, abs=0.3), "0, 0, 512 × 512"]]
    assert [row for table in tables[1:] for row in table if any(row)] == []


def test_no_image_is_no_result(client):
    verdict, *images, _ = client.predict(None, api_name="/detect")
    assert verdict["verdict"] == "No result yet" and images == [None, None, None]
    assert client.predict(0.5, 0.5, api_name="/decide")[0]["verdict"] == "No result yet"
    assert client.predict(api_name="/explain") == (None,) * 5
    for endpoint, arguments in (("/files", (0.5, 0.5)), ("/batch_csv", ()), ("/batch", (None, "tiny", *DEFAULTS))):
        with pytest.raises(AppError, match="there (is|are) no"):
            client.predict(*arguments, api_name=endpoint)


def test_two_visitors_get_their_own_results(client, server, tmp_path):
    good = Image.open(EXAMPLES / "hazelnut_good_1.jpg").resize((300, 200))
    good.save(tmp_path / "good.png")
    other = Client(server, verbose=False, analytics_enabled=False, download_files=tmp_path / "other")
    one = client.submit(handle_file(EXAMPLE), api_name="/detect")
    two = other.submit(handle_file(tmp_path / "good.png"), api_name="/detect")
    scores = [job.result()[0]["score"] for job in (one, two)]
    assert scores[0] != scores[1]
    for visitor, score, size in ((client, scores[0], (512, 512)), (other, scores[1], (300, 200))):
        verdict, image, _ = visitor.predict(0.5, 0.5, api_name="/decide")
        assert verdict["score"] == score and Image.open(image).size == size


def test_files_are_those_of_the_pipeline(client, folder, tmp_path):
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 255, (150, 220, 3), dtype=np.uint8)).save(tmp_path / "my part.png")
    client.predict(handle_file(tmp_path / "my part.png"), api_name="/detect")
    overlay, anomaly_map, report = client.predict(0.4, 0.45, api_name="/files")
    assert Path(overlay).name.endswith("_overlay.png") and Image.open(overlay).size == (220, 150)
    pipe = DiffusionADPipeline.from_pretrained(folder / "space" / "pretrained" / "tiny", pixel_threshold=0.45)
    expected = pipe(open_image(tmp_path / "my part.png"), output_type="np")
    stored = np.asarray(Image.open(anomaly_map))
    assert stored.dtype == np.uint16
    np.testing.assert_allclose(stored / 65535, expected.anomaly_maps[0, ..., 0], atol=1e-4)
    numbers = json.loads(Path(report).read_text())
    assert numbers["score"] == pytest.approx(expected.anomaly_scores[0], abs=1e-6)
    assert (numbers["model"], numbers["height"], numbers["width"]) == ("tiny", 150, 220)
    assert numbers["small_timestep"] == 200 and numbers["pixel_threshold"] == 0.45
    marked = sum(region["area"] for region in numbers["regions"])
    assert marked == pytest.approx(expected.predicted_masks.sum(), abs=20)  # at the threshold, by float32


def test_explain_shows_five_different_images(client):
    client.predict(handle_file(EXAMPLE), api_name="/detect")
    images = [np.asarray(Image.open(path)) for path in client.predict(api_name="/explain")]
    assert [image.shape for image in images] == [(64, 64, 3)] * 5
    assert len({image.tobytes() for image in images}) == 5
    assert images[1].std() > images[0].std() > images[4].std()  # large noise, small noise, none


def test_batch(client, tmp_path):
    broken = tmp_path / "broken.jpg"
    broken.write_text("<html>")
    archive = tmp_path / "parts.zip"
    with zipfile.ZipFile(archive, "w") as file:
        file.write(EXAMPLES / "hazelnut_good_1.jpg", "good/1.jpg")
        file.writestr("../escaped.jpg", EXAMPLE.read_bytes())
        file.writestr("inner.zip", b"PK")
        file.writestr("__MACOSX/._1.jpg", b"")
    uploads = [handle_file(path) for path in (EXAMPLE, broken, archive)]
    job = client.submit(uploads, "tiny", *DEFAULTS, api_name="/batch")
    told, table, gallery, problems = job.result()
    assert told.startswith("5 of 5 done: 2 examined") and told.endswith("3 not examined.")
    assert len(job.outputs()) >= 2  # progress
    assert [row[0] for row in table["data"]] == [EXAMPLE.name, "parts.zip/good/1.jpg"]
    single = client.predict(handle_file(EXAMPLE), api_name="/detect")[0]
    assert table["data"][0][1:3] == [single["verdict"], round(single["score"], 4)]
    reasons = dict(map(tuple, problems["data"]))
    assert "an HTML page" in reasons.pop("broken.jpg")
    assert "leads out of the archive" in reasons.pop("parts.zip/../escaped.jpg")
    assert "archive in an archive" in reasons.pop("parts.zip/inner.zip") and not reasons
    assert len(gallery) == 2
    lines = Path(client.predict(api_name="/batch_csv")).read_text().splitlines()
    assert lines[0] == "name,verdict,score,threshold,regions,marked_percent,error" and len(lines) == 6


def test_two_batches_at_once(client, server, tmp_path):
    other = Client(server, verbose=False, analytics_enabled=False, download_files=tmp_path / "other")
    names = sorted(path.name for path in EXAMPLES.iterdir())
    jobs = [
        visitor.submit([handle_file(EXAMPLES / name) for name in part], "tiny", *DEFAULTS, api_name="/batch")
        for visitor, part in ((client, names[:3]), (other, names[3:]))
    ]
    assert [[row[0] for row in job.result()[1]["data"]] for job in jobs] == [names[:3], names[3:]]


def test_choose_model(client):
    *values, card = client.predict("undecided", api_name="/choose_model")
    assert len(values) == 5 and "has no model card" in card
    verdict, *_ = client.predict(handle_file(EXAMPLE), "undecided", 0, 0, *DEFAULTS[2:], api_name="/detect")
    assert verdict["verdict"] == "Not decided"
    *_, card = client.predict("tiny", api_name="/choose_model")
    assert card == "# Tiny\nNot trained."


@pytest.mark.parametrize(
    "model, reason",
    [
        ("pickled", r"diffusion_pytorch_model.bin is a pickle.* only safetensors are loaded"),
        ("user/missing", "user/missing: the Hub cannot be reached"),  # offline here; see test_space_parts.py
        ("someone/else", "someone/else is not among the models here; choose one of tiny"),
        ("../../etc", "not among the models"),
    ],
)
def test_a_model_that_cannot_be_had_is_a_sentence(client, folder, model, reason):
    for call in (("/choose_model", model), ("/detect", handle_file(EXAMPLE), model, *DEFAULTS)):
        with pytest.raises(AppError, match=reason) as error:
            client.predict(*call[1:], api_name=call[0])
        assert str(folder) not in str(error.value) and "elsewhere" not in str(error.value)


def test_errors_say_what_is_wrong_and_the_app_goes_on(client, tmp_path):
    page, cut, strip, large = (tmp_path / name for name in ("page.png", "cut.jpg", "strip.png", "large.png"))
    page.write_text("<!DOCTYPE html><title>not a picture</title>")
    cut.write_bytes(EXAMPLE.read_bytes()[:50_000])
    Image.new("RGB", (400, 4)).save(strip)
    Image.new("1", (6000, 5000)).save(large)
    heavy = tmp_path / "heavy.png"
    heavy.write_bytes(EXAMPLE.read_bytes() + b"\0" * 21 * 2**20)
    for path, reason in (
        (page, "an HTML page"),
        (cut, "truncated"),
        (strip, "sides of at least 8"),
        (large, "are more than 24000000; make the picture smaller$"),
        (heavy, "the file has 21 MB; give a picture of at most 20 MB"),
    ):
        with pytest.raises(AppError, match=reason) as error:
            client.predict(handle_file(path), api_name="/detect")
        assert path.name not in str(error.value)  # and no path of the server
    for settings, reason in (
        ((0.4, 0.5, 500, 400, 1, 1), "must be in order"),
        ((0.4, 0.5, 200, 400, 1, 9), "at most 8 noise"),
        ((0.4, 0.5, 200, 400, 50, 1), "Guidance weight: 50 cannot be used"),
        ((-1, 0.5, 200, 400, 1, 1), "Decision threshold: -1 cannot"),
        (("much", 0.5, 200, 400, 1, 1), "Decision threshold: 'much' cannot"),
    ):
        with pytest.raises(AppError, match=reason):
            client.predict(handle_file(EXAMPLE), "tiny", *settings, api_name="/detect")
    verdict, *_ = client.predict(handle_file(EXAMPLE), api_name="/detect")
    assert verdict["verdict"] in ("Defective", "Looks good")


def test_a_disk_that_takes_no_files_is_a_sentence(client, folder):
    client.predict(handle_file(EXAMPLE), api_name="/detect")
    client.predict([handle_file(EXAMPLE)], "tiny", *DEFAULTS, api_name="/batch")
    uploads = folder / "uploads"
    uploads.rename(folder / "kept")
    uploads.touch()  # nothing can be made in it
    try:
        for endpoint, arguments in (("/decide", (0.4, 0.5)), ("/explain", ()), ("/batch_csv", ())):
            with pytest.raises(AppError, match="the server has no room for files just now") as error:
                client.predict(*arguments, api_name=endpoint)
            assert "uploads" not in str(error.value)
    finally:
        uploads.unlink()
        (folder / "kept").rename(uploads)
    assert len(client.predict(0.4, 0.5, api_name="/files")) == 3
    log = (folder / "log.txt").read_text()
    assert "cannot be written: [Errno 20] Not a directory" in log and "Traceback" not in log


def test_files_of_the_server_cannot_be_asked_for(client, server, folder):
    outside = folder / "outside.png"
    Image.new("RGB", (64, 64)).save(outside)
    image = {"path": str(outside), "meta": {"_type": "gradio.FileData"}}
    response = httpx.post(f"{server}/gradio_api/call/detect", json={"data": [image, "tiny", *DEFAULTS]})
    event = response.json()["event_id"]
    answer = httpx.get(f"{server}/gradio_api/call/detect/{event}", timeout=START_SECONDS).text
    assert answer.startswith("event: error") and "complete" not in answer


def test_an_upload_of_more_than_100_mb_is_refused(server):
    content = b"\0" * (101 * 2**20)
    response = httpx.post(f"{server}/gradio_api/upload", files={"files": ("a.png", content)}, timeout=START_SECONDS)
    assert response.status_code == 413 and "maximum allowed size" in response.text


def test_16_bit_and_large_images_are_shown_right(client, tmp_path):
    ramp = np.linspace(0, 65535, 900 * 1200).reshape(900, 1200).astype(np.uint16)
    Image.fromarray(ramp).save(tmp_path / "ramp.png")
    _, (shown, heatmap), *_ = client.predict(handle_file(tmp_path / "ramp.png"), api_name="/detect")
    assert Image.open(shown).size == Image.open(heatmap).size == (768, 576)
    assert np.asarray(Image.open(shown)).mean() == pytest.approx(127.5, abs=1)


def test_the_readme_names_every_endpoint(client):
    assert set(client.view_api(return_format="dict")["named_endpoints"]) == ENDPOINTS
    text = (ROOT / "spaces_demo" / "README.md").read_text()
    assert all(f"`{endpoint}`" in text for endpoint in ENDPOINTS)


def test_nothing_is_fetched_for_a_caller(client, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as elsewhere:
        elsewhere.settimeout(0.1)
        for host in ("127.0.0.1", "localhost.localdomain", "example.com"):
            address = f"http://{host}:{elsewhere.getsockname()[1]}/nut.jpg"
            with pytest.raises(AppError, match="an address cannot be examined here; upload the picture itself"):
                client.predict(handle_file(address), api_name="/detect")
            with pytest.raises(AppError, match="an address cannot be examined here"):
                client.predict([handle_file(address)], "tiny", *DEFAULTS, api_name="/batch")
        with pytest.raises(TimeoutError):
            elsewhere.accept()
    assert client.predict(handle_file(EXAMPLE), api_name="/detect")[0]["score"]  # and the page still works


@pytest.mark.slow
def test_a_port_in_use_is_a_sentence(server, folder, tmp_path):
    port = int(server.rpartition(":")[2])
    done = run_script([folder / "space" / "app.py"], environment(tmp_path, port))
    assert done.returncode == 1
    assert done.stderr.strip().endswith(f"port {port} is in use: set GRADIO_SERVER_PORT to another one")


@pytest.mark.slow
def test_the_page_is_there_before_the_model_and_a_damaged_one_ends_it(tmp_path):
    """Found while the page is shown, and told as a sentence."""
    model = save_model(tmp_path / "tiny")
    weights = model / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    variables = environment(tmp_path, free_port(), DIFFUSIONAD_MODEL=str(model))
    done = subprocess.run([sys.executable, APP], env=variables, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1
    assert "Running on local URL" in done.stdout
    last = done.stderr.strip().splitlines()[-1]
    assert "tiny/unet/diffusion_pytorch_model.safetensors" in last and str(tmp_path) not in last
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "damage", ["{", "[1]", '{"image_threshold": null}', '{"image_threshold": "high", "pixel_threshold": 0.5}']
)
def test_a_model_without_settings_is_a_sentence_at_once(tmp_path, damage):
    model = save_model(tmp_path / "tiny")
    (model / "model_index.json").write_text(damage)
    done = run_script([APP], environment(tmp_path, free_port(), DIFFUSIONAD_MODEL=str(model)))
    assert done.returncode == 1 and "Running on" not in done.stdout
    assert done.stderr.strip().splitlines()[-1].startswith("tiny") and "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.minutes(20)
def test_200_images_leave_neither_memory_nor_files_behind(tmp_path):
    """And benchmarks/space.py prints what it promises."""
    model = save_model(tmp_path / "tiny")
    command = [sys.executable, ROOT / "benchmarks" / "space.py", "--model", model, "--requests", "200"]
    done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert re.search(r"to the first page: [\d.]+ s\n", done.stdout)
    assert len(re.findall(r"from upload to answer, picture \d: [\d.]+ s\n", done.stdout)) == 3
    # Kept results would make it grow at each request; pools of the allocator, which may have tens of MB, at some.
    share, grew = re.search(r"\((.\d+\.\d) %\); in the second half it grew at (\d+) requests", done.stdout).groups()
    assert float(share) <= 10 and int(grew) <= 50, done.stdout
    left = int(re.search(r"(\d+) after another", done.stdout)[1])
    assert left <= len(list(EXAMPLES.iterdir())), done.stdout  # which are served from there
