"""`diffusionad predict`, on real pictures with the shipped model or a tiny one."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from diffusionad_pipe import DiffusionADPipeline
from diffusionad_pipe.cli import app, output_names

runner = CliRunner()


@pytest.fixture
def model(tiny_pipeline: DiffusionADPipeline, tmp_path: Path) -> Path:
    tiny_pipeline.register_to_config(image_threshold=0.5, pixel_threshold=0.5)
    tiny_pipeline.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    random = np.random.RandomState(0)
    for name in ("a.png", "sub/a.jpg", "sub/b c.png", "sub/ä.webp"):
        path = tmp_path / "pictures" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.randint(0, 256, (40, 48, 3), dtype=np.uint8)).save(path)
    return tmp_path / "pictures"


def predict(*arguments: object):
    return runner.invoke(app, ["predict", *map(str, arguments)])


def rows(output: Path) -> list[dict]:
    with open(output / "results.csv", newline="", encoding="utf-8") as file:
        table = list(csv.DictReader(file))
    lines = [json.loads(line) for line in (output / "results.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["path"] for line in lines] == [row["path"] for row in table]
    return lines


def test_folder(model: Path, folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    result = predict(folder, "--model", model, "--output", output, "--batch-size", 3, "--maps", "npy")
    assert result.exit_code == 0, result.output
    lines = rows(output)
    assert [Path(line["path"]).name for line in lines] == ["a.png", "a.jpg", "b c.png", "ä.webp"]
    assert {p.name for p in output.glob("*.png")} == {"pictures_a.png", "sub_a.png", "sub_b c.png", "sub_ä.png"}
    for line in lines:
        assert line["decision"] == ("defective" if line["score"] > 0.5 else "good") and line["seconds"] > 0
    anomaly_map = np.load(output / "sub_b c_map.npy")
    assert anomaly_map.shape == (40, 48) and anomaly_map.dtype == np.float32
    assert Image.open(output / "sub_b c.png").size == (48, 40)
    assert "4 judged" in result.output


def test_scores_are_those_of_the_pipeline(model: Path, folder: Path, tmp_path: Path) -> None:
    predict(folder, "--model", model, "--output", tmp_path / "out", "--batch-size", 1)
    pipe = DiffusionADPipeline.from_pretrained(model)
    for line in rows(tmp_path / "out"):
        assert line["score"] == pytest.approx(float(pipe(Image.open(line["path"])).anomaly_scores[0]), abs=1e-6)


def test_16_bit_maps_and_panels(model: Path, folder: Path, tmp_path: Path) -> None:
    result = predict(folder / "a.png", "--model", model, "--output", tmp_path / "out", "--maps", "png16", "--panels")
    assert result.exit_code == 0, result.output
    stored = np.asarray(Image.open(tmp_path / "out" / "a_map.png"))
    expected = DiffusionADPipeline.from_pretrained(model)(Image.open(folder / "a.png"), output_type="np").anomaly_maps
    assert stored.dtype == np.uint16
    np.testing.assert_allclose(stored / 65535, expected[0, ..., 0], atol=1e-5)
    assert Image.open(tmp_path / "out" / "a.png").width > 3 * 48


def test_broken_files_are_reported_and_the_rest_goes_on(model: Path, folder: Path, tmp_path: Path) -> None:
    (folder / "empty.png").touch()
    (folder / "page.png").write_text("<html><body>404</body></html>")
    whole = (folder / "a.png").read_bytes()
    (folder / "half.png").write_bytes(whole[: len(whole) // 2])
    Image.new("RGB", (1, 1)).save(folder / "dot.png")
    result = predict(folder, "--model", model, "--output", tmp_path / "out")
    assert result.exit_code == 1
    lines = {Path(line["path"]).name: line for line in rows(tmp_path / "out")}
    assert sum(line["score"] is not None for line in lines.values()) == 4
    for name, cause in (("empty.png", "empty"), ("page.png", "HTML"), ("half.png", "truncated"), ("dot.png", "8")):
        assert name in lines[name]["error"] and cause in lines[name]["error"]
        assert lines[name]["score"] is None and name in result.output
    assert "4 judged" in result.output and "4 with errors" in result.output


@pytest.mark.parametrize(
    "arguments, cause",
    [
        (["{tmp}/nothing", "--model", "{model}"], "nothing"),
        (["{tmp}/pictures", "--model", "{tmp}/no_model"], "no_model"),
        (["{tmp}/pictures", "--model", "{tmp}/pictures"], "model_index.json is missing"),
        (["{tmp}/pictures", "--model", "{model}", "--batch-size", "0"], "batch-size"),
        (["{tmp}/pictures"], "--model"),
        (["{tmp}/pictures", "--model", "{model}", "--device", "tpu9"], "device"),
    ],
)
def test_wrong_usage_is_exit_code_2(
    model: Path, folder: Path, tmp_path: Path, arguments: list[str], cause: str
) -> None:
    filled = [argument.format(tmp=tmp_path, model=model) for argument in arguments]
    result = predict(*filled, "--output", tmp_path / "out")
    assert result.exit_code == 2, result.output
    assert cause in result.output
    assert "Traceback" not in result.output


def test_threshold_and_pixel_limit(model: Path, folder: Path, tmp_path: Path) -> None:
    result = predict(folder, "--model", model, "--output", tmp_path / "out", "--threshold", "0")
    assert result.exit_code == 0 and {line["decision"] for line in rows(tmp_path / "out")} == {"defective"}
    result = predict(folder, "--model", model, "--output", tmp_path / "out", "--max-pixels", "100")
    assert result.exit_code == 1 and "--max-pixels" in result.output


@pytest.mark.parametrize(
    "files, names",
    [
        (["a/x.png", "a/y.png"], ["x", "y"]),
        (["a/x.png", "b/x.png", "b/y.png"], ["a_x", "b_x", "b_y"]),
        (["z.png", "a/b/z.png"], ["z", "b_z"]),
        (["a/x.png", "a/x.jpg"], ["a_x_png", "a_x_jpg"]),
    ],
)
def test_output_names_tell_all_pictures_apart(files: list[str], names: list[str]) -> None:
    assert list(output_names([Path(file) for file in files]).values()) == names


def test_help_teaches() -> None:
    result = runner.invoke(app, ["predict", "--help"])
    assert result.exit_code == 0 and "Exit code" in result.output
    script = Path(sys.executable).parent / "diffusionad"
    assert subprocess.run([script, "--help"], capture_output=True, check=True).stdout
