"""Evaluation of a tiny pipeline on real files, through the command and through `training/evaluate.py`."""

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from diffusionad_pipe import DiffusionADPipeline, open_image
from diffusionad_pipe.cli import app
from diffusionad_pipe.data import export_parquet, load_anomaly_dataset
from diffusionad_pipe.evaluation import CategoryResult, evaluate, read_prediction
from diffusionad_pipe.metrics import evaluate_maps, mean_metrics
from diffusionad_pipe.results_table import markdown_table, published_rows

SCRIPT = Path(__file__).parents[1] / "training" / "evaluate.py"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Two good pictures and three scratched ones: with a mask, with an empty one and without any."""
    random = np.random.RandomState(0)
    root = tmp_path / "data" / "part"
    for name in ("train/good/0", "test/good/0", "test/good/1", "test/scratch/0", "test/scratch/1", "test/scratch/2"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.randint(0, 256, (40, 48, 3), dtype=np.uint8)).save(root / f"{name}.png")
    (root / "ground_truth" / "scratch").mkdir(parents=True)
    mask = np.zeros((40, 48), dtype=np.uint8)
    Image.fromarray(mask).save(root / "ground_truth" / "scratch" / "1_mask.png")
    mask[4:19, 7:38] = 255
    Image.fromarray(mask).save(root / "ground_truth" / "scratch" / "0_mask.png")
    return root


@pytest.fixture
def model(tiny_pipeline: DiffusionADPipeline, tmp_path: Path) -> Path:
    tiny_pipeline.register_to_config(image_threshold=0.5, pixel_threshold=0.5)
    tiny_pipeline.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_metrics_are_those_of_the_pipelines_maps(model: Path, data: Path, tmp_path: Path) -> None:
    (result,) = evaluate(model, data, tmp_path / "out")
    pipe = DiffusionADPipeline.from_pretrained(model)
    paths = [Path(row["path"]) for row in result.rows]
    output = pipe([open_image(path) for path in paths], output_type="np")
    assert [row["score"] for row in result.rows] == pytest.approx(output.anomaly_scores.tolist(), abs=1e-6)
    marked = [path.parent.name == "good" or path.stem == "0" for path in paths]
    masks = [np.zeros((40, 48), dtype=bool) if path.parent.name == "good" else None for path in paths]
    masks[marked.index(True, 2)] = np.asarray(Image.open(data / "ground_truth" / "scratch" / "0_mask.png")) > 127
    expected = evaluate_maps([m[..., 0] for m in output.anomaly_maps], masks, output.anomaly_scores, [0, 0, 1, 1, 1])
    right = ((output.anomaly_scores > 0.5) == np.array([0, 0, 1, 1, 1])).mean()
    assert result.metrics == pytest.approx(expected | {"right_decisions": right}, abs=1e-4)
    assert result.unmasked == 2 and not result.failures


def test_the_command_writes_tables_a_report_and_the_card(model: Path, data: Path, tmp_path: Path) -> None:
    (model / "README.md").write_text("---\nmodel_name: tiny\n---\n# tiny\n\n## Results\n\nnone\n\n## More\n")
    flags = ["--data", str(data), "--output", str(tmp_path / "out")]
    result = CliRunner().invoke(app, ["evaluate", "--model", str(model), *flags, "--model_card"])
    assert result.exit_code == 0, result.output
    assert "2 of 5 pictures are defective without a usable mask" in result.output
    table = (tmp_path / "out" / "results.md").read_text(encoding="utf-8")
    assert table.splitlines()[0] in result.output and table.splitlines()[2].startswith("| part | 2 | 3 | ")
    written = json.loads((tmp_path / "out" / "results.json").read_text())["results"][0]
    assert written["good"] == 2 and 0 <= written["pixel_ap"] <= 1
    assert written["seconds_per_picture"] > 0 and written["peak_memory_bytes"] > 2**20
    scores = (tmp_path / "out" / "scores.csv").read_text().splitlines()
    assert len(scores) == 6 and scores[0] == "category,path,defect_type,label,score,decision"
    assert "pixel AUROC" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    card = (model / "README.md").read_text()
    assert "| part | 2 | 3 | " in card and "none" not in card and "## More" in card and "type: pixel_ap" in card

    # The metrics again, without the model: the same, and another method close to it.
    assert CliRunner().invoke(app, ["evaluate", *flags]).exit_code == 0
    assert json.loads((tmp_path / "out" / "results.json").read_text())["results"][0] == written
    assert CliRunner().invoke(app, ["evaluate", *flags, "--method", "streaming"]).exit_code == 0
    streamed = json.loads((tmp_path / "out" / "results.json").read_text())["results"][0]
    for name in ("pixel_auroc", "pixel_ap", "au_pro_0.30"):
        assert abs(streamed[name] - written[name]) <= streamed[f"{name}_error"] + 1e-9
    assert streamed["image_auroc"] == written["image_auroc"]
    result = CliRunner().invoke(app, ["evaluate", *flags, "--protocol", "reference"])
    assert result.exit_code == 2 and "no predictions under the protocol reference: give the model" in result.output


def test_an_interrupted_evaluation_goes_on_and_another_model_begins_anew(
    model: Path, data: Path, tmp_path: Path, tiny_pipeline: DiffusionADPipeline
) -> None:
    folder = tmp_path / "out" / "predictions" / "part"
    evaluate(model, data, tmp_path / "out", batch_size=2)
    first = read_prediction(folder, 1)
    (folder / "000002.npz").unlink()
    (folder / "000003.npz").unlink()
    times = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.npz")}
    with pytest.raises(ValueError, match="no prediction for .*0.png: give the model to go on"):
        evaluate(None, data, tmp_path / "out")
    evaluate(model, data, tmp_path / "out", batch_size=2)
    assert len(list(folder.glob("*.npz"))) == 5
    assert {path.name for path in folder.glob("*.npz") if times.get(path.name) == path.stat().st_mtime_ns} == set(times)

    with torch.no_grad():
        tiny_pipeline.segmentation.conv_out.bias += 0.5
    tiny_pipeline.save_pretrained(tmp_path / "other")
    evaluate(tmp_path / "other", data, tmp_path / "out", batch_size=2)
    assert (read_prediction(folder, 1).anomaly_map > first.anomaly_map).all()


def test_processes_share_the_work_and_agree(model: Path, data: Path, tmp_path: Path) -> None:
    tables = []
    for count, name in ((1, "one"), (2, "two")):
        launch = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", str(count)]
        launch += ["--multi_gpu"] if count > 1 else []
        arguments = ["--model", str(model), "--data", str(data), "--output", str(tmp_path / name), "--batch_size", "2"]
        subprocess.run(
            [*launch, str(SCRIPT), *arguments, "--no-report"],
            check=True, capture_output=True, timeout=300,
            env=os.environ | {"ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        tables.append([(tmp_path / name / table).read_text() for table in ("results.md", "results.csv", "scores.csv")])
    assert tables[0] == tables[1]


def test_an_export_gives_the_metrics_of_its_folders(model: Path, data: Path, tmp_path: Path) -> None:
    """Pictures and masks from bytes in Parquet files."""
    export_parquet(load_anomaly_dataset(data), tmp_path / "export")
    (folders,) = evaluate(model, data, tmp_path / "one")
    (parquet,) = evaluate(model, tmp_path / "export", tmp_path / "other")
    assert parquet.metrics == folders.metrics and parquet.unmasked == 2
    assert parquet.rows[-1]["path"] == "test/scratch/2.png"


def test_a_broken_picture_is_listed_and_the_rest_measured(model: Path, data: Path, tmp_path: Path) -> None:
    (data / "test" / "good" / "2.png").write_bytes(b"<html>not found</html>")
    arguments = ["evaluate", "--model", str(model), "--data", str(data), "--output", str(tmp_path / "out")]
    for _ in range(2):  # the second time from the stored predictions
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 1 and "2.png: this is not a picture but an HTML page" in result.output
        assert "| part | 2 | 3 | " in result.output
    Image.new("RGB", (48, 40)).save(data / "test" / "good" / "2.png")
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0 and "| part | 3 | 3 | " in result.output


def test_the_reference_protocol_erodes_masks_and_scores_fifty_pixels(model: Path, data: Path, tmp_path: Path) -> None:
    (result,) = evaluate(model, data, tmp_path / "out", protocol="reference")
    for row in result.rows:
        prediction = read_prediction(tmp_path / "out" / "predictions" / "part", row["index"])
        assert row["score"] == pytest.approx(np.sort(prediction.anomaly_map.ravel())[-50:].mean(), abs=1e-6)
    (exact,) = evaluate(None, data, tmp_path / "out", protocol="reference", at_model_size=True)
    assert exact.metrics == result.metrics
    (own,) = evaluate(model, data, tmp_path / "exact", at_model_size=True)
    assert own.metrics["pixel_ap"] != result.metrics["pixel_ap"]


def test_a_model_for_each_category_and_all_of_them(
    model: Path, data: Path, tmp_path: Path, tiny_pipeline: DiffusionADPipeline
) -> None:
    shutil.copytree(data, data.parent / "piece")
    with pytest.raises(ValueError, match="several categories"):
        evaluate(model, data.parent, tmp_path / "out")
    models = tmp_path / "models"
    shutil.copytree(model, models / "part")
    with pytest.raises(ValueError, match="nor has it one for piece"):
        evaluate(models, data.parent, tmp_path / "out", category="all")
    tiny_pipeline.segmentation.conv_out.bias.data += 1
    tiny_pipeline.save_pretrained(models / "piece")
    one, other = evaluate(models, data.parent, tmp_path / "out", category="all")
    assert (one.category, other.category) == ("part", "piece")
    assert all(a["score"] < b["score"] for a, b in zip(one.rows, other.rows))
    table = markdown_table([one, other]).splitlines()
    assert table[2].startswith("| part | 2 | 3 |") and table[4].startswith("| mean | 4 | 6 |")


def test_means_leave_out_what_is_not_defined() -> None:
    def result(name: str, value: float) -> CategoryResult:
        rows = [{"label": 0}, {"label": 1}]
        curve = (np.empty(0), np.empty(0))
        return CategoryResult(
            name, {"image_auroc": 0.5, "pixel_ap": value}, None, rows, 0, [], 0.1, 2**20, {}, {}, curve
        )

    results = [result("screw", 0.25), result("hazelnut", math.nan)]
    assert mean_metrics([r.metrics for r in results]) == {"image_auroc": 0.5, "pixel_ap": 0.25}
    table = markdown_table(results)
    assert "| hazelnut | 1 | 1 | 0.5000 | – |" in table
    assert "Not defined, and left out of the mean: pixel AP (hazelnut)." in table
    assert "*screw, MVTec AD: an independent rerun of the authors' code* |  |  | 0.9800 | 0.6230 |" in table
    assert published_rows(["screw", "my_part"]) == []


def test_no_test_pictures(model: Path, data: Path, tmp_path: Path) -> None:
    shutil.rmtree(data / "test")
    arguments = ["evaluate", "--model", str(model), "--data", str(data), "--output", str(tmp_path / "out")]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2 and "has no test pictures, only good ones" in result.output
