"""What a wheel holds, and a Space in an environment of its own. The second takes minutes and .ci/run asks for it."""

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
import zipfile
from pathlib import Path

import pytest
import yaml

from tests.helpers.training_runs import HAZELNUT, ROOT, TINY

START_SECONDS = 300


def run(*command: object, **options) -> str:
    arguments = [*map(str, command)]
    done = subprocess.run(arguments, text=True, capture_output=True, timeout=1800, check=False, **options)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of the wheel, in a folder."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", folder, ROOT]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=600, check=False)
    if done.returncode and "hatchling" in done.stderr:
        pytest.skip("no index to install the build backend from")
    assert done.returncode == 0, done.stderr
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        wheel.extractall(folder / "files")
    return folder / "files"


@pytest.mark.slow
@pytest.mark.minutes(20)
def test_a_wheel_can_train_predict_and_make_a_space(unpacked: Path, tmp_path: Path) -> None:
    """Far from any checkout, with nothing of ours but the wheel."""
    package = unpacked / "diffusionad_pipe"
    names = {path.relative_to(package).as_posix() for path in package.rglob("*") if path.is_file()}
    assert {"hub/model_card.md", "evaluation/published.yaml", "evaluation/report.html"} <= names
    assert {"training/presets/small.yaml", "spaces_demo/app.py"} <= names
    assert "training/train.py" in names  # what evaluate.py beside it does, `diffusionad evaluate` does
    assert not any(name.startswith(("training/data/", "tests/")) or "__pycache__" in name for name in names)
    code = f"""
from diffusionad_pipe import cli
from diffusionad_pipe.hub import space_folder
assert space_folder.PACKAGE.samefile({str(package)!r})
cli.app(["space", {str(ROOT / "pretrained" / "hazelnut")!r}, "--output", "space"], standalone_mode=False)
cli.app(["train", "--help"])
"""
    environment = os.environ | {"PYTHONPATH": str(unpacked)}
    output = run(sys.executable, "-c", code, cwd=tmp_path, env=environment)
    assert "--validation_fraction" in output and "python space/app.py" in output
    assert (tmp_path / "space" / "diffusionad_pipe" / "cli" / "__init__.py").is_file()
    assert not (tmp_path / "space" / "diffusionad_pipe" / "spaces_demo").exists()
    assert "packaging" in (tmp_path / "space" / "requirements.txt").read_text()

    settings = TINY | {"max_train_steps": 2, "validation_steps": 2, "validation_repeats": 1, "output_dir": "model"}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(settings))
    diffusionad = (sys.executable, "-m", "diffusionad_pipe.cli")
    environment |= {"ACCELERATE_USE_CPU": "1"}
    run(*diffusionad, "train", "--config", "tiny.yaml", cwd=tmp_path, env=environment)
    shutil.copy(HAZELNUT / "test" / "colour" / "00.jpg", tmp_path)
    run(*diffusionad, "predict", "00.jpg", "--model", "model", "--output", "results", cwd=tmp_path, env=environment)
    assert (tmp_path / "model" / "README.md").is_file() and (tmp_path / "results" / "00.png").is_file()


@pytest.mark.slow
@pytest.mark.minutes(20)
@pytest.mark.skipif("DIFFUSIONAD_FRESH_ENVIRONMENT" not in os.environ, reason="installs torch; .ci/run asks for it")
def test_a_space_starts_in_a_fresh_environment(unpacked: Path, tmp_path: Path) -> None:
    space, environment = tmp_path / "space", tmp_path / "environment"
    command = ("-m", "diffusionad_pipe.cli", "space", ROOT / "pretrained" / "hazelnut", "--output", space)
    run(sys.executable, *command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(unpacked)})
    run(sys.executable, "-m", "venv", environment)
    python = environment / "bin" / "python"
    # The versions that are known here; torch first and alone, or gigabytes of CUDA may come along.
    install = (python, "-m", "pip", "install", "--quiet", "--constraint", ROOT / "constraints.txt")
    run(*install, "torch")
    run(*install, "--requirement", space / "requirements.txt")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    clean = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "DIFFUSIONAD_MODEL")}
    clean |= {"GRADIO_SERVER_NAME": "127.0.0.1", "GRADIO_SERVER_PORT": str(port), "HF_HUB_OFFLINE": "1"}
    with open(tmp_path / "log.txt", "w") as log:
        process = subprocess.Popen([python, "app.py"], cwd=space, env=clean, stdout=log, stderr=log)
    try:
        for _ in range(START_SECONDS):
            time.sleep(1)
            assert process.poll() is None, (tmp_path / "log.txt").read_text()
            with socket.socket() as connection:
                if connection.connect_ex(("127.0.0.1", port)) == 0:
                    break
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=START_SECONDS) as answer:
            assert answer.status == 200 and b"DiffusionAD" in answer.read()
    finally:
        process.terminate()
        process.wait()
