"""Results of an evaluation in the model cards of the models that were measured."""

from collections.abc import Sequence
from pathlib import Path

from ..evaluation.results import CategoryResult
from ..evaluation.tables import markdown_table
from .model_card import require_section, write_results


def require_cards(models: Sequence[str]) -> None:
    """Fail before the work where [`write_into_cards`] would after it.

    Args:
        models: of [`find_models`].

    Raises:
        ValueError: when one is no folder, or has no card with a section for results.
    """
    for model in dict.fromkeys(models):
        if not Path(model).is_dir():
            raise ValueError(f"--model-card writes into a model's folder, and {model} is none: give the folder")
        require_section(model, "Results")


def write_into_cards(results: Sequence[CategoryResult], models: Sequence[str], data: str, how: str) -> None:
    """Put results into the README.md of the model's folder, or of each category's model.

    Args:
        results: of [`evaluate`].
        models: of [`find_models`].
        data: name of the dataset.
        how: completes "Measured with `diffusionad evaluate`, ...".
    """
    by_folder: dict[str, list[CategoryResult]] = {}
    for result, folder in zip(results, models):
        if result.rows:
            by_folder.setdefault(folder, []).append(result)
    for folder, measured in by_folder.items():
        source = f"Measured on the test pictures of `{data}` with `diffusionad evaluate`, {how}."
        metrics = {result.category: result.metrics for result in measured}
        write_results(folder, metrics, markdown_table(measured), source)
