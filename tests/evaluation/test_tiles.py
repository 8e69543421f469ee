"""Evaluation and calibration of pictures in tiles, with a tiny pipeline."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner, Result

from diffusionad_pipe import DiffusionADPipeline, open_image
from diffusionad_pipe.cli import app
from diffusionad_pipe.evaluation.kept_predictions import StoredPredictions
from diffusionad_pipe.files.output_folder import OutputFolder

TILES = ("--tile-size", 32, "--tile-overlap", 0.5)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, list(map(str, arguments)))


def in_tiles(model: Path) -> DiffusionADPipeline:
    pipe = DiffusionADPipeline.from_pretrained(model)
    pipe.enable_tiling(32, 0.5)
    return pipe


@pytest.mark.slow
def test_evaluate_measures_the_maps_of_tiles(saved: Path, data: Path, tmp_path: Path) -> None:
    strip = Image.fromarray(np.random.default_rng(0).integers(0, 256, (2000, 40, 3), dtype=np.uint8))
    strip.save(data / "test" / "good" / "strip.png")  # refused as a whole
    flags = ["evaluate", "--data", data, "--output", tmp_path / "out"]
    result = run(*flags, "--model", saved, *TILES)
    assert result.exit_code == 0, result.output
    written = json.loads((tmp_path / "out" / "results.json").read_text())
    assert (written["settings"]["tile_size"], written["settings"]["tile_overlap"]) == (32, 0.5)
    assert written["results"][0]["good"] == 3 and (tmp_path / "out" / "report.html").is_file()
    pipe = in_tiles(saved)
    stored = StoredPredictions(OutputFolder(tmp_path / "out", "evaluate"), "predictions/part")
    for file in sorted((data / "test").rglob("*.png")):
        image = open_image(file, max_aspect_ratio=float("inf"))
        expected = pipe(image, output_type="np", match_input_resolution=False)
        kept = stored.read(hashlib.sha256(file.read_bytes()).hexdigest())
        assert kept is not None and kept.score == expected.anomaly_scores[0]
        assert kept.size == image.size[::-1]
        np.testing.assert_array_equal(kept.anomaly_map, expected.anomaly_maps[0, ..., 0])

    # Kept under the tiles: the metrics again need the same ones, and whole pictures are predicted anew.
    table = (tmp_path / "out" / "results.csv").read_text()
    said = run(*flags).output
    assert "has predictions in tiles of 32 pixels that share 0.5: give the same --tile-size" in said, said
    assert run(*flags, *TILES).exit_code == 0
    assert [line.split(",")[:6] for line in (tmp_path / "out" / "results.csv").read_text().splitlines()] == [
        line.split(",")[:6] for line in table.splitlines()
    ]
    result = run(*flags, "--model", saved)
    assert result.exit_code == 1 and "strip.png" in result.output, result.output
    kept = stored.read(hashlib.sha256((data / "test" / "good" / "0.png").read_bytes()).hexdigest())
    assert kept is None  # of the settings before
    assert "has predictions of whole pictures" in run(*flags, *TILES).output


def test_options_of_tiles_that_do_not_go_together(saved: Path, data: Path, tmp_path: Path) -> None:
    flags = ["--data", data, "--output", tmp_path / "out", "--model", saved]
    for command in (["evaluate", *flags], ["calibrate", saved, data / "train" / "good"]):
        result = run(*command, "--tile-overlap", 0.5)
        assert result.exit_code == 2 and "--tile-overlap is for pictures in tiles" in result.output
        result = run(*command, "--tile-size", 32, "--tile-overlap", 1)
        assert result.exit_code == 2 and "overlap=1.0 must be in [0, 1)" in result.output, result.output
    result = run("evaluate", *flags, *TILES, "--protocol", "reference")
    assert result.exit_code == 2 and "the reference protocol resizes whole pictures" in result.output


@pytest.mark.slow
def test_calibrate_in_tiles(saved: Path, tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    (saved / "README.md").write_text("---\nmodel_name: tiny\n---\n# tiny\n\n## Thresholds\n\nnone\n\n## More\n")
    sizes = [(40, 48)] * 12 + [(64, 32)] * 6 + [(24, 24)] + [(2000, 40)]  # no larger than a tile; a strip
    for index, size in enumerate(sizes):
        pixels = random.integers(0, 256 - 10 * index, (*size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{index:02}.png")
    Image.open(tmp_path / "03.png").save(tmp_path / "again.bmp")
    result = run("calibrate", saved, tmp_path / "*.png", tmp_path / "again.bmp", "--false-positive-rate", 0.1, *TILES)
    assert result.exit_code == 0 and "again.bmp: the same picture as" in result.output, result.output
    assert "20 good pictures in tiles of 32 pixels that share 0.5" in (saved / "README.md").read_text()
    pipe = in_tiles(saved)
    outputs = [
        pipe(open_image(file, max_aspect_ratio=float("inf")), output_type="np", match_input_resolution=False)
        for file in sorted(tmp_path.glob("*.png"))
    ]
    # ceil(21 * 0.9) = 19: the second largest.
    assert pipe.config.image_threshold == sorted(float(output.anomaly_scores[0]) for output in outputs)[-2]
    shares = [(output.anomaly_maps > pipe.config.pixel_threshold).mean() for output in outputs]
    assert 0.05 < np.mean(shares) <= (0.1 * 21 - 1) / 20  # of each picture the same, whatever its size
