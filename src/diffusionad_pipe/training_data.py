"""What training reads: good pictures, textures and foreground mattes, decoded once and kept in memory."""

import logging
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import datasets
import numpy as np
import torch
from PIL import Image
from tqdm.auto import tqdm

from .data import load_anomaly_dataset
from .foreground import FOREGROUND_PROVIDERS, segmentation_model_foreground, threshold_foreground
from .image_files import ImageFileError, find_images, open_image, write_atomically
from .image_processor import DiffusionADImageProcessor

logger = logging.getLogger(__name__)

SHIPPED_TEXTURES = Path(__file__).parent / "textures"

# Where the authors keep their mattes: beside the folder `train`, under the same names.
REFERENCE_FOREGROUNDS = ("DISthresh", "thresh")


class Pictures(NamedTuple):
    """Decoded pictures and what they are called.

    Args:
        names: N paths or row numbers.
        pixels: `[N, 3, H, W]` uint8.
    """

    names: list[str]
    pixels: torch.Tensor


def read_pictures(
    sources: Iterable[tuple[str, Image.Image | str]],
    resolution: int,
    *,
    what: str = "pictures",
    max_unreadable: float = 0.1,
) -> Pictures:
    """Decode pictures and resize them to squares. Unreadable ones are listed and left out.

    Args:
        sources: (name, picture or its path) of each.
        resolution: side in pixels.
        what: for the progress bar and for messages.
        max_unreadable: largest share of unreadable pictures that is put up with.

    Raises:
        ValueError: when more than that share, or every picture, is unreadable.
    """
    processor = DiffusionADImageProcessor()
    names, pixels, count = [], [], 0
    for name, source in tqdm(sources, desc=f"reading {what}", unit="picture", leave=False):
        count += 1
        try:
            picture, _ = processor.preprocess(
                open_image(source) if isinstance(source, str) else source, resolution, resolution
            )
        except ImageFileError as error:
            logger.warning("left out: %s", error)
        except (ValueError, OSError) as error:
            logger.warning("left out: %s: %s", name, error)
        else:
            names.append(name)
            pixels.append((picture[0] * 255).round().byte())
    if not pixels:
        raise ValueError(f"none of the {count} {what} could be read")
    if count - len(pixels) > max_unreadable * count:
        raise ValueError(
            f"{count - len(pixels)} of {count} {what} could not be read, which is more than {max_unreadable:.0%}: "
            "repair or remove them, or allow more with --max_unreadable"
        )
    return Pictures(names, torch.stack(pixels))


def read_good_pictures(
    folder: str | None,
    resolution: int,
    *,
    category: str | None = None,
    dataset_name: str | None = None,
    image_column: str = "image",
    streaming: bool = False,
    max_unreadable: float = 0.1,
) -> Pictures:
    """The good training pictures of a folder, or of the split `train` of a dataset on the Hub or in Parquet files.

    Args:
        folder: any layout of [`load_anomaly_dataset`].
        resolution: side in pixels.
        category: sub-folder, or the Hub dataset's configuration.
        dataset_name: Hub id, or a folder with Parquet files; takes the place of `folder`. Where it has a column `label`
            with a class named good or normal, only that class is read.
        image_column: its column of pictures.
        streaming: do not download the dataset first.
        max_unreadable: as in [`read_pictures`].

    Raises:
        ValueError: names what is missing.
    """
    if dataset_name is None:
        paths = load_anomaly_dataset(folder or "", category=category)["train"]["path"]
        sources: Iterable[tuple[str, Image.Image | str]] = ((path, path) for path in paths)
        return read_pictures(sources, resolution, what="good pictures", max_unreadable=max_unreadable)

    rows = datasets.load_dataset(dataset_name, category, split="train", streaming=streaming)
    features = rows.features or {}
    if features and image_column not in features:
        raise ValueError(f"{dataset_name} has no column {image_column!r}: name one of {', '.join(features)}")
    classes = getattr(features.get("label"), "names", [])
    good = [index for index, name in enumerate(classes) if name.lower() in ("good", "normal", "ok")]
    if good:
        rows = rows.filter(lambda row: row["label"] in good)
    sources = ((f"{dataset_name}[{index}]", row[image_column]) for index, row in enumerate(rows))
    return read_pictures(sources, resolution, what="good pictures", max_unreadable=max_unreadable)


