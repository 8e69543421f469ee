"""Measure a trained pipeline on the test pictures of one category.

    python training/evaluate.py --model pretrained/hazelnut --data training/data/hazelnut_toy/hazelnut

Maps are compared with the masks at the pictures' own size. Nothing is chosen here: the metrics need no threshold,
and the decisions are made with the one that is saved in the model.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm

from diffusionad_pipe import DiffusionADPipeline, open_image
from diffusionad_pipe.cli import default_device
from diffusionad_pipe.data import load_anomaly_dataset, read_mask
from diffusionad_pipe.image_files import write_atomically
from diffusionad_pipe.metrics import evaluate_maps
from diffusionad_pipe.model_card import METRIC_NAMES, write_results


def evaluate(model: str, data: str, category: str | None, batch_size: int) -> dict[str, float]:
    """Metrics of [`evaluate_maps`], and the share of right decisions where the model has a threshold.

    Defective pictures without a usable mask, none or an empty one, count in the image metrics alone; prints how many
    there are.
    """
    splits = load_anomaly_dataset(data, category=category)
    if "test" not in splits:
        raise ValueError(f"{data} has no test pictures (test/good and test/<defect type>, or MT_<Defect type>/Imgs)")
    test = splits["test"].remove_columns(["image", "mask"])
    masks_of = splits["test"].cast_column("mask", splits["test"].features["mask"].__class__(decode=False))["mask"]

    pipe = DiffusionADPipeline.from_pretrained(model).to(default_device())
    pipe.set_progress_bar_config(disable=True)
    maps, scores = [], []
    for start in tqdm(range(0, len(test), batch_size), desc="evaluating", unit="batch"):
        pictures = [open_image(path) for path in test["path"][start : start + batch_size]]
        output = pipe(pictures, output_type="np", batch_size=batch_size)
        maps += [np.asarray(m)[..., 0] for m in output.anomaly_maps]
        scores += output.anomaly_scores.tolist()
    masks: list[np.ndarray | None] = []
    for anomaly_map, stored, label in zip(maps, masks_of, test["label"]):
        mask = np.zeros(anomaly_map.shape, dtype=bool) if stored is None else read_mask(Path(stored["path"]))
        # Nobody marked the defect, so nothing is known of this picture's pixels: calling them all good would be wrong.
        masks.append(None if label and not mask.any() else mask)
    left_out = sum(mask is None for mask in masks)
    if left_out:
        print(f"{left_out} of {len(masks)} pictures are defective without a usable mask: not in the pixel metrics")

    metrics = evaluate_maps(maps, masks, scores, test["label"])
    if pipe.config.image_threshold is not None:
        right = (np.array(scores) > pipe.config.image_threshold) == np.array(test["label"], dtype=bool)
        metrics["right_decisions"] = float(right.mean())
    return metrics


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of a saved pipeline, or its Hub id")
    parser.add_argument(
        "--data", required=True, help="folder of one category (train/good, test/*, ground_truth/*; or MT_*/Imgs)"
    )
    parser.add_argument("--category", help="sub-folder, where --data holds several")
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--model_card", action="store_true", help="put the results into the model's README.md")
    parser.add_argument("--output", type=Path, help="also write the metrics to this JSON file")
    arguments = parser.parse_args()
    try:
        metrics = evaluate(arguments.model, arguments.data, arguments.category, arguments.batch_size)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    print("| metric | value |\n|---|---|")
    for name, value in metrics.items():
        print(f"| {METRIC_NAMES[name]} | {value:.4f} |")
    if arguments.model_card:
        name = Path(arguments.data).name
        source = f"Measured on the test pictures of `{name}` with `training/evaluate.py`, at the pictures' own size."
        write_results(arguments.model, metrics, name, source)
    if arguments.output:
        text = json.dumps(metrics, indent=2) + "\n"
        write_atomically(arguments.output, lambda path: path.write_text(text, encoding="utf-8"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
