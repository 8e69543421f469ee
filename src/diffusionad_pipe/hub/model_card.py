"""Fills model_card.md, the template of every model's README, and keeps it true after a measurement."""

import json
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..evaluation.calibration import smallest_rate
from ..files.output_folder import OutputFolder
from ..files.single_files import edit_file
from ..metrics import METRIC_NAMES

NO_RESULTS = "Not measured on test pictures yet."


def write_model_card(
    folder: str | os.PathLike[str],
    config: dict[str, Any],
    *,
    image_count: int,
    held_out_count: int,
    best_step: int,
    hours: float,
    hardware: str,
    validation: dict[str, float],
) -> None:
    """Write `README.md` beside a pipeline that was trained here, without results.

    Args:
        folder: the pipeline's folder; its `model_index.json` holds the thresholds.
        config: the training configuration.
        image_count: good pictures, held-out ones included.
        held_out_count: of them held out.
        best_step: the step whose weights were kept; its picture grid, if there is one, is shown.
        hours: that training took.
        hardware: that it ran on.
        validation: metrics of the kept weights on the held-out pictures, names of `METRIC_NAMES`.

    Raises:
        OutputError: when it cannot be written, or a card is there that training did not write.
    """
    index = _read_index(folder)
    dataset, samples = config["dataset_name"], f"samples/step-{best_step:07d}.png"
    on_the_hub = dataset is not None and not Path(dataset).exists()
    teacher = config.get("distill")
    base = config.get("pretrained_model_name_or_path") or teacher
    base_on_the_hub = base is not None and not Path(base).exists()
    card = _fill(
        folder,
        Path(folder).absolute().name,
        {
            "license": config["license"],
            "datasets": [dataset] if on_the_hub else None,
            "base_model": base if base_on_the_hub else None,
        },
        # The folder's name only: its place on the machine is not published.
        training_data=config["dataset_title"]
        or (dataset if on_the_hub else Path(config["train_data_dir"] or dataset).name),
        base=base if base is None or base_on_the_hub else Path(base).name,
        teacher=teacher if teacher is None or not Path(teacher).exists() else Path(teacher).absolute().name,
        training_images=image_count - held_out_count,
        held_out_images=held_out_count,
        config=config,
        best_step=best_step,
        hours=hours,
        hardware=hardware,
        validation={METRIC_NAMES[name]: value for name, value in validation.items()},
        image=samples if (Path(folder) / samples).is_file() else None,
        thresholds=describe_thresholds(
            index["image_threshold"],
            index["pixel_threshold"],
            f"{held_out_count} held-out good pictures",
            held_out_count,
            config["false_positive_rate"],
        ),
        license_note=config["license_note"]
        or "The weights are under the licence of their training pictures"
        + (", and of the model that taught them." if teacher else "."),
    )
    OutputFolder(folder, "train", "--output_dir").write_text("README.md", _text_of(card))


def write_plain_card(folder: str | os.PathLike[str], origin: str, name: str | None = None) -> None:
    """Write `README.md` beside a pipeline of which nobody here knows how it was trained.

    Args:
        folder: the pipeline's folder.
        origin: sentences on where its weights are from.
        name: of the model; None takes the folder's.
    """
    index = _read_index(folder)
    thresholds = "None is set: the model gives scores and maps, and no decisions. `diffusionad calibrate` sets both."
    if index.get("image_threshold") is not None and index.get("pixel_threshold") is not None:
        thresholds = (
            f"{index['image_threshold']:.4f} for the image score and {index['pixel_threshold']:.4f} for pixels. Where "
            "they come from is not known here; `diffusionad calibrate` sets both anew."
        )
    note = "Not stated: ask for it where the weights come from."
    name = name or Path(folder).absolute().name
    _save(folder, _fill(folder, name, {}, config=None, origin=origin, thresholds=thresholds, license_note=note))


def describe_thresholds(image: float, pixel: float, images: str, count: int, false_positive_rate: float) -> str:
    """What both thresholds promise, for a card.

    Args:
        image: threshold of the image score.
        pixel: threshold of the map.
        images: what they come from, such as `"100 good pictures"`.
        count: how many these are.
        false_positive_rate: α that they aim at.
    """
    text = (
        f"{image:.4f} for the image score and {pixel:.4f} for pixels. They come from {images}, never from test "
        "pictures. "
    )
    if smallest_rate(count) <= false_positive_rate * (1 + 1e-9):
        return text + (
            f"A new good picture of the same kind is called defective with a probability of at most "
            f"{100 * false_positive_rate:g} % (split conformal prediction, on average over calibrations), and the same "
            "share of a good picture's pixels is marked, on average."
        )
    return text + (
        f"So few cannot promise fewer false alarms than {100 * smallest_rate(count):.0f} %: a good picture scores "
        "above the highest of them that often, on average over models. Where that is higher, the threshold that "
        "separates them best from synthetic anomalies was taken. Calibrate on "
        f"{math.ceil(1 / false_positive_rate - 1e-9) - 1} good pictures or more (`diffusionad calibrate`) before you "
        "rely on the decision."
    )


