"""The command that measures a model on test pictures."""

import os
from contextlib import ExitStack
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from diffusers.utils import logging as diffusers_logging

from ..evaluation.settings import EvaluationSettings
from ..evaluation.too_few_predicted import TooFewPredictedError
from ..files.output_error import OutputError
from ..files.output_folder import OutputFolder
from ..runtime.acceleration import find_device, join_processes
from .console import USER_ERRORS, fail, needed_packages, output_console
from .options import (
    BatchSize,
    Device,
    Dtype,
    MaxPixels,
    NetworksDtype,
    TileOverlap,
    TileSize,
    chosen_tiling,
)


class Protocol(StrEnum):
    """How test pictures and masks are prepared, see `EvaluationSettings`."""

    exact = "exact"
    reference = "reference"


class Method(StrEnum):
    """How metrics are computed, see `metrics.evaluate_maps`."""

    exact = "exact"
    streaming = "streaming"


def evaluate(
    data: Annotated[Path, typer.Option(help="Folder of a dataset, or of one category of it.")],
    model: Annotated[
        str | None,
        typer.Option(
            help="Folder of a saved pipeline, its id on the Hugging Face Hub, or a folder with one for each category. "
            "Without it the metrics are computed anew from the predictions in --output."
        ),
    ] = None,
    output: Annotated[Path, typer.Option(help="Folder for predictions, tables and the report.")] = Path("evaluation"),
    category: Annotated[str | None, typer.Option(help='One category, or "all", where --data holds several.')] = None,
    protocol: Annotated[
        Protocol, typer.Option(help="exact, or reference: resizing, masks, scores and PRO as in the authors' code.")
    ] = Protocol.exact,
    method: Annotated[
        Method, typer.Option(help="exact metrics, or streaming: with bounded errors, in little memory.")
    ] = Method.exact,
    at_model_size: Annotated[
        bool, typer.Option("--at-model-size", help="Compare at the model's size, not at the pictures' own.")
    ] = False,
    num_noise_samples: Annotated[
        int, typer.Option(min=1, help="Noises that a prediction is the mean of: an ensemble.")
    ] = 1,
    batch_size: BatchSize = 8,
    tile_size: TileSize = None,
    tile_overlap: TileOverlap = None,
    dtype: NetworksDtype = Dtype.float32,
    device: Device = None,
    report: Annotated[bool, typer.Option(help="Also write report.html, to look at.")] = True,
    model_card: Annotated[
        bool, typer.Option("--model-card", help="Put the results into the README.md of the model's folder.")
    ] = False,
    max_pixels: MaxPixels = 100_000_000,
) -> None:
    """Measure a model on the test pictures of a dataset.

    Prints a table with each category, and writes it with the score of every picture and a report. Predictions are
    kept by the pictures' contents, so that an interrupted evaluation goes on. `accelerate launch training/evaluate.py`
    takes the same options and shares the work among processes. Exit code: 0, 1 if a picture could not be judged or a
    mask not be used, 2 for wrong usage or if nothing could be judged, which `accelerate launch` turns into 1.

    \b
    diffusionad evaluate --model runs/mine --data datasets/screw
    diffusionad evaluate --model runs --data datasets --category all
    """
    diffusers_logging.disable_progress_bar()
    try:
        join_processes()
        place = find_device(device)
        settings = EvaluationSettings(
            protocol=protocol.value,
            method=method.value,
            at_model_size=at_model_size,
            num_noise_samples=num_noise_samples,
            batch_size=batch_size,
            tiling=chosen_tiling(tile_size, tile_overlap),
            dtype=dtype.on(place),
            device=place,
            max_pixels=max_pixels,
        )
    except USER_ERRORS as error:
        fail(error)
    _evaluate(data, category, model, OutputFolder(output, "evaluate"), settings, report, model_card)


def _evaluate(
    data: Path,
    category: str | None,
    model: str | None,
    folder: OutputFolder,
    settings: EvaluationSettings,
    report: bool,
    model_card: bool,
) -> None:
    """What the command does, once its options are one object."""
    with needed_packages():
        from ..evaluation import evaluate as evaluation
        from ..evaluation import tables
        from ..evaluation.kept_predictions import SETTINGS, name_predictions
        from ..evaluation.report import write_evaluation_report
        from ..evaluation.test_set import load_test_images
        from ..hub import results as cards
    console, title = output_console(), os.path.basename(os.path.abspath(data))
    with ExitStack() as stack:
        try:
            categories = load_test_images(data, category, settings.max_pixels, settings.max_aspect_ratio)
            names = [images.category for images in categories]
            models = None if model is None else evaluation.find_models(model, names)
            if model_card:
                if models is None:
                    raise ValueError("--model-card writes into a model's folder: give --model too")
                cards.require_cards(models)
            files = [*tables.TABLES, *(["report.html"] if report else [])]
            files += [f"{name}/{SETTINGS}" for name in name_predictions(names)]
            stack.enter_context(evaluation.held_by_main(folder, *files))
        except USER_ERRORS as error:
            fail(error)
        try:
            results = evaluation.evaluate_categories(categories, models, folder, settings)
            if not results:  # another process computes the metrics
                return
            described = {"model": model, "data": title, **settings.described()}
            tables.write_tables(results, folder, described)
            if report:
                write_evaluation_report(results, title, folder, described)
            for line in tables.markdown_table(results).splitlines():
                console.print(line)
            if model_card and models is not None:
                cards.write_into_cards(results, models, title, _how(settings))
        except (OutputError, MemoryError) as error:
            fail(error, 1)
        except TooFewPredictedError as error:
            for failure in error.failures:
                console.print(f"not judged: {failure}", style="yellow")
            fail(error)
        except USER_ERRORS as error:
            fail(error)
        except KeyboardInterrupt:
            console.print("interrupted: what was predicted is kept; the same command goes on")
            raise typer.Exit(130) from None
    for result in results:
        if result.rows:
            console.print(f"{result.category}: {tables.cost(result)}")
        for failure in result.failures:
            console.print(f"not judged: {failure}", style="yellow")
        for failure in result.mask_failures:
            console.print(f"not in the pixel metrics: {failure}", style="yellow")
    console.print(f"tables{' and report.html' if report else ''} are in {folder.path}")
    if any(result.failures or result.mask_failures for result in results):
        raise typer.Exit(1)


def _how(settings: EvaluationSettings) -> str:
    """How a model was measured, for its card."""
    at_own_size = not settings.at_model_size and not settings.is_reference
    size = "the pictures' own size" if at_own_size else "the model's size"
    described = settings.described()
    tiles = "" if settings.tiling is None else f", in tiles of {settings.tiling.tile_size} pixels"
    return f"protocol {settings.protocol}, at {size}{tiles}, in {described['dtype']}"
