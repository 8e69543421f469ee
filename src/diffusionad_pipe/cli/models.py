"""The commands on a model's files: what it is, other formats, the Hub, a Space."""

import os
from enum import StrEnum
from math import inf
from pathlib import Path
from typing import Annotated

import typer
from diffusers.utils import logging as diffusers_logging
from huggingface_hub.errors import HTTPError  # of the library that its version talks with

from ..files.output_folder import OutputFolder
from ..hub.model_card import write_plain_card
from ..hub.push import push_model, push_space
from ..hub.space_folder import write_space
from ..hub.summary import summarize
from ..images.files import MAX_PIXELS, ImageFileError, find_images, open_image
from ..images.pixels import MAX_ASPECT_RATIO
from ..images.sources import find_files
from ..pipeline_diffusionad import DiffusionADPipeline
from .console import USER_ERRORS, fail, needed_packages, output_console
from .options import MaxPixels, TileOverlap, TileSize, chosen_tiling

Model = Annotated[str, typer.Argument(help="Folder of a saved pipeline, or its id on the Hugging Face Hub.")]


def info(model: Model) -> None:
    """Say what a model is.

    Its networks, thresholds, training data, licence and results. Exit code: 0, or 2 for wrong usage.

    \b
    diffusionad info pretrained/hazelnut
    diffusionad info user/model
    """
    try:
        summary = summarize(model)
    except USER_ERRORS as error:
        fail(error)
    console, width = output_console(), max(map(len, summary))
    for title, text in summary.items():
        console.print(f"{title:<{width}}  {text}")


def convert(
    source: Annotated[str, typer.Argument(help="Checkpoint of the authors' code, or a pipeline's folder or Hub id.")],
    target: Annotated[Path, typer.Argument(help="The folder, or the file ending in .pt or .pth, to write.")],
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace what an earlier conversion wrote there.")
    ] = False,
) -> None:
    """Convert the authors' checkpoints, and back.

    Weights stay the same bit for bit. The authors' format holds the paper's networks only, and no thresholds. Exit
    code: 0, or 2 for wrong usage.

    \b
    diffusionad convert params-last.pt models/screw
    diffusionad convert models/screw params-last.pt
    """
    to_file = target.suffix in (".pt", ".pth")
    place = Path(os.path.abspath(target))
    folder = OutputFolder(place.parent, "convert", "name")
    try:
        if os.path.lexists(target) and not overwrite:
            raise ValueError(f"{target} is there already: choose another name, or --overwrite it")
        if to_file == (Path(source).suffix in (".pt", ".pth")):
            raise ValueError(
                f"{source} and {target}: one must be a file ending in .pt or .pth, of the authors' code, the other "
                "a pipeline"
            )
        if to_file:
            DiffusionADPipeline.from_pretrained(source).save_single_file(target)
        else:
            pipe = DiffusionADPipeline.from_single_file(source)

            def write(path: Path) -> None:
                pipe.save_pretrained(path)
                origin = f"It was converted from `{Path(source).name}`, a checkpoint of the authors' code."
                write_plain_card(path, origin, name=place.name)

            if os.path.lexists(place):  # file by file in place of an earlier conversion's
                if not any(name.startswith(f"{place.name}/") for name in folder.record):
                    raise ValueError(f"{target} was not written by diffusionad convert: choose another name")
                with folder.temporary() as temporary:
                    write(temporary)
                    folder.move_in(temporary, place.name, last="model_index.json")
            else:
                folder.write_tree(place.name, write)
    except USER_ERRORS as error:
        fail(error)
    hint = "" if to_file else "; it has no thresholds yet: diffusionad calibrate sets them"
    output_console().print(f"wrote {target}{hint}")


class ExportFormat(StrEnum):
    """What runs the exported file."""

    onnx = "onnx"
    openvino = "openvino"
    torch = "torch"


