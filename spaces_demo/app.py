"""A page that shows where pictures are defective, for Hugging Face Spaces or `python spaces_demo/app.py`.

The page is there before the model is: torch and the weights are loaded once it can be seen.
"""

import math
import os
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))  # which Python leaves out where PYTHONSAFEPATH is set
from server_settings import SERVER  # before Gradio, which reads the variables when it is imported

# isort: split
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # gradio reads it when it is imported
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

try:
    from spaces import GPU  # on ZeroGPU only, where it must come before torch
except ImportError:

    def GPU(function):
        return function


import gradio as gr
from batch import MAX_IMAGES, Batch, BatchRow, examine_batch, to_csv
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
from model_menu import load_model, read_defaults, read_menu, read_model_card
from PIL import Image
from server_disk import written_for_visitor

from diffusionad_pipe.freed_memory import keep_freed_memory
from diffusionad_pipe.images.colors import COLOR_SCALE

HERE = Path(__file__).parent
EXAMPLES = sorted(map(str, HERE.glob("examples/*.jpg")))
MAX_UPLOAD_MB = 100  # of one file; a single picture has a limit of its own
MAX_WAITING = 20  # visitors in the queue
MAX_VISITORS = 200  # whose last result is kept in memory, about 4 MB each
MAX_SHOWN_REGIONS = 50
THUMBNAIL_SIDE = 240
KEEP_SECONDS = SERVER.keep_seconds  # pictures and results

try:
    MENU = read_menu((HERE, HERE.parent), os.environ)  # a Space's own folder, or beside spaces_demo in a checkout
    DEFAULT = next(iter(MENU))
    defaults = read_defaults(DEFAULT, MENU[DEFAULT])
    if os.environ.get("SPACES_ZERO_GPU"):  # there a model is moved to the GPU before the page is launched, or each time
        load_model(DEFAULT, MENU[DEFAULT])
except ValueError as error:
    raise SystemExit(str(error)) from error
MODEL_IN_USE = threading.Lock()  # one picture at a time, so that a long batch and single pictures take turns


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
    path = Path(image_input.GRADIO_CACHE, uuid.uuid4().hex, "picture.png")
    with told_to_visitor(), written_for_visitor():
        path.parent.mkdir(parents=True)
        image.save(path, compress_level=1)
    return str(path)


