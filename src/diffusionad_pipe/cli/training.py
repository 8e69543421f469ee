"""The commands that come before a model: what to train on, and training."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

from ..files.output_folder import OutputFolder
from ..images.files import IMAGE_SUFFIXES, MAX_PIXELS
from .console import USER_ERRORS, fail, needed_packages, output_console
from .options import MaxPixels

MANY_EMPTY_MASKS = 0.1  # share of draws from which on the preview warns


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


def preview_synthesis(
    images_folder: Annotated[Path, typer.Argument(help="Folder of good pictures, or of one category (train/good).")],
    output: Annotated[Path, typer.Option(help="The contact sheet, a PNG or JPEG file.")],
    category: Annotated[str | None, typer.Option(help="Sub-folder, where the folder holds several.")] = None,
    resolution: Annotated[int, typer.Option(min=16, help="Side in pixels that the networks train on.")] = 256,
    resize_to: Annotated[
        int | None, typer.Option(min=16, help="Side that pictures are resized to; crops of --resolution are random.")
    ] = None,
    horizontal_flip: Annotated[
        bool, typer.Option("--horizontal-flip/--no-horizontal-flip", help="Flip half of the pictures left to right.")
    ] = False,
    vertical_flip: Annotated[
        bool, typer.Option("--vertical-flip/--no-vertical-flip", help="Flip half of the pictures upside down.")
    ] = False,
    rotation: Annotated[float, typer.Option(min=0, help="Turn by up to so many degrees to either side.")] = 0.0,
    foreground: Annotated[
        str, typer.Option(help="Where anomalies may be: none, random, threshold, folder or transformers.")
    ] = "threshold",
    foreground_dir: Annotated[
        str | None, typer.Option(help='Mattes for "folder". Default: DISthresh or thresh beside the folder train.')
    ] = None,
    foreground_model: Annotated[
        str | None, typer.Option(help='Segmentation model for "transformers": Hub id or folder.')
    ] = None,
    texture_dir: Annotated[
        str | None, typer.Option(help='Textures, flat or like DTD. Default: the shipped CC0 ones; "none": none.')
    ] = None,
    texture_probability: Annotated[
        float, typer.Option(min=0, max=1, help="Share of anomalies that are textures: 0.5 for objects, 1 for textures.")
    ] = 0.5,
    procedural_probability: Annotated[
        float, typer.Option(min=0, max=1, help="Share of textures that are drawn: clouds and plain colours.")
    ] = 0.0,
    grayscale_anomalies: Annotated[
        bool,
        typer.Option(
            "--grayscale-anomalies/--no-grayscale-anomalies", help="Anomalies on grey pictures are grey; the paper: no."
        ),
    ] = True,
    thin_line_probability: Annotated[
        float, typer.Option(min=0, max=1, help="Share of anomalies that are thin lines; the paper: 0.")
    ] = 0.0,
    soft_edge_probability: Annotated[
        float, typer.Option(min=0, max=1, help="Share of anomalies with blurred edges; the paper: 0.")
    ] = 0.0,
    validation_fraction: Annotated[
        float, typer.Option(min=0, max=1, help="Share of the pictures that training holds out.")
    ] = 0.15,
    max_unreadable: Annotated[
        float, typer.Option(min=0, max=1, help="Share of unreadable pictures that is put up with.")
    ] = 0.1,
    max_pixels: MaxPixels = MAX_PIXELS,
    seed: Annotated[int, typer.Option(min=0, help="The same as in training gives the same samples.")] = 0,
    count: Annotated[int, typer.Option(min=1, help="Samples on the sheet.")] = 8,
    draws: Annotated[int, typer.Option(min=1, help="Samples that empty masks are counted in.")] = 200,
) -> None:
    """Show what a model would be trained on.

    Writes a contact sheet with the first samples of a run with the same settings: picture, foreground, mask and
    composite, all with an anomaly. Says how many masks are empty: those samples would stay normal. The options and
    their defaults are the settings of `diffusionad train`. Exit code: 0, or 2 for wrong usage.

    \b
    diffusionad preview-synthesis my_good_pictures --output preview.png
    """
    with needed_packages():
        from ..training.preview import preview_synthesis as preview
    try:
        if output.suffix.lower() not in IMAGE_SUFFIXES:
            raise ValueError(f"{output}: the contact sheet is a picture; end its name in .png")
        folder = OutputFolder(output.parent, "preview-synthesis")
        folder.require_free(output.name)
        result = preview(
            str(images_folder),
            category=category,
            resolution=resolution,
            resize_to=resize_to,
            max_unreadable=max_unreadable,
            max_pixels=max_pixels,
            validation_fraction=validation_fraction,
            horizontal_flip=horizontal_flip,
            vertical_flip=vertical_flip,
            rotation=rotation,
            texture_dir=texture_dir,
            foreground=foreground,
            foreground_dir=foreground_dir,
            foreground_model=foreground_model,
            texture_probability=texture_probability,
            procedural_probability=procedural_probability,
            grayscale_anomalies=grayscale_anomalies,
            thin_line_probability=thin_line_probability,
            soft_edge_probability=soft_edge_probability,
            seed=seed,
            count=count,
            draws=draws,
        )
        folder.write(output.name, result.sheet.save)
    except USER_ERRORS as error:
        fail(error)

    console = output_console()
    console.print(
        f"{result.image_count} pictures to train on; of {result.sample_count} draws of an anomaly "
        f"{result.empty_share:.1%} have an empty mask; the others cover {result.coverage:.1%} of the area on average"
        if result.empty_share < 1
        else f"{result.image_count} pictures to train on; all {result.sample_count} draws have an empty mask"
    )
    if result.empty_share > MANY_EMPTY_MASKS:
        console.print(
            "hint: a draw with an empty mask stays a normal picture, so training would see fewer anomalies than asked "
            "for: the foreground is small or missing on many pictures; look at its row, and try another --foreground "
            "(none: everywhere)",
            style="yellow",
        )
    console.print(f"the first {count} are in {output}")


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
    sys.path.insert(0, str(script.parent))
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
