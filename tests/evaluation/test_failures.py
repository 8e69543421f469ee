"""Evaluations in which something is wrong: of one picture, mask, model or stored file; the rest is measured."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner, Result

from diffusionad_pipe import DiffusionADPipeline
from diffusionad_pipe.cli import app
from diffusionad_pipe.data.loading import FEATURES, export_parquet, load_anomaly_dataset
from diffusionad_pipe.evaluation.evaluate import evaluate, find_models
from diffusionad_pipe.evaluation.report import write_evaluation_report
from diffusionad_pipe.evaluation.settings import EvaluationSettings
from diffusionad_pipe.files.names import safe_name
from diffusionad_pipe.files.output_folder import OutputFolder
from diffusionad_pipe.files.record import sha256_of


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["evaluate", *map(str, arguments)])


def tree(root: Path) -> dict[str, str]:
    """The content of every file."""
    return {str(file.relative_to(root)): sha256_of(file) for file in root.rglob("*") if file.is_file()}


def predictions(output: Path) -> dict[Path, int]:
    """The stored predictions, and when they were written."""
    return {file: file.stat().st_mtime_ns for file in output.rglob("*.npz")}


def test_nothing_of_the_users_is_deleted_or_overwritten(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The output lies among the pictures, and files of its own names are there already."""
    folder = data / "test" / "scratch"
    shutil.copy(folder / "0.png", folder / "000001.png")
    (folder / "predictions" / "part").mkdir(parents=True)
    np.savez(folder / "predictions" / "part" / "000000.npz", mine=np.zeros(3))
    (folder / "predictions" / "000002.txt").write_text("mine")
    before = tree(data)
    monkeypatch.chdir(folder)
    for _ in range(2):
        result = run("--model", model, "--data", "../..", "--output", ".")
        assert result.exit_code == 0 and "| part | 2 | 4 | " in result.output, result.output
        assert before.items() <= tree(data).items()
    assert run("--data", "../..", "--output", ".").exit_code == 0
    # Another model's predictions take the place of ours alone.
    np.savez(folder / "predictions" / "part" / "000003.npz", mine=np.zeros(3))
    before = tree(data)
    ours = predictions(folder / "predictions" / "part").keys() - {
        folder / "predictions" / "part" / f"00000{number}.npz" for number in (0, 3)
    }
    assert len(ours) == 5
    assert run("--model", model, "--data", "../..", "--output", ".", "--batch-size", 3).exit_code == 0
    after = tree(data)
    assert {name for name in before if after.get(name) != before[name]} >= {str(f.relative_to(data)) for f in ours}
    assert all(after[name] == before[name] for name in before if name.endswith(".png") or "00000" in name)

    for name in ("results.csv", "report.html", "predictions/part/settings.json"):
        output = tmp_path / name.replace("/", "_")
        (output / name).parent.mkdir(parents=True)
        (output / name).write_text("mine")
        result = run("--model", model, "--data", data, "--output", output)
        assert result.exit_code == 2 and f"{output / name} is not what diffusionad evaluate wrote" in result.output
        assert (output / name).read_text() == "mine" and not predictions(output)


