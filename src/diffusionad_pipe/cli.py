"""The command line: `diffusionad predict` finds defects in pictures."""

import csv
import json
import time
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from diffusers.utils import logging as diffusers_logging
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from .image_files import ImageFileError, find_images, open_image, write_atomically
from .pipeline_diffusionad import DiffusionADPipeline

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
COLUMNS = ("path", "score", "decision", "threshold", "seconds", "error")
HIGHEST_SHOWN_ROWS = 60


class MapFormat(StrEnum):
    """How anomaly maps are stored: 16-bit PNG (65535 is 1), or float32 NumPy."""

    png16 = "png16"
    npy = "npy"


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
        # Without a box around it, so that paths stay whole and can be copied.
        Console(stderr=True).print(f"Error: {error}", highlight=False, markup=False, soft_wrap=True)
        raise typer.Exit(2) from None
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
