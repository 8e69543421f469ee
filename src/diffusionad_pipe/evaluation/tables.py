"""Results of an evaluation as tables, beside the figures that were published."""

import csv
import json
import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from ..files.output_folder import OutputFolder
from ..metrics import METRIC_NAMES, mean_metrics
from .results import CategoryResult

MEAN = "mean"
TABLES = ("results.md", "results.json", "results.csv", "scores.csv")

PUBLISHED = Path(__file__).with_name("published.yaml")


def published_rows(categories: Sequence[str]) -> list[tuple[str, dict[str, float]]]:
    """What was published on these categories: what and by whom, and metrics as fractions of 1.

    A mean is given where all categories of the benchmark are there.
    """
    rows = []
    for benchmark, published in yaml.safe_load(PUBLISHED.read_text(encoding="utf-8")).items():
        names, own = set(published["categories"]), set(categories)
        if own <= names:
            shown = own | {MEAN} if own == names else own
            for figures in published["figures"]:
                source = figures.pop("source")
                rows += [(f"{name}, {benchmark}: {source}", figures[name]) for name in figures if name in shown]
    return rows


def result_rows(results: Sequence[CategoryResult]) -> list[dict[str, Any]]:
    """One row a category, and the mean where there are several: category, good, defective, and the metrics."""
    rows = []
    for result in results:
        defective = sum(row["label"] for row in result.rows)
        counts = {"category": result.category, "good": len(result.rows) - defective, "defective": defective}
        rows.append(counts | result.metrics)
    if len(results) > 1:
        counts = {"category": MEAN} | {name: sum(row[name] for row in rows) for name in ("good", "defective")}
        rows.append(counts | mean_metrics([result.metrics for result in results]))
    return rows


def markdown_table(results: Sequence[CategoryResult]) -> str:
    """The rows of [`result_rows`], what was published, and remarks; a metric that is not defined or known is a dash."""
    rows = result_rows(results)
    names = [name for name in METRIC_NAMES if any(name in row for row in rows)]

    def line(first: str, good: object, defective: object, metrics: dict[str, Any]) -> str:
        values = [metrics.get(name, math.nan) for name in names]
        cells = ["–" if math.isnan(value) else f"{value:.4f}" for value in values]
        return " | ".join(["", _cell(first), str(good), str(defective), *cells, ""]).strip()

    titles = ["category", "good", "defective"] + [METRIC_NAMES[name] for name in names]
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    lines += [line(row["category"], row["good"], row["defective"], row) for row in rows]
    published = published_rows([result.category for result in results])
    lines += [line(f"*{title}*", "", "", metrics) for title, metrics in published]
    text = "\n".join(lines) + "\n"
    if published:
        text += "\nPublished figures are of the benchmark's full test set and of the paper's full-size networks.\n"
    remarks = [f"- {_cell(result.category)}: {remark}" for result in results for remark in result.remarks]
    if len(results) > 1:
        undefined = {name: sum(math.isnan(result.metrics.get(name, 0)) for result in results) for name in names}
        counts = [f"{METRIC_NAMES[name]} ({count})" for name, count in undefined.items() if count]
        if counts:
            remarks.append(f"- categories left out of a mean, since a metric is NaN there: {', '.join(counts)}")
    return text + "\n" * bool(remarks) + "".join(f"{remark}\n" for remark in remarks)


def cost(result: CategoryResult) -> str:
    """Times and memory in one sentence; these differ from run to run, the tables do not."""
    return (
        f"{result.seconds:.3g} s a picture in the pipeline (median), {result.metrics_seconds:.3g} s for the metrics, "
        f"at most {result.memory / 2**20:.0f} MiB of memory"
    )


def write_tables(results: Sequence[CategoryResult], folder: OutputFolder, settings: dict[str, Any]) -> None:
    """Write `results.md`, `results.csv`, `results.json` and, a row a picture, `scores.csv`: all of them or none.

    In a name that is no Unicode, what is none is escaped.

    Args:
        results: of [`evaluate`].
        folder: that the evaluation writes into.
        settings: how it was measured, for the JSON file.
    """
    rows = result_rows(results)
    columns = ["category", "good", "defective"] + [name for name in METRIC_NAMES if any(name in row for row in rows)]
    scores = [{"category": result.category} | row for result in results for row in result.rows]
    measured = [
        {
            "remarks": result.remarks,
            "f1_max_thresholds": _without_nan(result.f1_max_thresholds),
            "seconds_per_image": result.seconds,
            "seconds_for_metrics": result.metrics_seconds,
            "peak_memory_bytes": result.memory,
        }
        for result in results
    ]
    plain = [_without_nan(row | others) for row, others in zip(rows, [*measured, {}])]
    text = json.dumps({"settings": settings, "results": plain}, indent=1, ensure_ascii=False)
    score_columns = ["category", "path", "defect_type", "label", "score", "decision"]
    folder.write_together(
        {
            "results.md": partial(_write_text, text=markdown_table(results)),
            "results.json": partial(_write_text, text=text),
            "results.csv": partial(_write_csv, columns=columns, rows=rows),
            "scores.csv": partial(_write_csv, columns=score_columns, rows=scores),
        }
    )


def _without_nan(values: Mapping[str, Any]) -> dict[str, Any]:
    """JSON has no NaN."""
    return {name: None if isinstance(value, float) and math.isnan(value) else value for name, value in values.items()}


def _cell(text: str) -> str:
    """A name in a line of Markdown."""
    return " ".join(text.split()).replace("|", "\\|")


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8", errors="backslashreplace")  # the escape of half a character is JSON's, too


def _write_csv(path: Path, columns: Sequence[str], rows: Sequence[dict[str, Any]]) -> None:
    with open(path, "w", newline="", encoding="utf-8", errors="backslashreplace") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
