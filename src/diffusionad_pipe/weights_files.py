"""Checks of a pipeline folder before anything in it is loaded: what is there, is it whole, and does it fit.

diffusers would fall back to pickles, fill missing keys with random numbers and allocate whatever a config asks
for. Here every one of these is one clear error, found from the files' headers alone.
"""

import importlib
import json
import os
import struct
from pathlib import Path
from typing import Any

import torch

# A model_index.json names Python modules that the loader imports. Ours, and the two libraries we accept parts from.
TRUSTED_LIBRARIES = ("diffusionad_pipe", "diffusers", "transformers")
MAX_HEADER_BYTES = 100_000_000


class WeightsFileError(ValueError):
    """A file of a saved pipeline is missing, damaged, untrusted or does not fit; the message names it and the cure."""


def read_safetensors_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors in a safetensors file, from its header.

    Args:
        path: the file.

    Raises:
        WeightsFileError: for a Git-LFS pointer, a pickle, a truncated file, or anything else that is not safetensors.
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        start = file.read(64)
        if start.startswith(b"version https://git-lfs"):
            raise WeightsFileError(f"{path} is a Git-LFS pointer, not the weights: run `git lfs pull` in its repository")
        if start[:2] in (b"PK", b"\x80\x02", b"\x80\x04", b"\x80\x05"):
            raise WeightsFileError(f"{path} is a pickle, which could run code and is not loaded: ask for safetensors")
        try:
            (header_size,) = struct.unpack("<Q", start[:8])
            if header_size > min(size - 8, MAX_HEADER_BYTES):
                raise ValueError("its header says it is longer than the file")
            file.seek(8)
            header: dict[str, Any] = json.loads(file.read(header_size))
            header.pop("__metadata__", None)
            end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
            shapes = {name: tuple(entry["shape"]) for name, entry in header.items()}
        except (struct.error, ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
            raise WeightsFileError(f"{path} is not a safetensors file ({error}): download it again") from error
    if 8 + header_size + end != size:
        raise WeightsFileError(
            f"{path} has {size} bytes where its header promises {8 + header_size + end}: download it again"
        )
    return shapes


def check_pipeline_folder(folder: str | os.PathLike[str], variant: str | None = None) -> None:
    """Check every component of a saved pipeline.

    Args:
        folder: the folder with `model_index.json`.
        variant: the weights' variant, such as `"fp16"`; components without it use their plain weights.

    Raises:
        WeightsFileError: names the file, the cause and the cure.
    """
    folder = Path(folder)
    index = _read_json(folder / "model_index.json")
    for name, entry in index.items():
        if name.startswith("_") or not isinstance(entry, list) or len(entry) != 2 or entry[0] is None:
            continue
        library, class_name = entry
        if str(library).split(".")[0] not in TRUSTED_LIBRARIES:
            raise WeightsFileError(
                f"{folder / 'model_index.json'} wants {name} from the module {library!r}; "
                f"only {', '.join(TRUSTED_LIBRARIES)} are trusted"
            )
        if str(library).startswith("diffusionad_pipe.unet_2d"):
            _check_network(folder / name, library, class_name, variant)
        elif name != "scheduler":
            for pickle_file in (folder / name).glob("*.bin"):
                if not any((folder / name).glob("*.safetensors")):
                    raise WeightsFileError(f"{pickle_file} is a pickle and is not loaded: ask for safetensors")


def _check_network(folder: Path, library: str, class_name: str, variant: str | None) -> None:
    config = _read_json(folder / "config.json")
    stem = "diffusion_pytorch_model"
    # The variant first; shards (name-00001-of-00002) count as one file.
    candidates = [f"{stem}.{variant}*.safetensors"] if variant else []
    candidates += [f"{stem}.safetensors", f"{stem}-*.safetensors"]
    files = next((found for pattern in candidates if (found := sorted(folder.glob(pattern)))), [])
    if not files:
        pickles = sorted(folder.glob("*.bin")) + sorted(folder.glob("*.pt")) + sorted(folder.glob("*.pth"))
        if pickles:
            raise WeightsFileError(f"{pickles[0]} is a pickle, which could run code and is not loaded: ask for safetensors")
        raise WeightsFileError(f"{folder} holds no {stem}.safetensors: download the whole model again")

    try:
        network_class = getattr(importlib.import_module(library), class_name)
        with torch.device("meta"):
            network = network_class.from_config(config)
    except (ImportError, AttributeError, TypeError, ValueError, RuntimeError, ZeroDivisionError) as error:
        raise WeightsFileError(f"{folder / 'config.json'} does not describe a {class_name}: {error}") from error
    expected = {key: tuple(value.shape) for key, value in network.state_dict().items()}
    found = {key: shape for file in files for key, shape in read_safetensors_shapes(file).items()}
    if expected != found:
        missing, unknown = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
        shapes = [f"{k} is {found[k]}, not {expected[k]}" for k in expected.keys() & found.keys() if expected[k] != found[k]]
        causes = [f"{len(missing)} tensors are missing, such as {missing[0]}"] if missing else []
        causes += [f"{len(unknown)} are unknown, such as {unknown[0]}"] if unknown else []
        causes += [f"{len(shapes)} have another shape: {min(shapes)}"] if shapes else []
        raise WeightsFileError(
            f"{files[0]} does not fit {folder / 'config.json'}: {'; '.join(causes)}. "
            "Take both from the same model, or download it again"
        )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise WeightsFileError(f"{path} is missing: give the folder that save_pretrained wrote, whole") from None
    except (OSError, ValueError) as error:
        raise WeightsFileError(f"{path} cannot be read ({error}): download the model again") from error
    if not isinstance(content, dict):
        raise WeightsFileError(f"{path} does not hold a JSON object: download the model again")
    return content
