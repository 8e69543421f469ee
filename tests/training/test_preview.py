"""`diffusionad preview-synthesis` shows what training would use."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from typer.testing import CliRunner

from diffusionad_pipe import cli, open_image
from diffusionad_pipe.training.config import TrainingConfig
from diffusionad_pipe.training.preview import ROWS
from diffusionad_pipe.training.samples import read_inputs, training_samples

GOOD = Path(__file__).parents[2] / "training" / "data" / "hazelnut_toy" / "hazelnut" / "train" / "good"
COUNT = 8  # pictures, of which training holds out one


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Real pictures, made small."""
    folder = tmp_path_factory.mktemp("data") / "pictures"
    folder.mkdir()
    for path in sorted(GOOD.iterdir())[:COUNT]:
        open_image(path).resize((48, 48)).save(folder / f"{path.stem}.png")
    return folder


def preview(*arguments: object):
    return CliRunner().invoke(cli.app, ["preview-synthesis", *map(str, arguments)])


def columns(sheet: Path, count: int, side: int = 32) -> np.ndarray:
    """The pictures on a sheet without the captions, uint8 `[rows, columns, side, side, 3]`."""
    pixels = np.asarray(Image.open(sheet))[:, -count * side :]
    return pixels.reshape(len(ROWS), side, count, side, 3).transpose(0, 2, 1, 3, 4)


SETTINGS = {"resolution": 32, "horizontal_flip": True, "rotation": 20.0, "seed": 5, "foreground": "random"}


@pytest.mark.parametrize("settings", [SETTINGS, {"resolution": 32, "resize_to": 48, "procedural_probability": 0.5}])
def test_the_sheet_shows_what_training_sees(folder: Path, tmp_path: Path, settings: dict) -> None:
    sheet = tmp_path / "new" / "sheet.png"
    # The flags as training takes them, with underscores.
    flags = [f"--{name}" if value is True else f"--{name}={value}" for name, value in settings.items()]
    result = preview(folder, "--output", sheet, "--count", 10, "--samples", 1, *flags)
    assert result.exit_code == 0, result.output
    assert "7 pictures to train on; of 10 samples" in result.output and "the first 10 are in" in result.output
    assert Image.open(sheet).height == 4 * 32 and 10 * 32 < Image.open(sheet).width < 10 * 32 + 120
    assert {path.name for path in sheet.parent.iterdir()} == {"sheet.png", ".diffusionad"}

    config = TrainingConfig(train_data_dir=str(folder), **settings)
    training = training_samples(config, read_inputs(config), 10, torch.device("cpu"))
    images, mattes, masks, composites = columns(sheet, 10).astype(int)
    samples = training.__getitems__(range(10))
    assert 2 <= sum(sample["labels"] for sample in samples) <= 8
    for index, sample in enumerate(samples):
        image, mask = (255 * sample[key].permute(1, 2, 0).numpy() for key in ("images", "masks"))
        if sample["labels"]:
            np.testing.assert_allclose(masks[index], np.broadcast_to(mask, (32, 32, 3)), atol=1)
            np.testing.assert_allclose(composites[index], image, atol=1)
        else:  # without its anomaly it is the picture that the preview puts one on
            np.testing.assert_allclose(images[index], image, atol=1)
    assert (masks <= mattes).all() and masks.any()
    changed = (abs(images - composites) > 1).any(-1)
    assert (masks[changed] > 0).all() and changed.any()


def test_the_same_seed_gives_the_same_sheet(folder: Path, tmp_path: Path) -> None:
    sheets = []
    for index, seed in enumerate((0, 0, 1)):
        sheets.append(tmp_path / f"{index}.png")
        result = preview(
            folder, "--output", sheets[-1], "--resolution", 32, "--count", 3, "--samples", 3, "--seed", seed
        )
        assert result.exit_code == 0, result.output
    assert sheets[0].read_bytes() == sheets[1].read_bytes() != sheets[2].read_bytes()


