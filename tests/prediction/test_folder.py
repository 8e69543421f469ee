"""`diffusionad predict` loses no picture, answers for no other one, and overwrites nothing of anybody's."""

import csv
import hashlib
import json
import os
import random
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from diffusionad_pipe import DiffusionADPipeline
from diffusionad_pipe.cli import app
from diffusionad_pipe.files.names import LONGEST_NAME
from diffusionad_pipe.files.output_folder import OutputFolder
from tests.helpers.script_processes import ScriptProcess

runner = CliRunner()
COMMAND = Path(sys.executable).parent / "diffusionad"


@pytest.fixture
def model(tiny_pipeline: DiffusionADPipeline, tmp_path: Path) -> Path:
    tiny_pipeline.register_to_config(image_threshold=0.5, pixel_threshold=0.5)
    tiny_pipeline.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def draw(path: Path, seed: int = 0) -> Path:
    """Another picture for each seed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.RandomState(seed).randint(0, 256, (40, 48, 3), dtype=np.uint8)).save(path)
    return path


def predict(*arguments: object, listed: bytes | None = None):
    return runner.invoke(app, ["predict", *map(str, arguments)], input=listed)


def rows(output: Path) -> dict[str, dict]:
    lines = [json.loads(line) for line in (output / "results.jsonl").read_text(encoding="utf-8").splitlines()]
    with open(output / "results.csv", newline="", encoding="utf-8") as file:
        assert len(list(csv.DictReader(file))) == len(lines)
    return {Path(line["path"]).name: line for line in lines}


def state_of(tree: Path) -> dict[str, str]:
    files = [file for file in sorted(tree.rglob("*")) if file.is_file()]
    return {str(file.relative_to(tree)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


@pytest.mark.parametrize("output", [".", "pictures", "pictures/results"])
def test_the_output_may_lie_at_above_or_below_the_input(model: Path, tmp_path: Path, monkeypatch, output: str) -> None:
    tree = tmp_path / "tree"
    for index in range(3):
        draw(tree / "pictures" / f"{index}.png", index)
    before = state_of(tree)
    monkeypatch.chdir(tree)
    for again in ("", "3 of 3 pictures were judged before"):
        result = predict("pictures", "--model", model, "--output", output, "--maps", "png16", "--threshold", 0)
        assert result.exit_code == 0 and "3 judged" in result.output and again in result.output, result.output
    assert predict("pictures", "--model", model, "--output", output, "--maps", "png16", "--threshold", 0,
                   "--fail-on-defect").exit_code == 3  # fmt: skip
    assert before.items() <= state_of(tree).items()
    result = predict(next(Path(output).glob("*_map.png")), "--model", model, "--output", tmp_path / "other")
    assert result.exit_code == 2 and "written by diffusionad itself" in result.output


def test_files_of_others_are_neither_overwritten_nor_deleted(model: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    draw(tmp_path / "a.png")
    draw(output / "a.png", 1)
    (output / "a-2_mask.png").write_text("mine")
    before = state_of(output)
    result = predict(tmp_path / "a.png", "--model", model, "--output", output)
    assert result.exit_code == 0 and rows(output)["a.png"]["output"] == "a-3"
    assert predict(tmp_path / "a.png", "--model", model, "--output", output, "--threshold", 0, "--overwrite")
    assert before.items() <= state_of(output).items()
    (tmp_path / "table").mkdir()
    (tmp_path / "table" / "results.csv").write_text("mine")
    result = predict(tmp_path / "a.png", "--model", model, "--output", tmp_path / "table")
    assert result.exit_code == 2 and "results.csv is not what diffusionad predict wrote here" in result.output
    assert state_of(tmp_path / "table").keys() >= {"results.csv"} and not (tmp_path / "table" / "a.png").exists()


def test_a_verdict_belongs_to_the_content(model: Path, tmp_path: Path, monkeypatch) -> None:
    for folder, seed in (("A", 0), ("B", 1)):
        os.utime(draw(tmp_path / folder / "img.png", seed), (1e9, 1e9))
    common = ("img.png", "--model", model, "--output", tmp_path / "out")
    scores = []
    for folder in ("A", "B"):
        monkeypatch.chdir(tmp_path / folder)
        assert predict(*common).exit_code == 0
        scores.append(rows(tmp_path / "out")["img.png"]["score"])
    assert scores[0] != scores[1]
    shutil.copy2(tmp_path / "B" / "img.png", tmp_path / "A" / "img.png")
    monkeypatch.chdir(tmp_path / "A")
    assert "1 of 1 pictures were judged before" in predict(*common).output
    assert rows(tmp_path / "out")["img.png"]["score"] == scores[1]


def test_a_moved_image_keeps_its_verdict_and_a_copy_has_its_own(model: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    draw(tmp_path / "A" / "x.png")
    common = ("--model", model, "--output", output)
    assert predict(tmp_path / "A", *common).exit_code == 0
    shutil.copytree(tmp_path / "A", tmp_path / "copy")
    result = predict(tmp_path / "copy", *common)
    assert "judged before" not in result.output and len(OutputFolder(output, "predict").record.keys() & {"x.png"}) == 1
    shutil.rmtree(tmp_path / "copy")
    shutil.move(tmp_path / "A", tmp_path / "B")
    result = predict(tmp_path / "B", *common)
    assert "1 of 1 pictures were judged before" in result.output and "1 judged" in result.output
    paths = [json.loads(line)["path"] for line in (output / "results.jsonl").read_text().splitlines()]
    assert str(tmp_path / "B" / "x.png") in paths and len(paths) == 2


def test_deleted_maps_are_made_again(model: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    draw(tmp_path / "a.png")
    common = (tmp_path / "a.png", "--model", model, "--output", output, "--maps", "npy", "--masks")
    assert predict(*common).exit_code == 0
    for name in ("a_map.npy", "a_mask.png", "a.png"):
        (output / name).unlink()
        assert "judged before" not in predict(*common).output and (output / name).is_file()
    assert "1 of 1 pictures were judged before" in predict(*common).output


def test_products_of_different_images_never_share_a_name(model: Path, tmp_path: Path) -> None:
    names = ("a.png", "a_map.png", "a_mask.png", "a-2.png", "A_MAP.jpg")
    for seed, name in enumerate(names):
        draw(tmp_path / "in" / name, seed)
    output = tmp_path / "out"
    result = predict(tmp_path / "in", "--model", model, "--output", output, "--maps", "png16", "--masks")
    assert result.exit_code == 0, result.output
    assert Image.open(output / "a_map.png").mode == "I;16" and Image.open(output / "a_mask.png").mode == "L"
    assert len(list(output.glob("*.png"))) == 3 * len(names)


def test_names_stay_short(model: Path, tmp_path: Path) -> None:
    deep = tmp_path.joinpath("in", *(f"station_folder_name_{index:02d}" for index in range(14)))
    for seed, name in enumerate(("a.png", "a.jpg", "b.png", "x" * 240 + ".png", "ä" * 120 + ".png")):
        draw(deep / name, seed)
    output = tmp_path / "out"
    result = predict(tmp_path / "in", "--model", model, "--output", output, "--maps", "npy")
    assert result.exit_code == 0 and "5 judged" in result.output, result.output
    drawn = list(output.glob("*.*"))
    assert max(len(os.fsencode(path.name)) for path in drawn) <= LONGEST_NAME and len(drawn) == 5 * 2 + 4


def test_one_bad_entry_is_listed_and_the_rest_goes_on(model: Path, tmp_path: Path) -> None:
    good = draw(tmp_path / "in" / "good.png")
    (tmp_path / "in" / "loop.png").symlink_to("loop.png")
    (tmp_path / "in" / "empty").mkdir()
    (tmp_path / "in" / "gone.png").symlink_to("nowhere")
    common = ("--model", model, "--output", tmp_path / "out")
    result = predict(tmp_path / "in", *common)
    assert result.exit_code == 1 and "1 judged, " in result.output and "2 with errors" in result.output
    assert "loop.png: the file cannot be read" in result.output and "gone.png: there is no such file" in result.output
    for arguments, cause in (
        ([f"{tmp_path}/in/*"], "empty: this folder has no pictures"),
        ([good, tmp_path / "missing.png"], "missing.png: there is no such file"),
        ([good, f"{tmp_path}/*.tif"], "*.tif: no file has a name like this"),
    ):
        result = predict(*arguments, *common)
        assert result.exit_code == 1 and "1 judged" in result.output and cause in result.output, result.output
    result = predict(tmp_path / "missing.png", f"{tmp_path}/*.tif", *common)
    assert result.exit_code == 2 and "missing.png: there is no such file" in result.output


@pytest.mark.parametrize("separator", [b"\n", b"\r\n", b"\0"])
def test_lists_with_a_mark_or_nul_between(model: Path, tmp_path: Path, separator: bytes) -> None:
    files = [draw(tmp_path / "in" / name, seed) for seed, name in enumerate(("a.png", "b c.png"))]
    files.append(tmp_path / "in" / os.fsdecode(b"M\xfcnchen.png"))
    shutil.copy(files[0], files[2])
    listed = b"\xef\xbb\xbf" + separator.join(os.fsencode(file) for file in files) + separator
    result = predict("-", "--model", model, "--output", tmp_path / "out", listed=listed)
    assert result.exit_code == 0 and "3 judged" in result.output, result.output
    assert set(rows(tmp_path / "out")) == {file.name for file in files}
    assert "M\\xfcnchen.png" in (tmp_path / "out" / "results.csv").read_text(encoding="utf-8")
    assert "3 of 3" in predict("-", "--model", model, "--output", tmp_path / "out", listed=listed).output


def test_two_runs_at_once_lose_nothing(model: Path, tmp_path: Path) -> None:
    draw(tmp_path / "a.png")
    common = (tmp_path / "a.png", "--model", model, "--output", tmp_path / "out")
    with OutputFolder(tmp_path / "out", "predict"):
        result = predict(*common)
    assert result.exit_code == 2 and "another run of diffusionad is writing into this folder" in result.output
    assert predict(*common).exit_code == 0


def test_a_full_disk_is_one_sentence(model: Path, tmp_path: Path) -> None:
    import resource

    for seed in range(3):
        draw(tmp_path / "in" / f"{seed}.png", seed)
    arguments = [COMMAND, "predict", tmp_path / "in", "--model", model, "--output", tmp_path / "out"]
    with ScriptProcess([*arguments, "--batch-size", 1], limits={resource.RLIMIT_FSIZE: 3000}) as process:
        result = process.finish()
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert "cannot be written (File too large): free some space" in result.stdout + result.stderr
    with ScriptProcess(arguments) as process:
        assert process.finish().returncode == 0 and set(rows(tmp_path / "out")) == {"0.png", "1.png", "2.png"}


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_a_killed_run_goes_on(model: Path, tmp_path: Path, kills: int) -> None:
    tree = tmp_path / "tree"
    for seed in range(40):
        draw(tree / "in" / f"{seed:02}.png", seed)
    draw(tree / "out" / "07.png", 100)  # somebody's
    before = state_of(tree)
    arguments = [COMMAND, "predict", tree / "in", "--model", model, "--output", tree / "out", "--batch-size", 1]
    moments = random.Random(kills)
    done = 0
    for _ in range(kills):
        with ScriptProcess([*arguments, "--masks", "--maps", "npy"]) as process:
            journal = tree / "out" / "results.jsonl"
            deadline = time.monotonic() + 120
            # Its start takes most of a run: a moment is counted from the first picture that is new.
            while process.process.exitcode is None and time.monotonic() < deadline:
                if journal.is_file() and journal.read_bytes().count(b"\n") > done:
                    break
                time.sleep(0.001)
            time.sleep(moments.uniform(0, 0.1))
            process.process.kill()
            process.process.join()
        found = {line["path"] for line in map(json.loads, _whole_lines(journal))}
        assert len(found) >= done
        done = len(found)
        assert before.items() <= state_of(tree).items()
    with ScriptProcess([*arguments, "--masks", "--maps", "npy"]) as process:
        result = process.finish()
    assert result.returncode == 0 and f"{done} of 40 pictures were judged before" in result.stdout, result.stderr
    table = rows(tree / "out")
    assert len(table) == 40 and before.items() <= state_of(tree).items()
    drawn = {row["output"] + ending for row in table.values() for ending in (".png", "_mask.png", "_map.npy")}
    tables = {"results.csv", "results.jsonl", "settings.json", "07.png"}
    assert {path.name for path in (tree / "out").iterdir()} == drawn | tables | {".diffusionad"}


def _whole_lines(journal: Path) -> list[str]:
    return journal.read_text(encoding="utf-8").split("\n")[:-1]
