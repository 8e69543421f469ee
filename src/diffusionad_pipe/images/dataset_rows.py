"""Rows of a dataset of Hugging Face `datasets`: from the Hub, or from Parquet files here."""

from pathlib import Path
from typing import Any

from ..files.hub_caches import explained_caches


def load_rows(dataset: str, configuration: str | None = None, split: str | None = None, streaming: bool = False) -> Any:
    """`datasets.load_dataset`, whose errors are one sentence.

    Args:
        dataset: its Hub id, a Parquet file, or a folder that `load_dataset` reads.
        configuration, split, streaming: as there.

    Returns:
        The rows of the split, or without one a dictionary of all splits.

    Raises:
        ValueError: names the dataset, the cause and the cure.
        OutputError: where the caches of downloads and prepared datasets cannot be written.
        ModuleNotFoundError: without the package `datasets`.
    """
    import datasets

    is_file = Path(dataset).suffix == ".parquet"
    if is_file and not Path(dataset).is_file():
        raise ValueError(f"{dataset}: there is no such file; check the path")
    source: dict[str, Any] = {"path": "parquet", "data_files": dataset} if is_file else {"path": dataset}
    with explained_caches():
        try:
            return datasets.load_dataset(**source, name=configuration, split=split, streaming=streaming)
        except Exception as error:  # every format has errors of its own
            cause = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ValueError(
                f"{dataset} cannot be read as a dataset ({cause}): give a Hub id, a Parquet file or a folder of them"
            ) from error
