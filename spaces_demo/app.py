"""A page that shows where a picture is defective, for Hugging Face Spaces or `python spaces_demo/app.py`."""

import os
from pathlib import Path
from typing import Any

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # gradio reads it when it is imported

try:
    from spaces import GPU  # on ZeroGPU only, where it must come before torch
except ImportError:

    def GPU(function):
        return function


import gradio as gr
import torch

from diffusionad_pipe import DiffusionADPipeline, open_image
from diffusionad_pipe.image_processor import COLOUR_SCALE

HERE = Path(__file__).parent
EXAMPLES = sorted(map(str, HERE.glob("examples/*.jpg")))
MAX_PIXELS = 24_000_000  # a phone's picture fits
MAX_SHOWN_SIDE = 768
MAX_NOISE_SAMPLES = 8

# Inside a Space's own folder, or beside spaces_demo in a checkout.
FOLDERS = [parent / "pretrained" / "hazelnut" for parent in (HERE, HERE.parent)]
MODEL = os.environ.get("DIFFUSIONAD_MODEL") or next((f for f in FOLDERS if f.is_dir()), None)
if MODEL is None:
    raise SystemExit("there is no model: set DIFFUSIONAD_MODEL to the folder or the Hub id of one")
pipe = DiffusionADPipeline.from_pretrained(MODEL).to("cuda" if torch.cuda.is_available() else "cpu")
pipe.set_progress_bar_config(disable=True)


def decide(score: float | None, threshold: float) -> dict[str, str | float | None]:
    """Compare the score of the last picture with a threshold, without another run of the model.

    Args:
        score: in [0, 1]; None before the first picture.
        threshold: in [0, 1]; 0 makes no decision.

    Returns:
        A dictionary of verdict ("Defective", "Looks good", "Not decided" or "No result yet"), explanation,
        score and threshold.
    """
    if score is None:
        verdict, explanation = "No result yet", "Choose an example, or a picture of your own."
    elif not threshold:
        verdict, explanation = "Not decided", f"Score {score:.3f}. No threshold is set: see Advanced."
    elif score > threshold:
        verdict, explanation = "Defective", f"Score {score:.3f}, above the threshold of {threshold:.3f}."
    else:
        verdict, explanation = "Looks good", f"Score {score:.3f}, not above the threshold of {threshold:.3f}."
    return {"verdict": verdict, "explanation": explanation, "score": score, "threshold": threshold or None}


@GPU
def detect(picture, threshold, small_timestep, large_timestep, guidance_scale, num_noise_samples):
    """Find the defects in a picture.

    Args:
        picture: a PNG, JPEG, WebP, TIFF or BMP file of at most 20 MB.
        threshold: the picture is defective when its score is above; 0 makes no decision.
        small_timestep: the small noise scale.
        large_timestep: the large noise scale, above the small one.
        guidance_scale: weight of the reconstruction from the large scale.
        num_noise_samples: noises to average over, 1 to 8.

    Returns:
        A dictionary of verdict, explanation, score and threshold; picture and heatmap; picture and
        reconstruction.
    """
    if picture is None:
        return decide(None, threshold), None, None, None
    path = picture["path"]
    try:
        if num_noise_samples > MAX_NOISE_SAMPLES:
            raise ValueError(f"at most {MAX_NOISE_SAMPLES} noise samples are taken here")
        image = open_image(path, max_pixels=MAX_PIXELS)
        output = pipe(
            image,
            small_timestep=int(small_timestep),
            large_timestep=int(large_timestep),
            guidance_scale=float(guidance_scale),
            num_noise_samples=int(num_noise_samples),
            output_type="pt",
        )
    except ValueError as error:
        # Nobody needs a path of the server.
        raise gr.Error(str(error).removeprefix(f"{path}: "), print_exception=False) from error

    # A slider needs two pictures of one size, and a page no more pixels than it shows.
    height, width = output.anomaly_maps.shape[-2:]
    scale = min(1, MAX_SHOWN_SIDE / max(height, width))
    size = max(8, round(height * scale)), max(8, round(width * scale))
    processor = pipe.image_processor
    pixels, _ = processor.preprocess(image, *size)  # [1, 3, h, w]
    anomaly_map = processor.resize_to(output.anomaly_maps, [size])[0].clamp(0, 1)  # [1, h, w]
    shown = processor.postprocess(pixels, "pil")[0]
    heatmap = processor.visualize_anomaly_map(shown, anomaly_map, opacity=0.8)
    reconstruction = processor.postprocess(output.reconstructions, "pil", [size])[0]
    score = output.anomaly_scores.item()
    return decide(score, threshold), score, (shown, heatmap), (shown, reconstruction)


