"""The models that visitors may choose: named by the operator, loaded when first chosen, safetensors only.

torch is imported when the first model is loaded: that takes several seconds, and a page can be shown without it.
"""

import json
import os
import re
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError

from diffusionad_pipe.runtime.config_values import is_finite

if TYPE_CHECKING:
    from diffusionad_pipe import DiffusionADPipeline

MAX_LOADED = 2  # models in memory at once
LOADING = threading.Lock()  # two visitors who choose one model wait for the same copy


class Defaults(NamedTuple):
    """A model's own thresholds and settings, as its files say.

    Args:
        image_threshold: see `app.detect`; None where the model was not calibrated.
        pixel_threshold: likewise.
        small_timestep: see `detection.Settings`.
        large_timestep: likewise.
        guidance_scale: likewise.
        num_train_timesteps: the noise scales are below.
    """

    image_threshold: float | None
    pixel_threshold: float | None
    small_timestep: int
    large_timestep: int
    guidance_scale: float
    num_train_timesteps: int


def read_menu(folders: Iterable[Path], environment: Mapping[str, str]) -> dict[str, str]:
    """The models to choose from.

    Args:
        folders: looked through in this order for pipelines in `pretrained/`; the first that has some counts.
        environment: `DIFFUSIONAD_MODEL`, a model in place of those, and `DIFFUSIONAD_MODELS`, more of them with commas
            between: folders or Hub ids.

    Returns:
        Name -> folder or Hub id, the default first. A folder's name does not tell where it is.

    Raises:
        ValueError: when there is no model, or two have the same name.
    """
    if environment.get("DIFFUSIONAD_MODEL"):
        sources = [environment["DIFFUSIONAD_MODEL"]]
    else:
        found = [sorted(folder.glob("pretrained/*/model_index.json")) for folder in folders]
        sources = [str(path.parent) for path in next((paths for paths in found if paths), [])]
    sources += [source.strip() for source in environment.get("DIFFUSIONAD_MODELS", "").split(",") if source.strip()]
    variable = "DIFFUSIONAD_MODEL" if environment.get("DIFFUSIONAD_MODEL") else "DIFFUSIONAD_MODELS"
    menu: dict[str, str] = {}
    for source in dict.fromkeys(sources):
        name = Path(source).resolve().name if is_folder(source) else source
        if name in menu:
            raise ValueError(f"two models are called {name}: rename a folder in DIFFUSIONAD_MODELS")
        if is_folder(source) and not Path(source, "model_index.json").is_file():
            raise ValueError(f"{source} is no folder of a model: set {variable} to folders or Hub ids of some")
        menu[name] = source
    if not menu:
        raise ValueError("there is no model: set DIFFUSIONAD_MODEL to the folder or the Hub id of one")
    return menu


def is_folder(source: str) -> bool:
    """Whether a model's source is a folder, be it there or not, and no Hub id."""
    return os.path.isdir(source) or source.startswith((".", "/", "~")) or "\\" in source or source.count("/") > 1


def read_defaults(name: str, source: str) -> Defaults:
    """What the controls of the page begin with, read without loading the model.

    Args:
        name: what visitors call the model.
        source: its folder or Hub id.

    Raises:
        ValueError: as [`load_model`].
    """
    with sentences_for(name, source):
        found: dict[str, Any] = {}
        for file in ("model_index.json", "scheduler/scheduler_config.json"):
            config = json.loads(_find_file(source, file).read_text(encoding="utf-8"))
            found |= config if isinstance(config, dict) else {}
        thresholds = {field for field in Defaults._fields[:2] if field in found and found[field] is None}
        unusable = [field for field in Defaults._fields if field not in thresholds and not is_finite(found.get(field))]
        if unusable:
            raise ValueError(f"{name} is no DiffusionAD pipeline: its files do not say {', '.join(unusable)}")
        return Defaults(*(found[field] for field in Defaults._fields))


def load_model(name: str, source: str) -> "DiffusionADPipeline":
    """The pipeline of a model, from memory where it was used lately.

    Args:
        name: what visitors call it.
        source: its folder or Hub id.

    Raises:
        ValueError: when it cannot be loaded; a sentence without a path of this machine.
    """
    with sentences_for(name, source), LOADING:
        return _load(source)


@contextmanager
def sentences_for(name: str, source: str) -> Iterator[None]:
    """Turn whatever goes wrong with a model's files into a ValueError for visitors."""
    try:
        yield
    except RepositoryNotFoundError as error:
        message = "the Hub has no such model, or it is private; check the id, and set HF_TOKEN if it is yours"
        raise ValueError(f"{name}: {message}") from error
    except HFValidationError as error:
        raise ValueError(f"{name}: this is no Hub id; write user/model") from error
    except (LocalEntryNotFoundError, HfHubHTTPError, ConnectionError) as error:
        raise ValueError(f"{name}: the Hub cannot be reached, or refuses; try again later") from error
    except (ValueError, OSError, ImportError) as error:
        # Without the folders that lead to the model and to its files.
        message = re.sub(r"(?:(?<=^)|(?<=[\s'\"(]))/(?:[^\s:'\"]*/)*", "", str(error).replace(source, name))
        raise ValueError(message if name in message else f"{name}: {message}") from error


@lru_cache(maxsize=MAX_LOADED)
def _load(source: str) -> "DiffusionADPipeline":
    import torch

    from diffusionad_pipe import DiffusionADPipeline
    from diffusionad_pipe.runtime.progress import silence_libraries

    silence_libraries()
    pipe = DiffusionADPipeline.from_pretrained(source).to("cuda" if torch.cuda.is_available() else "cpu")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _find_file(source: str, name: str) -> Path:
    return Path(source, name) if is_folder(source) else Path(hf_hub_download(source, name))


def read_model_card(source: str) -> str:
    """The model's README.md as Markdown, without its metadata and its pictures.

    Args:
        source: folder or Hub id.

    Returns:
        The text, or "" where there is none.
    """
    try:
        text = _find_file(source, "README.md").read_text(encoding="utf-8")
    except (OSError, ValueError):  # the Hub's errors are among them
        return ""
    text = re.sub(r"\A\s*---\n.*?\n---\n", "", text, flags=re.DOTALL)
    # A picture would be missing here, or be requested from another server.
    return re.sub(r"!\[[^\]]*\]\([^)]*\)|<img[^>]*>", "", text).strip()
