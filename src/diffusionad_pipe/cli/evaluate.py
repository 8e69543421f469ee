"""The command that measures a model on test pictures."""

import os
from contextlib import ExitStack
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from diffusers.utils import logging as diffusers_logging

from ..files.output_folder import OutputError, OutputFolder
from ..runtime.acceleration import find_device, join_processes
from ..runtime.batch_failures import TooFewPredictedError
from .console import USER_ERRORS, fail, needed_packages, output_console
from .options import BatchSize, Device, Dtype, MaxPixels, NetworksDtype


class Protocol(StrEnum):
    """How test pictures and masks are prepared, see `measuring.evaluate`."""

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
    with needed_packages():
        from ..evaluation import measuring, tables
        from ..evaluation.kept_predictions import SETTINGS, name_predictions
        from ..evaluation.report import write_evaluation_report
        from ..evaluation.test_set import load_test_images
        from ..hub import results as cards
    diffusers_logging.disable_progress_bar()
    console = output_console()
    title = os.path.basename(os.path.abspath(data))
    settings = {
        "model": model, "data": title, "protocol": protocol.value, "method": method.value,
        "at_model_size": at_model_size, "num_noise_samples": num_noise_samples, "batch_size": batch_size,
    }  # fmt: skip
    folder = OutputFolder(output, "evaluate")
    with ExitStack() as stack:
        try:
            join_processes()
            place = find_device(device)
            networks_dtype = dtype.on(place)
            settings["dtype"] = str(networks_dtype).removeprefix("torch.")
            categories = load_test_images(data, category, max_pixels)
            names = [images.category for images in categories]
            models = None if model is None else measuring.find_models(model, names)
            if model_card:
                if models is None:
                    raise ValueError("--model-card writes into a model's folder: give --model too")
                cards.require_cards(models)
            files = [*tables.TABLES, *(["report.html"] if report else [])]
            files += [f"{name}/{SETTINGS}" for name in name_predictions(names)]
            stack.enter_context(measuring.held_by_main(folder, *files))
        except USER_ERRORS as error:
            fail(error)
        try:
            results = measuring.evaluate_categories(
                categories,
                models,
                folder,
                protocol=protocol.value,
                method=method.value,
                at_model_size=at_model_size,
                num_noise_samples=num_noise_samples,
                batch_size=batch_size,
                dtype=networks_dtype,
                device=place,
            )
            if not results:  # another process computes the metrics
                return
            tables.write_tables(results, folder, settings)
            if report:
                write_evaluation_report(results, title, folder, settings)
            for line in tables.markdown_table(results).splitlines():
                console.print(line)
            if model_card and models is not None:
                at_own_size = not at_model_size and protocol is not Protocol.reference
                size = "the pictures' own size" if at_own_size else "the model's size"
                how = f"protocol {protocol.value}, at {size}, in {settings['dtype']}"
                cards.write_into_cards(results, models, title, how)
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
    console.print(f"tables{' and report.html' if report else ''} are in {output}")
    if any(result.failures or result.mask_failures for result in results):
        raise typer.Exit(1)
