"""Measure a pipeline on the test pictures of one or several categories.

Predictions are stored picture by picture: an interrupted evaluation goes on where it was, several processes share the
work, and metrics are computed again without the model. Nothing is chosen here: no threshold, no checkpoint.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from ..files.names import safe_name
from ..files.output_error import OutputError
from ..files.output_folder import OutputFolder
from ..images.files import shown
from ..pipeline_diffusionad import DiffusionADPipeline
from ..runtime.acceleration import join_processes
from .kept_predictions import SETTINGS, StoredPredictions, name_predictions
from .measuring import measure_category, require_stored
from .predicting import predict_category
from .results import CategoryResult, unmeasured
from .settings import EvaluationSettings
from .test_set import TestImages, load_test_images
from .too_few_predicted import TooFewPredictedError


def evaluate(
    model: str | os.PathLike[str] | None,
    data: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    category: str | None = None,
    settings: EvaluationSettings | None = None,
) -> list[CategoryResult]:
    """Predict every test picture and compute the metrics of each category.

    Under `accelerate launch` the processes share the batches; the results are the same for any number of them, and
    only the main process computes metrics.

    Args:
        model: a pipeline's folder or Hub id, or a folder with one pipeline a category, named like it. None computes
            the metrics anew from the predictions in `output`.
        data: any layout of [`load_anomaly_dataset`].
        output: folder for the predictions, in `predictions/<category>`.
        category: one category, `"all"`, or None where `data` holds only one.
        settings: how; None takes the defaults of [`EvaluationSettings`].

    Returns:
        One result a category; none in the processes that are not the main one. A category whose model cannot be loaded,
        or of whose pictures none could be judged, has no metrics.

    Raises:
        OutputError: when `output` cannot be written to, or another run writes into it.
        TooFewPredictedError: when none of all pictures could be judged.
        ValueError: names what is missing.
    """
    join_processes()
    settings = settings or EvaluationSettings()
    categories = load_test_images(data, category, settings.max_pixels, settings.max_aspect_ratio)
    models = None if model is None else find_models(model, [images.category for images in categories])
    return evaluate_categories(categories, models, OutputFolder(output, "evaluate"), settings)


def evaluate_categories(
    categories: Sequence[TestImages], models: Sequence[str] | None, folder: OutputFolder, settings: EvaluationSettings
) -> list[CategoryResult]:
    """[`evaluate`] for pictures and models that have been found.

    Args:
        categories: of [`load_test_images`].
        models: of [`find_models`]; None computes the metrics anew from the predictions in `folder`.
        folder: for the predictions.
        settings: how.
    """
    state = join_processes()
    names = name_predictions([images.category for images in categories])
    with held_by_main(folder, *(f"{name}/{SETTINGS}" for name in names)):
        stored = [StoredPredictions(folder, name) for name in names]
        outcomes: list[dict[int, str] | str] = [{} for _ in categories]
        if models is not None:
            outcomes = _predict_categories(categories, models, stored, settings)
        if not state.is_main_process:
            return []
        folder.read_record()
        for predictions in stored if models is None else ():
            require_stored(predictions, settings)
        results = [
            unmeasured(images, predictions, [outcome])
            if isinstance(outcome, str)
            else measure_category(images, predictions, settings, outcome)
            for images, predictions, outcome in zip(categories, stored, outcomes)
        ]
    if not any(result.rows for result in results):
        sentences = [sentence for result in results for sentence in result.failures]
        raise TooFewPredictedError("none of the test pictures could be judged, so nothing was measured", sentences)
    return results


def _predict_categories(
    categories: Sequence[TestImages],
    models: Sequence[str],
    stored: Sequence[StoredPredictions],
    settings: EvaluationSettings,
) -> list[dict[int, str] | str]:
    """Of each category why pictures could not be judged, or why its model could not be loaded."""
    device = settings.device or PartialState().device
    several = len(set(models)) > 1
    pipe = None
    outcomes: list[dict[int, str] | str] = []
    for images, path, predictions in zip(categories, models, stored):
        if pipe is None or several:
            try:
                pipe = DiffusionADPipeline.from_pretrained(path, dtype=settings.dtype).to(device)
            except (OSError, ValueError) as error:
                if not several:
                    raise
                outcomes.append(f"{images.category}: its model cannot be loaded: {error}")
                continue
            pipe.set_progress_bar_config(disable=True)
            if settings.tiling is not None:
                pipe.enable_tiling(*settings.tiling)
        outcomes.append(predict_category(pipe, images, predictions, settings))
    return outcomes


@contextmanager
def held_by_main(folder: OutputFolder, *names: str) -> Iterator[None]:
    """Let no other run write into a folder: the main process has its lock, and where it cannot get it all fail.

    Args:
        folder: of the output.
        names: files in it that are going to be written.

    Raises:
        OutputError: in every process.
    """
    error = None
    with ExitStack() as stack:
        if PartialState().is_main_process:
            try:
                stack.enter_context(folder)
                folder.require_free(*names)
            except OutputError as caught:
                error = str(caught)
        (error,) = broadcast_object_list([error])
        if error is not None:
            raise OutputError(error)
        yield


def find_models(model: str | os.PathLike[str], categories: Sequence[str]) -> list[str]:
    """The pipeline of each category: one for all of them, or the sub-folder of the category's name.

    A category is text, which may hold slashes: a sub-folder is the category's where both give the same [`safe_name`].

    Raises:
        ValueError: names every category without a pipeline.
    """
    folder = Path(model)
    if not folder.is_dir() or (folder / "model_index.json").is_file():
        return [os.fspath(model)] * len(categories)
    pipelines = {
        safe_name(shown(entry.name)): entry for entry in folder.iterdir() if (entry / "model_index.json").is_file()
    }
    missing = [name for name in categories if safe_name(name) not in pipelines]
    if missing:
        folders = [f"{name} (as {safe_name(name)})" if safe_name(name) != name else name for name in missing]
        raise ValueError(f"{folder} is neither a pipeline nor has it one for {', '.join(folders)}: train them first")
    return [os.fspath(pipelines[safe_name(name)]) for name in categories]
