"""The command line: `predict` finds defects in pictures, `evaluate` measures a model on test pictures,
`preview-synthesis` shows what a model would be trained on, `check-data` what is wrong with a dataset."""

import csv
import json
import time
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NoReturn

import numpy as np
import typer
from diffusers.utils import logging as diffusers_logging
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from .image_files import IMAGE_SUFFIXES, ImageFileError, find_images, open_image, write_atomically
from .pipeline_diffusionad import DiffusionADPipeline

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
COLUMNS = ("path", "score", "decision", "threshold", "seconds", "error")
HIGHEST_SHOWN_ROWS = 60
MANY_EMPTY_MASKS = 0.1  # share of draws from which on the preview warns
# Training writes its settings with underscores: both spellings are taken, so that they can be copied.
UNDERSCORES = {"token_normalize_func": lambda name: name.replace("_", "-")}


class MapFormat(StrEnum):
    """How anomaly maps are stored: 16-bit PNG (65535 is 1), or float32 NumPy."""

    png16 = "png16"
    npy = "npy"


class Protocol(StrEnum):
    """How test pictures and masks are prepared, see `evaluation.evaluate`."""

    exact = "exact"
    reference = "reference"


class Method(StrEnum):
    """How metrics are computed, see `metrics.evaluate_maps`."""

    exact = "exact"
    streaming = "streaming"


@app.callback()
def main() -> None:
    """DiffusionAD: find defects in pictures with a one-step, norm-guided diffusion model."""


@app.command()
def predict(
    paths: Annotated[list[Path], typer.Argument(help="Pictures, or folders that are searched for pictures.")],
    model: Annotated[str, typer.Option(help="Folder of a saved pipeline, or its id on the Hugging Face Hub.")],
    output: Annotated[Path, typer.Option(help="Folder for overlays, results.csv and results.jsonl.")],
    threshold: Annotated[
        float | None, typer.Option(help="Defective above this score, 0 to 1. Default: the model's own.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Pictures in one pass of the networks.")] = 8,
    maps: Annotated[MapFormat | None, typer.Option(help="Also store the anomaly maps.")] = None,
    panels: Annotated[
        bool, typer.Option("--panels", help="Store picture, reconstruction and heatmap side by side.")
    ] = False,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, mps, ... Default: a GPU if there is one.")] = None,
    max_pixels: Annotated[int, typer.Option(min=1, help="Refuse larger pictures before decoding.")] = 100_000_000,
) -> None:
    """Find defects in pictures.

    Writes one overlay for each picture, and one table with path, score, decision and seconds. A picture that cannot be
    read is reported and skipped. Exit code: 0 if every picture was judged, 1 if one could not be, 2 for wrong usage.
    """
    console = Console()
    diffusers_logging.disable_progress_bar()
    try:
        files = find_images(paths)
        pipe = DiffusionADPipeline.from_pretrained(model)
        if threshold is not None:
            pipe.register_to_config(image_threshold=threshold)
        pipe.to(device or default_device())
        output.mkdir(parents=True, exist_ok=True)
    except (ValueError, OSError, RuntimeError) as error:
        fail(error)
    pipe.set_progress_bar_config(disable=True)

    rows: list[dict[str, Any]] = []
    names = output_names(files)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("predicting", total=len(files))
        try:
            for start in range(0, len(files), batch_size):
                batch = files[start : start + batch_size]
                rows += predict_batch(pipe, batch, names, output, maps, panels, max_pixels)
                progress.update(task, advance=len(batch))
        finally:  # what is done is written, also after Ctrl-C
            if rows:
                write_tables(rows, output)

    print_table(rows, output, console)
    if any(row["error"] for row in rows):
        raise typer.Exit(1)


