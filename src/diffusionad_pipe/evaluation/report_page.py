"""A report to look at: one HTML file with the curves, tables and pictures of an evaluation.

The file needs nothing but itself: no script, no other file, no request. `report.html` is its template.
"""

import base64
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image
from sklearn.metrics import roc_auc_score

from ..images.colors import COLOR_SCALE
from ..images.files import PathLike
from ..metrics import METRIC_NAMES, f1_max
from .charts import curves_svg, histogram_svg

WEAK_DEFECTS = "Missed or weakest defects"
ALARMING_GOOD = "Good pictures with the highest scores"
BORDERLINE = "Closest to the threshold"
CLEAR_DEFECTS = "Defects that stand out most"

PRO_LIMIT = 0.3  # the field's usual limit of the PRO curve


@dataclass
class GalleryImage:
    """One test picture and what the pipeline makes of it; the pictures may be of any size and are shrunk.

    Args:
        group: heading that the picture is shown under, one of [`choose_gallery`] or any other.
        name: caption, such as `colour/14.jpg`.
        defect_type: such as `color`, or `good`.
        label: 1 where the picture is defective, 0 where it is good.
        score: its image score.
        image: RGB.
        reconstruction: RGB.
        heatmap: RGB, the picture with its anomaly map over it, of the image processor.
        predicted_mask: RGB with contours, or a mask of mode 1 or L that is 0 where normal; None without a threshold.
        ground_truth: of the same kinds; None where nobody marked anything.
    """

    group: str
    name: str
    defect_type: str
    label: int
    score: float
    image: Image.Image
    reconstruction: Image.Image
    heatmap: Image.Image
    predicted_mask: Image.Image | None
    ground_truth: Image.Image | None


class Chart(NamedTuple):
    """A chart, with what tells of it to those who cannot see it.

    Args:
        heading: what is drawn.
        labels: what is on the horizontal and the vertical axis.
        summary: what it shows, in a sentence.
        svg: an `<svg>` element.
    """

    heading: str
    labels: tuple[str, str]
    summary: str
    svg: str


@dataclass
class CategoryReport:
    """What was measured on the test pictures of one category.

    Args:
        name: of the category.
        metrics: name of `METRIC_NAMES` → value, NaN where it is undefined; those of the curves below are there.
        remarks: sentences on what the metrics leave out, and on why one is undefined.
        image_threshold: anomalous is `score > threshold`; None where the model has no threshold.
        scores: finite image score of each test picture.
        labels: of each, 1 where it is defective.
        defect_types: of each, such as `color` or `good`.
        roc: `"image"` and `"pixel"`, each if there is one → (false-positive rate, true-positive rate), both rising.
        precision_recall: the same → (recall, precision) with recall falling, as scikit-learn gives it.
        pro: (false-positive rate, mean overlap of the regions), both rising; None if there is none.
        gallery: pictures to show; those of a group in the order to show them in.
    """

    name: str
    metrics: dict[str, float]
    remarks: Sequence[str]
    image_threshold: float | None
    scores: Sequence[float]
    labels: Sequence[int]
    defect_types: Sequence[str]
    roc: dict[str, tuple[np.ndarray, np.ndarray]]
    precision_recall: dict[str, tuple[np.ndarray, np.ndarray]]
    pro: tuple[np.ndarray, np.ndarray] | None
    gallery: Sequence[GalleryImage]


def choose_gallery(
    scores: Sequence[float], labels: Sequence[int], threshold: float | None, count: int = 6
) -> dict[str, list[int]]:
    """Choose the best, the worst and the borderline test pictures, each at most once.

    The groups take one picture each in turns, so that few pictures are shared fairly.

    Args:
        scores: `[N]` image scores, larger is more anomalous.
        labels: `[N]`, 1 where the picture is defective.
        threshold: of the image score; None takes the one with the best F1, for this choice alone, and without
            defective pictures none, so that nothing is borderline.
        count: pictures of a group at most.

    Returns:
        Heading of the group → indices of its pictures, the most telling first. Groups may be empty.
    """
    score, defective = np.asarray(scores, dtype=np.float64), np.asarray(labels).astype(bool)
    if threshold is None and defective.any():
        threshold = f1_max(defective, score)[1]
    rising = np.argsort(score, kind="stable")
    falling = np.argsort(-score, kind="stable")
    candidates = {
        WEAK_DEFECTS: rising[defective[rising]],
        ALARMING_GOOD: falling[~defective[falling]],
        BORDERLINE: [] if threshold is None else np.argsort(np.abs(score - threshold), kind="stable"),
        CLEAR_DEFECTS: falling[defective[falling]],
    }
    chosen: dict[str, list[int]] = {group: [] for group in candidates}
    taken: set[int] = set()
    for _ in range(count):
        for group, order in candidates.items():
            index = next((int(i) for i in order if int(i) not in taken), None)
            if index is not None:
                chosen[group].append(index)
                taken.add(index)
    return chosen


