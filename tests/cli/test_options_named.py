"""What a message tells to try exists: every option that a text names is one of the commands that can say it."""

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import typer
from accelerate.commands.launch import launch_command_parser
from PIL import Image

from diffusionad_pipe.cli import PASSED_ON, UNDERSCORES, app
from diffusionad_pipe.cli.training import preview_parser
from diffusionad_pipe.training.config import TrainingConfig, settings_parser
from diffusionad_pipe.training.images import read_textures

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "src" / "diffusionad_pipe"
FILES = sorted([*PACKAGE.rglob("*.py"), *(ROOT / "training").glob("*.py")])
READERS = "predict check-data preview-synthesis train evaluate calibrate export space"
LAUNCH = "accelerate launch"

# Who says what: the commands in which a file's texts appear, of one option or of all; of a file of commands, by
# function. All else in it belongs to the command of its name.
SAID_BY = {
    "data/loading": READERS,
    "evaluation/calibration": "calibrate",
    "evaluation/measuring": "evaluate",
    "evaluation/predicting": "evaluate",
    "evaluation/tables": "evaluate",
    "files/output_folder": "predict evaluate preview-synthesis export space",  # the others give it a name of their own
    "files/single_files": "export preview-synthesis",
    "hub/model_card": "evaluate",
    "hub/model_card --output_dir": "train",
    "hub/results": "evaluate",
    "hub/space_folder": "space",
    "images/files": READERS,
    "images/sources": "predict",
    "cli/predict": "predict",
    "prediction/folder": "predict",
    "prediction/predict": "predict",
    "prediction/settings": "predict",
    "synthesis/foregrounds": "train preview-synthesis",
    "training/images": "train preview-synthesis",
    "training/preview": "preview-synthesis",
    "cli/options load_pipeline": "predict calibrate",
    "cli/evaluate": "evaluate",
    "cli/calibrate": "calibrate",
    "cli/options chosen_tiling": "predict evaluate calibrate export",
    "cli/training TRAIN_DESCRIPTION": "train",
    "cli/training PREVIEW_DESCRIPTION": "preview-synthesis",
    "cli/training preview_parser": "preview-synthesis",
}
# The commands of the page of benchmarks are others; tests/test_readme.py has them.
PAGES = [ROOT / "README.md", ROOT / "training" / "README.md", *sorted((ROOT / "docs").glob("[!b]*.md"))]
OF_PIP = {"--no-deps"}
SCRIPTS = {"train": "train", "evaluate": "evaluate"}
# What `accelerate launch` is told, and not the command.
LAUNCHER = {"--multi_gpu", "--quiet"}


@cache
def options_of(command: str) -> set[str]:
    if command == LAUNCH:
        return {option for action in launch_command_parser()._actions for option in action.option_strings}
    if command in ("train", "preview-synthesis"):
        parser = preview_parser() if command == "preview-synthesis" else settings_parser(TrainingConfig, None)
        return set(parser._option_string_actions)
    parameters = typer.main.get_command(app).commands[command].params
    options = {option for parameter in parameters for option in (*parameter.opts, *parameter.secondary_opts)}
    if command == "evaluate":  # which takes underscores too
        options |= {f"--{option[2:].replace('-', '_')}" for option in options}
    return options


def named_options(file: Path) -> Iterator[tuple[str, str]]:
    """(name of the function or constant, option) of each text in a file that is no docstring."""
    for part in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(part, ast.Expr):  # the module's docstring
            continue
        docstrings = {
            id(node.body[0].value)
            for node in ast.walk(part)
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and isinstance(node.body[0], ast.Expr)
        }
        name = getattr(part, "name", "") or getattr(getattr(part, "targets", [None])[0], "id", "")
        for node in ast.walk(part):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
                yield from ((name, option) for option in re.findall(r"(?<![\w-])--[a-z][\w-]*\w", node.value))


def commands_that_say(file: Path, function: str, option: str) -> list[str]:
    if option in LAUNCHER:
        return [LAUNCH]
    if file.parent == ROOT / "training":
        return [SCRIPTS[file.stem]]
    place = file.relative_to(PACKAGE).with_suffix("").as_posix()
    said_by = next(
        (SAID_BY[key] for key in (f"{place} {option}", f"{place} {function}", place) if key in SAID_BY), None
    )
    if said_by is None and place.startswith("training/"):
        said_by = "train"
    if said_by is None and place.startswith("cli/"):
        said_by = function.replace("_", "-")
    assert said_by is not None, f"{file.name} names {option}: in which commands? Add it to SAID_BY"
    return said_by.split()


@pytest.mark.parametrize("file", FILES, ids=lambda file: f"{file.parent.name}-{file.stem}")
def test_every_option_that_is_named_exists(file: Path) -> None:
    for function, option in named_options(file):
        for command in commands_that_say(file, function, option):
            assert option in options_of(command), f"{file.name}, {function}: {command} has no {option}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: f"{page.parent.name}-{page.stem}")
def test_every_option_on_a_page_exists(page: Path) -> None:
    text = re.sub(r"`python benchmarks/[^`]*`", "", page.read_text(encoding="utf-8"))  # of others than the commands
    known = set().union(*(options_of(command) for command in [*typer.main.get_command(app).commands, LAUNCH]))
    named = set(re.findall(r"(?<![\w-])--[a-z][\w-]*\w", text))
    assert named - OF_PIP <= known | {"--help"}, sorted(named - OF_PIP - known)


def test_textures_that_are_tolerated(tmp_path: Path) -> None:
    Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match="1 of 2 textures .* allow more with --max_unreadable"):
        read_textures(str(tmp_path), 16)
    textures = read_textures(str(tmp_path), 16, max_unreadable=0.5)
    assert textures is not None and len(textures) == 1


def test_names_are_found() -> None:
    assert ("OR_RAISE_MAX_PIXELS", "--max-pixels") in named_options(PACKAGE / "images" / "files.py")
    assert ("explain", "--train_batch_size") in named_options(PACKAGE / "training" / "launch.py")
    assert PASSED_ON["allow_extra_args"] and UNDERSCORES  # the two spellings that options_of counts with