@app.command(context_settings=UNDERSCORES)
def preview_synthesis(
    pictures_folder: Annotated[Path, typer.Argument(help="Folder of good pictures, or of one category (train/good).")],
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
    validation_fraction: Annotated[
        float, typer.Option(min=0, max=1, help="Share of the pictures that training holds out.")
    ] = 0.15,
    max_unreadable: Annotated[
        float, typer.Option(min=0, max=1, help="Share of unreadable pictures that is put up with.")
    ] = 0.1,
    seed: Annotated[int, typer.Option(min=0, help="The same as in training gives the same samples.")] = 0,
    count: Annotated[int, typer.Option(min=1, help="Samples on the sheet.")] = 8,
    draws: Annotated[int, typer.Option(min=1, help="Samples that empty masks are counted in.")] = 200,
) -> None:
    """Show what a model would be trained on, before any training.

    Writes a contact sheet with the first samples of a run with the same settings: picture, foreground, mask and
    composite, all with an anomaly. Says how many masks are empty: those samples would stay normal. The options and
    their defaults are the settings of training/train.py. Exit code: 0, or 2 for wrong usage.
    """
    try:
        from .preview import preview_synthesis as preview
    except ModuleNotFoundError as error:
        fail(f'{error.name} is not installed, which this command needs: pip install "diffusionad_pipe[train]"')
    try:
        if output.suffix.lower() not in IMAGE_SUFFIXES:
            raise ValueError(f"{output}: the contact sheet is a picture; end its name in .png")
        result = preview(
            str(pictures_folder),
            category=category,
            resolution=resolution,
            resize_to=resize_to,
            max_unreadable=max_unreadable,
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
            seed=seed,
            count=count,
            draws=draws,
        )
        output.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(output, result.sheet.save)
    except (ValueError, OSError, RuntimeError) as error:
        fail(error)

    console = Console(highlight=False, soft_wrap=True)
    console.print(
        f"{result.picture_count} pictures to train on; of {result.draw_count} draws of an anomaly "
        f"{result.empty_share:.1%} have an empty mask; the others cover {result.coverage:.1%} of the area on average"
        if result.empty_share < 1
        else f"{result.picture_count} pictures to train on; all {result.draw_count} draws have an empty mask"
    )
    if result.empty_share > MANY_EMPTY_MASKS:
        console.print(
            "hint: a draw with an empty mask stays a normal picture, so training would see fewer anomalies than asked "
            "for: the foreground is small or missing on many pictures; look at its row, and try another --foreground "
            "(none: everywhere)",
            style="yellow",
        )
    console.print(f"the first {count} are in {output}", markup=False)


@app.command()
def check_data(
    path: Annotated[Path, typer.Argument(help="Folder of one category, or of several.")],
    category: Annotated[str, typer.Option(help="Sub-folder, where the folder holds several; all: every one.")] = "all",
    layout: Annotated[str, typer.Option(help="As load_anomaly_dataset takes it; auto: whichever fits.")] = "auto",
) -> None:
    """Report every problem of a dataset in one pass, and count its pictures.

    Finds missing, stray, empty and odd masks, sizes that differ, the same picture in two splits, unreadable and missing
    files. Exit code: 0 if nothing was found, 1 if there are only warnings, 2 if there are errors or for wrong usage.
    """
    try:
        from .check_data import check_data as check
    except ModuleNotFoundError as error:
        fail(f'{error.name} is not installed, which this command needs: pip install "diffusionad_pipe[train]"')
    try:
        problems = check(path, layout, category)
    except (ValueError, OSError) as error:
        fail(error)
    console = Console(highlight=False, markup=False, soft_wrap=True)
    styles = {"error": "red", "warning": "yellow", "note": ""}
    for problem in problems:
        console.print(f"{problem.severity}: {problem.message}", style=styles[problem.severity])
    errors, warnings = (sum(p.severity == severity for p in problems) for severity in ("error", "warning"))
    console.print(f"errors: {errors}, warnings: {warnings}")
    raise typer.Exit(2 if errors else 1 if warnings else 0)


