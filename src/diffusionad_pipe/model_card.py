"""Fills model_card.md, the template of every trained model's README."""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from .calibration import smallest_rate
from .image_files import write_atomically

PACKAGE = Path(__file__).parent
# Built packages carry the template beside the modules; a checkout has it at its top.
TEMPLATE = next((p for p in (PACKAGE / "model_card.md", PACKAGE.parents[1] / "model_card.md") if p.is_file()), None)

NO_RESULTS = "Not measured on test pictures yet."

METRIC_NAMES = {
    "image_auroc": "image AUROC",
    "image_ap": "image AP",
    "image_f1_max": "image F1-max",
    "pixel_auroc": "pixel AUROC",
    "pixel_ap": "pixel AP",
    "pixel_f1_max": "pixel F1-max",
    "au_pro_0.30": "AU-PRO 0.3",
    "au_pro_0.05": "AU-PRO 0.05",
    "right_decisions": "right decisions",
}


def write_model_card(
    folder: str | os.PathLike[str],
    config: dict[str, Any],
    *,
    picture_count: int,
    held_out_count: int,
    best_step: int,
    hours: float,
    hardware: str,
    validation: dict[str, float],
) -> None:
    """Write `README.md` beside a saved pipeline, without results.

    Args:
        folder: the pipeline's folder; its `model_index.json` holds the thresholds.
        config: the training configuration.
        picture_count: good pictures, held-out ones included.
        held_out_count: of them held out.
        best_step: the step whose weights were kept.
        hours: that training took.
        hardware: that it ran on.
        validation: metrics of the kept weights on the held-out pictures, names of `METRIC_NAMES`.
    """
    if TEMPLATE is None:
        raise FileNotFoundError("model_card.md is missing beside the package: install diffusionad_pipe again")
    folder = Path(folder)
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    title = f"DiffusionAD, {folder.name}"
    card_data = ModelCardData(
        license=config["licence"],
        library_name="diffusers",
        pipeline_tag="image-segmentation",
        tags=["anomaly-detection", "diffusionad", "diffusionad_pipe"],
        model_name=title,
    )
    card = ModelCard.from_template(
        card_data,
        template_path=str(TEMPLATE),
        title=title,
        model_id=folder.name,
        # The folder's name only: where it lay on the machine is nobody's business.
        training_data=config["dataset_title"] or Path(config["train_data_dir"]).name,
        training_pictures=picture_count - held_out_count,
        held_out_pictures=held_out_count,
        config=config,
        best_step=best_step,
        hours=hours,
        hardware=hardware,
        validation={METRIC_NAMES[name]: value for name, value in validation.items()},
        guaranteed=smallest_rate(held_out_count) <= config["false_positive_rate"],
        smallest_rate=smallest_rate(held_out_count),
        image_threshold=index["image_threshold"],
        pixel_threshold=index["pixel_threshold"],
        results=NO_RESULTS,
        licence_note=config["licence_note"] or "The weights are under the licence of their training pictures.",
    )
    write_atomically(folder / "README.md", lambda path: path.write_text(str(card), encoding="utf-8"))


def write_results(
    folder: str | os.PathLike[str], metrics: Mapping[str, Mapping[str, float]], table: str, source: str
) -> None:
    """Put measured results into a model card: its section "Results" and the Hub's model index.

    Args:
        folder: the pipeline's folder with a `README.md` of [`write_model_card`].
        metrics: test set → name → value, names of `METRIC_NAMES`; NaN is left out.
        table: the same for a person, Markdown.
        source: sentence that says what was measured and by which command.

    Raises:
        ValueError: when the card has no section "Results".
    """
    path = Path(folder) / "README.md"
    card = ModelCard.load(path)
    before, heading, rest = card.text.partition("\n## Results\n")
    _, next_heading, after = rest.partition("\n## ")
    if not heading or not next_heading:
        raise ValueError(f"{path} has no section 'Results' to fill: write the card again with the training script")
    card.text = f"{before}{heading}\n{source}\n\n{table.strip()}\n{next_heading}{after}"
    card.data.eval_results = [
        EvalResult("image-segmentation", dataset, dataset, name, value, metric_name=METRIC_NAMES[name])
        for dataset, values in metrics.items()
        for name, value in values.items()
        if not math.isnan(value)
    ]
    write_atomically(path, lambda temporary: temporary.write_text(str(card), encoding="utf-8"))
