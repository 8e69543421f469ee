"""What happens when a visitor does something on the page, or calls the API."""

import math
import os
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

try:
    from spaces import GPU  # on ZeroGPU only, where it must come before torch
except ImportError:

    def GPU(function):
        return function


import gradio as gr
from batch import Batch, BatchRow, examine_batch, to_csv
from detection import (
    MAX_NOISE_SAMPLES,
    Detection,
    Settings,
    apply_thresholds,
    decide,
    draw_heatmap,
    run_model,
    write_files,
)
from gradio import processing_utils
from gradio.utils import get_upload_folder  # where Gradio serves files from, and deletes them
from model_menu import load_model, read_defaults, read_menu, read_model_card
from PIL import Image
from server_disk import written_for_visitor

HERE = Path(__file__).parent
MAX_SHOWN_REGIONS = 50
THUMBNAIL_SIDE = 240

try:
    MENU = read_menu((HERE, HERE.parent), os.environ)  # a Space's own folder, or beside spaces_demo in a checkout
    DEFAULT = next(iter(MENU))
    defaults = read_defaults(DEFAULT, MENU[DEFAULT])
    if os.environ.get("SPACES_ZERO_GPU"):  # there a model is moved to the GPU before the page is launched, or each time
        load_model(DEFAULT, MENU[DEFAULT])
except ValueError as error:
    raise SystemExit(str(error)) from error
MODEL_IN_USE = threading.Lock()  # one picture at a time, so that a long batch and single pictures take turns


THRESHOLDS = (
    ("Decision threshold", "A picture is defective when its score is above; 0 makes no decision."),
    ("Mask threshold", "Pixels of the heatmap above it are marked; 0 marks none."),
)
last = defaults.num_train_timesteps - 1
SETTINGS: tuple[tuple[str, str, float, float, float], ...] = (  # label, explanation, minimum, maximum, step
    ("Small noise scale", "Keeps details; more hides more of a defect.", 0, last, 1),
    ("Large noise scale", "Hides defects wholly; above the small one.", 0, last, 1),
    ("Guidance weight", "How much the large scale corrects the small.", 0, 5, 0.1),
    ("Noise samples", "Averages over this many: steadier, but slower.", 1, MAX_NOISE_SAMPLES, 1),
)
DEFAULT_SETTINGS = (defaults.small_timestep, defaults.large_timestep, defaults.guidance_scale, 1)

ORDERS = ("Highest score first", "Lowest score first", "By name")

NOTHING: tuple[Any, ...] = None, decide(None, 0), None, None, None, []


def get_model(name: str):
    """The pipeline of that name.

    Raises:
        gr.Error: when it is not in the menu or cannot be loaded.
    """
    if name not in MENU:
        raise sentence(f"{name} is not among the models here; choose one of {', '.join(MENU)}")
    with told_to_visitor():
        return load_model(name, MENU[name])


def sentence(error: object) -> gr.Error:
    """What went wrong, for the visitor; the log needs no traceback of it."""
    return gr.Error(str(error), print_exception=False)


@contextmanager
def told_to_visitor() -> Iterator[None]:
    """Where a ValueError is one sentence for the visitor."""
    try:
        yield
    except ValueError as error:
        raise sentence(error) from error


async def refuse_address(url: str) -> None:
    """In place of Gradio's download of a picture that a caller of the API gives by its address: that has no limit."""
    raise sentence("an address cannot be examined here; upload the picture itself")


processing_utils.async_ssrf_protected_get = refuse_address


def read_settings(image_threshold: Any, pixel_threshold: Any, *settings: Any) -> tuple[float, float, Settings]:
    """Numbers from the page, or from anyone who calls the API.

    Raises:
        gr.Error: for anything that is not a number in its range.
    """
    # The pipeline checks the noise scales: how many there are depends on the model.
    ranges = ((0, 1), (0, 1), (-math.inf, math.inf), (-math.inf, math.inf), (0, 5), (1, math.inf))
    labels = [label for label, *_ in (*THRESHOLDS, *SETTINGS)]
    for label, value, (low, high) in zip(labels, (image_threshold, pixel_threshold, *settings), ranges):
        if not isinstance(value, int | float) or not math.isfinite(value) or not low <= value <= high:
            raise sentence(f"{label}: {value!r} cannot be used; give a number from {low} to {high}")
    small, large, guidance, samples = settings
    checked = Settings(int(small), int(large), float(guidance), int(samples))
    return float(image_threshold), float(pixel_threshold), checked


