"""The benchmark that counts on fake tensors; those that only take time are run by hand."""

import re
from pathlib import Path

import pytest

from tests.helpers.script_processes import run_script

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_the_memory_of_a_step_is_counted_without_taking_it():
    command = [ROOT / "benchmarks" / "training_step.py", "--memory"]
    done = run_script([*command, "--resolution", "64", "--batch_size", "2"])
    assert done.returncode == 0, done.stderr
    table = dict(re.findall(r"\| ([\w' ]+) \| ([\d.]+) \| [\d.]+ \|", done.stdout))
    # 160 million parameters of 4 bytes, Adam's two averages of them, and gradients.
    assert table["parameters"] == table["gradients"] == "0.60" and table["Adam's averages"] == "1.19"
    assert float(table["peak"]) > 2.39