def apply_other_thresholds(detection: Detection | None, image_threshold, pixel_threshold):
    """Judge the last picture by other thresholds, without another run of the model.

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
    folder = Path(files.GRADIO_CACHE)
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
            thumbnail = processing_utils.save_pil_to_cache(heatmap, gallery.GRADIO_CACHE, format="webp")
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
    path = Path(csv_file.GRADIO_CACHE, uuid.uuid4().hex, "results.csv")
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


def delete_old_files() -> None:
    """Delete uploads and results that are older than `KEEP_SECONDS`, again and again.

    Gradio would, but its task ends for ever when a file comes in while it looks (6.31: "Set changed size").
    """
    examples = {file for block in demo.blocks.values() for file in getattr(block, "keep_in_cache", ())}
    while True:
        time.sleep(max(KEEP_SECONDS // 6, 1))
        for files_of_block in demo.temp_file_sets:
            for file in files_of_block.copy() - examples:
                with suppress(OSError):  # what cannot be deleted now is tried again
                    path = Path(file)
                    if not path.exists():
                        files_of_block.discard(file)
                    elif time.time() - path.lstat().st_ctime > KEEP_SECONDS:
                        path.unlink()
                        files_of_block.discard(file)


INTRODUCTION = """# Find the defect
DiffusionAD has seen good parts only: it rebuilds your picture as a good part would look, and marks where the
two really differ."""

# The browser fills in the values of `decide`; style.css draws the result.
VERDICT = """<div class="verdict ${value.verdict.split(' ')[0].toLowerCase()}" role="status">
<h2>${value.verdict}</h2>
<p>${value.explanation}</p>
<div style="--score: ${value.score ?? 0}; --threshold: ${value.threshold ?? -1}"><i></i><b></b></div>
</div>"""

LEGEND = f"""<div class="legend" role="img" aria-label="Colours from dark blue, normal, 0, to light pink, anomalous, 1">
<span>normal 0</span>
<i style="background: linear-gradient(90deg, {", ".join("#" + c for c in COLOR_SCALE.split())})"></i>
<span>1 anomalous</span></div>"""

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

STEP_LABELS = (
    ("Small noise", "A little noise: most of a defect still shows through."),
    ("Large noise", "Much noise: it hides the defect, and the detail with it."),
    ("From small noise", "What the UNet predicts from it in one step: detailed, but it may keep more of the defect."),
    ("From large noise", "The same from much noise: coarser, and the further from the defect the better."),
    ("Guided", "The coarse one corrects the detailed one. The second network compares this with your picture."),
)

BUTTONS = ["fullscreen", "download"]  # and none that shares a picture with another site
ORDERS = ("Highest score first", "Lowest score first", "By name")

NOTHING: tuple[Any, ...] = None, decide(None, 0), None, None, None, []

# At the end Gradio deletes all; until then it is delete_old_files that does.
with gr.Blocks(title="DiffusionAD", delete_cache=(10**9, KEEP_SECONDS)) as demo:
    gr.Markdown(INTRODUCTION)
    detection = gr.State(time_to_live=KEEP_SECONDS)
    batch = gr.State(time_to_live=KEEP_SECONDS)
    model = gr.Dropdown(
        list(MENU), value=DEFAULT, label="Model", info="Each knows one kind of part.", visible=len(MENU) > 1
    )
    with gr.Tabs(overflow_behavior="wrap"):
        with gr.Tab("One picture"):
            # Above all else, so that a phone shows it together with the picture.
            verdict = gr.HTML(
                NOTHING[1], html_template=VERDICT, js_on_load=None, container=True, elem_classes="verdict-box"
            )
            with gr.Row():
                with gr.Column(scale=2, min_width=320):
                    image_input = gr.Image(label="Picture", sources=["upload", "clipboard", "webcam"], height=340)
                    button = gr.Button("Detect", variant="primary")
                    examples = gr.Examples(EXAMPLES, image_input, cache_examples=False)
                    with gr.Accordion("Advanced", open=False):
                        thresholds = [
                            gr.Slider(0, 1, round(value or 0, 4), step=0.0001, label=label, info=explanation)
                            for (label, explanation), value in zip(THRESHOLDS, defaults[:2])
                        ]
                        gr.Markdown("The next press of Detect takes these:")
                        settings = [
                            gr.Slider(low, high, value, step=step, label=label, info=explanation)
                            for (label, explanation, low, high, step), value in zip(SETTINGS, DEFAULT_SETTINGS)
                        ]
                with gr.Column(scale=4, min_width=320):
                    with gr.Row():
                        with gr.Column(min_width=300):
                            heatmap = gr.ImageSlider(label="Picture | heatmap")
                            gr.HTML(LEGEND)
                        with gr.Column(min_width=300):
                            reconstruction = gr.ImageSlider(label="Picture | reconstruction")
                    with gr.Row():
                        with gr.Column(min_width=300):
                            contours = gr.Image(label="Contours of the defects", interactive=False, buttons=BUTTONS)
                        with gr.Column(min_width=300):
                            regions = gr.Dataframe(
                                headers=["no.", "px", "%", "peak", "x, y, w × h"],
                                datatype=["number", "number", "number", "number", "str"],
                                column_widths=["11%", "18%", "14%", "16%", "41%"],
                                label="Defect regions; click on one to frame it",
                                interactive=False,
                                max_height=300,
                                wrap=True,
                                buttons=[],
                                elem_classes="results",
                            )
                            save = gr.Button("Make files to download", size="sm")
                            files = gr.Files(
                                label="Overlay, 16-bit map, numbers", interactive=False, elem_classes="made"
                            )
        with gr.Tab("Many pictures"):
            gr.Markdown(
                f"Up to {MAX_IMAGES} pictures or zip archives of pictures, {MAX_UPLOAD_MB} MB a file. "
                "The model, the thresholds and the settings are those of the first tab."
            )
            uploads = gr.File(label="Pictures or zip archives", file_count="multiple", height=160)
            with gr.Row():
                start = gr.Button("Examine all", variant="primary")
                cancel = gr.Button("Cancel")
            progress = gr.Textbox(label="Progress", value="Nothing to do yet.", interactive=False)
            table = gr.Dataframe(
                headers=["name", "verdict", "score", "regions", "marked, %"],
                datatype=["str", "str", "number", "number", "number"],
                label="Results; click on a column's name to sort",
                interactive=False,
                max_height=400,
                elem_classes="results",
            )
            problems = gr.Dataframe(
                headers=["name", "reason"],
                column_widths=["40%", "60%"],
                label="Not examined",
                interactive=False,
                max_height=300,
                wrap=True,
                elem_classes="results",
            )
            save_table = gr.Button("Make a CSV file of the results", size="sm")
            csv_file = gr.File(label="CSV", interactive=False, elem_classes="made")
            order = gr.Dropdown(ORDERS, value=ORDERS[0], label="Order of the gallery")
            gallery = gr.Gallery(label="Heatmaps", height="auto", buttons=BUTTONS, elem_classes="heatmaps")
        with gr.Tab("How it works") as steps_tab:
            gr.Markdown(
                "What happened to your last picture between the upload and the verdict. A defect is hidden by "
                "noise, and the network, which has learnt what good parts look like, takes the noise away."
            )
            with gr.Row():
                steps = []
                for label, explanation in STEP_LABELS:
                    with gr.Column(min_width=200):
                        steps.append(gr.Image(label=label, interactive=False, buttons=BUTTONS))
                        gr.Markdown(explanation)
        with gr.Tab("Learn"):
            gr.Markdown((HERE / "learn.md").read_text(encoding="utf-8"))
            with gr.Accordion("The model card", open=True):
                card = gr.Markdown(card_of(DEFAULT))

    inputs = [model, *thresholds, *settings]
    results = [detection, verdict, heatmap, reconstruction, contours, regions]
    detecting: dict[str, Any] = {
        "fn": detect,
        "inputs": [image_input, *inputs],
        "outputs": results,
        "preprocess": False,  # Gradio cannot say what is wrong with a file, and saturates 16-bit pictures
        "concurrency_limit": 2,  # one reads and draws while the other's model runs
        "trigger_mode": "always_last",
    }
    # Input is an upload, a snapshot or a removal; an example is none. For `change`, an upload counts twice.
    for event in (
        gr.on([button.click, image_input.input], **detecting, api_name="detect"),
        examples.load_input_event.then(**detecting, api_visibility="private"),
    ):
        # After an error, the verdict on the picture before must not stand beside this one.
        event.failure(lambda: NOTHING, outputs=results, api_visibility="private")
        event.then(lambda: None, outputs=files, api_visibility="private")
    gr.on(
        [threshold.change for threshold in thresholds],
        apply_other_thresholds,
        [detection, *thresholds],
        [verdict, contours, regions],
        api_name="decide",
        show_progress="hidden",
        trigger_mode="always_last",
    )
    regions.select(
        choose_region, [detection, thresholds[1]], contours, api_visibility="private", show_progress="hidden"
    )
    save.click(save_files, [detection, *thresholds], files, api_name="files")
    steps_tab.select(explain, detection, steps, api_name="explain")

    examining = start.click(
        detect_batch,
        [uploads, *inputs],
        [batch, progress, table, gallery, problems],
        preprocess=False,
        concurrency_limit=2,
        show_progress="minimal",
        show_progress_on=progress,
        api_name="batch",
    )
    start.click(lambda: (ORDERS[0], None), outputs=[order, csv_file], api_visibility="private")
    cancel.click(
        lambda text: f"{text} Cancelled; what is done is below.",
        progress,
        progress,
        cancels=examining,
        api_visibility="private",
    )
    order.input(sort_gallery, [batch, order], gallery, api_visibility="private")
    save_table.click(save_csv, batch, csv_file, api_name="batch_csv")

    chosen = model.input(
        choose_model, model, [*thresholds, *settings[:3], card], api_name="choose_model", preprocess=False
    )
    chosen.then(lambda: NOTHING, outputs=results, api_visibility="private")

demo.queue(max_size=MAX_WAITING)
threading.Thread(target=delete_old_files, daemon=True).start()

if __name__ == "__main__":
    keep_freed_memory()
    # Fonts that the visitor's system has: none is downloaded.
    theme = gr.themes.Default(
        primary_hue="indigo", neutral_hue="slate", font=("system-ui", "sans-serif"), font_mono="monospace"
    )
    # Gradio's own are hard to read: text needs a contrast of 4.5 to 1, level AA of WCAG 2.
    theme.set(
        body_text_color_subdued="*neutral_500",
        button_primary_background_fill="*primary_600",
        button_primary_background_fill_hover="*primary_700",
        color_accent="*primary_600",
        link_text_color_dark="*secondary_400",
    )
    try:
        demo.launch(
            # Gradio takes the variable for the first of a hundred ports to try. Who names a port wants that one.
            server_port=SERVER.port,
            theme=theme,
            css_paths=HERE / "style.css",
            head_paths=HERE / "head.html",
            max_file_size=f"{MAX_UPLOAD_MB}mb",
            state_session_capacity=MAX_VISITORS,
            enable_monitoring=False,
            footer_links=["api", "settings"],
            run_history=False,
            prevent_thread_lock=True,
        )
    except OSError as error:
        if "empty port" not in str(error):
            raise
        raise SystemExit(
            f"port {SERVER.port or '7860 to 7959'} is in use: set GRADIO_SERVER_PORT to another one"
        ) from error
    try:
        load_model(DEFAULT, MENU[DEFAULT])  # whoever is quicker waits for this copy
    except ValueError as error:
        raise SystemExit(str(error)) from error
    demo.block_thread()
