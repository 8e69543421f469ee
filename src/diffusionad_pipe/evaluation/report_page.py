"""A report to look at: one HTML file with the curves, tables and pictures of an evaluation.

The file needs nothing but itself: no script, no other file, no request. `report.html` is its template.
"""

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image
from skimage.measure import approximate_polygon
from sklearn.metrics import roc_auc_score

from ..images.colors import COLOR_SCALE
from ..images.files import PathLike
from ..metrics import METRIC_NAMES, f1_max
from ..runtime.figures import import_matplotlib

WEAK_DEFECTS = "Missed or weakest defects"
ALARMING_GOOD = "Good pictures with the highest scores"
BORDERLINE = "Closest to the threshold"
CLEAR_DEFECTS = "Defects that stand out most"

WIDTH, HEIGHT = 260, 208  # a chart's plotting area, in its own pixels
BINS = 30  # of the histogram
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


@dataclass
class CategoryReport:
    """What was measured on the test pictures of one category.

    Args:
        name: of the category.
        metrics: name of `METRIC_NAMES` → value, NaN where it is undefined; has the AUROC or AP of each curve below.
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
    environment.globals |= {"METRIC_NAMES": METRIC_NAMES, "WIDTH": WIDTH, "HEIGHT": HEIGHT}
    html = environment.get_template("report.html").render(
        title=title,
        categories=[(category, _view(category)) for category in categories],
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


def _view(category: CategoryReport) -> dict[str, Any]:
    """What the template shows of a category besides its own fields."""
    score, defective = np.asarray(category.scores, dtype=np.float64), np.asarray(category.labels).astype(bool)
    threshold = category.image_threshold
    spread = score if threshold is None else np.append(score, threshold)
    import_matplotlib()
    from matplotlib.ticker import MaxNLocator

    ticks = MaxNLocator(4, steps=[1, 2, 2.5, 5, 10]).tick_values(spread.min(), spread.max())
    start, length = ticks[0], ticks[-1] - ticks[0]

    def position(value: float | np.ndarray) -> Any:
        return (value - start) / length * WIDTH

    return {
        "good": int((~defective).sum()),
        "defective": int(defective.sum()),
        "found": None if threshold is None else int((score[defective] > threshold).sum()),
        "false_alarms": None if threshold is None else int((score[~defective] > threshold).sum()),
        "threshold": None if threshold is None else position(threshold),
        "score_ticks": [(position(tick), f"{tick:g}") for tick in ticks],
        "histogram": _histogram(score, defective, np.linspace(ticks[0], ticks[-1], BINS + 1)),
        "charts": _charts(category),
        "defect_types": _defect_types(category, score, defective, position(score)),
        "groups": {
            group: [image for image in category.gallery if image.group == group]
            for group in dict.fromkeys(image.group for image in category.gallery)
        },
    }


def _charts(category: CategoryReport) -> list[dict[str, Any]]:
    """The curves that there are, as the template draws them."""
    charts = []
    if category.roc:
        rates = " and ".join(f"{np.interp(0.05, *curve):.3f} for {kind}s" for kind, curve in category.roc.items())
        charts.append(
            {
                "heading": "ROC",
                "axes": ("false-positive rate", "true-positive rate"),
                "x_end": 1.0,
                "lines": {kind: _curve_path(*curve) for kind, curve in category.roc.items()},
                "legend": [(kind, f"{kind}_auroc") for kind in category.roc],
                "summary": f"True-positive rate at a false-positive rate of 0.05: {rates}.",
            }
        )
    if category.precision_recall:
        best = {k: precision[recall >= 0.9].max() for k, (recall, precision) in category.precision_recall.items()}
        precisions = " and ".join(f"{value:.3f} for {kind}s" for kind, value in best.items())
        charts.append(
            {
                "heading": "Precision and recall",
                "axes": ("recall", "precision"),
                "x_end": 1.0,
                "lines": {k: _curve_path(*curve, steps=True) for k, curve in category.precision_recall.items()},
                "legend": [(kind, f"{kind}_ap") for kind in category.precision_recall],
                "summary": f"Best precision at a recall of 0.9 or more: {precisions}.",
            }
        )
    if category.pro is not None:
        fpr, overlap = category.pro
        end = min(PRO_LIMIT, fpr[-1])
        inside = fpr < end
        cut = np.append(fpr[inside], end), np.append(overlap[inside], np.interp(end, fpr, overlap))
        charts.append(
            {
                "heading": "Per-region overlap (PRO)",
                "axes": ("false-positive rate", "mean overlap of the regions"),
                "x_end": PRO_LIMIT,
                "lines": {"pixel": _curve_path(*cut, x_end=PRO_LIMIT)},
                "legend": [("pixel", name) for name in category.metrics if name.startswith("au_pro")],
                "summary": f"Overlap at a false-positive rate of 0.05: {np.interp(0.05, fpr, overlap):.3f}.",
            }
        )
    return charts


def _curve_path(x: np.ndarray, y: np.ndarray, *, x_end: float = 1.0, steps: bool = False) -> str:
    """SVG path of a curve, to a fifth of a chart's pixel: a pixel curve of a million points becomes a few dozen.

    Args:
        x: `[N]` in [0, x_end].
        y: `[N]` in [0, 1].
        steps: as in the average precision, y holds until the next x and then jumps.
    """
    points = np.stack([np.divide(x, x_end) * WIDTH, np.subtract(1, y) * HEIGHT], axis=1).round(1)
    points = points[np.append(True, (np.diff(points, axis=0) != 0).any(axis=1))]
    if steps:
        points = np.stack([points[:, 0].repeat(2)[1:], points[:, 1].repeat(2)[:-1]], axis=1)
    return "M" + "L".join(f"{px:g} {py:g}" for px, py in approximate_polygon(points, 0.2))


def _histogram(score: np.ndarray, defective: np.ndarray, edges: np.ndarray) -> dict[str, Any]:
    """Bars of the good pictures upwards and of the defective ones downwards from the middle, each as shares."""
    counts = {
        kind: np.histogram(score[mask], edges)[0] for kind, mask in (("good", ~defective), ("defective", defective))
    }
    shares = {kind: count / max(count.sum(), 1) for kind, count in counts.items()}
    largest = max(share.max() for share in shares.values())
    bars = []
    for kind, share in shares.items():
        for index in np.flatnonzero(share):
            height = share[index] / largest * HEIGHT / 2
            bars.append(
                {
                    "kind": kind,
                    "x": index * WIDTH / BINS,
                    "y": HEIGHT / 2 - (height if kind == "good" else 0),
                    "height": height,
                    "title": f"{counts[kind][index]} {kind}: {edges[index]:.4g} to {edges[index + 1]:.4g}",
                }
            )
    return {"bars": bars, "largest": largest, "width": WIDTH / BINS}


def _defect_types(
    category: CategoryReport, score: np.ndarray, defective: np.ndarray, position: np.ndarray
) -> list[dict[str, Any]]:
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
                "mean": score[own].mean(),
                "above": above,
                "auroc": float(roc_auc_score(defective[compared], score[compared]))
                if label and not defective.all()
                else None,
                "range": f"{own.sum()} scores from {score[own].min():.4g} to {score[own].max():.4g}",
                "strip": "".join(f"M{x:.1f} 0v16" for x in position[own]),
            }
        )
    return sorted(rows, key=lambda row: (row["defective"], row["auroc"] or 0, row["name"]))