@app.command(context_settings=UNDERSCORES)
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
    num_noise_samples: Annotated[int, typer.Option(min=1, help="Noises that a prediction is the mean of.")] = 1,
    batch_size: Annotated[int, typer.Option(min=1, help="Pictures in one pass of the networks.")] = 8,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, mps, ... Default: a GPU if there is one.")] = None,
    report: Annotated[bool, typer.Option(help="Also write report.html, to look at.")] = True,
    model_card: Annotated[
        bool, typer.Option("--model-card", help="Put the results into the README.md of the model's folder.")
    ] = False,
) -> None:
    """Measure a model on the test pictures of a dataset.

    Prints a table with each category, and writes it with the score of every picture and a report. Predictions are
    kept, so that an interrupted evaluation goes on. `accelerate launch training/evaluate.py` takes the same options
    and shares the work among processes. Exit code: 0, 1 if a picture could not be read, 2 for wrong usage.
    """
    try:
        from . import evaluation, results_table
        from .evaluation_report import write_evaluation_report
    except ModuleNotFoundError as error:
        fail(f'{error.name} is not installed, which this command needs: pip install "diffusionad_pipe[train]"')
    diffusers_logging.disable_progress_bar()
    console = Console(highlight=False, soft_wrap=True)
    settings = {
        "model": model, "data": data.name, "protocol": protocol.value, "method": method.value,
        "at_model_size": at_model_size, "num_noise_samples": num_noise_samples, "batch_size": batch_size,
    }  # fmt: skip
    try:
        results = evaluation.evaluate(
            model,
            data,
            output,
            category=category,
            protocol=protocol.value,
            method=method.value,
            at_model_size=at_model_size,
            num_noise_samples=num_noise_samples,
            batch_size=batch_size,
            device=device,
        )
        if not results:  # another process computes the metrics
            return
        results_table.write_tables(results, output, settings)
        console.print(results_table.markdown_table(results), markup=False)
        if report:
            write_evaluation_report(results, data, category, output, settings)
        if model_card:
            size = "the model's size" if at_model_size or protocol is Protocol.reference else "the pictures' own size"
            results_table.write_into_cards(results, model, data.name, f"protocol {protocol.value}, at {size}")
    except (ValueError, OSError, RuntimeError) as error:
        fail(error)
    for result in results:
        if result.unmasked:
            console.print(
                f"{result.category}: {result.unmasked} of {len(result.rows)} pictures are defective without a usable "
                "mask: not in the pixel metrics"
            )
        console.print(f"{result.category}: {result.seconds:.3f} s a picture in the pipeline (median)")
        for failure in result.failures:
            console.print(f"not judged: {failure}", style="yellow", markup=False)
    console.print(f"tables{' and report.html' if report else ''} are in {output}", markup=False)
    if any(result.failures for result in results):
        raise typer.Exit(1)


def fail(error: object) -> NoReturn:
    """End with one sentence and exit code 2."""
    # Without a box around it, so that paths stay whole and can be copied.
    Console(stderr=True).print(f"Error: {error}", highlight=False, markup=False, soft_wrap=True)
    raise typer.Exit(2) from None


def default_device() -> str:
    import torch

    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return accelerator.type if accelerator is not None else "cpu"


def output_names(files: list[Path]) -> dict[Path, str]:
    """A name without suffix for each picture's outputs: its stem, after as many of its folders as tell all apart."""
    deepest = max(len(file.parts) for file in files)
    for depth in range(1, deepest + 1):
        names = {file: "_".join(file.with_suffix("").parts[-depth:]).strip("/\\") for file in files}
        if len(set(names.values())) == len(files):
            return names
    # Pictures that differ by their suffix alone keep it.
    return {file: "_".join(file.parts).strip("/\\").replace(".", "_") for file in files}