INTRODUCTION = """# Find the defect
DiffusionAD has seen good parts only: it rebuilds your picture as a good part would look, and marks where the
two really differ."""

# The browser fills in the values of `decide`; style.css draws the result.
VERDICT = """<div class="verdict ${value.verdict.split(' ')[0].toLowerCase()}">
<h2>${value.verdict}</h2>
<p>${value.explanation}</p>
<div style="--score: ${value.score ?? 0}; --threshold: ${value.threshold ?? -1}"><i></i><b></b></div>
</div>"""

LEGEND = f"""<div class="legend"><span>normal 0</span>
<i style="background: linear-gradient(90deg, {", ".join("#" + c for c in COLOUR_SCALE.split())})"></i>
<span>1 anomalous</span></div>"""

config, last = pipe.scheduler.config, len(pipe.scheduler) - 1
SETTINGS = (  # label, explanation, minimum, maximum, value, step
    ("Small noise scale", "Keeps details; more hides more of a defect.", 0, last, config.small_timestep, 1),
    ("Large noise scale", "Hides defects wholly; above the small one.", 0, last, config.large_timestep, 1),
    ("Guidance weight", "How much the large scale corrects the small.", 0, 5, config.guidance_scale, 0.1),
    ("Noise samples", "Averages over this many: steadier, but slower.", 1, MAX_NOISE_SAMPLES, 1, 1),
)

with gr.Blocks(title="DiffusionAD", delete_cache=(600, 1800)) as demo:
    gr.Markdown(INTRODUCTION)
    score = gr.State()
    with gr.Row():
        with gr.Column(scale=2, min_width=320):
            picture = gr.Image(label="Picture", sources=["upload", "clipboard", "webcam"], height=340)
            button = gr.Button("Detect", variant="primary")
            examples = gr.Examples(EXAMPLES, picture, cache_examples=False)
            with gr.Accordion("Advanced", open=False):
                threshold = gr.Slider(
                    maximum=1,
                    value=round(pipe.config.image_threshold or 0, 4),
                    step=0.0001,
                    label="Decision threshold",
                    info="A picture is defective when its score is above; 0 makes no decision.",
                )
                gr.Markdown("The next press of Detect takes these:")
                settings = [
                    gr.Slider(low, high, value, step=step, label=label, info=explanation)
                    for label, explanation, low, high, value, step in SETTINGS
                ]
        with gr.Column(scale=4, min_width=320):
            nothing = decide(None, 0)
            verdict = gr.HTML(nothing, html_template=VERDICT, js_on_load=None, container=True)
            with gr.Row():
                with gr.Column(min_width=300):
                    heatmap = gr.ImageSlider(label="Picture | heatmap", format="png")
                    gr.HTML(LEGEND)
                with gr.Column(min_width=300):
                    reconstruction = gr.ImageSlider(label="Picture | reconstruction", format="png")

    results = [verdict, score, heatmap, reconstruction]
    detection: dict[str, Any] = {
        "fn": detect,
        "inputs": [picture, threshold, *settings],
        "outputs": results,
        "preprocess": False,  # Gradio cannot say what is wrong with a file, and saturates 16-bit pictures
        "concurrency_limit": 1,
        "trigger_mode": "always_last",
    }
    # Input is an upload, a snapshot or a removal; an example is none. For `change`, an upload counts twice.
    for event in (
        gr.on([button.click, picture.input], **detection, api_name="detect"),
        examples.load_input_event.then(**detection, api_visibility="private"),
    ):
        # After an error, the verdict on the picture before must not stand beside this one.
        event.failure(lambda: (nothing, None, None, None), outputs=results, api_visibility="private")
    threshold.change(decide, [score, threshold], verdict, api_name="decide", show_progress="hidden")

demo.queue(max_size=20)

if __name__ == "__main__":
    # Fonts that the visitor's system has: none is downloaded.
    theme = gr.themes.Default(
        primary_hue="indigo", neutral_hue="slate", font=("system-ui", "sans-serif"), font_mono="monospace"
    )
    demo.launch(
        theme=theme,
        css_paths=HERE / "style.css",
        max_file_size="20mb",
        enable_monitoring=False,
        footer_links=["api", "settings"],
        run_history=False,
    )
