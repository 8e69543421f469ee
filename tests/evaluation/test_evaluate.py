"""Evaluation of a tiny pipeline on real files, through the command and through `training/evaluate.py`."""

import hashlib
import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from diffusionad_pipe import DiffusionADPipeline, open_image
from diffusionad_pipe.cli import app
from diffusionad_pipe.data.loading import export_parquet, load_anomaly_dataset
from diffusionad_pipe.evaluation.evaluate import evaluate
from diffusionad_pipe.evaluation.kept_predictions import Prediction, StoredPredictions
from diffusionad_pipe.evaluation.report import write_evaluation_report
from diffusionad_pipe.evaluation.results import CategoryResult
from diffusionad_pipe.evaluation.settings import EvaluationSettings
from diffusionad_pipe.evaluation.tables import markdown_table, published_rows
from diffusionad_pipe.files.output_error import OutputError
from diffusionad_pipe.files.output_folder import OutputFolder
from diffusionad_pipe.metrics.exact import evaluate_maps, mean_metrics
from tests.helpers.script_processes import run_ranks, run_script

SCRIPT = Path(__file__).parents[2] / "training" / "evaluate.py"
ENVIRONMENT = os.environ | {"ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1"}


def stored(output: Path, image: Path, category: str = "part") -> Prediction:
    """What an evaluation keeps of a picture."""
    predictions = StoredPredictions(OutputFolder(output, "evaluate"), f"predictions/{category}")
    prediction = predictions.read(hashlib.sha256(image.read_bytes()).hexdigest())
    assert prediction is not None
    return prediction


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
    called = output.anomaly_scores >= result.f1_max_thresholds["image"] - 1e-6
    assert result.metrics["image_f1_max"] == pytest.approx(2 * called[2:].sum() / (called.sum() + 3))


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
    assert written["seconds_per_image"] > 0 and written["peak_memory_bytes"] > 2**20
    assert re.search(r"part: \S+ s a picture .*, \S+ s for the metrics, at most \d+ MiB of memory", result.output)
    scores = (tmp_path / "out" / "scores.csv").read_text().splitlines()
    assert len(scores) == 6 and scores[0] == "category,path,defect_type,label,score,decision"
    assert "pixel AUROC" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    card = (model / "README.md").read_text()
    assert "| part | 2 | 3 | " in card and "none" not in card and "## More" in card and "type: pixel_ap" in card

    # The metrics again, without the model: the same, and another method close to it.
    assert CliRunner().invoke(app, ["evaluate", *flags]).exit_code == 0
    again = json.loads((tmp_path / "out" / "results.json").read_text())["results"][0]
    assert again | {"seconds_for_metrics": 0} == written | {"seconds_for_metrics": 0}
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
    folder, image = tmp_path / "out" / "predictions" / "part", data / "test" / "good" / "1.png"
    evaluate(model, data, tmp_path / "out", settings=EvaluationSettings(batch_size=2))
    first = stored(tmp_path / "out", image)
    gone = sorted(folder.glob("*.npz"))[1:3]
    for file in gone:
        file.unlink()
    times = {path: path.stat().st_mtime_ns for path in folder.glob("*.npz")}
    with pytest.raises(ValueError, match=r"no prediction for .*\.png: give the model to go on"):
        evaluate(None, data, tmp_path / "out")
    evaluate(model, data, tmp_path / "out", settings=EvaluationSettings(batch_size=2))
    now = {path: path.stat().st_mtime_ns for path in folder.glob("*.npz")}
    assert now.keys() == {*times, *gone} and now | times == now

    with torch.no_grad():
        tiny_pipeline.segmentation.conv_out.bias += 0.5
    tiny_pipeline.save_pretrained(tmp_path / "other")
    evaluate(tmp_path / "other", data, tmp_path / "out", settings=EvaluationSettings(batch_size=2))
    other = stored(tmp_path / "out", image).anomaly_map
    assert (other > first.anomaly_map).all()
    assert len(list(folder.glob("*.npz"))) == 5 and not now.keys() & {*folder.glob("*.npz")}
    evaluate(
        tmp_path / "other", data, tmp_path / "out", settings=EvaluationSettings(batch_size=2, dtype=torch.bfloat16)
    )
    half = stored(tmp_path / "out", image).anomaly_map
    assert 0 < np.abs(half - other).max() < 0.05


