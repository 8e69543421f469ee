"""Every cell of the notebook runs, in order, in a folder of its own."""

import json
import re
from pathlib import Path

import pytest

from tests.helpers.script_processes import run_script
from tests.helpers.training_runs import ENVIRONMENT, ROOT

NOTEBOOK = ROOT / "examples" / "quickstart.ipynb"


@pytest.mark.slow
def test_every_cell_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    alone = "import os\nos.sched_setaffinity(0, [min(os.sched_getaffinity(0))])"  # two threads wait for other tests
    (tmp_path / "quickstart.py").write_text("\n\n".join([alone, *code]), encoding="utf-8")
    for name in ("pretrained", "training"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)

    done = run_script(["quickstart.py"], ENVIRONMENT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "stained: score 0.885, defective" in done.stdout and "good: score 0.107, good" in done.stdout
    calibrated = json.loads(Path("runs/quickstart/model/model_index.json").read_text())["image_threshold"]
    assert re.findall(r"^image threshold ([\d.]+)", done.stdout, re.MULTILINE) == [f"{calibrated:.3f}"]


def test_the_notebook_holds_no_outputs() -> None:
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in cells)
