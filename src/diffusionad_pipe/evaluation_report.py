"""The report of an evaluation: its curves, and a gallery of pictures that are drawn again from stored predictions."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from .evaluation import CategoryResult, Prediction, TestPictures, load_test_pictures, read_prediction
from .image_files import PathLike
from .image_processor import DiffusionADImageProcessor
from .model_card import METRIC_NAMES
from .report import CategoryReport, GalleryPicture, choose_gallery, write_report
from .results_table import cost


def write_evaluation_report(
    results: Sequence[CategoryResult],
    data: PathLike,
    category: str | None,
    output: Path,
    configuration: Mapping[str, object],
) -> None:
    """Write `report.html`.

    Args:
        results, data, category, output: what [`evaluate`] gave and was given.
        configuration: what was run, shown as it is.
    """
    reports = [
        category_report(result, pictures, output / "predictions" / result.category)
        for result, pictures in zip(results, load_test_pictures(data, category))
    ]
    name = os.path.basename(os.path.abspath(data))
    costs = {"times and memory": {result.category: cost(result) for result in results}}
    write_report(output / "report.html", f"DiffusionAD on {name}", reports, {**configuration, **costs})


def category_report(result: CategoryResult, pictures: TestPictures, folder: Path) -> CategoryReport:
    """The report of one category, from its stored predictions in `folder`."""
    scores, labels = ([row[name] for row in result.rows] for name in ("score", "label"))
    pixel_threshold = json.loads((folder / "settings.json").read_text(encoding="utf-8"))["pixel_threshold"]
    groups = choose_gallery(scores, labels, result.image_threshold)
    gallery = [
        _draw(group, result.rows[position]["index"], pictures, folder, pixel_threshold)
        for group, positions in groups.items()
        for position in positions
    ]
    return CategoryReport(
        name=result.category,
        metrics={name: value for name, value in result.metrics.items() if name in METRIC_NAMES},
        remarks=result.remarks,
        image_threshold=result.image_threshold,
        scores=scores,
        labels=labels,
        defect_types=[row["defect_type"] for row in result.rows],
        roc={name: curve for name, curve in result.roc.items() if len(curve[0])},
        # The report's recall falls, as scikit-learn's does.
        precision_recall={
            name: (recall[::-1], precision[::-1])
            for name, (recall, precision) in result.precision_recall.items()
            if len(recall)
        },
        pro=result.pro if len(result.pro[0]) else None,
        gallery=gallery,
    )


def _draw(
    group: str, index: int, pictures: TestPictures, folder: Path, pixel_threshold: float | None
) -> GalleryPicture:
    prediction: Prediction = read_prediction(folder, index)
    processor = DiffusionADImageProcessor()
    picture = pictures.picture(index)
    shown = processor.postprocess(processor.preprocess(picture, *prediction.size)[0], "pil")[0]  # RGB, upright
    anomaly_map = processor.resize_to(torch.from_numpy(prediction.anomaly_map)[None, None], [prediction.size])[0][
        0
    ].numpy()
    mask = pictures.mask(index, prediction.size)
    path = Path(pictures.paths[index])
    return GalleryPicture(
        group=group,
        name=f"{path.parent.name}/{path.name}",
        defect_type=pictures.defect_types[index],
        label=pictures.labels[index],
        score=prediction.score,
        picture=shown,
        reconstruction=Image.fromarray(prediction.reconstruction).resize(shown.size, Image.Resampling.BILINEAR),
        heatmap=processor.visualize_anomaly_map(shown, anomaly_map),
        predicted_mask=None
        if pixel_threshold is None
        else processor.visualize_mask(shown, anomaly_map > pixel_threshold),
        ground_truth=None if mask is None else Image.fromarray(mask * np.uint8(255)),
    )
