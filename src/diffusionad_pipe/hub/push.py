"""Models and their Spaces on the Hugging Face Hub."""

import os
import tempfile
from pathlib import Path

import yaml
from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.utils import filter_repo_objects

from ..loading import check_pipeline_folder
from .model_card import address_card, write_plain_card
from .space_folder import write_space

# Whole paths: a run's checkpoints hold files of the same names.
PUBLISHED = [
    "model_index.json", "README.md", "training_config.yaml", "log.jsonl", "losses.png", "panels.jpg", "samples/*.png",
    "scheduler/*.json", "unet/*.json", "unet/*.safetensors", "segmentation/*.json", "segmentation/*.safetensors",
]  # fmt: skip


def push_model(folder: str | os.PathLike[str], repository: str, *, private: bool = False) -> str:
    """Upload a pipeline in one commit: weights, thresholds, card, configuration, log and pictures; no checkpoints.

    The example in the card loads the model from where it now is, and no path of this machine is published.

    Args:
        folder: the pipeline's folder; a card is written where there is none.
        repository: Hub id `user/model`, or `model` for the account that is logged in; made if need be.
        private: whether a new repository is.

    Returns:
        The Hub id.

    Raises:
        WeightsFileError: names the file that keeps the folder from being a pipeline.
        OSError: of the Hub.
    """
    folder = Path(folder)
    check_pipeline_folder(folder)
    if not (folder / "README.md").is_file():
        write_plain_card(folder, "How this model was trained is not known to who published it here.")
    hub = HfApi()
    repository = hub.create_repo(repository, exist_ok=True, private=private or None).repo_id
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    operations = []
    for name in filter_repo_objects(names, allow_patterns=PUBLISHED):
        content: str | bytes = str(folder / name)
        if name == "README.md":
            content = address_card((folder / name).read_text(encoding="utf-8"), repository).encode()
        elif name == "training_config.yaml":
            content = _without_paths((folder / name).read_text(encoding="utf-8")).encode()
        operations.append(CommitOperationAdd(path_in_repo=name, path_or_fileobj=content))
    hub.create_commit(repository, operations, commit_message="Upload DiffusionAD pipeline")
    return repository


def push_space(folder: str | os.PathLike[str], model: str, repository: str, *, private: bool = False) -> str:
    """Upload a Space for a model.

    Args:
        folder: the model's folder; it is embedded.
        model: its Hub id, which the Space links to.
        repository: Hub id of the Space; made if need be.
        private: whether a new Space is.

    Returns:
        The Space's Hub id.

    Raises:
        OSError: of the Hub.
    """
    hub = HfApi()
    repository = hub.create_repo(
        repository, repo_type="space", space_sdk="gradio", exist_ok=True, private=private or None
    ).repo_id
    with tempfile.TemporaryDirectory() as temporary:
        space = Path(temporary) / "space"
        write_space(folder, space, model_id=model)
        hub.upload_folder(repo_id=repository, repo_type="space", folder_path=space, commit_message="Upload the Space")
    return repository


def _without_paths(text: str) -> str:
    """The settings of a run with names in place of absolute paths."""
    settings = yaml.safe_load(text)
    for name, value in settings.items():
        if isinstance(value, str) and os.path.isabs(value):
            settings[name] = os.path.basename(os.path.normpath(value))
    return yaml.safe_dump(settings, sort_keys=False)
