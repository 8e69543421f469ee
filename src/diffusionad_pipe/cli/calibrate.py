"""The command that sets the thresholds of a model."""

from pathlib import Path
from typing import Annotated

import typer
from diffusers.utils import logging as diffusers_logging

from ..evaluation.calibration import calibrate as calibrate_pipeline
from ..evaluation.calibration import store_thresholds
from ..evaluation.too_few_predicted import TooFewPredictedError
from ..files.output_error import OutputError
from ..files.single_files import edit_file, require_editable
from ..hub.model_card import describe_thresholds, write_thresholds
from ..images.sources import find_files
from .console import USER_ERRORS, Console, fail, output_console
from .options import BatchSize, Device, MaxPixels, TileOverlap, TileSize, chosen_tiling, load_pipeline


def calibrate(
    model: Annotated[Path, typer.Argument(help="Folder of a saved pipeline.")],
    images: Annotated[list[str], typer.Argument(help="Good pictures: files, folders or quoted patterns.")],
    false_positive_rate: Annotated[
        float, typer.Option(help="Share of good pictures that may be called defective, between 0 and 1.")
    ] = 0.01,
    batch_size: BatchSize = 8,
    tile_size: TileSize = None,
    tile_overlap: TileOverlap = None,
    device: Device = None,
    max_pixels: MaxPixels = 100_000_000,
) -> None:
    """Set the thresholds of a model from good pictures.

    The model must not have been trained on them. Both thresholds go into the model's folder, and into its card. With n
    pictures a rate of 1 / (n + 1) can be promised: 1 % takes 99 of them; the same picture again counts for nothing.
    With --tile-size the thresholds come from whole pictures in tiles, at the size that was cut, and hold for such: they
    are for predictions with the same tiles, as the card then says, and nothing checks it.

    Exit code: 0, 1 if a picture could not be judged, 2 for wrong usage or too few pictures.

    \b
    diffusionad calibrate runs/mine more_good_pictures --false-positive-rate 0.02
    """
    console = output_console()
    diffusers_logging.disable_progress_bar()
    try:
        if not 0 < false_positive_rate < 1:
            raise ValueError(f"--false-positive-rate {false_positive_rate:g} must lie between 0 and 1, such as 0.01")
        if not model.is_dir():
            raise ValueError(f"{model} is no folder: give that of a pipeline, into which the thresholds are written")
        require_editable(model / "model_index.json")
        tiling = chosen_tiling(tile_size, tile_overlap)
        pipe = load_pipeline(str(model), device)
        if tiling is not None:
            pipe.enable_tiling(*tiling)
        result = calibrate_pipeline(
            pipe,
            find_files(images),
            batch_size=batch_size,
            false_positive_rate=false_positive_rate,
            max_pixels=max_pixels,
        )
    except TooFewPredictedError as error:
        for sentence in error.failures:
            console.print(f"left out: {sentence}", style="yellow")
        fail(error)
    except USER_ERRORS as error:
        fail(error)
    for sentence in [*result.failures, *result.duplicates]:
        console.print(f"left out: {sentence}", style="yellow")
    origin = f"{result.image_count} good pictures"
    if pipe.tiling is not None:
        origin += f" in tiles of {pipe.tiling.tile_size} pixels that share {pipe.tiling.overlap:g}"
    thresholds = result.image_threshold, result.pixel_threshold
    text = describe_thresholds(*thresholds, origin, result.image_count, false_positive_rate)
    try:
        _store(model, *thresholds, text, console)
    except USER_ERRORS as error:
        fail(error, 1)
    console.print(f"{model}: {text}")
    if result.failures:
        raise typer.Exit(1)


def _store(model: Path, image_threshold: float, pixel_threshold: float, text: str, console: Console) -> None:
    """Write the thresholds into the model's folder, and what they are into its card: both, or neither."""
    index = (model / "model_index.json").read_text(encoding="utf-8")
    store_thresholds(model, image_threshold, pixel_threshold)
    try:
        write_thresholds(model, text)
    except OutputError:  # a full disk
        edit_file(model / "model_index.json", index)
        raise
    except (FileNotFoundError, ValueError) as error:
        console.print(f"hint: its model card does not say so: {error}", style="yellow")