@pytest.mark.slow
def test_streaming_holds_one_map_whatever_their_number(model: Path, tmp_path: Path) -> None:
    """In a process of its own, whose peak memory tells."""
    side = 1500
    for count, name in ((2, "few"), (10, "many")):
        folder = tmp_path / name / "part"
        for part in ("train/good", "test/good", "test/bad", "ground_truth/bad"):
            (folder / part).mkdir(parents=True)
        Image.new("L", (side, side)).save(folder / "train" / "good" / "0.png")
        for index in range(count):
            kind = "bad" if index % 2 else "good"
            Image.new("L", (side, side), index).save(folder / "test" / kind / f"{index}.png")
            mask = Image.new("1", (side, side))
            mask.paste(1, (100, 100, 300, 200))
            mask.save(folder / "ground_truth" / "bad" / f"{index}.png") if index % 2 else None
        evaluate(
            model,
            tmp_path / name,
            tmp_path / "out" / name,
            settings=EvaluationSettings(batch_size=1, at_model_size=True),
        )
    script = f"""
import resource
from diffusionad_pipe.evaluation.evaluate import evaluate
from diffusionad_pipe.evaluation.settings import EvaluationSettings
streaming = EvaluationSettings(method="streaming")
for name in ("few", "many"):
    evaluate(None, {str(tmp_path)!r} + "/" + name, {str(tmp_path / "out")!r} + "/" + name, settings=streaming)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * {1 if sys.platform == "darwin" else 1024})
"""
    printed = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout
    few, many = map(int, printed.split())
    assert many - few < 4 * side**2 * 4  # 8 further maps of 9 MB each took less than 4 of them


@pytest.mark.slow
def test_processes_share_the_work_and_agree(model: Path, data: Path, tmp_path: Path) -> None:
    arguments = ["--model", str(model), "--data", str(data), "--batch_size", "2", "--no-report", "--output"]
    one = run_script([SCRIPT, *arguments, tmp_path / "one"], ENVIRONMENT)
    assert one.returncode == 0, one.stderr
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2", "--multi_gpu"]
    subprocess.run(
        [*launch, str(SCRIPT), *arguments, str(tmp_path / "two")],
        check=True, capture_output=True, timeout=300, env=ENVIRONMENT,
    )  # fmt: skip
    for table in ("results.md", "results.csv", "scores.csv"):
        assert (tmp_path / "one" / table).read_text() == (tmp_path / "two" / table).read_text()


def test_processes_share_the_work_of_the_function(model: Path, data: Path, tmp_path: Path) -> None:
    """Called from Python, without the command around it."""
    script = tmp_path / "script.py"
    script.write_text(
        "import sys\n"
        "from diffusionad_pipe.evaluation.evaluate import evaluate\n"
        "from diffusionad_pipe.evaluation.settings import EvaluationSettings\n"
        "results = evaluate(*sys.argv[1:4], settings=EvaluationSettings(batch_size=2))\n"
        "print('results', len(results), *(result.metrics['image_auroc'] for result in results))\n"
    )
    ranks = run_ranks([script, model, data, tmp_path / "two"], 2, ENVIRONMENT)
    assert [rank.returncode for rank in ranks] == [0, 0], ranks
    (one,) = evaluate(model, data, tmp_path / "one", settings=EvaluationSettings(batch_size=2))
    lines = sorted(line for rank in ranks for line in rank.stdout.splitlines() if line.startswith("results"))
    assert lines == ["results 0", f"results 1 {one.metrics['image_auroc']}"]


