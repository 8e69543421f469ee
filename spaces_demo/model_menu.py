"""The models that visitors may choose: named by the operator, loaded when first chosen, safetensors only."""

import os
import re
import threading
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError

from diffusionad_pipe import DiffusionADPipeline

MAX_LOADED = 2  # models in memory at once
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LOADING = threading.Lock()  # two visitors who choose one model wait for the same copy


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
    menu: dict[str, str] = {}
    for source in dict.fromkeys(sources):
        name = Path(source).resolve().name if is_folder(source) else source
        if name in menu:
            raise ValueError(f"two models are called {name}: rename a folder in DIFFUSIONAD_MODELS")
        menu[name] = source
    if not menu:
        raise ValueError("there is no model: set DIFFUSIONAD_MODEL to the folder or the Hub id of one")
    return menu


def is_folder(source: str) -> bool:
    """Whether a model's source is a folder, be it there or not, and no Hub id."""
    return os.path.isdir(source) or source.startswith((".", "/", "~")) or "\\" in source or source.count("/") > 1


def load_model(name: str, source: str) -> DiffusionADPipeline:
    """The pipeline of a model, from memory where it was used lately.

    Args:
        name: what visitors call it.
        source: its folder or Hub id.

    Raises:
        ValueError: when it cannot be loaded; a sentence without a path of this machine.
    """
    try:
        with LOADING:
            return _load(source)
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
def _load(source: str) -> DiffusionADPipeline:
    pipe = DiffusionADPipeline.from_pretrained(source).to(DEVICE)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def read_model_card(source: str) -> str:
    """The model's README.md as Markdown, without its metadata and its pictures.

    Args:
        source: folder or Hub id.

    Returns:
        The text, or "" where there is none.
    """
    try:
        path = Path(source, "README.md") if is_folder(source) else Path(hf_hub_download(source, "README.md"))
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError):  # the Hub's errors are among them
        return ""
    text = re.sub(r"\A\s*---\n.*?\n---\n", "", text, flags=re.DOTALL)
    # A picture would be missing here, or be requested from another server.
    return re.sub(r"!\[[^\]]*\]\([^)]*\)|<img[^>]*>", "", text).strip()
