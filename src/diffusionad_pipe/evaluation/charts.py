"""The charts of a report, drawn by matplotlib as SVG that stands in the page itself."""

import io
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np

from ..runtime.figures import import_matplotlib

BINS = 30  # of the histogram

# matplotlib draws in these colors, and the page shows its own in their place: its CSS has a light and a dark scheme.
INK, MUTED, LINE, FIRST, SECOND = "#000001", "#000002", "#000003", "#000004", "#000005"
PAGE_COLORS = dict(zip((INK, MUTED, LINE, FIRST, SECOND), ("ink", "muted", "line", "first", "second")))
STYLE = {
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "figure.figsize": (4.7, 4.3),
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 12.5,
    "legend.borderaxespad": 0,
    "legend.borderpad": 0.2,
    "legend.fontsize": 14,
    "legend.frameon": False,
    "lines.linewidth": 2.25,
    "path.simplify_threshold": 0.3,  # a pixel curve of a million points becomes some hundreds
    "svg.fonttype": "none",
    "svg.hashsalt": "diffusionad",  # the same results give the same file
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    **dict.fromkeys(["axes.facecolor", "figure.facecolor"], "none"),
    **dict.fromkeys(["axes.labelcolor", "xtick.color", "ytick.color"], MUTED),
    **dict.fromkeys(["axes.edgecolor", "grid.color"], LINE),
    "legend.labelcolor": INK,
}
LINES: dict[str, dict[str, Any]] = {"image": {"color": FIRST}, "pixel": {"color": SECOND, "linestyle": "--"}}


def histogram_svg(id: str, labels: tuple[str, str], good: np.ndarray, bad: np.ndarray, threshold: float | None) -> str:
    """The image scores of good pictures upwards and of defective ones downwards, each as shares of their kind.

    Args:
        id: what all ids in the SVG begin with; no other chart of a page may have it.
        labels: of the horizontal and the vertical axis.
        good: `[N]` finite scores.
        bad: of defective pictures, the same.
        threshold: None where there is none.
    """
    edges = np.histogram_bin_edges(np.concatenate([good, bad, [] if threshold is None else [threshold]]), BINS)
    kinds = ("good", good, 1, "upwards", FIRST), ("defective", bad, -1, "downwards", SECOND)
    with _page_style():
        figure, axes = _axes(labels)
        for kind, scores, sign, direction, color in kinds:
            shares, label = np.full(len(scores), sign / max(len(scores), 1)), f"{len(scores)} {kind}, {direction}"
            axes.hist(scores, edges, weights=shares, color=color, label=label, gid=kind, histtype="stepfilled")
        axes.axhline(0, color=INK, linewidth=1)
        if threshold is not None:
            axes.axvline(threshold, color=INK, linestyle="--", linewidth=1.75, label=f"threshold {threshold:.4g}")
        axes.yaxis.set_major_formatter(lambda share, _: f"{abs(share):.0%}")
        return _to_svg(figure, id)


def curves_svg(
    id: str,
    labels: tuple[str, str],
    curves: Mapping[str, tuple[np.ndarray, np.ndarray]],
    legend: Mapping[str, str],
    *,
    x_end: float = 1.0,
    drawstyle: str = "default",
    chance: bool = False,
) -> str:
    """Curves in the unit square, or in the part of it up to `x_end`.

    Args:
        id: as in [`histogram_svg`].
        labels: the same.
        curves: `"image"` and `"pixel"`, or one of them → (x, y).
        legend: of each curve, its text.
        drawstyle: as in matplotlib.
        chance: whether the diagonal is drawn.
    """
    with _page_style():
        figure, axes = _axes(labels)
        axes.set(xlim=(-0.01 * x_end, 1.01 * x_end), ylim=(-0.01, 1.01))
        if chance:
            axes.plot([0, 1], [0, 1], color=MUTED, linestyle=":", linewidth=1)
        for kind, curve in curves.items():
            axes.plot(*curve, **LINES[kind], label=legend[kind], drawstyle=drawstyle, gid=f"{kind}-curve")
        return _to_svg(figure, id)


@contextmanager
def _page_style() -> Iterator[None]:
    """Our style on matplotlib's own defaults, whatever is set on this machine."""
    import_matplotlib()
    from matplotlib import style

    with style.context(["default", STYLE]):
        yield


def _axes(labels: tuple[str, str]) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(layout="constrained")
    axes = figure.subplots()
    axes.set(xlabel=labels[0], ylabel=labels[1])
    axes.locator_params(nbins=5)
    return figure, axes


def _to_svg(figure: Any, id: str) -> str:
    figure.legend(loc="outside upper left")
    stream = io.StringIO()
    figure.savefig(stream, format="svg", metadata=dict.fromkeys(["Date", "Creator", "Type", "Format"]))
    svg = stream.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<defs>\s*<style.*?</defs>", "", svg, count=1, flags=re.DOTALL)  # a rule for all the page
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{id}-", svg)
    return re.sub("|".join(PAGE_COLORS), lambda color: f"var(--{PAGE_COLORS[color[0]]})", svg)