@GPU
def examine(model: str, path: str, name: str, settings: Settings) -> Detection:
    """Run a model of the menu on a picture file, see `detection.run_model`."""
    pipe = get_model(model)
    with MODEL_IN_USE:
        return run_model(pipe, model, path, name, settings)


def detect(image, model, image_threshold, pixel_threshold, *settings):
    """Find the defects in a picture.

    Args:
        image: a PNG, JPEG, WebP, TIFF or BMP file of at most 20 MB and 24 megapixels.
        model: a name from the menu.
        image_threshold: the picture is defective when its score is above; 0 makes no decision.
        pixel_threshold: pixels above are marked; 0 marks none.
        settings: see `detection.Settings`.

    Returns:
        The detection, a dictionary of verdict, explanation, score and threshold; picture and heatmap; picture and
        reconstruction; the picture with the defects' contours; their table.
    """
    if image is None:
        return NOTHING
    image_threshold, pixel_threshold, settings = read_settings(image_threshold, pixel_threshold, *settings)
    pipe = get_model(model)
    with told_to_visitor():
        detection = examine(model, image["path"], image.get("orig_name") or "picture", settings)
    verdict, regions, contours = apply_thresholds(pipe, detection, image_threshold, pixel_threshold)
    shown, heatmap = write_png(detection.shown), write_png(draw_heatmap(pipe, detection))
    sliders = (shown, heatmap), (shown, write_png(detection.reconstruction))
    return detection, verdict, *sliders, write_png(contours), tabulate(regions, detection)


def write_png(image: Image.Image | None) -> str | None:
    """Write a picture for the page, where Gradio serves and deletes it, and return its path.

    Gradio would compress it at PNG's usual level, for a tenth fewer bytes: most of an answer's time went there.
    """
    if image is None:
        return None
    path = Path(get_upload_folder(), uuid.uuid4().hex, "picture.png")
    with told_to_visitor(), written_for_visitor():
        path.parent.mkdir(parents=True)
        image.save(path, compress_level=1)
    return str(path)


def apply_other_thresholds(detection: Detection | None, image_threshold, pixel_threshold):
    """Compare the last picture with other thresholds, without another run of the model.

    Args:
        detection: the visitor's last one.
        image_threshold: see [`detect`].
        pixel_threshold: see [`detect`].

    Returns:
        The verdict, the picture with the contours, and the table of the regions.
    """
    image_threshold, pixel_threshold, _ = read_settings(image_threshold, pixel_threshold, *DEFAULT_SETTINGS)
    if detection is None:
        return decide(None, image_threshold), None, []
    verdict, regions, contours = apply_thresholds(
        get_model(detection.model), detection, image_threshold, pixel_threshold
    )
    return verdict, write_png(contours), tabulate(regions, detection)


def tabulate(regions, detection: Detection) -> list[list[Any]]:
    """Rows of number, area in pixels and in percent, peak, and box."""
    pixels = detection.size[0] * detection.size[1]
    rows = []
    for number, (area, peak, (left, top, right, bottom)) in enumerate(regions[:MAX_SHOWN_REGIONS], 1):
        box = f"{left}, {top}, {right - left} × {bottom - top}"
        rows.append([number, area, round(100 * area / pixels, 2), round(peak, 3), box])
    return rows


def choose_region(detection: Detection | None, pixel_threshold, event: gr.SelectData):
    """Frame the region of the table's row that was clicked."""
    if detection is None:
        return None
    framed = apply_thresholds(get_model(detection.model), detection, 0, pixel_threshold, int(event.row_value[0]))
    return write_png(framed.image)


def explain(detection: Detection | None):
    """The five pictures between the last picture and its reconstruction: at both noise scales, the predictions from
    both, and the guided one."""
    return [None] * 5 if detection is None else [write_png(step) for step in detection.steps]