def predict_batch(
    pipe: DiffusionADPipeline,
    files: list[Path],
    names: dict[Path, str],
    output: Path,
    maps: MapFormat | None,
    panels: bool,
    max_pixels: int,
) -> list[dict[str, Any]]:
    """Judge some pictures and write what belongs to each; one row a picture, in order."""
    threshold = pipe.config.image_threshold
    rows: dict[Path, dict[str, Any]] = {}
    readable: list[tuple[Path, Image.Image]] = []
    started = time.perf_counter()
    for file in files:
        rows[file] = dict.fromkeys(COLUMNS) | {"path": str(file), "threshold": threshold}
        try:
            picture = open_image(file, max_pixels=max_pixels)
            pipe.image_processor.preprocess(picture, 32, 32)  # finds here, by itself, what the pipeline would refuse
            readable.append((file, picture))
        except ImageFileError as error:
            rows[file]["error"] = str(error)
        except ValueError as error:
            rows[file]["error"] = f"{file}: {error}"
    if not readable:
        return list(rows.values())

    result = pipe([picture for _, picture in readable], batch_size=len(readable), output_type="np")
    processor = pipe.image_processor
    for index, (file, picture) in enumerate(readable):
        score = float(result.anomaly_scores[index])
        anomaly_map = np.asarray(result.anomaly_maps[index])[..., 0]  # [h, w]
        mask = None if result.predicted_masks is None else np.asarray(result.predicted_masks[index])[..., 0]
        decision = None if threshold is None else ("defective" if score > threshold else "good")
        rows[file] |= {"score": score, "decision": decision}
        name = names[file]
        try:
            if panels:
                title = f"{file.name}: {decision or 'score'} {score:.3f}"
                drawing = processor.panel(picture, result.reconstructions[index], anomaly_map, mask, title=title)
            else:
                drawing = processor.visualize_anomaly_map(picture, anomaly_map, mask)
            write_atomically(output / f"{name}.png", drawing.save)
            if maps is MapFormat.png16:
                map_16 = Image.fromarray((anomaly_map * 65535).round().astype(np.uint16))
                write_atomically(output / f"{name}_map.png", map_16.save)
            elif maps is MapFormat.npy:
                write_atomically(output / f"{name}_map.npy", partial(np.save, arr=anomaly_map))
        except OSError as error:
            rows[file]["error"] = f"{output / name}: could not be written ({error.strerror}): free some space"
    seconds = (time.perf_counter() - started) / len(readable)
    for file, _ in readable:
        rows[file]["seconds"] = round(seconds, 4)
    return list(rows.values())


def write_tables(rows: list[dict[str, Any]], output: Path) -> None:
    """results.csv and results.jsonl: path, score, decision, threshold, seconds and error."""

    def write_csv(path: Path) -> None:
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(rows)

    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    write_atomically(output / "results.csv", write_csv)
    write_atomically(output / "results.jsonl", lambda path: path.write_text(lines, encoding="utf-8"))


def print_table(rows: list[dict[str, Any]], output: Path, console: Console) -> None:
    """The table a person reads: worst first, errors last."""
    table = Table("picture", "score", "verdict", box=None, pad_edge=False)
    judged = sorted((row for row in rows if row["score"] is not None), key=lambda row: -row["score"])
    styles = {"defective": "bold red", "good": "green", None: ""}
    for row in judged[:HIGHEST_SHOWN_ROWS]:
        table.add_row(
            row["path"], f"{row['score']:.4f}", row["decision"] or "no threshold", style=styles[row["decision"]]
        )
    console.print(table)
    if len(judged) > HIGHEST_SHOWN_ROWS:
        console.print(f"... and {len(judged) - HIGHEST_SHOWN_ROWS} more, in the tables below")
    for row in rows:
        if row["error"]:
            console.print(f"not judged: {row['error']}", style="yellow", highlight=False, soft_wrap=True)
    defective = sum(row["decision"] == "defective" for row in judged)
    failed = sum(row["error"] is not None for row in rows)
    console.print(
        f"{len(judged)} judged, {defective} defective, {failed} with errors; pictures and tables are in {output}",
        highlight=False,
        soft_wrap=True,
    )
