"""The examples in docstrings, run as a reader would."""

import doctest
import importlib
import re
import shutil
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "diffusionad_pipe"
SOURCES = {file: file.read_text(encoding="utf-8") for file in sorted(PACKAGE.rglob("*.py"))}
WITH_OUTPUT = [file for file, text in SOURCES.items() if ">>>" in text]
ON_FILES = [
    pytest.param(code, id=file.stem)
    for file, text in SOURCES.items()
    for code in re.findall(r"Example:\n +```python\n(.*?)```", text, re.DOTALL)
    if "detector.onnx" not in code  # it takes minutes to export; tests/test_readme.py runs these lines
]


@pytest.mark.parametrize("file", WITH_OUTPUT, ids=lambda file: file.stem)
def test_examples_give_what_they_say(file: Path) -> None:
    module = importlib.import_module(".".join(file.relative_to(PACKAGE.parent).with_suffix("").parts))
    failed, attempted = doctest.testmod(module)
    assert attempted and not failed


@pytest.mark.parametrize("code", ON_FILES)
def test_examples_on_files_run(code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "pretrained").symlink_to(ROOT / "pretrained")
    shutil.copy(ROOT / "spaces_demo" / "examples" / "hazelnut_good_1.jpg", tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    exec(textwrap.dedent(code), {})
