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

from ..files.names import safe_name
from ..files.output_folder import OutputFolder
from ..image_processor import DiffusionADImageProcessor
from ..images.files import MAX_PIXELS, ImageFileError, find_images, open_image
from ..loading import COMPONENTS, check_pipeline_folder
from ..pipeline_diffusionad import DiffusionADPipeline

NAME = "diffusionad_pipe"
PACKAGE = Path(__file__).parents[1]
HIGHEST_EXAMPLE_COUNT = 6
# What a Space does not run, and what a wheel carries inside the package.
LEFT_OUT = ("__pycache__", "textures", "training", "spaces_demo")


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
    place = Path(os.path.abspath(folder))
    if os.path.lexists(place):
        raise ValueError(f"{folder} is there already: remove it, or choose another --output")
    is_local = os.path.isdir(model)
    source = Path(model if is_local else DiffusionADPipeline.download(os.fspath(model)))
    check_pipeline_folder(source)
    name = source.absolute().name if is_local else os.fspath(model).rpartition("/")[2]
    space = PACKAGE / "spaces_demo"  # in a wheel
    if not space.is_dir():
        space = PACKAGE.parents[1] / "spaces_demo"  # in a checkout

    def write(path: Path) -> None:
        not_shown = shutil.ignore_patterns(*LEFT_OUT, *(["examples"] if examples else []))
        shutil.copytree(space, path, ignore=not_shown, dirs_exist_ok=True)
        shutil.copytree(PACKAGE, path / NAME, ignore=shutil.ignore_patterns(*LEFT_OUT))
        embedded = path / "pretrained" / safe_name(name)
        embedded.mkdir(parents=True)
        for file in ("model_index.json", "README.md"):
            if (source / file).is_file():
                shutil.copy(source / file, embedded / file)
        for component in COMPONENTS:
            shutil.copytree(source / component, embedded / component, ignore=_all_but_json_and_safetensors)
        if examples:
            _write_examples(path / "examples", examples[:HIGHEST_EXAMPLE_COUNT], max_pixels)
        requirements = path / "requirements.txt"
        requirements.write_text(_spell_out(requirements.read_text(encoding="utf-8")), encoding="utf-8")
        card = SpaceCard.load(path / "README.md")
        card.data.title = f"DiffusionAD: {name}"
        card.data.models = [model_id or os.fspath(model)] if model_id or not is_local else None
        (path / "README.md").write_text(f"{str(card).rstrip()}\n", encoding="utf-8")

    OutputFolder(place.parent, "space").write_tree(place.name, write)


def _all_but_json_and_safetensors(folder: str, names: list[str]) -> set[str]:
    return {name for name in names if not name.endswith((".json", ".safetensors"))}


def _write_examples(folder: Path, images: Sequence[Path], max_pixels: int) -> None:
    folder.mkdir()
    processor = DiffusionADImageProcessor()
    for index, file in enumerate(find_images(images), 1):
        try:
            image = open_image(file, max_pixels=max_pixels)
            tensor, _ = processor.preprocess(image, image.height, image.width)
        except ImageFileError:
            raise
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from error
        processor.postprocess(tensor, "pil")[0].save(folder / f"{index}_{safe_name(file.stem)}.jpg", quality=95)


def _spell_out(requirements: str) -> str:
    """The lines of a requirements.txt with what this package needs in the place of its name."""
    needed = [Requirement(text) for text in requires(NAME) or ()]
    lines = [f"{r.name}{r.specifier}" for r in needed if r.marker is None or r.marker.evaluate({"extra": ""})]
    for line in requirements.splitlines():
        if line.strip() and not line.startswith("#") and Requirement(line).name.replace("-", "_") != NAME:
            lines.append(line)
    return "".join(f"{line}\n" for line in lines)
