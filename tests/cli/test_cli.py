"""`diffusionad predict`, on real pictures with a tiny model."""

import csv
import json
import os
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from diffusionad_pipe import DiffusionADPipeline
from diffusionad_pipe.cli import app
from diffusionad_pipe.images.sources import output_names, watch_folders
from diffusionad_pipe.runtime.acceleration import fastest_dtype
from tests.helpers.script_processes import DIFFUSIONAD, ScriptProcess

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


def predict(*arguments: object, listed: str | None = None):
    return runner.invoke(app, ["predict", *map(str, arguments)], input=listed)


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
        (["{tmp}/*.tif", "--model", "{model}"], "no file has a name like this"),
        (["-", "--model", "{model}"], "write one on each line"),
        (["{tmp}/pictures/a.png", "--model", "{model}", "--watch"], "a.png is none"),
        (["--model", "{model}"], "give pictures, or --dataset"),
        (["{tmp}/pictures", "--model", "{model}", "--threshold", "nan"], "--threshold nan must lie between 0 and 1"),
        (["{tmp}/pictures", "--model", "{model}", "--threshold", "1.5"], "--threshold 1.5 must lie"),
        (["{tmp}/pictures", "--model", "{model}", "--pixel-threshold", "inf"], "--pixel-threshold inf must lie"),
        (["{tmp}/pictures", "--model", "{model}", "--pixel-threshold", "-0.1"], "--pixel-threshold -0.1 must lie"),
        (["{tmp}/pictures", "--model", "{model}", "--tile-overlap", "0.5"], "give --tile-size too"),
        (["{tmp}/pictures", "--model", "{model}", "--tile-size", "9000"], "tile_size=9000 is outside"),
        (["{tmp}/pictures", "--model", "{model}", "--tile-size", "32", "--tile-overlap", "nan"], "overlap=nan must be"),
        (["{tmp}/pictures", "--model", "{model}", "--dtype", "float16"], "float16"),
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


