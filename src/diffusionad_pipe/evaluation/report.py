"""The report of an evaluation: its curves, and a gallery of pictures that are drawn again from stored predictions."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ..files.output_folder import OutputFolder
from ..image_processor import DiffusionADImageProcessor
from ..metrics import METRIC_NAMES
from .report_page import CategoryReport, GalleryImage, choose_gallery, write_report
from .results import CategoryResult
from .tables import cost


def write_evaluation_report(
    results: Sequence[CategoryResult], name: str, folder: OutputFolder, configuration: Mapping[str, object]
) -> None:
    """Write `report.html`.

    Args:
        results: what [`evaluate`] gave; categories that were not measured are left out.
        name: of the dataset.
        folder: that the evaluation writes into.
        configuration: what was run, shown as it is.
    """
    measured = [result for result in results if result.rows]
    costs = {"times and memory": {result.category: cost(result) for result in measured}}
    report = partial(
        write_report,
        title=f"DiffusionAD on {name}",
        categories=[category_report(result) for result in measured],
        configuration={**configuration, **costs},
    )
    folder.write("report.html", report)


def category_report(result: CategoryResult) -> CategoryReport:
    """The report of one category, from its pictures and stored predictions.

    Those that can no longer be read, or are others now, are left out of the gallery.
    """
    scores, labels = ([row[name] for row in result.rows] for name in ("score", "label"))
    groups = choose_gallery(scores, labels, result.image_threshold)
    chosen = [(group, result.rows[position]["index"]) for group, positions in groups.items() for position in positions]
    drawn = [_draw(group, index, result) for group, index in chosen]
    gallery = [image for image in drawn if image is not None]
    remarks = list(result.remarks)
    if len(gallery) < len(drawn):
        remarks.append(f"{len(drawn) - len(gallery)} pictures are not shown: their files have changed or are gone")
    return CategoryReport(
        name=result.category,
        metrics={name: value for name, value in result.metrics.items() if name in METRIC_NAMES},
        remarks=remarks,
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


def _draw(group: str, index: int, result: CategoryResult) -> GalleryImage | None:
    images = result.images
    content = images.content(index)
    prediction = None if content is None else result.predictions.read(content)
    if prediction is None:
        return None
    processor = DiffusionADImageProcessor()
    try:
        image = processor.preprocess(images.image(index), *prediction.size)[0]  # upright
    except ValueError:
        return None
    try:
        mask = images.mask(index, prediction.size)
    except ValueError:  # said with the metrics
        mask = None
    shown = processor.postprocess(image, "pil")[0]  # RGB
    anomaly_map = processor.resize_to(torch.from_numpy(prediction.anomaly_map)[None, None], [prediction.size])[0][
        0
    ].numpy()
    pixel_threshold = result.predictions.settings["thresholds"]["pixel_threshold"]
    path = Path(images.paths[index])
    return GalleryImage(
        group=group,
        name=f"{path.parent.name}/{path.name}",
        defect_type=images.defect_types[index],
        label=images.labels[index],
        score=prediction.score,
        image=shown,
        reconstruction=Image.fromarray(prediction.reconstruction).resize(shown.size, Image.Resampling.BILINEAR),
        heatmap=processor.visualize_anomaly_map(shown, anomaly_map),
        predicted_mask=None
        if pixel_threshold is None
        else processor.visualize_mask(shown, anomaly_map > pixel_threshold),
        ground_truth=None if mask is None else Image.fromarray(mask * np.uint8(255)),
    )