def export(
    model: Model,
    output: Annotated[Path, typer.Option(help="The file: .onnx, .xml for openvino, .pt2 for torch.")],
    format: Annotated[ExportFormat, typer.Option(help="For ONNX Runtime, OpenVINO or torch.")] = ExportFormat.onnx,
    int8: Annotated[bool, typer.Option("--int8", help="Quantize to 8 bits; needs --calibration.")] = False,
    calibration: Annotated[
        Path | None, typer.Option(help="Folder of good pictures that the ranges for --int8 are taken from.")
    ] = None,
    calibration_count: Annotated[int, typer.Option(min=1, help="How many of them at most.")] = 100,
    tile_size: TileSize = None,
    tile_overlap: TileOverlap = None,
    max_pixels: MaxPixels = MAX_PIXELS,
    license: Annotated[str | None, typer.Option(help="Of the weights. Default: what the model card says.")] = None,
) -> None:
    """Write a model as one file that runs without torch.

    It is the whole detector, from picture to map and score. Thresholds, sizes and licence are in its metadata;
    `diffusionad_pipe.exported.ExportedDetector` runs it. Says how far its map and score are from the pipeline's on one
    picture. Exit code: 0, or 2 for wrong usage.

    With --tile-size the file works at that size. ExportedDetector cuts pictures that are larger in height and width,
    enlarges those that are smaller in both, and refuses others.

    \b
    diffusionad export runs/mine --output detector.onnx
    diffusionad export runs/mine --format openvino --output detector.xml --int8 --calibration good_pictures
    """
    with needed_packages("export"):
        from ..export.detector import to_rgb_uint8
        from ..export.export import export_detector, stated_license
    try:
        if int8 and calibration is None:
            raise ValueError("--int8 needs --calibration: a folder with good pictures, those you trained on will do")
        tiling = chosen_tiling(tile_size, tile_overlap)
        ratio = MAX_ASPECT_RATIO if tiling is None else inf
        images, failures = [], []
        if calibration is not None:
            # Spread over the folder: its first pictures may all be from one day.
            files = find_images(calibration)
            chosen = files[:: -(-len(files) // calibration_count)]
            for file in chosen:
                try:
                    image = open_image(file, max_pixels=max_pixels, max_aspect_ratio=ratio)
                    images.append(to_rgb_uint8(image, max_aspect_ratio=ratio))
                except ImageFileError as error:
                    failures.append(str(error))
            if not images:
                raise ValueError(f"none of {len(chosen)} pictures can be read: {failures[0]}")
        diffusers_logging.disable_progress_bar()
        pipe = DiffusionADPipeline.from_pretrained(model)
        pipe.set_progress_bar_config(disable=True)
        if tiling is not None:
            pipe.enable_tiling(*tiling)
        with needed_packages("export"):  # each format imports its own
            result = export_detector(
                pipe,
                output,
                format.value,
                int8=int8,
                calibration=images,
                license=license or stated_license(model),
                name=Path(model).name,
            )
    except USER_ERRORS as error:
        fail(error)
    for failure in failures:
        output_console().print(f"left out: {failure}", style="yellow")
    output_console().print(
        f"{result.path} ({result.metadata['precision']}); on one picture its map differs from the pipeline's by at "
        f"most {result.map_difference:.2g}, its score by {result.score_difference:.2g}"
    )
    if failures:
        raise typer.Exit(1)


def push(
    model: Annotated[Path, typer.Argument(help="Folder of a saved pipeline.")],
    repository: Annotated[str, typer.Argument(help="Where to: user/model, or a name for your own account.")],
    space: Annotated[
        bool, typer.Option("--space", help="Also make a Space of the same name where everybody can try the model.")
    ] = False,
    private: Annotated[bool, typer.Option("--private", help="Only you can see what is made new.")] = False,
) -> None:
    """Publish a model on the Hugging Face Hub.

    Weights, thresholds, model card, configuration and pictures. Log in with `hf auth login` first. Exit code: 0, 1 if
    the Hub refuses, 2 for wrong usage.

    \b
    diffusionad push runs/mine user/model
    diffusionad push runs/mine user/model --space
    """
    console = output_console()
    try:
        published = push_model(model, repository, private=private)
        console.print(f'published: DiffusionADPipeline.from_pretrained("{published}")')
        if "\nlicense:" not in (model / "README.md").read_text(encoding="utf-8"):
            console.print(f"hint: add a line `license: ...` to the head of {model / 'README.md'}, and push again")
        if space:
            console.print(f"and its Space: {push_space(model, published, published, private=private)}")
    except ValueError as error:
        fail(error)
    except (OSError, HTTPError) as error:  # of the Hub too
        fail(f"{repository} was not published ({_first_line(error)}): log in with hf auth login, and check the name", 1)


def space(
    model: Model,
    output: Annotated[Path, typer.Option(help="The folder to make.")],
    examples: Annotated[
        list[str] | None,
        typer.Option(help="Pictures to try the model on: files, folders or quoted patterns; the first six are taken."),
    ] = None,
    max_pixels: MaxPixels = MAX_PIXELS,
) -> None:
    """Make a web page for a model.

    The folder is a Hugging Face Space. `pip install -r requirements.txt` and `python app.py` start it anywhere. Exit
    code: 0, or 2 for wrong usage.

    \b
    diffusionad space runs/mine --output my_space --examples new_pictures
    """
    try:
        images = [source.place for source in find_files(examples or [])]
        write_space(model, output, examples=images, max_pixels=max_pixels)
    except USER_ERRORS as error:
        fail(error)
    console = output_console()
    console.print(f"start it with: python {output / 'app.py'}")
    if not examples:
        console.print("hint: the page offers hazelnuts to try; give pictures of your own with --examples")


def _first_line(error: object) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