def test_thresholds_masks_and_pixel_limit(model: Path, folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    result = predict(folder, "--model", model, "--output", output, "--threshold", 0, "--pixel-threshold", 0, "--masks")
    assert result.exit_code == 0 and {line["decision"] for line in rows(output)} == {"defective"}
    mask = np.asarray(Image.open(output / "pictures_a_mask.png"))
    assert mask.shape == (40, 48) and mask.min() == 255
    result = predict(folder, "--model", model, "--output", tmp_path / "small", "--max-pixels", "100")
    assert result.exit_code == 1 and "--max-pixels" in result.output


def test_fail_on_defect(model: Path, folder: Path, tmp_path: Path) -> None:
    common = (folder / "a.png", "--model", model, "--fail-on-defect")
    assert predict(*common, "--output", tmp_path / "one", "--threshold", 0).exit_code == 3
    assert predict(*common, "--output", tmp_path / "two", "--threshold", 1).exit_code == 0
    # A picture that was not judged is an error first.
    common = (*common, tmp_path / "pictures" / "page.png")
    (folder / "page.png").write_text("<html>")
    assert predict(*common, "--output", tmp_path / "one", "--threshold", 0).exit_code == 1


def test_patterns_lists_and_what_lies_in_the_output(model: Path, folder: Path, tmp_path: Path) -> None:
    listed = f"{folder}/a.png\n\n{folder}/sub/gone.png\n"
    output = folder / "results"
    result = predict(f"{folder}/**/*.webp", "-", "--model", model, "--output", output, listed=listed)
    assert result.exit_code == 1 and "gone.png: there is no such file" in result.output
    assert [Path(line["path"]).name for line in rows(output)] == ["ä.webp", "a.png", "gone.png"]
    # The drawings in the output folder are no pictures to judge.
    result = predict(folder, "--model", model, "--output", output)
    assert result.exit_code == 0 and len(rows(output)) == 5 and "2 of 4 pictures were judged before" in result.output


def test_going_on_predicts_only_what_is_new_or_changed(model: Path, folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    common = ("--model", model, "--output", output, "--batch-size", 1)
    predict(folder / "a.png", folder / "sub" / "a.jpg", *common)
    before = {file.name: file.stat().st_mtime_ns for file in output.glob("*.png")}
    # A killed run leaves half a line behind and no table.
    with open(output / "results.jsonl", "a", encoding="utf-8") as file:
        file.write('{"path": "half')
    (output / "results.csv").unlink()
    result = predict(folder, *common)
    assert result.exit_code == 0 and "2 of 4 pictures were judged before" in result.output
    assert "4 judged" in result.output and len(rows(output)) == 4
    assert all((output / name).stat().st_mtime_ns == when for name, when in before.items())
    kept = {row["path"]: row["output"] for row in rows(output)}

    Image.new("RGB", (48, 40)).save(folder / "a.png")  # another picture under the same name
    os.utime(folder / "a.png", (time.time() + 5,) * 2)
    changed = rows(output)[0]["score"]
    result = predict(folder, *common)
    assert "3 of 4 pictures were judged before" in result.output and rows(output)[0]["score"] != changed
    assert {row["path"]: row["output"] for row in rows(output)} == kept
    assert len(set(kept.values())) == 4


def test_another_model_or_other_settings_do_not_mix(model: Path, folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    common = (folder / "a.png", "--model", model, "--output", output)
    predict(*common, folder / "sub" / "a.jpg")
    result = predict(*common, "--threshold", 0.1)
    assert result.exit_code == 2 and "another threshold" in result.output and "--overwrite" in result.output
    assert len(rows(output)) == 2
    result = predict(*common, "--threshold", 0.1, "--overwrite")
    assert result.exit_code == 0 and [row["threshold"] for row in rows(output)] == [0.1]
    assert [file.name for file in output.glob("*.png")] == ["a.png"]  # the other one is of no row any more


def test_dtype_and_tiles_are_those_of_the_pipeline(model: Path, folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    common = (folder / "a.png", "--model", model, "--output", output)
    exact = DiffusionADPipeline.from_pretrained(model)
    tiled = DiffusionADPipeline.from_pretrained(model)
    tiled.enable_tiling(32, 0.5)
    half = DiffusionADPipeline.from_pretrained(model, dtype=torch.bfloat16)
    automatic = DiffusionADPipeline.from_pretrained(model, dtype=fastest_dtype("cpu"))
    scores = []
    for pipe, options, other in (
        (exact, (), ""),
        (tiled, ("--tile-size", 32, "--tile-overlap", 0.5), "another tiling:"),
        (half, ("--dtype", "bfloat16"), "another model, dtype"),
        (automatic, ("--dtype", "auto", "--device", "cpu"), ""),
    ):
        if other:  # results of other settings do not mix
            result = predict(*common, *options)
            assert result.exit_code == 2 and other in result.output, result.output
        result = predict(*common, *options, "--overwrite")
        assert result.exit_code == 0, result.output
        (row,) = rows(output)
        expected = pipe(Image.open(folder / "a.png"), batch_size=8).anomaly_scores[0]
        assert row["score"] == pytest.approx(float(expected), abs=1e-6)
        scores.append(row["score"])
        result = predict(*common, *options)
        assert "1 of 1 pictures were judged before" in result.output
    assert len(set(scores[:3])) == 3


def test_an_interrupted_run_keeps_what_is_done(model: Path, folder: Path, tmp_path: Path) -> None:
    for index in range(50):
        (folder / f"{index:03d}.png").write_bytes((folder / "a.png").read_bytes())
    output = tmp_path / "out"
    arguments = ["predict", folder, "--model", model, "--output", output, "--batch-size", 1]
    with ScriptProcess([DIFFUSIONAD, *arguments]) as process:
        process.wait_for(lambda: count_lines(output) > 2)
        process.send_signal(signal.SIGINT)
        result = process.finish()
    assert result.returncode == 130 and "the same command goes on" in result.stdout, result.stderr
    done = len(rows(output))
    assert 2 < done < 54
    result = predict(folder, "--model", model, "--output", output)
    assert result.exit_code == 0 and f"{done} of 54 pictures were judged before" in result.output
    assert len(rows(output)) == 54


def test_watching_a_folder(model: Path, folder: Path, tmp_path: Path) -> None:
    """Pictures that are there, one that comes, one that is written slowly; then Ctrl-C."""
    output, late, slow = tmp_path / "out", folder / "late.png", folder / "slow.png"
    content = (folder / "a.png").read_bytes()

    def predicted() -> set[str]:
        """By the table, which is written once a round's verdicts are printed: Ctrl-C comes after them."""
        with open(output / "results.csv", newline="", encoding="utf-8") as file:
            return {Path(row["path"]).name for row in csv.DictReader(file) if row["score"]}

    with ScriptProcess([DIFFUSIONAD, "predict", folder, "--model", model, "--output", output, "--watch"]) as process:
        process.wait_for((output / "results.csv").exists)
        late.write_bytes(content)
        with open(slow, "wb") as file:
            for start in range(0, len(content), 1 + len(content) // 8):
                file.write(content[start : start + 1 + len(content) // 8])
                file.flush()
                time.sleep(0.3)
        process.wait_for(lambda: predicted() >= {"late.png", "slow.png"})
        process.send_signal(signal.SIGINT)
        result = process.finish()
    assert result.returncode == 0, result.stderr
    assert "6 judged" in result.stdout and "slow.png: 0." in result.stdout
    assert {Path(row["path"]).name for row in rows(output)} >= {"late.png", "slow.png"}


def test_only_what_is_completely_written_is_given(folder: Path) -> None:
    looks = watch_folders([folder], seconds=0)

    def look() -> list[str]:
        return [source.place.name for source in next(looks)]

    assert look() == [] and look() == ["a.png", "a.jpg", "b c.png", "ä.webp"] and look() == []
    growing = folder / "growing.png"
    for size in (10, 20):
        growing.write_bytes(b"0" * size)
        assert look() == []
    assert look() == ["growing.png"] and look() == []
    growing.write_bytes(b"0" * 30)
    assert look() == [] and look() == ["growing.png"]


def test_datasets_and_parquet(model: Path, folder: Path, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    from datasets.table import embed_table_storage

    images = sorted(str(file) for file in folder.rglob("*.*"))
    columns = {"photo": [*images[:2], None], "number": [0, 1, 2]}
    features = datasets.Features({"photo": datasets.Image(), "number": datasets.Value("int64")})
    table = datasets.Dataset.from_dict(columns, features=features)
    parquet, output = tmp_path / "line.parquet", tmp_path / "out"
    embedded = table.with_format("arrow").map(embed_table_storage, batched=True, keep_in_memory=True)
    embedded.with_format(None).to_parquet(parquet)
    common = ("--dataset", parquet, "--model", model, "--output", output)
    result = predict(*common, "--image-column", "photo", "--parquet")
    assert result.exit_code == 1 and "[2]: this row has no picture" in result.output, result.output
    lines = rows(output)
    assert [line["path"] for line in lines] == [f"{parquet}[train][{index}]" for index in range(3)]
    pipe = DiffusionADPipeline.from_pretrained(model)
    for line, image in zip(lines[:2], images):
        assert line["score"] == pytest.approx(float(pipe(Image.open(image)).anomaly_scores[0]), abs=2e-6)
        assert (output / f"{line['output']}.png").is_file()
    stored = datasets.Dataset.from_parquet(str(output / "results.parquet"))
    assert stored["path"] == [line["path"] for line in lines] and stored["score"][2] is None
    result = predict(*common, "--image-column", "photo", "--parquet")
    assert "2 of 3 pictures were judged before" in result.output

    for flags, cause in (
        ((), "has no column 'image': choose one of photo, number"),
        (("--split", "nothing"), "has no split 'nothing': choose one of train"),
        (("--image-column", "number"), "holds no pictures"),
        ((folder,), "one of them"),
        (("--watch",), "--watch takes folders"),
    ):
        result = predict(*flags, *common)
        assert result.exit_code == 2 and cause in result.output and "Traceback" not in result.output, result.output
    parquet.write_bytes(parquet.read_bytes()[:100])
    result = predict(*common)
    assert result.exit_code == 2 and "cannot be read as a dataset" in result.output


@pytest.mark.parametrize(
    "files, names",
    [
        (["a/x.png", "a/y.png"], ["x", "y"]),
        (["a/x.png", "b/x.png", "b/y.png"], ["a_x", "b_x", "b_y"]),
        (["z.png", "a/b/z.png"], ["z", "b_z"]),
        (["a/x.png", "a/x.jpg"], ["x_png", "x_jpg"]),
        (["a/x.png", "b/X.png"], ["a_x", "b_X"]),  # one file for Windows and macOS
    ],
)
def test_output_names_tell_all_images_apart(files: list[str], names: list[str]) -> None:
    assert output_names([Path(file) for file in files]) == names


COMMANDS = [
    "predict", "check-data", "preview-synthesis", "train", "evaluate", "calibrate", "info", "convert", "push", "space",
]  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS)
def test_help_teaches(command: str) -> None:
    """Every command shows at least one line that can be copied."""
    result = runner.invoke(app, [command, "--help"], env={"COLUMNS": "200"})
    assert result.exit_code == 0 and f"diffusionad {command} " in result.output, result.output


def test_the_installed_command_lists_all() -> None:
    output = subprocess.run([DIFFUSIONAD, "--help"], capture_output=True, check=True, text=True).stdout
    assert all(command in output for command in COMMANDS)


def count_lines(output: Path) -> int:
    journal = output / "results.jsonl"
    return journal.read_bytes().count(b"\n") if journal.exists() else 0
