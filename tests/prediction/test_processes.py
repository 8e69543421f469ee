"""`diffusionad predict` on several processes: the table of one, in as many Parquet files, also after an interruption;
and what it says when memory is short."""

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from datasets import load_dataset
from PIL import Image
from typer.testing import CliRunner

from diffusionad_pipe import DiffusionADPipeline
from diffusionad_pipe.cli import app
from diffusionad_pipe.files.output_folder import OutputFolder
from diffusionad_pipe.prediction.folder import COLUMNS, PredictionFolder, append_share, even_shares
from tests.helpers.script_processes import DIFFUSIONAD, run_ranks, run_script

# `--multi_gpu` is accelerate's word for several processes; the environment keeps them on the CPU.
LAUNCH = ["-m", "accelerate.commands.launch", "--num_processes", "2", "--multi_gpu", "-m", "diffusionad_pipe.cli"]
ENVIRONMENT = os.environ | {"ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1"}


def launch(output: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    """As a user starts it."""
    return subprocess.run(
        [sys.executable, *LAUNCH, "predict", *map(str, arguments), "--output", str(output), "--batch-size", "2"],
        capture_output=True, text=True, timeout=300, env=ENVIRONMENT,
    )  # fmt: skip


def table(output: Path) -> list[dict]:
    """Without the seconds, which differ from run to run."""
    rows = [json.loads(line) for line in (output / "results.jsonl").read_text(encoding="utf-8").splitlines()]
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


@pytest.fixture
def model(tiny_pipeline: DiffusionADPipeline, tmp_path: Path) -> Path:
    tiny_pipeline.register_to_config(image_threshold=0.5)
    tiny_pipeline.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Nine pictures and a broken one."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    random = np.random.RandomState(0)
    for index in range(9):
        Image.fromarray(random.randint(0, 256, (40, 48, 3), dtype=np.uint8)).save(folder / f"{index}.png")
    (folder / "broken.png").write_bytes(b"<html>not found</html>")
    return folder


def test_two_processes_give_the_table_of_one(model: Path, images: Path, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    arguments = ["predict", "--model", str(model), "--batch-size", "2", "--output"]
    result = CliRunner().invoke(app, [*arguments, str(one), str(images), "--parquet"])
    assert result.exit_code == 1 and "9 judged" in result.output, result.output
    # An earlier run was interrupted after a picture in the middle.
    CliRunner().invoke(app, [*arguments, str(two), str(images / "4.png")])
    written = (two / "4.png").stat().st_mtime_ns
    done = launch(two, images, "--model", model, "--parquet")
    assert "1 of 10 pictures were judged before" in done.stdout and done.stdout.count("9 judged") == 1, done.stderr
    assert done.stdout.count("HTML page") == 1
    assert done.returncode == 1 and "exitcode  : 1" in done.stderr

    expected, found = table(one), table(two)
    assert [row["path"] for row in found] == [row["path"] for row in expected]
    for ours, theirs in zip(found, expected):
        assert ours["decision"] == theirs["decision"] and ours["error"] == theirs["error"]
        if theirs["score"] is not None:  # batches are others after an interruption: the last bits may differ
            assert ours["score"] == pytest.approx(theirs["score"], abs=1e-5)
            assert (two / f"{ours['output']}.png").is_file()
    assert found[4]["output"] == "4" and (two / "4.png").stat().st_mtime_ns == written

    shards = sorted(two.glob("*.parquet"))
    assert [shard.name for shard in shards] == [f"results-0000{i}-of-00002.parquet" for i in range(2)]
    whole = load_dataset("parquet", data_files=[str(shard) for shard in shards], split="train", cache_dir=tmp_path)
    assert whole.remove_columns("seconds").to_list() == found
    assert {path.suffix for path in two.glob("*.*")} - {""} == {".png", ".json", ".jsonl", ".csv", ".parquet"}
    assert len(list(two.glob("*.jsonl"))) == 1


def test_two_processes_are_bit_identical_to_one_on_a_dataset(model: Path, images: Path, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    files = [{"image": {"bytes": (images / f"{index}.png").read_bytes(), "path": None}} for index in range(7)]
    rows = datasets.Dataset.from_list(files).cast_column("image", datasets.Image())
    rows.to_parquet(tmp_path / "rows.parquet")
    tables = []
    for count in (1, 2):
        output = tmp_path / f"out_{count}"
        arguments = ["predict", "--dataset", tmp_path / "rows.parquet", "--model", model, "--output", output]
        for done in run_ranks([DIFFUSIONAD, *arguments, "--batch-size", "2"], count, ENVIRONMENT):
            assert done.returncode == 0, done.stderr
        tables.append(table(output))
    assert tables[0] == tables[1] and len(tables[0]) == 7


def test_a_killed_process_loses_no_rows(tmp_path: Path) -> None:
    def row(name: str) -> dict:
        return dict.fromkeys(COLUMNS) | {"path": name, "score": 0.5, "output": name}

    def opened(model: str, overwrite: bool = False) -> PredictionFolder:
        return PredictionFolder(OutputFolder(tmp_path, "predict"), {"model": model}, [".png"], overwrite)

    other = OutputFolder(tmp_path, "predict")
    folder = opened("a")
    folder.add([row("a")])
    append_share(other, 1, [row("c"), row("d")])
    append_share(other, 2, [row("e")])
    with open(tmp_path / "results.process-00002.jsonl", "a", encoding="utf-8") as file:
        file.write('{"path": "half')
    again = opened("a")
    assert list(again.rows) == ["a", "c", "d", "e"]
    assert [path.name for path in tmp_path.glob("*.jsonl")] == ["results.jsonl"]
    append_share(other, 1, [row("b")])
    again.take_shares()
    again.order(["a", "b", "c", "missing"])
    again.write_tables(parquet_shards=3)
    assert [r["path"] for r in table(tmp_path)] == ["d", "e", "a", "b", "c"]
    assert len(list(tmp_path.glob("*.parquet"))) == 3
    again.write_tables(parquet_shards=1)
    assert [path.name for path in tmp_path.glob("*.parquet")] == ["results.parquet"]
    with pytest.raises(ValueError, match="another model"):
        append_share(other, 1, [row("f")])
        opened("b")
    assert list(opened("b", overwrite=True).rows) == []
    assert not list(tmp_path.glob("results.process*"))


def test_even_shares() -> None:
    assert [list(share) for share in even_shares(5, 3)] == [[0], [1, 2], [3, 4]]
    assert [len(share) for share in even_shares(1, 4)] == [0, 0, 0, 1]


@pytest.mark.slow
def test_watching_takes_one_process(model: Path, images: Path, tmp_path: Path) -> None:
    done = launch(tmp_path / "out", images, "--model", model, "--watch")
    assert "--watch is for one process" in done.stderr
    assert done.returncode == 1 and "exitcode  : 2" in done.stderr  # accelerate knows no other failure than 1
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_running_out_of_memory_names_the_batch_size(
    tiny_pipeline: DiffusionADPipeline, images: Path, tmp_path: Path
) -> None:
    tiny_pipeline.register_to_config(image_size=8192)
    tiny_pipeline.save_pretrained(tmp_path / "huge")
    arguments = ["predict", images, "--model", tmp_path / "huge", "--output", tmp_path / "out"]
    done = run_script([DIFFUSIONAD, *arguments], ENVIRONMENT, {resource.RLIMIT_AS: 6 * 2**30})
    assert done.returncode == 1 and "out of memory with --batch-size 8: use a lower" in done.stderr, done.stderr