def save_files(detection: Detection | None, image_threshold, pixel_threshold) -> list[str]:
    """Write overlay (PNG), anomaly map (16-bit PNG) and numbers (JSON) of the last picture, at its own size."""
    image_threshold, pixel_threshold, _ = read_settings(image_threshold, pixel_threshold, *DEFAULT_SETTINGS)
    if detection is None:
        raise sentence("there is no result yet; choose a picture first")
    folder = Path(get_upload_folder())
    with told_to_visitor():
        return write_files(get_model(detection.model), detection, image_threshold, pixel_threshold, folder)


def detect_batch(uploads, model, image_threshold, pixel_threshold, *settings):
    """Examine many pictures, one after another.

    Args:
        uploads: pictures and zip archives of pictures.
        model: see [`detect`], as all that follow.

    Yields:
        The batch; how far it is; the table of results; the gallery; the table of what could not be examined.
    """
    if not uploads:
        raise sentence("there are no pictures; choose some, or a zip archive of them")
    image_threshold, pixel_threshold, settings = read_settings(image_threshold, pixel_threshold, *settings)
    pipe = get_model(model)

    def examine_one(path: str, name: str) -> BatchRow:
        detection = examine(model, path, name, settings)
        verdict, regions, _ = apply_thresholds(pipe, detection, image_threshold, pixel_threshold)
        heatmap = draw_heatmap(pipe, detection)
        heatmap.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
        marked = 100 * sum(region.area for region in regions) / (detection.size[0] * detection.size[1])
        with written_for_visitor():
            thumbnail = processing_utils.save_pil_to_cache(heatmap, get_upload_folder(), format="webp")
        score, threshold = verdict["score"], verdict["threshold"]
        return BatchRow(name, verdict["verdict"], score, threshold, len(regions), round(marked, 3), thumbnail)

    named = [(upload["path"], upload.get("orig_name") or Path(upload["path"]).name) for upload in uploads]
    for batch in examine_batch(named, examine_one):
        done = len(batch.rows) + len(batch.problems)
        defective = sum(row.verdict == "Defective" for row in batch.rows)
        told = f"{done} of {batch.total} done: {len(batch.rows)} examined, {defective} of them defective"
        told += f", {len(batch.problems)} not examined." if batch.problems else "."
        told += f" {batch.stopped.capitalize()}." if batch.stopped else ""
        yield batch, told, tabulate_batch(batch), sort_gallery(batch, ORDERS[0]), list(map(list, batch.problems))


def tabulate_batch(batch: Batch) -> list[list[Any]]:
    """Rows of name, verdict, score, number of regions and percentage of pixels marked."""
    return [[r.name, r.verdict, round(r.score, 4), r.regions, round(r.marked_percent, 2)] for r in batch.rows]


def sort_gallery(batch: Batch | None, order: str) -> list[tuple[str, str]]:
    """The pictures of a batch with captions, in one of `ORDERS`."""
    rows = batch.rows if batch else []
    if order == ORDERS[2]:
        rows = sorted(rows, key=lambda row: row.name)
    else:
        rows = sorted(rows, key=lambda row: row.score, reverse=order == ORDERS[0])
    return [(row.thumbnail, f"{row.verdict}, {row.score:.3f}: {row.name}") for row in rows]


def save_csv(batch: Batch | None) -> str:
    """Write the last batch as CSV with the columns of `batch.COLUMNS`."""
    if batch is None:
        raise sentence("there is no batch yet; examine some pictures first")
    path = Path(get_upload_folder(), uuid.uuid4().hex, "results.csv")
    with told_to_visitor(), written_for_visitor():
        path.parent.mkdir(parents=True)
        path.write_text(to_csv(batch), encoding="utf-8")
    return str(path)


def choose_model(model: str):
    """Load another model of the menu.

    Returns:
        Its thresholds and settings for the controls, and its model card.
    """
    pipe = get_model(model)
    config, scheduler = pipe.config, pipe.scheduler.config
    last = len(pipe.scheduler) - 1
    return (
        round(config.image_threshold or 0, 4),
        round(config.pixel_threshold or 0, 4),
        gr.update(value=scheduler.small_timestep, maximum=last),
        gr.update(value=scheduler.large_timestep, maximum=last),
        scheduler.guidance_scale,
        card_of(model),
    )


def card_of(model: str) -> str:
    return read_model_card(MENU[model]) or f"The model {model} has no model card."
