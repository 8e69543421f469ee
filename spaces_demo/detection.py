"""One picture through the model, and all that is drawn and written from the result without running it again.

Imports torch when it is needed, see `model_menu`.
"""

import json
import os
import time
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from PIL import Image, ImageDraw
from server_disk import written_for_visitor

from diffusionad_pipe import open_image
from diffusionad_pipe.files.names import safe_name
from diffusionad_pipe.images.files import OR_RAISE_MAX_PIXELS
from diffusionad_pipe.scoring import to_16_bits

if TYPE_CHECKING:
    import torch

    from diffusionad_pipe import DiffusionADPipeline
    from diffusionad_pipe.images.regions import DefectRegion

MAX_IMAGE_BYTES = 20 * 2**20
MAX_PIXELS = 24_000_000  # a phone's picture fits
MAX_NOISE_SAMPLES = 8
MAX_SECONDS = 60  # for one picture; a free CPU needs about one for each noise sample
MAX_SHOWN_SIDE = 768
OPACITY = 0.8
DELETED = "the picture was deleted from the server meanwhile; upload it again"

# What the intermediate pictures are, in the order in which they come about.
STEPS = ("noised_small", "noised_large", "pred_small", "pred_large", "prev_sample")


class Settings(NamedTuple):
    """How the model is run.

    Args:
        small_timestep: the small noise scale, from 0.
        large_timestep: the large noise scale, above the small one.
        guidance_scale: weight of the prediction from the large scale, 0 to 5.
        num_noise_samples: noises to average over, 1 to 8.
    """

    small_timestep: int
    large_timestep: int
    guidance_scale: float
    num_noise_samples: int


@dataclass(frozen=True)
class Detection:
    """What one run of the model found: about 4 MB, whatever the size of the picture.

    Args:
        path: the uploaded file, which is deleted after a while.
        name: its name at the visitor's.
        size: (height, width) of the picture in pixels.
        model: name of the model in the menu.
        settings: those of the run.
        score: in [0, 1].
        anomaly_map: `[1, 1, h, w]` in [0, 1], at the size at which the networks work.
        shown: the picture, its longest side at most `MAX_SHOWN_SIDE`.
        reconstruction: of the size of `shown`.
        steps: the pictures of `STEPS`, at the networks' size, for the first noise; None where the model has no large
            scale.
    """

    path: str
    name: str
    size: tuple[int, int]
    model: str
    settings: Settings
    score: float
    anomaly_map: "torch.Tensor"
    shown: Image.Image
    reconstruction: Image.Image
    steps: list[Image.Image | None]


class Finding(NamedTuple):
    """A detection compared with the thresholds.

    Args:
        verdict: what [`decide`] says.
        regions: the defects, the largest first.
        image: the picture with their contours.
    """

    verdict: dict[str, Any]
    regions: "list[DefectRegion]"
    image: Image.Image


def run_model(pipe: "DiffusionADPipeline", model: str, path: str, name: str, settings: Settings) -> Detection:
    """Find the defects in a picture file.

    Args:
        pipe: the model.
        model: its name.
        path: the file.
        name: the file's name at the visitor's.
        settings: see [`Settings`].

    Raises:
        ValueError: for a file that is no picture or too large, settings out of range, or a run of more than
            `MAX_SECONDS`; the message names no path.
    """
    end = time.monotonic() + MAX_SECONDS
    first_step: dict[str, torch.Tensor] = {}

    def watch(
        pipe: "DiffusionADPipeline", index: int, timesteps: "torch.Tensor", tensors: "dict[str, torch.Tensor]"
    ) -> None:
        if not index:
            first_step.update({key: tensors[key].cpu() for key in STEPS if key in tensors})
        if time.monotonic() > end:
            raise ValueError(f"this took more than {MAX_SECONDS} s and was stopped; take fewer noise samples")

    if settings.num_noise_samples > MAX_NOISE_SAMPLES:
        raise ValueError(f"at most {MAX_NOISE_SAMPLES} noise samples are taken here")
    try:
        megabytes = os.path.getsize(path) / 2**20
    except OSError as error:
        raise ValueError(DELETED) from error
    if megabytes > MAX_IMAGE_BYTES / 2**20:
        raise ValueError(f"the file has {megabytes:.0f} MB; give a picture of at most {MAX_IMAGE_BYTES >> 20} MB")
    try:
        image = open_image(path, max_pixels=MAX_PIXELS)
    except ValueError as error:
        # A visitor cannot raise the limit, and must not see a path of the server.
        message = str(error).removeprefix(f"{path}: ").replace(OR_RAISE_MAX_PIXELS, "")
        raise ValueError(message) from error

    processor = pipe.image_processor
    pixels = processor.decode(image)
    output = pipe(
        pixels,
        **settings._asdict(),
        match_input_resolution=False,  # a map of 24 megapixels would be kept for nothing
        output_type="pt",
        callback_on_step_end=watch,
    )
    # A slider needs two pictures of one size, and a page no more pixels than it shows.
    height, width = processor.size(pixels)
    scale = min(1, MAX_SHOWN_SIDE / max(height, width))
    shown_size = max(8, round(height * scale)), max(8, round(width * scale))
    shown_pixels, _ = processor.preprocess(pixels, *shown_size)
    return Detection(
        path=path,
        name=name,
        size=(height, width),
        model=model,
        settings=settings,
        score=output.anomaly_scores.item(),
        anomaly_map=output.anomaly_maps,
        shown=processor.postprocess(shown_pixels, "pil")[0],
        reconstruction=processor.postprocess(output.reconstructions, "pil", [shown_size])[0],
        steps=[processor.postprocess(first_step[key], "pil")[0] if key in first_step else None for key in STEPS],
    )


