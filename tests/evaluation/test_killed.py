"""`diffusionad evaluate`, killed at random moments: the same command goes on to the same tables."""

import os
import random
import time
from pathlib import Path

import pytest
from PIL import Image

from diffusionad_pipe.files.record import sha256_of
from tests.helpers.script_processes import ScriptProcess, run_script
from tests.helpers.small_data import write_small_data
from tests.helpers.tiny_pipeline import build_tiny_pipeline

SCRIPT = Path(__file__).parents[2] / "training" / "evaluate.py"
ENVIRONMENT = os.environ | {"ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1"}
TABLES = ("results.md", "results.csv", "scores.csv")
PREDICTIONS = "predictions/part/*-*.npz"
IMAGES = 12
KILLS = 3  # of one evaluation


def tree(root: Path) -> dict[str, str]:
    return {str(file.relative_to(root)): sha256_of(file) for file in root.rglob("*") if file.is_file()}


@pytest.fixture(scope="module")
def arguments(tmp_path_factory: pytest.TempPathFactory) -> list[object]:
    """Of an evaluation of twelve pictures, without its output."""
    folder = tmp_path_factory.mktemp("evaluation")
    data = write_small_data(folder / "part")
    for index in range(7):
        Image.new("RGB", (48, 40), (30 * index, 0, 200)).save(data / "test" / "good" / f"plain {index}.png")
    build_tiny_pipeline().save_pretrained(folder / "model")
    return [SCRIPT, "--model", folder / "model", "--data", data, "--batch-size", 3, "--output"]


@pytest.fixture(scope="module")
def tables(arguments: list[object], tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Of an evaluation that nothing interrupts."""
    output = tmp_path_factory.mktemp("uninterrupted")
    done = run_script([*arguments, output], ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    return [(output / name).read_text() for name in TABLES]


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 7))])
def test_a_killed_evaluation_goes_on(seed: int, arguments: list[object], tables: list[str], tmp_path: Path) -> None:
    moments = random.Random(seed)
    output = tmp_path / "out"
    others = [output / name for name in ("notes.txt", "predictions/part/000000.npz", "predictions/other/0.npz")]
    for file in others:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"mine: {file.name}")
    inputs = Path(str(arguments[2])).parent
    before = tree(inputs), [file.read_text() for file in others]
    for _ in range(KILLS):
        kept = {file: file.stat().st_mtime_ns for file in output.glob(PREDICTIONS)}
        wanted = moments.randint(0, IMAGES)
        with ScriptProcess([*arguments, output], ENVIRONMENT) as process:
            while process.process.exitcode is None and len(list(output.glob(PREDICTIONS))) < wanted:
                time.sleep(0.001)
            process.process.join(moments.choice([0, 0.01, 0.1, 1]) * moments.random())
            process.process.kill()
        assert all(file.stat().st_mtime_ns == when for file, when in kept.items())  # what was done is kept
    done = run_script([*arguments, output], ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    assert [(output / name).read_text() for name in TABLES] == tables
    assert (tree(inputs), [file.read_text() for file in others]) == before
    assert len(list(output.glob(PREDICTIONS))) == IMAGES
    assert not any((output / ".diffusionad" / "unfinished").glob("*/*"))
