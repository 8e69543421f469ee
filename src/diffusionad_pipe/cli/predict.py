"""The command that finds defects in pictures."""

import sys
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, NamedTuple

import typer
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from diffusers.utils import logging as diffusers_logging

from ..files.output_folder import OutputFolder
from ..images.files import shown
from ..images.sources import ImageSource, find_files, find_rows, watch_folders
from ..prediction.folder import PredictionFolder, Row
from ..prediction.rounds import PredictionRun
from ..prediction.settings import MapFormat, PredictionSettings
from ..runtime.acceleration import join_processes
from .console import USER_ERRORS, Console, fail, needed_packages, output_console
from .options import (
    BatchSize,
    Device,
    Dtype,
    MaxPixels,
    NetworksDtype,
    TileOverlap,
    TileSize,
    chosen_tiling,
    load_pipeline,
)

HIGHEST_SHOWN_ROWS = 60
STYLES = {"defective": "bold red", "good": "green", None: ""}


def predict(
    model: Annotated[str, typer.Option(help="Folder of a saved pipeline, or its id on the Hugging Face Hub.")],
    output: Annotated[Path, typer.Option(help="Folder for drawings, results.csv and results.jsonl.")],
    images: Annotated[
        list[str] | None,
        typer.Argument(
            help='Files, folders, quoted patterns such as "line_3/*.png", or - for paths on standard input.'
        ),
    ] = None,
    dataset: Annotated[
        str | None, typer.Option(help="Instead of pictures: a dataset's Hub id, a Parquet file, or a folder of them.")
    ] = None,
    split: Annotated[str | None, typer.Option(help="Of the dataset. Default: test, or the only one.")] = None,
    image_column: Annotated[str, typer.Option(help="Of the dataset.")] = "image",
    threshold: Annotated[
        float | None, typer.Option(help="Defective above this score, 0 to 1. Default: the model's own.")
    ] = None,
    pixel_threshold: Annotated[
        float | None, typer.Option(help="The same for a pixel: for contours and masks. Default: the model's own.")
    ] = None,
    batch_size: BatchSize = 8,
    panels: Annotated[
        bool, typer.Option("--panels", help="Draw picture, reconstruction and heatmap side by side.")
    ] = False,
    maps: Annotated[MapFormat | None, typer.Option(help="Also store the anomaly maps.")] = None,
    masks: Annotated[bool, typer.Option("--masks", help="Also store which pixels are defective.")] = False,
    parquet: Annotated[bool, typer.Option("--parquet", help="Write the table as results.parquet too.")] = False,
    watch: Annotated[
        bool, typer.Option("--watch", help="Then wait for new pictures in the folders; Ctrl-C ends.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Forget results of other settings in --output.")
    ] = False,
    fail_on_defect: Annotated[
        bool, typer.Option("--fail-on-defect", help="Exit code 3 when a picture is defective.")
    ] = False,
    tile_size: TileSize = None,
    tile_overlap: TileOverlap = None,
    dtype: NetworksDtype = Dtype.float32,
    device: Device = None,
    max_pixels: MaxPixels = 100_000_000,
) -> None:
    """Find defects in pictures.

    Writes a drawing for each picture, and one table. A picture that cannot be read is reported and skipped. The same
    command again goes on after an interruption: pictures whose content was judged with this model and these settings
    are skipped, and so is what diffusionad drew itself. Only files that the command wrote itself are overwritten.

    `accelerate launch --module diffusionad_pipe.cli predict` takes the same options and shares the pictures among
    processes and machines, which must see the same folders. The table is the same; --parquet writes one file each.

    Exit code: 0 if every picture was judged, 1 if one could not be, 2 for wrong usage, 3 with --fail-on-defect if all
    were judged and one is defective, 130 after Ctrl-C. `accelerate launch` itself ends with 0 or 1: it turns every
    other code into 1, and prints it as `exitcode`.

    \b
    diffusionad predict photo.jpg pictures --model runs/mine --output results --panels
    find . -name "*.png" -newer mark | diffusionad predict - --model runs/mine --output results
    diffusionad predict --dataset user/pictures --split test --model runs/mine --output results --parquet
    diffusionad predict incoming --watch --model runs/mine --output results
    accelerate launch -m diffusionad_pipe.cli predict pictures --model runs/mine --output results --parquet
    """
    console = output_console()
    diffusers_logging.disable_progress_bar()
    try:
        state = join_processes()
        console.quiet = not state.is_main_process
        if watch and state.num_processes > 1:
            raise ValueError("--watch is for one process: start it without accelerate launch")
        settings = PredictionSettings(
            image_threshold=threshold,
            pixel_threshold=pixel_threshold,
            batch_size=batch_size,
            panels=panels,
            maps=maps,
            masks=masks,
            parquet=parquet,
            tiling=chosen_tiling(tile_size, tile_overlap),
            max_pixels=max_pixels,
        )
        sources = _find_sources(images or [], dataset, split, image_column, watch)
        pipe = load_pipeline(model, device, dtype)
        settings.apply_to(pipe, model)
        if fail_on_defect and pipe.config.image_threshold is None:
            raise ValueError(f"{model} has no threshold to decide by: calibrate it, or give --threshold")
        folder = OutputFolder(output, "predict")
        with ExitStack() as stack:
            results = None
            if state.is_main_process:
                kept_with = settings.kept_with(pipe)
                results = PredictionFolder(stack.enter_context(folder), kept_with, settings.endings, overwrite)
            run = PredictionRun(pipe, settings, folder, results)
            rounds = watch_folders([Path(name) for name in images or []]) if watch else [sources]
            ended = _predict(run, rounds, console, each=watch)
    except USER_ERRORS as error:
        fail(error)
    if ended.failure is not None:
        fail(ended.failure, 1)
    if ended.rows is None:  # another process has the table
        raise typer.Exit(130 if ended.interrupted else 0)
    _print_table(ended.rows, output, console)
    if ended.interrupted and not watch:
        console.print(
            f"interrupted: {len(ended.rows)} of {ended.asked_for} pictures are done; the same command goes on"
        )
        raise typer.Exit(130)
    if not ended.rows or any(row["error"] for row in ended.rows):
        raise typer.Exit(1)
    if fail_on_defect and any(row["decision"] == "defective" for row in ended.rows):
        raise typer.Exit(3)