def decide(score: float | None, threshold: float) -> dict[str, Any]:
    """Compare a score with a threshold.

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


def draw_heatmap(pipe: "DiffusionADPipeline", detection: Detection) -> Image.Image:
    """The anomaly map over the picture, of the size of `shown`, on the scale from 0 to 1."""
    anomaly_map = resize_map(pipe, detection, (detection.shown.height, detection.shown.width))
    return pipe.image_processor.visualize_anomaly_map(detection.shown, anomaly_map, opacity=OPACITY)


def apply_thresholds(
    pipe: "DiffusionADPipeline", detection: Detection, image_threshold: float, pixel_threshold: float, chosen: int = 0
) -> Finding:
    """Verdict, regions and contours for these thresholds, without running the model.

    Args:
        pipe: the model, whose image processor draws.
        detection: of the picture.
        image_threshold: see [`decide`].
        pixel_threshold: pixels above are marked, in [0, 1]; 0 marks none.
        chosen: number of the region to be framed, from 1; 0 for none.
    """
    import torch.nn.functional as F

    from diffusionad_pipe.images.regions import find_defect_regions

    verdict, shown = decide(detection.score, image_threshold), detection.shown
    if not pixel_threshold:
        return Finding(verdict, [], shown)
    anomaly_map = resize_map(pipe, detection, detection.size)  # [H, W]: as `predicted_masks` of the pipeline
    regions = find_defect_regions(anomaly_map, pixel_threshold)
    mask = (anomaly_map > pixel_threshold).float()[None]
    # A maximum, so that a small region does not vanish when the picture is shrunk.
    mask = F.adaptive_max_pool2d(mask, (shown.height, shown.width))[0]
    image = pipe.image_processor.visualize_mask(shown, mask)
    if 0 < chosen <= len(regions):
        scale = shown.width / detection.size[1]
        left, top, right, bottom = (round(side * scale) for side in regions[chosen - 1].box)
        draw, margin = ImageDraw.Draw(image), 6
        box = (
            max(left - margin, 0),
            max(top - margin, 0),
            min(right + margin, shown.width - 1),
            min(bottom + margin, shown.height - 1),
        )
        draw.rectangle(box, outline="black", width=5)  # seen on bright and on dark surfaces
        draw.rectangle(box, outline="white", width=2)
    return Finding(verdict, regions, image)


def resize_map(pipe: "DiffusionADPipeline", detection: Detection, size: tuple[int, int]) -> "torch.Tensor":
    """The anomaly map `[height, width]` in [0, 1] at another size (height, width)."""
    return pipe.image_processor.resize_to(detection.anomaly_map, [size])[0][0].clamp(0, 1)


def write_files(
    pipe: "DiffusionADPipeline", detection: Detection, image_threshold: float, pixel_threshold: float, folder: Path
) -> list[str]:
    """Write what a visitor may keep, at the picture's own size.

    Args:
        pipe: the model, whose image processor draws.
        detection: of the picture.
        image_threshold: see [`apply_thresholds`].
        pixel_threshold: see [`apply_thresholds`].
        folder: where a new folder for the files is made.

    Returns:
        Three paths: overlay (PNG), anomaly map (16-bit PNG, 65535 is 1), and everything in numbers (JSON).

    Raises:
        ValueError: when the uploaded picture was deleted meanwhile, or there is no room for files.
    """
    try:
        image = open_image(detection.path, max_pixels=MAX_PIXELS)
    except ValueError as error:
        raise ValueError(DELETED) from error
    anomaly_map = resize_map(pipe, detection, detection.size)
    mask = anomaly_map > pixel_threshold if pixel_threshold else None
    verdict, regions, _ = apply_thresholds(pipe, detection, image_threshold, pixel_threshold)
    report = {
        "picture": detection.name,
        "height": detection.size[0],
        "width": detection.size[1],
        "model": detection.model,
        **detection.settings._asdict(),
        **verdict,
        "pixel_threshold": pixel_threshold or None,
        "regions": [region._asdict() for region in regions],
    }
    stem = safe_name(Path(detection.name).stem or "picture")
    folder = folder / uuid.uuid4().hex  # two visitors may have pictures of one name
    overlay_path, map_path, report_path = (folder / f"{stem}{end}" for end in ("_overlay.png", "_map.png", ".json"))
    overlay = pipe.image_processor.visualize_anomaly_map(image, anomaly_map, mask)
    with written_for_visitor():
        folder.mkdir(parents=True)
        overlay.save(overlay_path)
        to_16_bits(anomaly_map.numpy()).save(map_path)
        report_path.write_text(json.dumps(report, indent=2, ensure_ascii=False), encoding="utf-8")
    return [str(overlay_path), str(map_path), str(report_path)]