def test_a_prediction_belongs_to_an_images_content(model: Path, data: Path, tmp_path: Path) -> None:
    (first,) = evaluate(model, data, tmp_path / "out", settings=EvaluationSettings(batch_size=2))
    kept = predictions(tmp_path / "out")
    assert len(kept) == 5
    # Moved, renamed, with another date and another neighbour: all are kept, and the new one alone is added.
    moved = shutil.copytree(data, tmp_path / "elsewhere" / "part")
    (moved / "test" / "good" / "0.png").rename(moved / "test" / "good" / "9.png")
    os.utime(moved / "test" / "good" / "9.png", (0, 0))
    (again,) = evaluate(None, moved, tmp_path / "out")
    assert again.metrics == first.metrics and again.rows[1]["score"] == first.rows[0]["score"]
    Image.new("RGB", (48, 40)).save(moved / "test" / "good" / "5.png")
    (more,) = evaluate(model, moved, tmp_path / "out", settings=EvaluationSettings(batch_size=2))
    assert len(more.rows) == 6 and predictions(tmp_path / "out") | kept == predictions(tmp_path / "out")
    assert [row["score"] for row in more.rows[:3:2]] == [row["score"] for row in first.rows[1::-1]]
    # Another picture under an old name is another picture.
    Image.new("RGB", (48, 40), (255, 0, 0)).save(moved / "test" / "good" / "9.png")
    with pytest.raises(ValueError, match=r"no prediction for .*9\.png: give the model to go on"):
        evaluate(None, moved, tmp_path / "out")
    (fresh,) = evaluate(model, moved, tmp_path / "out", settings=EvaluationSettings(batch_size=2))
    assert fresh.rows[2]["score"] != first.rows[0]["score"] and len(predictions(tmp_path / "out")) == 7
    # The same picture twice is judged once.
    shutil.copy(moved / "test" / "good" / "9.png", moved / "test" / "good" / "9 again.png")
    (twice,) = evaluate(model, moved, tmp_path / "out", settings=EvaluationSettings(batch_size=2))
    assert len(twice.rows) == 7 and len(predictions(tmp_path / "out")) == 7


def test_a_damaged_prediction_is_made_anew(model: Path, data: Path, tmp_path: Path) -> None:
    assert run("--model", model, "--data", data, "--output", tmp_path / "out").exit_code == 0
    whole = (tmp_path / "out" / "scores.csv").read_text()
    short, garbled, *others = predictions(tmp_path / "out")
    content, status = garbled.read_bytes(), garbled.stat()
    short.write_bytes(short.read_bytes()[:1000])
    garbled.write_bytes(content[:900] + bytes(100) + content[1000:])
    os.utime(garbled, ns=(status.st_atime_ns, status.st_mtime_ns))  # as it happens on a disk
    times = {file: predictions(tmp_path / "out")[file] for file in others}
    assert run("--data", data, "--output", tmp_path / "out").exit_code == 2
    for _ in range(2):
        assert run("--model", model, "--data", data, "--output", tmp_path / "out").exit_code == 0
        assert (tmp_path / "out" / "scores.csv").read_text() == whole
    assert predictions(tmp_path / "out") | times == predictions(tmp_path / "out")
    assert short.stat().st_size == 1000  # somebody's now, for all that is known


@pytest.mark.parametrize(
    ("mask", "said"),
    [
        (b"", "0_mask.png: the file is empty"),
        (b"<html>", "0_mask.png: this is not a picture but an HTML page"),
        ((24, 20), "0_mask.png: 24 x 20 pixels, and its picture"),
    ],
)
@pytest.mark.parametrize("method", ["exact", "streaming"])
def test_a_mask_that_cannot_be_used_is_listed(
    mask: bytes | tuple[int, int], said: str, method: str, model: Path, data: Path, tmp_path: Path
) -> None:
    file = data / "ground_truth" / "scratch" / "0_mask.png"
    arguments = ["--model", model, "--data", data, "--method", method, "--output", tmp_path / "out"]
    assert run(*arguments).exit_code == 0
    scores = (tmp_path / "out" / "scores.csv").read_text()
    before = json.loads((tmp_path / "out" / "results.json").read_text())["results"][0]
    if isinstance(mask, bytes):
        file.write_bytes(mask)
    else:
        Image.new("L", mask, 255).save(file)
    result = run(*arguments)
    assert result.exit_code == 1 and f"not in the pixel metrics: {data}" in result.output, result.output
    assert said in result.output and "1 of 5 pictures have a mask that cannot be used" in result.output
    # Its image score counts as before; no marked pixels are left, so of pixels nothing can be said.
    assert (tmp_path / "out" / "scores.csv").read_text() == scores
    after = json.loads((tmp_path / "out" / "results.json").read_text())["results"][0]
    assert after["image_auroc"] == before["image_auroc"]
    assert before["pixel_auroc"] is not None and after["pixel_auroc"] is None
    assert "mask that cannot be used" in (tmp_path / "out" / "report.html").read_text()


