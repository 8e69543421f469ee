"""The command that finds defects in pictures."""

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from math import inf
from pathlib import Path
from typing import Annotated

import typer
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from diffusers.utils import logging as diffusers_logging

from ..files.output_folder import OutputFolder
from ..images.files import shown
from ..images.pixels import MAX_ASPECT_RATIO
from ..images.sources import ImageSource, find_files, find_rows, watch_folders
from ..pipeline_diffusionad import DiffusionADPipeline
from ..prediction.folder import PredictionFolder, Row, append_share, even_shares
from ..prediction.predict import MapFormat, OutputFiles, fingerprint, predict_images
from ..runtime.acceleration import explained_out_of_memory, join_processes
from ..runtime.progress import ProgressBar
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
        for option, value in (("--threshold", threshold), ("--pixel-threshold", pixel_threshold)):
            if value is not None and not 0 <= value <= 1:  # NaN too
                raise ValueError(f"{option} {value:g} must lie between 0 and 1, as scores do")
        tiling = chosen_tiling(tile_size, tile_overlap)
        sources = _find_sources(images or [], dataset, split, image_column, watch)
        pipe = load_pipeline(model, device, dtype)
        if tiling is not None:
            pipe.enable_tiling(*tiling)
        thresholds = {"image_threshold": threshold, "pixel_threshold": pixel_threshold}
        pipe.register_to_config(**{name: value for name, value in thresholds.items() if value is not None})
        if fail_on_defect and pipe.config.image_threshold is None:
            raise ValueError(f"{model} has no threshold to decide by: calibrate it, or give --threshold")
        if masks and pipe.config.pixel_threshold is None:
            raise ValueError(f"{model} has no pixel threshold for masks: calibrate it, or give --pixel-threshold")
        settings = {
            "model": fingerprint(pipe), "threshold": pipe.config.image_threshold,
            "pixel-threshold": pipe.config.pixel_threshold, "panels": panels, "maps": maps, "masks": masks,
            "dtype": str(pipe.unet.dtype).removeprefix("torch."), "tiling": pipe.tiling and list(pipe.tiling),
        }  # fmt: skip
        # Tiles are square, whatever the shape of the whole.
        ratio = MAX_ASPECT_RATIO if tiling is None else inf
        drawings = OutputFiles(panels, maps, masks, max_pixels, ratio)
        folder = OutputFolder(output, "predict")
    except USER_ERRORS as error:
        fail(error)

    results, failure, interrupted = None, None, False
    asked_for: dict[str, None] = {}
    with ExitStack() as stack:
        try:
            if state.is_main_process:
                results = PredictionFolder(stack.enter_context(folder), settings, drawings.endings, overwrite)
        except USER_ERRORS as error:
            fail(error)
        store = results.add if results is not None else partial(append_share, folder, state.process_index)
        rounds: Iterable[list[ImageSource]] = (
            watch_folders([Path(name) for name in images or []]) if watch else [sources]
        )
        try:
            for found in rounds:
                asked_for |= dict.fromkeys(source.name for source in found)
                todo, names = found, {}
                if results is not None:
                    todo = [source for source in found if not results.is_done(source)]
                    names = results.name_outputs(todo)
                if state.num_processes > 1:
                    # All have found the same, but the others may see drawings that are already being written anew.
                    wanted, names = broadcast_object_list([{source.name for source in todo}, names])
                    todo = [source for source in found if source.name in wanted]
                if len(todo) < len(found):
                    console.print(
                        f"{len(found) - len(todo)} of {len(found)} pictures were judged before with this model and "
                        "these settings, and are skipped"
                    )
                if todo:
                    _predict_share(pipe, todo, names, folder, store, drawings, batch_size, console, each=watch)
                if watch and todo and results is not None:
                    results.write_tables(int(parquet))
            state.wait_for_everyone()
            if results is not None:
                results.take_shares()
        except KeyboardInterrupt:
            interrupted = True
        except USER_ERRORS as error:
            failure = error
        if results is not None:  # what is done is written, whatever happened
            results.order(asked_for)
            try:
                results.write_tables(state.num_processes if parquet else 0)
            except OSError as error:
                failure = failure or error
    if failure is not None:
        fail(failure, 1)
    if results is None:
        raise typer.Exit(130 if interrupted else 0)
    rows = [results.rows[name] for name in asked_for if name in results.rows]
    _print_table(rows, output, console)
    if interrupted and not watch:
        console.print(f"interrupted: {len(rows)} of {len(asked_for)} pictures are done; the same command goes on")
        raise typer.Exit(130)
    if not rows or any(row["error"] for row in rows):
        raise typer.Exit(1)
    if fail_on_defect and any(row["decision"] == "defective" for row in rows):
        raise typer.Exit(3)


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


def _predict_share(
    pipe: DiffusionADPipeline,
    sources: Sequence[ImageSource],
    names: Mapping[str, str],
    folder: OutputFolder,
    store: Callable[[Sequence[Row]], None],
    drawings: OutputFiles,
    batch_size: int,
    console: Console,
    each: bool,
) -> None:
    """Judge this process's share of the pictures batch by batch; with `each` a line is printed for every one.

    Batches are the same for any number of processes, since in batches of other sizes the last bits of scores differ.
    """
    state = PartialState()
    starts = range(0, len(sources), batch_size)
    share = even_shares(len(starts), state.num_processes)[state.process_index]
    total = min(len(share) * batch_size, len(sources))
    with ProgressBar(total, "predicting", "picture", shown=state.is_main_process and not each) as bar:
        for start in starts[share.start : share.stop]:
            batch = sources[start : start + batch_size]
            with explained_out_of_memory(f"--batch-size {batch_size}", "a lower one; what was judged is kept"):
                rows = predict_images(pipe, batch, names, folder, drawings, batch_size)
            store(rows)
            bar.update(len(batch))
            for row in rows if each else ():
                verdict = (
                    row["error"] or f"{shown(row['path'])}: {row['score']:.4f} {row['decision'] or 'no threshold'}"
                )
                console.print(verdict, style="yellow" if row["error"] else STYLES[row["decision"]])


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
