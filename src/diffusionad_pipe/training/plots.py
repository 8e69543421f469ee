"""Pictures of a training run: what it makes of held-out samples, and its losses."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image

from ..evaluation.calibration import Validation
from ..image_processor import DiffusionADImageProcessor
from ..pipeline_diffusionad import DiffusionADPipeline
from ..runtime.figures import import_matplotlib


def validation_grid(
    pipeline: DiffusionADPipeline, samples: Sequence[dict[str, torch.Tensor]], result: Validation, columns: int = 8
) -> Image.Image:
    """Rows: picture, one-step prediction from the small and from the large scale, guided reconstruction, anomaly map,
    true mask; at most `columns` samples, evenly chosen. A distilled network makes the reconstruction alone."""
    chosen = (
        torch.linspace(0, len(samples) - 1, min(columns, len(samples)), dtype=torch.float32, device="cpu")
        .long()
        .tolist()
    )
    images = torch.stack([samples[index]["images"] for index in chosen]).cpu()
    masks = torch.stack([samples[index]["masks"] for index in chosen]).cpu()
    rows = [images]
    scheduler = pipeline.scheduler
    if scheduler.num_scales == 2:
        # The closed form of the guidance leaves the small prediction alone at w = 0, the norm image at 1 / (1 − ᾱ_s).
        norm_only = 1 / (1 - scheduler.alphas_cumprod[scheduler.config.small_timestep].item())
        for weight in (0.0, norm_only):
            rows.append(pipeline(images, guidance_scale=weight, output_type="pt").reconstructions.cpu())
    rows += [result.reconstructions[chosen].cpu(), result.anomaly_maps[chosen].cpu(), masks]
    grid = torch.cat([torch.cat(list(row.expand(-1, 3, -1, -1)), dim=2) for row in rows], dim=1)[None]
    return DiffusionADImageProcessor().postprocess(grid, "pil")[0]


def plot_losses(log: Path, path: Path) -> None:
    """Plot both losses and the validation figures of a `log.jsonl` into a picture file."""
    import_matplotlib()
    from matplotlib.figure import Figure

    entries = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    figure = Figure(figsize=(9, 6), layout="constrained")
    losses, figures = figure.subplots(2, sharex=True)
    for axes, names in (
        (losses, ("noise_loss", "mask_loss")),
        (figures, ("validation_image_auroc", "validation_pixel_ap", "validation_au_pro_0.30")),
    ):
        for name in names:
            points = [(entry["step"], entry[name]) for entry in entries if name in entry]
            axes.plot(*zip(*points), label=name)
        axes.legend()
        axes.grid(alpha=0.3)
    losses.set_yscale("log")
    figures.set_xlabel("step")
    figure.savefig(path)