def read_textures(folder: str | None, resolution: int) -> torch.Tensor | None:
    """Textures `[T, 3, H, W]` uint8 of a folder, nested like DTD's or flat; None: the shipped ones, `"none"`: none."""
    if folder == "none":
        return None
    paths = find_images([folder or SHIPPED_TEXTURES])
    return read_pictures(((str(path), str(path)) for path in paths), resolution, what="textures").pixels


def foreground_mattes(
    provider: str,
    pictures: Pictures,
    *,
    folder: str | None = None,
    model: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
) -> torch.Tensor | Literal["random"] | None:
    """Where synthetic anomalies may be, as [`SyntheticAnomalyDataset`] takes it.

    Args:
        provider: `"none"`, `"random"`, `"threshold"`, `"folder"` or `"transformers"`.
        pictures: the good pictures.
        folder: mattes of the provider `folder`, found by the pictures' stems; None looks for the authors' `DISthresh`
            or `thresh` beside the folder `train`.
        model: Hub id or folder of a semantic segmentation model of transformers, for that provider.
        cache_dir: where mattes of such a model are kept as PNG files, to be looked at and not computed again.

    Returns:
        `[N, 1, H, W]` uint8, `"random"` or None.

    Raises:
        ValueError: when mattes are missing, all of them named, or a setting is.
    """
    resolution = pictures.pixels.shape[-1]
    if provider == "none":
        return None
    if provider == "random":
        return "random"
    if provider == "threshold":
        mattes = [threshold_foreground(picture.float() / 255) for picture in pictures.pixels]
        return (torch.stack(mattes) * 255).round().byte()
    if provider == "folder":
        return _read_mattes(_find_mattes(pictures.names, folder), resolution)
    if provider == "transformers":
        if not model:
            raise ValueError("the foreground provider transformers needs --foreground_model, a Hub id or a folder")
        cache = (
            [Path(cache_dir) / f"{i:05d}_{Path(n).stem}.png" for i, n in enumerate(pictures.names)] if cache_dir else []
        )
        if cache and all(path.is_file() for path in cache):
            return _read_mattes(cache, resolution)
        mattes = [segmentation_model_foreground(p.float() / 255, model) for p in tqdm(pictures.pixels, desc="mattes")]
        result = (torch.stack(mattes) * 255).round().byte()
        for path, matte in zip(cache, result):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, Image.fromarray(matte[0].numpy()).save)
        return result
    raise ValueError(f"foreground must be one of {', '.join(FOREGROUND_PROVIDERS)}, not {provider!r}")


def _find_mattes(names: Sequence[str], folder: str | None) -> list[Path]:
    """One matte for each picture; all that are missing are named at once."""
    by_folder: dict[Path, dict[str, Path]] = {}
    found, missing = [], []
    for name in names:
        picture = Path(name)
        if folder is not None:
            places = [Path(folder)]
        else:  # <category>/train/good/000.png -> <category>/DISthresh/good/000.png
            places = [picture.parents[2] / where / picture.parent.name for where in REFERENCE_FOREGROUNDS]
        for place in places:
            if place not in by_folder:
                by_folder[place] = {path.stem: path for path in find_images([place])} if place.is_dir() else {}
        mattes = [by_folder[place][picture.stem] for place in places if picture.stem in by_folder[place]]
        found += mattes[:1]
        missing += [] if mattes else [name]
    if missing:
        listed = "\n  ".join(missing[:20]) + (f"\n  and {len(missing) - 20} more" if len(missing) > 20 else "")
        raise ValueError(
            f"{len(missing)} of {len(names)} pictures have no matte of the same name in "
            f"{folder or ' or '.join(REFERENCE_FOREGROUNDS)}:\n  {listed}\n"
            "Add them, or use --foreground threshold (objects) or random (textures), which need no files"
        )
    return found


def _read_mattes(paths: Sequence[Path], resolution: int) -> torch.Tensor:
    mattes = [
        open_image(path).convert("L").resize((resolution, resolution), Image.Resampling.BILINEAR) for path in paths
    ]
    return torch.from_numpy(np.stack([np.asarray(matte) for matte in mattes]))[:, None]
