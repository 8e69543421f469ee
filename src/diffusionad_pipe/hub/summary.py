"""What a model is, from its files."""

import os
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError

from ..pipeline_diffusionad import DiffusionADPipeline

UNKNOWN = "not stated"


def summarize(model: str) -> dict[str, str]:
    """Describe a pipeline.

    Args:
        model: its folder, or its Hub id.

    Returns:
        Titles and what is known, in the order in which it is to be read.

    Raises:
        ValueError: when it cannot be loaded; names the file, the cause and the cure.
    """
    folder = Path(model if os.path.isdir(model) else DiffusionADPipeline.download(model))
    pipe = DiffusionADPipeline.from_pretrained(folder)
    config, schedule, unet = pipe.config, pipe.scheduler.config, pipe.unet.config
    summary = {
        "model": f"DiffusionAD anomaly detector, {model}",
        "pictures": f"{config.image_size} x {config.image_size} pixels inside, any size outside",
        "unet": f"{_size(pipe.unet, folder / 'unet')}; widths {'/'.join(map(str, unet.block_out_channels))}, "
        f"patches of {unet.patch_size}, predicts {schedule.prediction_type}",
        "segmentation": f"{_size(pipe.segmentation, folder / 'segmentation')}; {type(pipe.segmentation).__name__}",
        "noise scales": f"{schedule.small_timestep} and {schedule.large_timestep} of {schedule.num_train_timesteps}, "
        f"guidance weight {schedule.guidance_scale:g}"
        + (", distilled into one call of the UNet" if schedule.distilled else ""),
        "image score": f"mean of {config.score_top_k:g} pixels"
        if config.score_top_k >= 1
        else f"mean of the largest {config.score_top_k:.2%} of the pixels",
        "image threshold": _threshold(config.image_threshold),
        "pixel threshold": _threshold(config.pixel_threshold),
    }
    card = _find_card(model, folder)
    data: Any = None if card is None else card.data
    lines = card.text.splitlines() if card is not None else []
    rows = dict(line.strip("|").split("|", 1) for line in lines if line.startswith("| ") and line.count("|") == 3)
    training = {title.strip(): text.strip() for title, text in rows.items()}
    summary["training data"] = "; ".join(training[key] for key in ("data", "pictures") if key in training) or UNKNOWN
    summary["license"] = (data and data.license) or UNKNOWN
    results = (data and data.eval_results) or []
    for name in dict.fromkeys(result.dataset_name for result in results):
        values = [f"{r.metric_name} {r.metric_value:.4f}" for r in results if r.dataset_name == name]
        summary[f"results on {name}"] = ", ".join(values)
    return summary


def _size(network: Any, folder: Path) -> str:
    count = sum(parameter.numel() for parameter in network.parameters())
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    dtype = str(network.dtype).removeprefix("torch.")
    return f"{count / 1e6:.2f} million parameters, {size / 1e6:.1f} MB, {dtype}"


def _threshold(value: float | None) -> str:
    return "not calibrated: no decisions (diffusionad calibrate sets it)" if value is None else f"{value:.4f}"


def _find_card(model: str, folder: Path) -> ModelCard | None:
    path = folder / "README.md"
    if not os.path.isdir(model):
        try:
            path = Path(hf_hub_download(model, "README.md", revision=folder.name))
        except EntryNotFoundError:
            return None
    return ModelCard.load(path, ignore_metadata_errors=True) if path.is_file() else None