def test_an_export_gives_the_metrics_of_its_folders(model: Path, data: Path, tmp_path: Path) -> None:
    """Pictures and masks from bytes in Parquet files."""
    export_parquet(load_anomaly_dataset(data), tmp_path / "export")
    (folders,) = evaluate(model, data, tmp_path / "one")
    (parquet,) = evaluate(model, tmp_path / "export", tmp_path / "other")
    assert parquet.metrics == folders.metrics and parquet.unmasked == 2
    assert parquet.rows[-1]["path"] == "test/scratch/2.png"


def test_a_broken_image_is_listed_and_the_rest_measured(model: Path, data: Path, tmp_path: Path) -> None:
    (data / "test" / "good" / "2.png").write_bytes(b"<html>not found</html>")
    arguments = ["evaluate", "--model", str(model), "--data", str(data), "--output", str(tmp_path / "out")]
    for _ in range(2):  # the second time from the stored predictions
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 1 and "2.png: this is not a picture but an HTML page" in result.output
        assert "| part | 2 | 3 | " in result.output
    Image.new("RGB", (48, 40)).save(data / "test" / "good" / "2.png")
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0 and "| part | 3 | 3 | " in result.output


def opencv_resize(values: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """`cv2.resize` of 8-bit values as it is documented: linear between the centers of pixels, rounded."""
    for axis, length in enumerate(size):
        source = values.shape[axis]
        centers = np.clip((np.arange(length) + 0.5) * source / length - 0.5, 0, source - 1)
        low = np.floor(centers).astype(int)
        high = np.minimum(low + 1, source - 1)
        share = np.expand_dims(centers - low, 1 - axis)
        values = values.take(low, axis) * (1 - share) + values.take(high, axis) * share
    return np.floor(values + 0.5)


def test_the_reference_protocol_erodes_masks_and_scores_fifty_pixels(model: Path, data: Path, tmp_path: Path) -> None:
    (result,) = evaluate(model, data, tmp_path / "out", settings=EvaluationSettings(protocol="reference"))
    for row in result.rows:
        prediction = stored(tmp_path / "out", Path(row["path"]))
        assert row["score"] == pytest.approx(np.sort(prediction.anomaly_map.ravel())[-50:].mean(), abs=1e-6)
    # The mask of scratch/0, [4:19, 7:38] of 40 x 48 pixels; the others have none that is usable.
    mask = np.zeros((40, 48))
    mask[4:19, 7:38] = 255
    eroded = opencv_resize(mask, (32, 32)) == 255
    assert 0 < eroded.sum() < (mask > 0).mean() * 32 * 32
    maps = [stored(tmp_path / "out", Path(row["path"])).anomaly_map for row in result.rows]
    masks = [eroded if row["path"].endswith("scratch/0.png") else None for row in result.rows]
    masks = [np.zeros((32, 32)) if row["label"] == 0 else mask for row, mask in zip(result.rows, masks)]
    expected = evaluate_maps(maps, masks, method="reference")
    assert {name: result.metrics[name] for name in expected} == expected

    (exact,) = evaluate(
        None, data, tmp_path / "out", settings=EvaluationSettings(protocol="reference", at_model_size=True)
    )
    assert exact.metrics == result.metrics
    (own,) = evaluate(model, data, tmp_path / "exact", settings=EvaluationSettings(at_model_size=True))
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


def test_a_category_without_test_images_is_named(model: Path, data: Path, tmp_path: Path) -> None:
    shutil.copytree(data / "train", data.parent / "piece" / "train")
    with pytest.warns(UserWarning, match="without test pictures, and so not measured: piece"):
        (result,) = evaluate(model, data.parent, tmp_path / "out", category="all")
    assert result.category == "part"


def test_means_leave_out_what_is_not_defined() -> None:
    def result(name: str, value: float) -> CategoryResult:
        rows = [{"label": 0}, {"label": 1}]
        curve = (np.empty(0), np.empty(0))
        return CategoryResult(
            name,
            {"image_auroc": 0.5, "pixel_ap": value},
            None,
            rows,
            0,
            [],
            [],
            ["a remark"],
            {},
            0.1,
            0.2,
            2**20,
            {},
            {},
            curve,
            *(cast(Any, None), cast(Any, None)),
        )

    results = [result("screw", 0.25), result("hazelnut", math.nan)]
    assert mean_metrics([r.metrics for r in results]) == {"image_auroc": 0.5, "pixel_ap": 0.25}
    table = markdown_table(results)
    assert "| hazelnut | 1 | 1 | 0.5000 | – |" in table
    assert "- screw: a remark\n- hazelnut: a remark\n" in table
    assert table.endswith("- categories left out of a mean, since a metric is NaN there: pixel AP (1)\n")
    assert "*screw, MVTec AD: an independent rerun of the authors' code* |  |  | 0.9800 | 0.6230 |" in table
    assert published_rows(["screw", "my_part"]) == []


@pytest.mark.parametrize(
    ("missing", "defined", "remark"),
    [
        ("test/good", {"pixel"}, "image metrics are NaN: of the pictures with a score 3 are defective and 0 good"),
        ("test/scratch", set(), "image metrics are NaN: of the pictures with a score 0 are defective and 2 good"),
        ("ground_truth", {"image"}, "3 of 5 pictures are defective without a usable mask: not in the pixel metrics"),
    ],
)
@pytest.mark.parametrize("method", ["exact", "streaming"])
def test_what_a_dataset_lacks_is_said(
    missing: str, defined: set[str], remark: str, method: str, model: Path, data: Path, tmp_path: Path
) -> None:
    shutil.rmtree(data / missing)
    (result,) = evaluate(model, data, tmp_path / "Ausgabe für Ä", settings=EvaluationSettings(method=method))  # type: ignore[arg-type]
    of_scores = {name: value for name, value in result.metrics.items() if name.startswith(("image_", "pixel_"))}
    assert {name.split("_")[0] for name, value in of_scores.items() if not math.isnan(value)} == defined
    assert any(line.startswith(remark) for line in result.remarks)
    assert f"- part: {remark}" in markdown_table([result])
    write_evaluation_report([result], data.name, OutputFolder(tmp_path / "Ausgabe für Ä", "evaluate"), {})
    page = (tmp_path / "Ausgabe für Ä" / "report.html").read_text(encoding="utf-8")
    assert not re.search(r">[\d.]+e\+\d+ %<", page)  # 1e+02 %
    assert remark in page and ("false alarm" in page or "passed" in page) == (missing != "test/good")


def test_an_unusable_output_is_said_at_once(data: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    outputs = [(tmp_path / "file", "Not a directory|exists")]
    if os.path.isdir("/proc/self"):  # nobody can make a folder there, not even root, whom permissions do not stop
        outputs.append((Path("/proc/self/evaluation"), "No such file"))
    for output, reason in outputs:
        with pytest.raises(OutputError, match=rf"{output} cannot be written \(.*({reason}).*\): .*choose another"):
            evaluate(tmp_path / "no model", data, output)


def test_categories_and_files_that_are_none(model: Path, data: Path, tmp_path: Path) -> None:
    for path, category, said in (
        (data.parent, "prat", "has no category 'prat'; it has: part; did you mean part?"),
        (data / "test" / "good" / "0.png", None, "is not a folder"),
    ):
        arguments = ["evaluate", "--model", str(model), "--data", str(path), "--output", str(tmp_path / "out")]
        result = CliRunner().invoke(app, arguments + (["--category", category] if category else []))
        assert result.exit_code == 2 and said in result.output and not (tmp_path / "out").exists()


def test_no_test_images(model: Path, data: Path, tmp_path: Path) -> None:
    shutil.rmtree(data / "test")
    arguments = ["evaluate", "--model", str(model), "--data", str(data), "--output", str(tmp_path / "out")]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2 and "has no test pictures, only good ones" in result.output
