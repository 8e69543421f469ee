"""The commands that come before a model: what to train on, and training."""

import argparse
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from ..files.output_folder import OutputFolder
from ..images.files import IMAGE_SUFFIXES, MAX_PIXELS
from .console import USER_ERRORS, fail, needed_packages, output_console
from .options import MaxPixels

MANY_EMPTY_MASKS = 0.1  # share of samples from which on the preview warns


def check_data(
    path: Annotated[Path, typer.Argument(help="Folder of one category, or of several.")],
    category: Annotated[str, typer.Option(help="Sub-folder, where the folder holds several; all: every one.")] = "all",
    layout: Annotated[str, typer.Option(help="As load_anomaly_dataset takes it; auto: whichever fits.")] = "auto",
    max_pixels: MaxPixels = MAX_PIXELS,
) -> None:
    """Report every problem of a dataset.

    Counts its pictures, and finds in one pass missing, stray, empty and odd masks, sizes that differ, the same picture
    in two splits, unreadable and missing files. Exit code: 0 if nothing was found, 1 if there are only warnings, 2 if
    there are errors or for wrong usage.

    \b
    diffusionad check-data datasets/screw
    """
    with needed_packages():
        from ..data.checks import check_data as check
    try:
        problems = check(path, layout, category, max_pixels)
    except (ValueError, OSError) as error:
        fail(error)
    console = output_console()
    styles = {"error": "red", "warning": "yellow", "note": ""}
    for problem in problems:
        console.print(f"{problem.severity}: {problem.message}", style=styles[problem.severity])
    errors, warnings = (sum(p.severity == severity for p in problems) for severity in ("error", "warning"))
    console.print(f"errors: {errors}, warnings: {warnings}")
    raise typer.Exit(2 if errors else 1 if warnings else 0)


def preview_parser() -> argparse.ArgumentParser:
    """The arguments of `preview-synthesis`: the settings of training that its samples depend on, and its own."""
    from ..training.config import SampleConfig, settings_parser

    parser = settings_parser(SampleConfig, PREVIEW_DESCRIPTION, "diffusionad preview-synthesis")
    own = parser.add_argument_group("the preview")
    own.add_argument(
        "images_folder",
        nargs="?",
        help="good pictures, or one category (train/good); first of all; or --train_data_dir",
    )
    own.add_argument("--output", type=Path, required=True, help="the contact sheet, a PNG or JPEG file")
    own.add_argument("--count", type=int, default=8, help="samples on the sheet")
    own.add_argument("--samples", type=int, default=200, help="samples in which empty masks are counted")
    return parser


def preview_synthesis(context: typer.Context) -> None:
    """Show what a model would be trained on.

    Writes a contact sheet with the first samples of a run with the same settings.

    \b
    diffusionad preview-synthesis my_good_pictures --output preview.png
    """
    with needed_packages():
        from ..training.config import parse_settings
        from ..training.preview import preview_synthesis as preview
    parser = preview_parser()
    config, own = parse_settings(parser, context.args)
    if own.images_folder is not None:
        config = replace(config, train_data_dir=own.images_folder, dataset_name=None)
    if not config.train_data_dir and not config.dataset_name:
        parser.error("a folder with pictures of good parts is needed, as first argument or in --config")
    try:
        if own.output.suffix.lower() not in IMAGE_SUFFIXES:
            raise ValueError(f"{own.output}: the contact sheet is a picture; end its name in .png")
        folder = OutputFolder(own.output.parent, "preview-synthesis")
        folder.require_free(own.output.name)
        result = preview(config, own.count, own.samples)
        folder.write(own.output.name, result.sheet.save)
    except USER_ERRORS as error:
        fail(error)

    console = output_console()
    console.print(
        f"{result.image_count} pictures to train on; of {result.sample_count} samples of an anomaly "
        f"{result.empty_share:.1%} have an empty mask; the others cover {result.coverage:.1%} of the area on average"
        if result.empty_share < 1
        else f"{result.image_count} pictures to train on; all {result.sample_count} samples have an empty mask"
    )
    if result.empty_share > MANY_EMPTY_MASKS:
        console.print(
            "hint: a sample with an empty mask stays a normal picture, so training would see fewer anomalies than "
            "asked for: the foreground is small or missing on many pictures; look at its row, and try another "
            "--foreground (none: everywhere)",
            style="yellow",
        )
    console.print(f"the first {own.count} are in {own.output}")


def train(context: typer.Context) -> None:
    """Train a model on pictures of good parts.

    Starts `accelerate launch` on the training script with the same arguments; `diffusionad train --help` explains them.
    `accelerate config` sets what is launched. Ctrl-C saves first.

    \b
    diffusionad train --train_data_dir my_good_pictures --output_dir runs/mine
    diffusionad train --config my_settings.yaml --output_dir runs/mine --resume_from_checkpoint latest
    """
    package = Path(__file__).parents[1]
    script = package / "training" / "train.py"  # in a wheel
    if not script.is_file():
        script = package.parents[1] / "training" / "train.py"  # in a checkout
    with needed_packages():
        from ..training import dataset, plots  # noqa: F401
        from ..training.config import parse_arguments
    # Wrong arguments, and --help, end here and not in every process that would be launched.
    parse_arguments(context.args, TRAIN_DESCRIPTION)
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--quiet", str(script), *context.args]
    if os.name == "nt":  # there a process cannot become another one
        raise typer.Exit(subprocess.call(launch))
    os.environ["DIFFUSIONAD_LAUNCHER"] = str(os.getpid())  # which stays
    os.execv(sys.executable, launch)  # so that signals reach it as if it had been started itself


TRAIN_DESCRIPTION = """Train DiffusionAD on pictures of good parts.

    diffusionad train --train_data_dir my_good_pictures --output_dir runs/mine
    diffusionad train --config my_settings.yaml --output_dir runs/mine --resume_from_checkpoint latest
"""

PREVIEW_DESCRIPTION = """Show what a model would be trained on.

Writes a contact sheet with the first samples of a run with the same settings: picture, foreground, mask and composite,
all with an anomaly. Says how many masks are empty: those samples would stay normal. Exit code: 0, or 2 for wrong usage.

    diffusionad preview-synthesis my_good_pictures --output preview.png
    diffusionad preview-synthesis --config training/configs/hazelnut.yaml --output preview.png
"""
