"""The commands that show pictures to a model: predict, evaluate, calibrate."""

import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from enum import StrEnum
from functools import partial
from math import inf
from pathlib import Path
from typing import Annotated

import torch
import typer
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from diffusers.utils import logging as diffusers_logging

from ..evaluation.calibration import calibrate as calibrate_pipeline
from ..evaluation.calibration import store_thresholds
from ..files.output_folder import OutputError, OutputFolder, edit_file, require_editable
from ..hub.model_card import describe_thresholds, write_thresholds
from ..images.files import shown
from ..images.pixels import MAX_ASPECT_RATIO
from ..images.sources import ImageSource, find_files, find_rows, watch_folders
from ..pipeline_diffusionad import DiffusionADPipeline
from ..prediction.folder import PredictionFolder, Row, append_share, even_shares
from ..prediction.predict import MapFormat, OutputFiles, fingerprint, predict_images
from ..runtime.acceleration import explained_out_of_memory, fastest_dtype, find_device, join_processes
from ..runtime.batch_failures import TooFewPredictedError
from ..runtime.progress import ProgressBar
from .console import USER_ERRORS, Console, MaxPixels, fail, needed_packages, output_console

HIGHEST_SHOWN_ROWS = 60
STYLES = {"defective": "bold red", "good": "green", None: ""}

Device = Annotated[str | None, typer.Option(help="cpu, cuda, mps, ... Default: a GPU if there is one.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Pictures in one pass of the networks.")]


class Dtype(StrEnum):
    """In which the networks compute; auto is bfloat16 where the device is faster with it, see `fastest_dtype`."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"

    def on(self, device: str | torch.device) -> torch.dtype:
        """torch's own for this device."""
        return fastest_dtype(device) if self is Dtype.auto else getattr(torch, self.value)


NetworksDtype = Annotated[
    Dtype,
    typer.Option(help="Of the networks. Thresholds are set in float32; auto is bfloat16 where that is faster."),
]


class Protocol(StrEnum):
    """How test pictures and masks are prepared, see `measuring.evaluate`."""

    exact = "exact"
    reference = "reference"


class Method(StrEnum):
    """How metrics are computed, see `metrics.evaluate_maps`."""

    exact = "exact"
    streaming = "streaming"


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
    tile_size: Annotated[
        int | None,
        typer.Option(min=1, help="Take larger pictures at their own size, in tiles with this side in pixels."),
    ] = None,
    tile_overlap: Annotated[
        float | None, typer.Option(help="Share of a tile that the next one shares, below 1. Default: 0.25.")
    ] = None,
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
        if tile_overlap is not None and tile_size is None:
            raise ValueError("--tile-overlap is for pictures in tiles: give --tile-size too")
        sources = _find_sources(images or [], dataset, split, image_column, watch)
        pipe = _load(model, device, dtype)
        if tile_size is not None:
            pipe.enable_tiling(tile_size, 0.25 if tile_overlap is None else tile_overlap)
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
        ratio = MAX_ASPECT_RATIO if tile_size is None else inf
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
    batch_size: Annotated[int, typer.Option(min=1, help="Pictures in one pass of the networks.")] = 8,
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


def calibrate(
    model: Annotated[Path, typer.Argument(help="Folder of a saved pipeline.")],
    images: Annotated[list[str], typer.Argument(help="Good pictures: files, folders or quoted patterns.")],
    false_positive_rate: Annotated[
        float, typer.Option(help="Share of good pictures that may be called defective, between 0 and 1.")
    ] = 0.01,
    batch_size: BatchSize = 8,
    device: Device = None,
    max_pixels: MaxPixels = 100_000_000,
) -> None:
    """Set the thresholds of a model from good pictures.

    The model must not have been trained on them. Both thresholds go into the model's folder, and into its card. With n
    pictures a rate of 1 / (n + 1) can be promised: 1 % takes 99 of them; the same picture again counts for nothing.
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
        result = calibrate_pipeline(
            _load(str(model), device),
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
    count = result.image_count
    text = describe_thresholds(
        result.image_threshold, result.pixel_threshold, f"{count} good pictures", count, false_positive_rate
    )
    index = (model / "model_index.json").read_text(encoding="utf-8")
    try:
        store_thresholds(model, result.image_threshold, result.pixel_threshold)
        try:
            write_thresholds(model, text)
        except OutputError:  # a full disk: both say the same, or neither
            edit_file(model / "model_index.json", index)
            raise
        except (FileNotFoundError, ValueError) as error:
            console.print(f"hint: its model card does not say so: {error}", style="yellow")
    except USER_ERRORS as error:
        fail(error, 1)
    console.print(f"{model}: {text}")
    if result.failures:
        raise typer.Exit(1)


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


def _load(model: str, device: str | None, dtype: Dtype = Dtype.float32) -> DiffusionADPipeline:
    place = find_device(device)
    pipe = DiffusionADPipeline.from_pretrained(model, dtype=dtype.on(place))
    with explained_out_of_memory(f"the networks on {place}", "--device cpu"):
        pipe.to(place)
    pipe.set_progress_bar_config(disable=True)
    return pipe


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
