"""The page: what stands where, and which handler answers to what."""

from pathlib import Path
from typing import Any

import gradio as gr
from batch import MAX_IMAGES
from handlers import (
    DEFAULT,
    DEFAULT_SETTINGS,
    MENU,
    NOTHING,
    ORDERS,
    SETTINGS,
    THRESHOLDS,
    apply_other_thresholds,
    card_of,
    choose_model,
    choose_region,
    defaults,
    detect,
    detect_batch,
    explain,
    save_csv,
    save_files,
    sort_gallery,
)
from server_settings import SERVER

from diffusionad_pipe.images.colors import COLOR_SCALE

HERE = Path(__file__).parent
EXAMPLES = sorted(map(str, HERE.glob("examples/*.jpg")))
MAX_UPLOAD_MB = 100  # of one file; a single picture has a limit of its own
KEEP_SECONDS = SERVER.keep_seconds  # pictures and results

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

STEP_LABELS = (
    ("Small noise", "A little noise: most of a defect still shows through."),
    ("Large noise", "Much noise: it hides the defect, and the detail with it."),
    ("From small noise", "What the UNet predicts from it in one step: detailed, but it may keep more of the defect."),
    ("From large noise", "The same from much noise: coarser, and the further from the defect the better."),
    ("Guided", "The coarse one corrects the detailed one. The second network compares this with your picture."),
)

BUTTONS = ["fullscreen", "download"]  # and none that shares a picture with another site

# Gradio deletes all files when it ends, delete_old_files those that are too old before.
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