def test_an_image_for_which_the_networks_give_nan_fails_alone(
    data: Path, tmp_path: Path, tiny_pipeline: DiffusionADPipeline
) -> None:
    """The first convolution overflows where a picture is white, and not where it is black."""
    shutil.rmtree(data / "ground_truth")
    for index, file in enumerate(sorted((data / "test").rglob("*.png"))):
        Image.new("RGB", (48, 40 + index)).save(file)
    white = data / "test" / "good" / "1.png"
    Image.new("RGB", (48, 40), (255, 255, 255)).save(white)
    with torch.no_grad():
        tiny_pipeline.segmentation.encoder_blocks[0][0].weight[:, :3] = 3e38
    tiny_pipeline.save_pretrained(tmp_path / "model")
    for _ in range(2):
        result = run("--model", tmp_path / "model", "--data", data, "--output", tmp_path / "out")
        assert result.exit_code == 1, result.output
        assert f"not judged: {white}: the networks gave NaN" in result.output
        assert "| part | 1 | 3 | " in result.output and result.output.count("not judged") == 1
    # Where it is so for all of them, nothing is measured.
    for file in (data / "test").rglob("*.png"):
        file.write_bytes(white.read_bytes())
    result = run("--model", tmp_path / "model", "--data", data, "--output", tmp_path / "none")
    assert result.exit_code == 2 and "none of the test pictures could be judged" in result.output
    assert result.output.count("gave NaN") == 2 and result.output.count(f"the same picture as {data}") == 4
    assert not (tmp_path / "none" / "results.md").exists()


def test_an_image_that_cannot_be_read_is_tried_again(model: Path, data: Path, tmp_path: Path) -> None:
    broken = data / "test" / "good" / "2.png"
    broken.write_bytes(b"<html>not found</html>")
    arguments = ["--data", data, "--output", tmp_path / "out"]
    for choice in (["--model", model], ["--model", model], []):  # the last time from what is stored
        result = run(*arguments, *choice)
        assert result.exit_code == 1 and "2.png: this is not a picture but an HTML page" in result.output
        assert "| part | 2 | 3 | " in result.output
    Image.new("RGB", (48, 40)).save(broken)
    assert "no prediction for" in run(*arguments).output
    result = run(*arguments, "--model", model)
    assert result.exit_code == 0 and "| part | 3 | 3 | " in result.output
    result = run(*arguments, "--model", model, "--max-pixels", 1000)  # of the masks: the pictures were judged before
    assert result.exit_code == 1 and "not judged" not in result.output and "| part | 3 | 3 | " in result.output
    result = run("--data", data, "--output", tmp_path / "none", "--model", model, "--max-pixels", 1000)
    assert result.exit_code == 2 and "48 x 40 pixels are more than 1000" in result.output


def test_masks_in_doubt_are_listed(model: Path, data: Path, tmp_path: Path) -> None:
    """One that alone tells whether its picture is good, and two that could be the same picture's."""
    for name in ("train/10", "test/10", "test/11", "test/12"):
        file = tmp_path / "kolektor" / f"{name}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (48, 40), 3 * int(file.stem)).save(file)
        Image.new("L", (48, 40), 255 if file.stem == "11" else 0).save(file.with_name(f"{file.stem}_GT.png"))
    (tmp_path / "kolektor" / "test" / "12_GT.png").write_bytes(b"<html>")
    result = run("--model", model, "--data", tmp_path / "kolektor", "--output", tmp_path / "one")
    assert result.exit_code == 1 and "| kolektor | 1 | 1 |" in result.output, result.output
    assert "12_GT.png: this is not a picture but an HTML page" in result.output
    assert "1 of 3 test pictures could not be judged" in result.output

    shutil.copytree(data / "ground_truth" / "scratch", data / "ground_truth" / "scratch" / "again")
    shutil.copytree(data / "test" / "scratch", data / "test" / "scratch" / "more")
    shutil.copytree(data / "test" / "scratch" / "more", data / "test" / "scratch" / "even more")
    result = run("--model", model, "--data", data, "--output", tmp_path / "two")
    assert result.exit_code == 1 and "not in the pixel metrics: " in result.output, result.output


