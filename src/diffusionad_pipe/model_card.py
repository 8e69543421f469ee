"""Fills model_card.md, the template of every trained model's README."""

import json
import os
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from .image_files import write_atomically

PACKAGE = Path(__file__).parent
# Built packages carry the template beside the modules; a checkout has it at its top.
TEMPLATE = next((p for p in (PACKAGE / "model_card.md", PACKAGE.parents[1] / "model_card.md") if p.is_file()), None)

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
    picture_count: int,
    held_out_count: int,
    *,
    results: dict[str, float] | None = None,
    results_source: str = "",
    title: str | None = None,
    model_id: str | None = None,
    training_data: str | None = None,
    licence: str | None = None,
    licence_note: str = "The licence of the weights is that of their training pictures; state it here.",
) -> None:
    """Write `README.md` beside a saved pipeline.

    Args:
        folder: the pipeline's folder; its `model_index.json` holds the thresholds.
        config: the training configuration.
        picture_count: good pictures, held-out ones included.
        held_out_count: of them held out.
        results: metrics on test pictures, or None when there are none yet.
        results_source: what they were measured on and by which command.
        title: heading; None takes the folder's name.
        model_id: what `from_pretrained` shall be given; None takes the folder's name.
        training_data: name of the pictures; None takes the folder's name only, never a path of this machine.
        licence: identifier for the Hub, such as `"cc-by-4.0"`.
        licence_note: sentence on the licence and its attribution.
    """
    if TEMPLATE is None:
        raise FileNotFoundError("model_card.md is missing beside the package: install diffusionad_pipe again")
    folder = Path(folder)
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    training_data = training_data or Path(config["train_data_dir"]).name
    title = title or f"DiffusionAD, {folder.name}"
    table = "Not measured on test pictures yet."
    eval_results = None
    if results:
        rows = "\n".join(f"| {METRIC_NAMES[name]} | {value:.4f} |" for name, value in results.items())
        table = f"{results_source}\n\n| metric | value |\n|---|---|\n{rows}"
        eval_results = [
            EvalResult("image-segmentation", training_data, training_data, name, value, metric_name=METRIC_NAMES[name])
            for name, value in results.items()
        ]
    card_data = ModelCardData(
        license=licence,
        library_name="diffusers",
        pipeline_tag="image-segmentation",
        tags=["anomaly-detection", "diffusionad", "diffusionad_pipe"],
        model_name=title,
        eval_results=eval_results,
    )
    card = ModelCard.from_template(
        card_data,
        template_path=str(TEMPLATE),
        title=title,
        model_id=model_id or folder.name,
        training_data=training_data,
        training_pictures=picture_count - held_out_count,
        held_out_pictures=held_out_count,
        config=config,
        image_threshold=index["image_threshold"],
        pixel_threshold=index["pixel_threshold"],
        results=table,
        licence_note=licence_note,
    )
    write_atomically(folder / "README.md", lambda path: path.write_text(str(card), encoding="utf-8"))