def write_report(
    path: PathLike,
    title: str,
    categories: Sequence[CategoryReport],
    configuration: Mapping[str, object],
    *,
    side: int = 256,
) -> None:
    """Write the report of an evaluation as one HTML file that opens offline.

    Args:
        path: the file to write, `*.html`; its folder must exist.
        title: heading of the report.
        categories: at least one; several also get a table of all, with their means.
        configuration: what was run, name → value or a mapping of the same kind; shown as it is.
        side: longest side in pixels of the embedded pictures; one takes 2 to 10 kB at 256.
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["metric"] = _metric
    environment.filters["data_uri"] = lambda image: _data_uri(image, side)
    environment.globals["METRIC_NAMES"] = METRIC_NAMES
    html = environment.get_template("report.html").render(
        title=title,
        categories=[(category, _view(category, f"category-{number}")) for number, category in enumerate(categories, 1)],
        count=sum(len(category.scores) for category in categories),
        overview=_overview(categories),
        configuration=configuration,
        colors=[f"#{color}" for color in COLOR_SCALE.split()],
    )
    # Names of files need not be valid Unicode.
    Path(path).write_text(html, encoding="utf-8", errors="backslashreplace")


def _metric(value: float) -> str:
    return "undefined" if np.isnan(value) else f"{value:.4f}"


def _data_uri(image: Image.Image, side: int) -> tuple[str, int, int]:
    """A shrunk picture as (data URI, width, height)."""
    is_mask = image.mode in ("1", "L")
    shown = image.convert("L" if is_mask else "RGB")
    scale = min(1, side / max(shown.size))
    size = max(1, round(scale * shown.width)), max(1, round(scale * shown.height))
    if is_mask:  # a region that is smaller than a pixel must not vanish
        shown = shown.point(lambda value: 255 if value else 0).resize(size, Image.Resampling.BOX)
        shown = shown.point(lambda value: 255 if value else 0)
    else:
        shown = shown.resize(size, Image.Resampling.LANCZOS)
    stream = io.BytesIO()
    shown.save(stream, "WEBP", lossless=is_mask, quality=85)
    return f"data:image/webp;base64,{base64.b64encode(stream.getvalue()).decode()}", *size


def _overview(categories: Sequence[CategoryReport]) -> dict[str, tuple[float, int]]:
    """Name of a metric → (mean over the categories where it is defined, their number)."""
    overview = {}
    for name in dict.fromkeys(name for category in categories for name in category.metrics):
        values = [category.metrics.get(name, np.nan) for category in categories]
        defined = [value for value in values if not np.isnan(value)]
        overview[name] = (float(np.mean(defined)) if defined else np.nan, len(defined))
    return overview


def _view(category: CategoryReport, id: str) -> dict[str, Any]:
    """What the template shows of a category besides its own fields; `id` begins the ids in its charts."""
    score, defective = np.asarray(category.scores, dtype=np.float64), np.asarray(category.labels).astype(bool)
    return {
        "charts": [_histogram(category, id, score[~defective], score[defective]), *_curves(category, id)],
        "defect_types": _defect_types(category, score, defective),
        "groups": {
            group: [image for image in category.gallery if image.group == group]
            for group in dict.fromkeys(image.group for image in category.gallery)
        },
    }


def _histogram(category: CategoryReport, id: str, good: np.ndarray, bad: np.ndarray) -> Chart:
    labels, threshold = ("image score", "share of the pictures"), category.image_threshold
    svg = histogram_svg(f"{id}-scores", labels, good, bad, threshold)
    summary = "There is no threshold."
    if threshold is not None:
        found, alarms = (bad > threshold).sum(), (good > threshold).sum()
        summary = f"Above the threshold: {found} of {len(bad)} defective and {alarms} of {len(good)} good pictures."
    return Chart("Scores, good against defective", labels, summary, svg)


def _curves(category: CategoryReport, id: str) -> Iterator[Chart]:
    """The charts of the curves that there are."""
    legend = {name: f"{METRIC_NAMES[name]}: {_metric(value)}" for name, value in category.metrics.items()}
    if curves := category.roc:
        labels = "false-positive rate", "true-positive rate"
        svg = curves_svg(f"{id}-roc", labels, curves, {kind: legend[f"{kind}_auroc"] for kind in curves}, chance=True)
        rates = " and ".join(f"{np.interp(0.05, *curve):.3f} for {kind}s" for kind, curve in curves.items())
        yield Chart("ROC", labels, f"True-positive rate at a false-positive rate of 0.05: {rates}.", svg)
    if curves := category.precision_recall:
        labels, texts = ("recall", "precision"), {kind: legend[f"{kind}_ap"] for kind in curves}
        # As in the average precision, a precision holds until the next recall.
        svg = curves_svg(f"{id}-precision-recall", labels, curves, texts, drawstyle="steps-post")
        best = {kind: precision[recall >= 0.9].max() for kind, (recall, precision) in curves.items()}
        precisions = " and ".join(f"{value:.3f} for {kind}s" for kind, value in best.items())
        yield Chart("Precision and recall", labels, f"Best precision at a recall of 0.9 or more: {precisions}.", svg)
    if category.pro is not None:
        labels = "false-positive rate", "mean overlap of the regions"
        text = "\n".join(text for name, text in legend.items() if name.startswith("au_pro"))
        svg = curves_svg(f"{id}-pro", labels, {"pixel": category.pro}, {"pixel": text}, x_end=PRO_LIMIT)
        overlap = np.interp(0.05, *category.pro)
        summary = f"Overlap at a false-positive rate of 0.05: {overlap:.3f}."
        yield Chart("Per-region overlap (PRO)", labels, summary, svg)


def _defect_types(category: CategoryReport, score: np.ndarray, defective: np.ndarray) -> list[dict[str, Any]]:
    """One row for the good pictures and one for each defect type, the hardest to detect first."""
    types = np.asarray(category.defect_types)
    rows: list[dict[str, Any]] = []
    for label, name in dict.fromkeys(zip(defective.tolist(), category.defect_types)):
        own = (defective == label) & (types == name)
        compared = own | ~defective
        above = None if category.image_threshold is None else (score[own] > category.image_threshold).mean()
        rows.append(
            {
                "name": name,
                "defective": label,
                "count": int(own.sum()),
                "scores": (score[own].min(), score[own].mean(), score[own].max()),
                "above": above,
                "auroc": float(roc_auc_score(defective[compared], score[compared]))
                if label and not defective.all()
                else None,
            }
        )
    return sorted(rows, key=lambda row: (row["defective"], row["auroc"] or 0, row["name"]))