class Ended(NamedTuple):
    """How a run of predictions ended.

    Args:
        asked_for: number of the pictures that were found.
        rows: of those of them that are done; None in a process that has no table.
        failure: what ended it before its time.
        interrupted: whether that was Ctrl-C.
    """

    asked_for: int
    rows: list[Row] | None
    failure: Exception | None
    interrupted: bool


def _predict(run: PredictionRun, rounds: Iterable[Sequence[ImageSource]], console: Console, each: bool) -> Ended:
    """Predict, and write the tables of what is done, whatever happens meanwhile."""
    asked_for: dict[str, None] = {}

    def begun(found: Sequence[ImageSource], todo: Sequence[ImageSource]) -> None:
        asked_for.update(dict.fromkeys(source.name for source in found))
        if len(todo) < len(found):
            console.print(
                f"{len(found) - len(todo)} of {len(found)} pictures were judged before with this model and these "
                "settings, and are skipped"
            )

    def done(row: Row) -> None:
        verdict = row["error"] or f"{shown(row['path'])}: {row['score']:.4f} {row['decision'] or 'no threshold'}"
        console.print(verdict, style="yellow" if row["error"] else STYLES[row["decision"]])

    failure: Exception | None = None
    interrupted = False
    try:
        run.predict_rounds(rounds, begun, done if each else None)
    except KeyboardInterrupt:
        interrupted = True
    except USER_ERRORS as error:
        failure = error
    if run.results is None:
        return Ended(len(asked_for), None, failure, interrupted)
    run.results.order(asked_for)
    try:
        run.results.write_tables(PartialState().num_processes if run.settings.parquet else 0)
    except OSError as error:
        failure = failure or error
    rows = [run.results.rows[name] for name in asked_for if name in run.results.rows]
    return Ended(len(asked_for), rows, failure, interrupted)


def _find_sources(
    images: Sequence[str], dataset: str | None, split: str | None, image_column: str, watch: bool
) -> list[ImageSource]:
    if bool(images) == bool(dataset):
        raise ValueError("give pictures, or --dataset: one of them")
    if watch:
        others = [name for name in images if not Path(name).is_dir()]
        if others or dataset:
            raise ValueError(f"--watch takes folders: {dataset or others[0]} is none")
        return []
    if dataset:
        with needed_packages(), PartialState().main_process_first():  # which downloads it, if need be
            return find_rows(dataset, split, image_column)
    found: list[ImageSource] = []
    if PartialState().is_main_process:  # which alone has the standard input; and a folder may change meanwhile
        found = find_files(images, None if sys.stdin is None else sys.stdin.buffer)
    return broadcast_object_list([found])[0]


def _print_table(rows: Sequence[Row], output: Path, console: Console) -> None:
    """The table a person reads: worst first, errors last."""
    predicted = sorted((row for row in rows if row["score"] is not None), key=lambda row: -row["score"])
    for row in predicted[:HIGHEST_SHOWN_ROWS]:
        verdict = row["decision"] or "no threshold"
        console.print(f"{row['score']:.4f}  {verdict:<12}  {shown(row['path'])}", style=STYLES[row["decision"]])
    if len(predicted) > HIGHEST_SHOWN_ROWS:
        console.print(f"... and {len(predicted) - HIGHEST_SHOWN_ROWS} more, in the tables below")
    for row in rows:
        if row["error"]:
            console.print(f"not judged: {row['error']}", style="yellow")
    defective = sum(row["decision"] == "defective" for row in predicted)
    failed = sum(row["error"] is not None for row in rows)
    console.print(
        f"{len(predicted)} judged, {defective} defective, {failed} with errors; drawings and tables are in {output}"
    )
