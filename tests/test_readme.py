"""Every command in README.md and docs/*.md works: run here on tiny real data, or where `ELSEWHERE` says."""

import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from PIL import Image
from typer.testing import CliRunner

from diffusionad_pipe import DiffusionADPipeline, open_image
from diffusionad_pipe.cli import app
from diffusionad_pipe.training.config import parse_arguments
from tests.helpers.hub_server import HubServer
from tests.helpers.script_processes import run_script
from tests.helpers.training_runs import ENVIRONMENT, HAZELNUT, ROOT, TINY

README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
# How a command begins -> the file that runs it, and what stands there.
ELSEWHERE = {
    "make demo": (".ci/run", "make demo"),
    "make docs": (".ci/run", "make docs"),
    "make test": (".ci/run", "make test"),
    "make space": ("tests/space/test_space.py", "app.py"),
    "pip install": ("Makefile", "pip install"),
    "accelerate launch training/evaluate.py": ("tests/evaluation/test_evaluate.py", "accelerate.commands.launch"),
    "accelerate launch -m diffusionad_pipe.cli": ("tests/prediction/test_processes.py", "accelerate.commands.launch"),
    "accelerate launch training/train.py": ("tests/helpers/training_runs.py", "accelerate.commands.launch"),
    "accelerate launch --multi_gpu": ("tests/helpers/training_runs.py", "--multi_gpu"),
    "python app.py": ("tests/test_wheel.py", "app.py"),
    "hf auth login": ("docs/training.md", "hf auth login"),  # needs an account
}


def commands(pages: list[Path]) -> list[str]:
    """The lines of the shell blocks, and commands in sentences; what only names a command is none."""
    texts = [page.read_text(encoding="utf-8") for page in pages]
    blocks = [block for text in texts for block in re.findall("```bash\n(.*?)```", text, re.DOTALL)]
    lines = [line.split("  #")[0].strip() for block in blocks for line in block.splitlines()]
    inline = r"`((?:make|python|pip install|hf|accelerate launch|diffusionad) [^`]*)`"
    lines += [" ".join(command.split()) for text in texts for command in re.findall(inline, text)]
    named = re.compile(r"diffusionad( [a-z-]+)?( --help)?")
    return list(dict.fromkeys(line for line in lines if line and not named.fullmatch(line)))


def python_blocks(pages: list[Path]) -> list[str]:
    texts = [page.read_text(encoding="utf-8") for page in pages]
    return [block for text in texts for block in re.findall("```python\n(.*?)```", text, re.DOTALL)]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder like the one that a reader works in."""
    for name in ("pretrained", "training", "benchmarks"):
        (tmp_path / name).symlink_to(ROOT / name)
    good = sorted((HAZELNUT / "train" / "good").iterdir())
    bad = sorted((HAZELNUT / "test" / "colour").iterdir())
    folders = {
        "my_good_pictures": good[:6], "more_good_pictures": good[6:26], "new_pictures": [*good[26:], *bad[:2]],
        "DATASET/train/good": good[:2], "DATASET/test/good": good[2:4], "DATASET/test/colour": bad[:2],
        "DATASET/ground_truth/colour": [HAZELNUT / "ground_truth" / "colour" / f"{file.stem}.png" for file in bad[:2]],
    }  # fmt: skip
    for folder, files in folders.items():
        (tmp_path / folder).mkdir(parents=True)
        for index, file in enumerate(files):
            name = f"{file.stem}.png" if "DATASET" in folder else f"{index:02d}.png"
            open_image(file).resize((64, 64), Image.Resampling.NEAREST).save(tmp_path / folder / name)
    shutil.copy(bad[0], tmp_path / "photo.jpg")
    tiny = TINY | {"max_train_steps": 2, "validation_steps": 2, "output_dir": "runs/mine", "small_timestep": 10,
                   "large_timestep": 20}  # fmt: skip
    del tiny["train_data_dir"]
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(tiny))
    student = tiny | {"output_dir": "runs/student", "prediction_type": "sample"}
    del student["small_timestep"], student["large_timestep"]  # they are the teacher's
    (tmp_path / "student.yaml").write_text(yaml.safe_dump(student))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    program, *arguments = shlex.split(command)
    if program == "make":  # what it would do, in small
        recipe = subprocess.run(
            ["make", "--dry-run", "--no-print-directory", "--old-file=.venv/installed", *arguments],
            cwd=ROOT,
            capture_output=True,
            text=True,
        ).stdout.replace("\\\n", " ")
        lines = [line.strip() for line in recipe.split(".venv/bin/")[1:]]
        for line in lines:
            if "train.py" in line:
                config = parse_arguments(shlex.split(line.partition("train.py ")[2]), None)
                assert config.max_train_steps > 0
        recipe = lines[-1]
        if "train.py" in recipe:
            return
        assert all((ROOT / model).is_dir() for model in re.findall(r"pretrained/\w+", recipe))
        recipe = re.sub(r"pretrained/\w+", "runs/mine", recipe)
        recipe = recipe.replace("training/data/hazelnut_toy/hazelnut", "DATASET")
        program, *arguments = shlex.split(recipe)
    if program == "python":
        monkeypatch.setattr(sys, "argv", [*arguments, "--model", "runs/mine", "--images", "new_pictures"])
        runpy.run_path(arguments[0], run_name="__main__")
    elif arguments[0] == "train":
        config_file = "student.yaml" if "--distill" in arguments else "tiny.yaml"
        line = [sys.executable, "-m", "diffusionad_pipe.cli", *arguments, "--config", config_file]
        done = subprocess.run(line, env=ENVIRONMENT, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr
    else:
        assert program == "diffusionad", f"nothing here runs: {command}"
        result = CliRunner().invoke(app, arguments)
        # The pictures of the little data set are nothing that check-data warns of.
        assert result.exit_code == 0, (command, result.output, result.exception)


@pytest.mark.slow
@pytest.mark.minutes(25)
def test_every_command_runs(place: Path, hub_server: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    pages = [page for page in PAGES if page.stem != "benchmarks"]
    for command in commands(pages):
        if where := next((where for start, where in ELSEWHERE.items() if command.startswith(start)), None):
            assert where[1] in (ROOT / where[0]).read_text(encoding="utf-8"), command
        else:
            run(command, monkeypatch)
    assert {path.name for path in (place / "results_mine").glob("*.png")} == {f"{index:02d}.png" for index in range(4)}
    assert DiffusionADPipeline.from_pretrained("user/model").config.image_threshold is not None
    assert (place / "my_space" / "app.py").is_file() and (place / "maps" / "results.parquet").is_file()
    for code in python_blocks(pages):  # after the commands: they use what those have made
        exec(compile(code, "a page", "exec"), {})


@pytest.mark.slow
def test_the_benchmarks_have_the_options_that_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    scripts = {path.name for path in (ROOT / "benchmarks").glob("*.py")}
    told = [shlex.split(command) for command in commands([ROOT / "docs" / "benchmarks.md"])]
    assert scripts - {Path(script).name for _, script, *_ in told} <= {"__init__.py", "measure.py"}
    for program, script, *options in told:
        assert program == "python", script
        done = run_script([script, "--help"])
        assert done.returncode == 0, done.stderr
        assert all(option in done.stdout for option in options if option.startswith("--")), (script, options)


def test_the_readme_is_short() -> None:
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 100


def test_the_lines_of_python_run(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    exec(compile(python_blocks([README])[0], "README.md", "exec"), {})
    score, decision = capsys.readouterr().out.split()
    assert 0 < float(score) < 1 and decision == "True"
    assert Image.open("map.png").size == (512, 512)