def write_thresholds(folder: str | os.PathLike[str], text: str) -> None:
    """Replace the section "Thresholds" of a model card.

    Args:
        folder: the pipeline's folder with a `README.md`.
        text: of [`describe_thresholds`].

    Raises:
        ValueError: when the card has no such section.
    """
    card = ModelCard.load(Path(folder) / "README.md", ignore_metadata_errors=True)
    _replace_section(folder, card, "Thresholds", text)
    _save(folder, card)


def require_section(folder: str | os.PathLike[str], title: str) -> None:
    """Fail before a measurement where its result could not be put into the model card.

    Args:
        folder: the pipeline's folder.
        title: of the section that is going to be replaced.

    Raises:
        ValueError: when there is no card, or no such section in it.
    """
    path = Path(folder) / "README.md"
    if not path.is_file():
        raise ValueError(f"{path}: there is no such model card to put results into; add one, or leave out --model-card")
    _replace_section(folder, ModelCard.load(path, ignore_metadata_errors=True), title, "")


def write_results(
    folder: str | os.PathLike[str], metrics: Mapping[str, Mapping[str, float]], table: str, source: str
) -> None:
    """Put measured results into a model card: its section "Results" and the Hub's model index.

    Args:
        folder: the pipeline's folder with a `README.md` of [`write_model_card`].
        metrics: test set → name → value, names of `METRIC_NAMES`; NaN is left out.
        table: the same for a person, Markdown.
        source: sentence that says what was measured and by which command.

    Raises:
        ValueError: when the card has no section "Results".
    """
    card = ModelCard.load(Path(folder) / "README.md")
    _replace_section(folder, card, "Results", f"{source}\n\n{table.strip()}")
    card.data.eval_results = [
        EvalResult("image-segmentation", dataset, dataset, name, value, metric_name=METRIC_NAMES[name])
        for dataset, values in metrics.items()
        for name, value in values.items()
        if not math.isnan(value)
    ]
    _save(folder, card)


def address_card(text: str, repository: str) -> str:
    """The text of a model card whose example loads the model from where it is published.

    Args:
        text: of a `README.md`.
        repository: the Hub id, `user/model`.
    """
    return re.sub(r"""(DiffusionADPipeline\.from_pretrained\()(["']).*?\2""", rf'\g<1>"{repository}"', text)


def _read_index(folder: str | os.PathLike[str]) -> dict[str, Any]:
    return json.loads((Path(folder) / "model_index.json").read_text(encoding="utf-8"))


def _fill(folder: str | os.PathLike[str], name: str, metadata: dict[str, Any], **values: Any) -> ModelCard:
    title = f"DiffusionAD, {name}"
    card_data = ModelCardData(
        library_name="diffusers",
        pipeline_tag="image-segmentation",
        tags=["anomaly-detection", "diffusionad", "diffusionad_pipe"],
        model_name=title,
        **metadata,
    )
    template = str(Path(__file__).with_name("model_card.md"))
    return ModelCard.from_template(
        card_data,
        template_path=template,
        title=title,
        model_id=name,
        decides=_read_index(folder).get("image_threshold") is not None,
        results=NO_RESULTS,
        **values,
    )


def _replace_section(folder: str | os.PathLike[str], card: ModelCard, title: str, text: str) -> None:
    before, heading, rest = card.text.partition(f"\n## {title}\n")
    _, next_heading, after = rest.partition("\n## ")
    if not heading or not next_heading:
        raise ValueError(
            f"{Path(folder) / 'README.md'} has no section {title!r} to fill: add a heading '## {title}' in it"
        )
    card.text = f"{before}{heading}\n{text}\n{next_heading}{after}"


def _save(folder: str | os.PathLike[str], card: ModelCard) -> None:
    edit_file(Path(folder) / "README.md", _text_of(card))


def _text_of(card: ModelCard) -> str:
    return re.sub("\n{3,}", "\n\n", str(card)).rstrip("\n") + "\n"  # empty lines of what the template leaves out
