"""That benchmarks start, and what the one of a training step counts on fake tensors; they are timed by hand."""

import re
from pathlib import Path

import pytest

from tests.helpers.script_processes import run_script

ROOT = Path(__file__).parents[1]
BENCHMARKS = [file for file in sorted((ROOT / "benchmarks").glob("*.py")) if file.stem != "measure"]


@pytest.mark.slow
@pytest.mark.parametrize("script", BENCHMARKS, ids=lambda script: script.stem)
def test_a_benchmark_starts(script: Path) -> None:
    done = run_script([script, "--help"])
    assert done.returncode == 0, done.stderr
    assert f"python benchmarks/{script.name}" in done.stdout


@pytest.mark.slow
def test_the_memory_of_a_step_is_counted_without_taking_it():
    command = [ROOT / "benchmarks" / "training_step.py", "--memory"]
    done = run_script([*command, "--resolution", "64", "--batch_size", "2"])
    assert done.returncode == 0, done.stderr
    table = dict(re.findall(r"\| ([\w' ]+) \| ([\d.]+) \| [\d.]+ \|", done.stdout))
    # 160 million parameters of 4 bytes, Adam's two averages of them, and gradients.
    assert table["parameters"] == table["gradients"] == "0.60" and table["Adam's averages"] == "1.19"
    assert float(table["peak"]) > 2.39