@pytest.mark.parametrize(
    "empty, share", [(0, "0.0% have an empty mask"), (2, "28.6% have"), (8, "all 14 samples have")]
)
def test_empty_masks_are_counted(folder: Path, tmp_path: Path, empty: int, share: str) -> None:
    """Mattes without a foreground on some of the pictures, none of which is the one that is held out."""
    for index, path in enumerate(sorted(folder.iterdir())):
        Image.new("L", (48, 48), 0 if index < empty else 255).save(tmp_path / path.name)
    flags = ["--resolution", 32, "--count", 2, "--samples", 14, "--foreground", "folder", "--foreground-dir", tmp_path]
    result = preview(folder, "--output", tmp_path / "sheet.png", *flags)
    assert result.exit_code == 0 and share in result.output, result.output
    assert ("hint" in result.output) == (empty > 0)
    assert ("of the area on average" in result.output) == (empty < 8)


@pytest.mark.parametrize(
    "arguments, cause",
    [
        (["{tmp}/nothing"], "nothing is not a folder"),
        (["{tmp}"], "has no pictures to train on"),
        (["{folder}", "--foreground", "salient"], "'none', 'random', 'threshold', 'folder', 'transformers'"),
        (["{folder}", "--foreground", "transformers"], "--foreground_model"),
        (["{folder}", "--foreground", "folder", "--foreground-dir", "{folder}/../mattes"], "7 of 8 pictures have no"),
        (["{folder}", "--texture-dir", "{tmp}/textures"], "textures"),
        (["{folder}", "--resize-to", "16"], "--resize-to 16 is smaller than --resolution 32"),
        (["{folder}", "--texture-probability", "2"], "texture_probability must be a share"),
        (["{folder}", "--output", "{tmp}/sheet.txt"], "sheet.txt"),
    ],
)
def test_wrong_usage_is_exit_code_2(folder: Path, tmp_path: Path, arguments: list[str], cause: str) -> None:
    mattes, first = folder.parent / "mattes", sorted(folder.iterdir())[0]
    mattes.mkdir(exist_ok=True)
    Image.new("L", (48, 48), 255).save(mattes / first.name)
    filled = [argument.format(tmp=tmp_path, folder=folder) for argument in arguments]
    output = [] if "--output" in arguments else ["--output", tmp_path / "sheet.png"]
    result = preview(*filled, "--resolution", 32, *output)
    assert result.exit_code == 2 and cause in result.output, result.output
    assert "Traceback" not in result.output and not list(tmp_path.iterdir())
    if "7 of 8" in cause:  # all of them are named
        missing = [path for path in sorted(folder.iterdir()) if path != first]
        assert all(str(path) in result.output for path in missing)


def test_a_run_that_a_file_describes(folder: Path, tmp_path: Path) -> None:
    """The settings of a YAML file show the same as the same flags, and flags win over them."""
    settings = {"resolution": 32, "rotation": 45.0, "foreground": "random", "soft_edge_probability": 1.0, "seed": 3}
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(settings | {"train_data_dir": str(folder), "max_train_steps": 7}))
    flags = [f"--{name}={value}" for name, value in settings.items()]
    few = ["--count", 2, "--samples", 2]
    sheets = [tmp_path / f"{name}.png" for name in ("file", "flags", "both")]
    for sheet, arguments in zip(sheets, (["--config", file], [folder, *flags], ["--config", file, "--seed", 4])):
        result = preview(*arguments, "--output", sheet, *few)
        assert result.exit_code == 0, result.output
    assert sheets[0].read_bytes() == sheets[1].read_bytes() != sheets[2].read_bytes()


def test_without_the_train_extra() -> None:
    code = "import sys; sys.modules.update(dict.fromkeys(['datasets', 'kornia', 'skimage', 'gradio', 'matplotlib']))\n"
    code += "from diffusionad_pipe.cli import app; app()"
    command = [sys.executable, "-c", code, "preview-synthesis", "pictures", "--output", "sheet.png"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 2 and 'pip install "diffusionad_pipe[train]"' in result.stderr, result.stderr
    assert len(result.stderr.splitlines()) == 1
