"""A folder that is a Hugging Face Space for one model: the app, this package, the model and what they need.

The package goes along as source, because a Space installs what requirements.txt names before it sees any other file,
and an index need not have this very version.
"""

import os
import shutil
from collections.abc import Sequence
from importlib.metadata import requires
from pathlib import Path

from huggingface_hub import SpaceCard
from packaging.requirements import Requirement

from .image_files import MAX_PIXELS, ImageFileError, find_images, open_image
from .image_processor import DiffusionADImageProcessor
from .pipeline_diffusionad import DiffusionADPipeline
from .shipped_files import PACKAGE, find_shipped
from .weights_files import COMPONENTS, check_pipeline_folder

NAME = "diffusionad_pipe"
HIGHEST_EXAMPLE_COUNT = 6
# What a Space does not run, and what a wheel carries inside the package.
LEFT_OUT = shutil.ignore_patterns("__pycache__", "textures", "training", "spaces_demo")


def write_space(
    model: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    *,
    model_id: str | None = None,
    examples: Sequence[Path] = (),
    max_pixels: int = MAX_PIXELS,
) -> None:
    """Write the folder. `python app.py` starts it wherever its requirements.txt is installed, and so does a Space.

    Args:
        model: the pipeline's folder, or its Hub id.
        folder: to be made; it appears when it is whole.
        model_id: Hub id that the Space's page links to; None takes `model` if that is one.
        max_pixels: examples of more are refused.
        examples: pictures to try the model on, the first six of them; without any those of the hazelnut model stay.

    Raises:
        ValueError: when the folder is there already, the model cannot be used, or an example cannot be read.
    """
    folder = Path(folder)
    if folder.exists():
        raise ValueError(f"{folder} is there already: remove it, or choose another --output")
    is_local = os.path.isdir(model)
    source = Path(model if is_local else DiffusionADPipeline.download(os.fspath(model)))
    check_pipeline_folder(source)
    name = source.absolute().name if is_local else os.fspath(model).rpartition("/")[2]
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(f".{folder.name}.writing")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        shutil.copytree(find_shipped("spaces_demo"), temporary, ignore=LEFT_OUT)
        shutil.copytree(PACKAGE, temporary / NAME, ignore=LEFT_OUT)
        embedded = temporary / "pretrained" / name
        embedded.mkdir(parents=True)
        for file in ("model_index.json", "README.md"):
            if (source / file).is_file():
                shutil.copy(source / file, embedded / file)
        for component in COMPONENTS:
            shutil.copytree(source / component, embedded / component, ignore=_all_but_json_and_safetensors)
        if examples:
            _replace_examples(temporary / "examples", examples[:HIGHEST_EXAMPLE_COUNT], max_pixels)
        requirements = temporary / "requirements.txt"
        requirements.write_text(_spell_out(requirements.read_text(encoding="utf-8")), encoding="utf-8")
        card = SpaceCard.load(temporary / "README.md")
        card.data.title = f"DiffusionAD: {name}"
        card.data.models = [model_id or os.fspath(model)] if model_id or not is_local else None
        (temporary / "README.md").write_text(f"{str(card).rstrip()}\n", encoding="utf-8")
        os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _all_but_json_and_safetensors(folder: str, names: list[str]) -> set[str]:
    return {name for name in names if not name.endswith((".json", ".safetensors"))}


def _replace_examples(folder: Path, pictures: Sequence[Path], max_pixels: int) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    processor = DiffusionADImageProcessor()
    for index, file in enumerate(find_images(pictures), 1):
        try:
            picture = open_image(file, max_pixels=max_pixels)
            tensor, _ = processor.preprocess(picture, picture.height, picture.width)
        except ImageFileError:
            raise
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from error
        processor.postprocess(tensor, "pil")[0].save(folder / f"{index}_{file.stem}.jpg", quality=95)


def _spell_out(requirements: str) -> str:
    """The lines of a requirements.txt with what this package needs in the place of its name."""
    needed = [Requirement(text) for text in requires(NAME) or ()]
    lines = [f"{r.name}{r.specifier}" for r in needed if r.marker is None or r.marker.evaluate({"extra": ""})]
    for line in requirements.splitlines():
        if line.strip() and not line.startswith("#") and Requirement(line).name.replace("-", "_") != NAME:
            lines.append(line)
    return "".join(f"{line}\n" for line in lines)
