"""Loading a pipeline from the Hub or a folder, once it is sure that all of it is there, whole and fitting.

diffusers would fall back to pickles, fill missing keys with random numbers and allocate whatever a config asks
for. Here every one of these is one clear error, found from the files' headers alone.
"""

import importlib
import inspect
import json
import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from diffusers import ConfigMixin, DiffusionPipeline
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open

from .files.hub_caches import explained_caches
from .runtime.acceleration import fastest_dtype
from .runtime.config_values import is_whole

# A model_index.json names Python modules that the loader imports. Ours, and the two libraries we accept parts from.
TRUSTED_LIBRARIES = ("diffusionad_pipe", "diffusers", "transformers")
COMPONENTS = ("unet", "segmentation", "scheduler")


class WeightsFileError(ValueError):
    """A file of a saved pipeline is missing, damaged, untrusted or does not fit; the message names it and the cure."""


class LoadedFromFolderMixin(DiffusionPipeline):
    """How [`DiffusionADPipeline`] is loaded: from a folder or the Hub, checked, and safetensors only."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any):
        """Load a pipeline from a folder or from the Hugging Face Hub; safetensors only.

        Args:
            pretrained_model_name_or_path: a folder that `save_pretrained` wrote, or a Hub id such as `"user/model"`.
            kwargs: those of diffusers (`dtype`, `variant`, `revision`, `token`, `cache_dir`, `local_files_only`, ...),
                components, or values for the pipeline's config such as `image_threshold=0.4`. `dtype` is that of the
                networks, but for the segmentation network's first convolution; the rest is computed in float32. None
                loads float32, with which thresholds are calibrated and results documented; `"auto"` loads bfloat16
                where the GPU, or the CPU if there is none, has instructions for it, and float32 elsewhere. Where there
                is no GPU, weights in bfloat16 are laid out channels last, which is faster (docs/benchmarks.md).

        Raises:
            WeightsFileError: the folder or a file is missing, damaged, a pickle, or does not fit; the message names it.
        """
        if kwargs.pop("use_safetensors", True) is False:
            raise WeightsFileError("only safetensors are loaded: a pickle could run code. Leave use_safetensors out")
        dtype = kwargs.pop("torch_dtype", None) if kwargs.get("dtype") is None else kwargs["dtype"]
        if isinstance(dtype, str) and dtype == "auto":
            dtype = fastest_dtype("cuda" if torch.cuda.is_available() else "cpu")
        kwargs["dtype"] = torch.float32 if dtype is None else dtype
        folder = origin = os.fspath(pretrained_model_name_or_path)
        if os.path.isdir(folder):
            origin = Path(folder).resolve().name
        else:
            hub_arguments = ("cache_dir", "force_download", "local_files_only", "revision", "token", "variant")
            folder = cls.download(folder, **{k: kwargs[k] for k in hub_arguments if k in kwargs})
        passed = [name for name in COMPONENTS if name in kwargs]
        index = check_pipeline_folder(folder, kwargs.get("variant"), passed)
        names = inspect.signature(cls).parameters.keys() - set(COMPONENTS)
        settings = {name: value for name, value in {**index, **kwargs}.items() if name in names}
        without_parts: dict[str, Any] = {**settings, **dict.fromkeys(COMPONENTS)}
        try:
            cls(**without_parts)  # an unusable setting is found before any weights are read
            # However this process builds its own networks: weights made in inference mode are multiplied otherwise.
            with torch.device("cpu"), torch.inference_mode(False):
                pipeline = super().from_pretrained(folder, use_safetensors=True, **kwargs)
        except (TypeError, ValueError) as error:
            raise WeightsFileError(f"{Path(folder) / 'model_index.json'} cannot be used: {error}") from error
        for name in ("unet", "segmentation"):
            network = pipeline.components[name]
            if name not in passed and network.dtype == torch.bfloat16 and not torch.cuda.is_available():
                network.to(memory_format=torch.channels_last)
        # diffusers notes the folder of every part and would save it again: a path of this machine in public files.
        for part in [pipeline] + [pipeline.components[name] for name in COMPONENTS if name not in passed]:
            if isinstance(part, ConfigMixin) and "_name_or_path" in part.config:
                part.register_to_config(_name_or_path=origin)
        return pipeline

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **kwargs: Any):
        """Another pipeline around the same networks, which stay as they are and take no memory again.

        Args:
            pipeline: whose components and config values are taken.
            kwargs: others in place of some: components, or values such as `noise_seed=1`; and `dtype`, to which both
                pipelines' networks are then converted.
        """
        given = kwargs.pop("torch_dtype", None)
        dtype = kwargs.pop("dtype", None) or given
        names = inspect.signature(cls).parameters.keys() - set(COMPONENTS)
        values = {name: value for name, value in pipeline.config.items() if name in names}
        new = cls(**{**pipeline.components, **values, **kwargs})
        new._records_cuda_graphs = pipeline._records_cuda_graphs
        if "_name_or_path" in pipeline.config:
            new.register_to_config(_name_or_path=pipeline.config._name_or_path)
        return new if dtype is None else new.to(dtype=dtype)

    @classmethod
    def download(cls, pretrained_model_name: str, **kwargs: Any) -> str:
        """Download a pipeline from the Hub and return its folder; arguments and errors are those of
        [`loading.download_pipeline`].
        """
        return download_pipeline(pretrained_model_name, **kwargs)


def read_safetensors_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors in a safetensors file, from its header.

    Args:
        path: the file.

    Raises:
        WeightsFileError: for a Git-LFS pointer, a pickle, a truncated file, or anything else that is not safetensors.
    """
    try:
        with open(path, "rb") as file:
            start = file.read(64)
        if start.startswith(b"version https://git-lfs"):
            raise WeightsFileError(f"{path} is a Git-LFS pointer, not the weights: run `git lfs pull` where it is")
        if start[:2] in (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"):
            raise WeightsFileError(f"{path} is a pickle, which could run code and is not loaded: ask for safetensors")
        with safe_open(path, framework="pt") as tensors:  # checks that header and size agree
            return {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise WeightsFileError(f"{path} is truncated or not a safetensors file ({error}): download it again") from error


def check_pipeline_folder(
    folder: str | os.PathLike[str], variant: str | None = None, passed: Collection[str] = ()
) -> dict[str, Any]:
    """Check every component of a saved pipeline.

    Args:
        folder: the folder with `model_index.json`.
        variant: the weights' variant, such as `"fp16"`; components without it use their plain weights.
        passed: names of components that do not come from the folder.

    Returns:
        What `model_index.json` holds.

    Raises:
        WeightsFileError: names the file, the cause and the cure.
    """
    folder = Path(folder)
    index_path = folder / "model_index.json"
    index = _read_json(index_path)
    for name, entry in index.items():
        if name.startswith("_") or not isinstance(entry, list) or entry == [None, None]:
            continue
        if not entry or str(entry[0]).split(".")[0] not in TRUSTED_LIBRARIES:
            raise WeightsFileError(
                f"{index_path} wants {name} from {entry}; only modules of {', '.join(TRUSTED_LIBRARIES)} are trusted"
            )
    if variant and not any(folder.glob(f"*/*.{variant}*.safetensors")):
        # The first half is diffusers' own wording, which its users and its tests look for.
        raise WeightsFileError(
            f"You are trying to load the model files of the `variant={variant}`, but {folder} has none: "
            "leave variant out"
        )

    for name in COMPONENTS:
        if name in passed:
            continue
        entry = index.get(name)
        if not isinstance(entry, list) or len(entry) != 2 or not all(isinstance(part, str) for part in entry):
            raise WeightsFileError(
                f"{index_path} names no {name}: give a folder that DiffusionADPipeline.save_pretrained wrote"
            )
        library, class_name = entry
        try:
            component_class = getattr(importlib.import_module(library), class_name)
        except (ImportError, AttributeError) as error:
            raise WeightsFileError(
                f"{index_path} wants {name} to be {library}.{class_name}, which cannot be imported ({error}): "
                "update diffusionad_pipe, or install that library"
            ) from error
        if not hasattr(component_class, "from_pretrained"):
            raise WeightsFileError(f"{index_path} wants {name} to be {library}.{class_name}, which cannot be loaded")
        if library.split(".")[0] == "transformers":
            _check_transformers_model(folder / name, component_class, variant)
        else:
            _check_component(folder / name, component_class, variant)
    return index


def _check_component(folder: Path, component_class: type[ConfigMixin], variant: str | None) -> None:
    """Check a network or a scheduler that is built from diffusers' classes."""
    config_path = folder / component_class.config_name
    config = _read_config(config_path)
    # A network may be large; a scheduler is small, and looks at its numbers.
    device = "meta" if issubclass(component_class, torch.nn.Module) else "cpu"
    try:
        with torch.device(device):
            component = component_class.from_config(config)
    except (TypeError, AttributeError, ValueError, RuntimeError, ArithmeticError) as error:
        raise WeightsFileError(
            f"{config_path} does not describe a {component_class.__name__} ({error}): download it again"
        ) from error
    if not isinstance(component, torch.nn.Module):
        return
    expected = {key: tuple(value.shape) for key, value in component.state_dict().items()}
    found = _read_shapes(folder, "diffusion_pytorch_model", variant)
    if expected != found:
        missing, unknown = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
        common = expected.keys() & found.keys()
        shapes = [f"{k} is {found[k]}, not {expected[k]}" for k in common if expected[k] != found[k]]
        causes = [f"{len(missing)} tensors are missing, such as {missing[0]}"] if missing else []
        causes += [f"{len(unknown)} are unknown, such as {unknown[0]}"] if unknown else []
        causes += [f"{len(shapes)} have another shape: {min(shapes)}"] if shapes else []
        raise _misfit(folder, "; ".join(causes))


def _check_transformers_model(folder: Path, model_class: Any, variant: str | None) -> None:
    """transformers stores tensors under other names than its networks use, so it compares them itself."""
    config = _read_config(folder / "config.json")
    shapes = _read_shapes(folder, "model", variant)
    # transformers makes layers and labels one by one: with a damaged or hostile number it would not end.
    depths = config.get("depths")
    for number in [config.get("num_labels"), *(depths if isinstance(depths, list) else [depths])]:
        if is_whole(number) and number > len(shapes):
            raise _misfit(folder, f"{number} layers or labels, but {len(shapes)} tensors")
    options = {"variant": variant} if variant and any(folder.glob(f"*.{variant}*.safetensors")) else {}
    try:
        _, report = model_class.from_pretrained(
            folder, device_map="meta", output_loading_info=True, use_safetensors=True, local_files_only=True, **options
        )
    except ImportError:  # accelerate is missing; the message says so
        raise
    except Exception as error:  # transformers has many kinds
        raise _misfit(folder, str(error)) from error
    causes = [f"{kind.replace('_', ' ')} {sorted(keys)[0]}" for kind, keys in report.items() if keys]
    if causes:
        raise _misfit(folder, "; ".join(causes))


def _misfit(folder: Path, cause: str) -> WeightsFileError:
    return WeightsFileError(
        f"the weights in {folder} do not fit {folder / 'config.json'}: {cause}. "
        "Take both from the same model, or download it again"
    )


def _read_shapes(folder: Path, stem: str, variant: str | None) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a network's tensors, from the very files that diffusers and transformers would load."""
    suffix = f".{variant}" if variant and any(folder.glob(f"{stem}.{variant}*.safetensors")) else ""
    index_path = folder / f"{stem}.safetensors.index{suffix}.json"
    if not index_path.is_file():
        path = folder / f"{stem}{suffix}.safetensors"
        if not path.is_file():
            pickles = sorted(p for p in folder.glob("*") if p.suffix in (".bin", ".pt", ".pth", ".ckpt"))
            cause = f"{pickles[0]} is a pickle, which could run code" if pickles else f"{path} is missing"
            raise WeightsFileError(f"{cause}, and only safetensors are loaded: ask for them, or download again")
        return read_safetensors_shapes(path)

    weight_map = _read_json(index_path).get("weight_map")
    if not isinstance(weight_map, dict) or not all(
        isinstance(name, str) and name.endswith(".safetensors") and Path(name).name == name
        for name in weight_map.values()
    ):
        raise WeightsFileError(f"{index_path} lists no safetensors files beside it: download the model again")
    shards = {}
    for name in sorted(set(weight_map.values())):
        if not (folder / name).is_file():
            raise WeightsFileError(f"{folder / name} is missing, which {index_path.name} lists: download it again")
        shards[name] = read_safetensors_shapes(folder / name)
    return {key: shards[name][key] for key, name in weight_map.items() if key in shards[name]}


def _read_config(path: Path) -> dict[str, Any]:
    config = _read_json(path)
    if "quantization_config" in config:
        raise WeightsFileError(f"{path} asks for quantized weights, which are not supported: take the plain ones")
    return config


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise WeightsFileError(f"{path} is missing: give the folder that save_pretrained wrote, whole") from None
    except (OSError, ValueError, RecursionError) as error:
        raise WeightsFileError(f"{path} cannot be read ({error}): download the model again") from error
    if not isinstance(content, dict):
        raise WeightsFileError(f"{path} does not hold a JSON object: download the model again")
    return content


@explained_caches()
def download_pipeline(name: str, **kwargs: Any) -> str:
    """Download a pipeline and return its folder.

    Args:
        name: a Hub id such as `"user/model"`.
        kwargs: `variant`, and those of `huggingface_hub.snapshot_download` (`revision`, `token`, `cache_dir`,
            `local_files_only`, `force_download`).

    Raises:
        WeightsFileError: for a path, at which there is no folder.
        OutputError: where the cache of the Hub cannot be written.
    """
    if name.count("/") > 1 or name.startswith((".", "/", "~")) or "\\" in name:
        raise WeightsFileError(
            f"there is no folder {name!r}: give one that save_pretrained wrote, or a Hub id user/model"
        )
    passed_on = ("cache_dir", "force_download", "local_files_only", "revision", "token")
    options = {k: kwargs[k] for k in passed_on if kwargs.get(k) is not None}
    networks, variant = ["unet", "segmentation"], kwargs.get("variant")
    # Whole paths: a `*` matches across folders, so `*/config.json` would take training checkpoints too.
    patterns = ["model_index.json", "scheduler/scheduler_config.json"] + [f"{n}/config.json" for n in networks]
    if variant:
        folder = snapshot_download(name, allow_patterns=patterns + _weights_patterns(networks, variant), **options)
        # A network without the variant uses its plain weights, from the same commit. Without any there is no use.
        plain = [n for n in networks if not any(Path(folder, n).glob(f"*.{variant}*.safetensors"))]
        if plain in ([], networks):
            return folder
        networks, options = plain, {**options, "revision": Path(folder).name}
    return snapshot_download(name, allow_patterns=patterns + _weights_patterns(networks), **options)


def _weights_patterns(networks: list[str], variant: str | None = None) -> list[str]:
    """Names of the weights, of their shards and of the shards' index."""
    stems = [f"{n}/{stem}" for n in networks for stem in ("diffusion_pytorch_model", "model")]  # ... and transformers'
    infix = f".{variant}" if variant else ""
    names = ("{0}{1}.safetensors", "{0}{1}-*.safetensors", "{0}.safetensors.index{1}.json")
    return [name.format(stem, infix) for stem in stems for name in names]
