"""A pipeline's files from the Hugging Face Hub, and no others.

diffusers' own `download` refuses components that are defined outside diffusers (its issue 6563), so this takes the
files that a pipeline is made of itself.
"""

from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download

from .hub_caches import explained_caches
from .weights_files import WeightsFileError


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