def test_a_category_whose_model_is_broken_is_listed(model: Path, data: Path, tmp_path: Path) -> None:
    shutil.copytree(data, data.parent / "piece")
    for name in ("part", "piece"):
        shutil.copytree(model, tmp_path / "models" / name)
    weights = next((tmp_path / "models" / "part" / "unet").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:2000])
    arguments = ["--model", tmp_path / "models", "--data", data.parent, "--output", tmp_path / "out"]
    result = run(*arguments, "--category", "all")
    assert result.exit_code == 1, result.output
    assert "not judged: part: its model cannot be loaded: " in result.output and weights.name in result.output
    table = (tmp_path / "out" / "results.md").read_text()
    assert "| part | 0 | 0 | –" in table and "| piece | 2 | 3 | " in table
    assert json.loads((tmp_path / "out" / "results.json").read_text())["results"][0]["seconds_per_image"] is None
    assert run(*arguments, "--category", "part").exit_code == 2


def test_names_from_data_become_no_paths(model: Path, tmp_path: Path, data: Path) -> None:
    """A category and a defect type of Parquet files that lead out of every folder."""
    splits = load_anomaly_dataset(data)
    for split in splits:
        rows = splits[split].to_list()
        for row in rows:
            row |= {"category": "../../victim", "defect_type": "../|\n<b>"}
        splits[split] = type(splits[split]).from_list(rows, features=FEATURES)
    export_parquet(splits, tmp_path / "set" / "export")
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "000000.npz").write_bytes(b"mine")
    shutil.copytree(model, tmp_path / "victim_model" / "inner")
    before = tree(tmp_path)
    result = run("--model", model, "--data", tmp_path / "set" / "export", "--output", tmp_path / "a" / "b" / "out")
    assert result.exit_code == 0, result.output
    after = tree(tmp_path)
    assert before.items() <= after.items()
    assert all(name.startswith(os.path.join("a", "b", "out")) for name in after.keys() - before.keys())
    # Nor is a model looked for outside.
    shutil.copytree(model, tmp_path / "models" / "inside")
    shutil.copytree(model, tmp_path / "outside")
    with pytest.raises(ValueError, match=r"for \.\./outside \(as _outside-\w+\), \.\.(?: |,)"):
        find_models(tmp_path / "models", ["../outside", ".."])
    shutil.copytree(model, tmp_path / "models" / safe_name("../outside"))
    assert find_models(tmp_path / "models", ["../outside"]) == [str(tmp_path / "models" / safe_name("../outside"))]


def test_the_report_leaves_out_images_that_are_gone(model: Path, data: Path, tmp_path: Path) -> None:
    (result,) = evaluate(model, data, tmp_path / "out")
    (data / "test" / "good" / "0.png").unlink()
    Image.new("RGB", (48, 40)).save(data / "test" / "good" / "1.png")
    write_evaluation_report([result], "part", OutputFolder(tmp_path / "out", "evaluate"), {})
    page = (tmp_path / "out" / "report.html").read_text()
    assert "2 pictures are not shown: their files have changed or are gone" in page
    assert "scratch/0.png" in page and "good/0.png" not in page and "good/1.png" not in page


def test_two_runs_into_one_folder(model: Path, data: Path, tmp_path: Path) -> None:
    with OutputFolder(tmp_path / "out", "evaluate"):
        result = run("--model", model, "--data", data, "--output", tmp_path / "out")
    assert result.exit_code == 2 and "another run of diffusionad is writing into this folder" in result.output


def test_a_card_that_cannot_be_filled_is_said_before_the_work(model: Path, data: Path, tmp_path: Path) -> None:
    arguments = ["--data", data, "--output", tmp_path / "out", "--model-card"]
    assert "give --model too" in run(*arguments).output
    assert "there is no such model card" in run(*arguments, "--model", model).output
    (model / "README.md").write_text("# mine\n")
    result = run(*arguments, "--model", model)
    assert result.exit_code == 2 and "has no section 'Results'" in result.output and not (tmp_path / "out").exists()
