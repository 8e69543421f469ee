"""What training reads: good pictures, textures and foreground mattes, decoded once and kept in memory."""

import hashlib
import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import datasets
import numpy as np
import torch
import torch.nn.functional as F
from PIL import ExifTags, Image

from ..data.layouts import REFERENCE_FOREGROUNDS
from ..data.loading import load_anomaly_dataset
from ..data.masks import read_matte
from ..files.hub_caches import explained_caches
from ..files.names import safe_name
from ..files.output_folder import OutputFolder
from ..files.record import sha256_of
from ..image_processor import DiffusionADImageProcessor
from ..images.dataset_rows import load_rows
from ..images.files import MAX_PIXELS, ImageFileError, find_images, open_cell, open_image, shown
from ..runtime.progress import tracked
from ..synthesis.config import Foreground
from ..synthesis.foregrounds import (
    segmentation_model_digest,
    segmentation_model_foreground,
    threshold_foreground,
)

logger = logging.getLogger(__name__)

Source: TypeAlias = Image.Image | str | Mapping[str, Any]

SHIPPED_TEXTURES = Path(__file__).parents[1] / "synthesis" / "textures"
FOREGROUNDS = "foregrounds"  # where mattes are cached


class ImageInputs(NamedTuple):
    """Decoded pictures and what they are called.

    Args:
        names: N paths or row numbers.
        pixels: `[N, 3, H, W]` uint8.
        digests: N hashes of what they were before they were resized: of files, or of pictures that have none.
    """

    names: list[str]
    pixels: torch.Tensor
    digests: list[str]


def read_images(
    sources: Iterable[tuple[str, Source]],
    resolution: int,
    *,
    what: str = "pictures",
    max_unreadable: float = 0.1,
    max_pixels: int = MAX_PIXELS,
) -> ImageInputs:
    """Decode pictures and resize them to squares. Unreadable ones are listed and left out.

    Args:
        sources: of each its name, and the picture, its path or its cell in a dataset.
        resolution: side in pixels.
        what: for the progress bar and for messages.
        max_unreadable: largest share of unreadable pictures that is tolerated.
        max_pixels: pictures of more are not read.

    Raises:
        ValueError: when more than that share, or every picture, is unreadable.
    """
    processor = DiffusionADImageProcessor()
    names, pixels, digests, count = [], [], [], 0
    for name, source in tracked(sources, f"reading {what}", "picture"):
        count += 1
        try:
            image, _ = processor.preprocess(_open(source, name, max_pixels), resolution, resolution)
            digest = digest_of(source)
        except ImageFileError as error:
            logger.warning("left out: %s", error)
        except (ValueError, OSError) as error:
            logger.warning("left out: %s: %s", name, error)
        else:
            names.append(name)
            pixels.append((image[0] * 255).round().byte())
            digests.append(digest)
    if not pixels:
        raise ValueError(f"none of the {count} {what} could be read")
    if count - len(pixels) > max_unreadable * count:
        raise ValueError(
            f"{count - len(pixels)} of {count} {what} could not be read, which is more than {max_unreadable:.0%}: "
            "repair or remove them, or allow more with --max_unreadable"
        )
    return ImageInputs(names, torch.stack(pixels), digests)


def digest_of(source: Source) -> str:
    """A hash of a picture, as hexadecimal digits: of its file, or where it has none of its pixels and their meaning."""
    if isinstance(source, Mapping):
        content = source.get("bytes")
        return hashlib.sha256(content).hexdigest() if content is not None else sha256_of(source["path"])
    if isinstance(source, str):
        return sha256_of(source)
    meaning = source.mode, source.size, source.getexif().get(ExifTags.Base.Orientation)
    digest = hashlib.sha256(repr(meaning).encode())
    digest.update(bytes(source.getpalette() or ()))
    digest.update(source.tobytes())
    return digest.hexdigest()


def _open(source: Source, name: str, max_pixels: int) -> Image.Image:
    if isinstance(source, Image.Image):
        return source
    if isinstance(source, Mapping):
        return open_cell(source, name, max_pixels=max_pixels)
    return open_image(source, max_pixels=max_pixels)


def read_good_images(
    folder: str | None,
    resolution: int,
    *,
    category: str | None = None,
    dataset_name: str | None = None,
    image_column: str = "image",
    streaming: bool = False,
    max_unreadable: float = 0.1,
    max_pixels: int = MAX_PIXELS,
) -> ImageInputs:
    """The good training pictures of a folder, or of the split `train` of a dataset on the Hub or in Parquet files.

    Args:
        folder: any layout of [`load_anomaly_dataset`].
        resolution: side in pixels.
        category: sub-folder, or the Hub dataset's configuration.
        dataset_name: Hub id, or a folder with Parquet files; takes the place of `folder`. Where it has a column `label`
            with a class named good or normal, only that class is read.
        image_column: its column of pictures.
        streaming: do not download the dataset first.
        max_unreadable: as in [`read_images`].
        max_pixels: as in [`read_images`].

    Raises:
        ValueError: names what is missing.
    """
    limits: dict[str, Any] = {"max_unreadable": max_unreadable, "max_pixels": max_pixels}
    if dataset_name is None:
        train = load_anomaly_dataset(folder or "", category=category, max_pixels=max_pixels)["train"]
        cells = train.cast_column("image", datasets.Image(decode=False))["image"]
        return read_images(zip(train["path"], cells), resolution, what="good pictures", **limits)

    rows = load_rows(dataset_name, category, split="train", streaming=streaming)
    features = rows.features or {}
    if features and image_column not in features:
        raise ValueError(f"{dataset_name} has no column {image_column!r}: name one of {', '.join(features)}")
    classes = getattr(features.get("label"), "names", [])
    good = [index for index, name in enumerate(classes) if name.lower() in ("good", "normal", "ok")]
    if good:
        with explained_caches():
            rows = rows.filter(lambda row: row["label"] in good)
    if isinstance(features.get(image_column), datasets.Image):  # else it decodes them itself, by rules of its own
        rows = rows.cast_column(image_column, datasets.Image(decode=False))
    sources = ((f"{dataset_name}[{index}]", row[image_column]) for index, row in enumerate(rows))
    return read_images(sources, resolution, what="good pictures", **limits)


def read_textures(
    folder: str | None, resolution: int, *, max_unreadable: float = 0.1, max_pixels: int = MAX_PIXELS
) -> torch.Tensor | None:
    """Textures `[T, 3, H, W]` uint8 of a folder, nested like DTD's or flat; None: the shipped ones, `"none"`: none.
    The limits are as in [`read_images`]."""
    if folder == "none":
        return None
    paths = find_images([folder or SHIPPED_TEXTURES])
    sources = ((shown(path), str(path)) for path in paths)
    limits: dict[str, Any] = {"max_unreadable": max_unreadable, "max_pixels": max_pixels}
    return read_images(sources, resolution, what="textures", **limits).pixels


def textures_digest(folder: str | None) -> str | None:
    """A hash of the files that [`read_textures`] reads, in their order; None where that is none."""
    return None if folder == "none" else _digest_of_files(find_images([folder or SHIPPED_TEXTURES]))


def foreground_mattes(
    provider: str,
    images: ImageInputs,
    *,
    folder: str | None = None,
    model: str | None = None,
    cache: OutputFolder | None = None,
    max_pixels: int = MAX_PIXELS,
) -> torch.Tensor | Literal["random"] | None:
    """Where synthetic anomalies may be, as [`SyntheticAnomalyDataset`] takes it.

    Args:
        provider: `"none"`, `"random"`, `"threshold"`, `"folder"` or `"transformers"`.
        images: the good pictures.
        folder: mattes of the provider `folder`, found by the pictures' stems; None looks for the authors' `DISthresh`
            or `thresh` beside the folder `train`.
        model: Hub id or folder of a semantic segmentation model of transformers, for that provider.
        cache: where mattes of such a model are kept, in the sub-folder `FOREGROUNDS`, to be looked at and not computed
            again for the same picture and model.
        max_pixels: mattes of more are refused.

    Returns:
        `[N, 1, H, W]` uint8, `"random"` or None.

    Raises:
        ValueError: when mattes are missing, all of them named, or a setting is.
    """
    resolution = images.pixels.shape[-1]
    if provider == "none":
        return None
    if provider == "random":
        return "random"
    if provider == "threshold":
        mattes = [threshold_foreground(image.float() / 255) for image in images.pixels]
        return (torch.stack(mattes) * 255).round().byte()
    if provider == "folder":
        return _read_mattes(_find_mattes(images.names, folder), resolution, max_pixels)
    if provider == "transformers":
        if not model:
            raise ValueError("the foreground provider transformers needs --foreground_model, a Hub id or a folder")
        digest = segmentation_model_digest(model)
        mattes = []
        for name, pixels in zip(tracked(images.names, "making mattes", "matte"), images.pixels):
            key = hashlib.sha256(digest.encode() + repr(pixels.shape).encode() + pixels.numpy().tobytes()).hexdigest()
            file = f"{FOREGROUNDS}/{safe_name(Path(name).stem)}-{key[:16]}.png"
            if cache is not None and cache.owns(file):
                mattes.append(torch.from_numpy(np.array(open_image(cache.path / file)))[None])
                continue
            matte = (segmentation_model_foreground(pixels.float() / 255, model) * 255).round().byte()
            if cache is not None:
                cache.write(file, Image.fromarray(matte[0].numpy()).save)
            mattes.append(matte)
        return torch.stack(mattes)
    raise ValueError(f"foreground must be one of {', '.join(get_args(Foreground))}, not {provider!r}")


def mattes_digest(
    provider: str, names: Sequence[str], *, folder: str | None = None, model: str | None = None
) -> str | None:
    """A hash of what [`foreground_mattes`] takes beside the pictures, files or a model; None where that is nothing.

    Args:
        provider, folder, model: as there.
        names: of the pictures.
    """
    if provider == "folder":
        return _digest_of_files(_find_mattes(names, folder))
    return segmentation_model_digest(model) if provider == "transformers" and model else None


def _digest_of_files(paths: Iterable[Path]) -> str:
    return hashlib.sha256("".join(map(sha256_of, paths)).encode()).hexdigest()


def _find_mattes(names: Sequence[str], folder: str | None) -> list[Path]:
    """One matte for each picture; all that are missing, or could be another's, are named at once."""
    by_folder: dict[Path, dict[str, list[Path]]] = {}
    found: list[Path | None] = []
    for name in names:
        image = Path(name)
        if folder is not None:
            places = [Path(folder)]
        else:  # <category>/train/good/000.png -> <category>/DISthresh/good/000.png
            root = next((parent.parent for parent in image.parents if parent.name == "train"), image.parents[-1])
            places = [root / where for where in REFERENCE_FOREGROUNDS]
        for place in places:
            if place not in by_folder:
                by_folder[place] = {}
                for matte in find_images([place]) if place.is_dir() else []:
                    by_folder[place].setdefault(shown(matte.stem), []).append(matte)
        mattes = next((by_folder[place][image.stem] for place in places if image.stem in by_folder[place]), [])
        found.append(_nearest(mattes, image))
    shared = Counter(found)
    missing = [name for name, matte in zip(names, found) if matte is None or shared[matte] > 1]
    if missing:
        listed = "\n  ".join(missing[:20]) + (f"\n  and {len(missing) - 20} more" if len(missing) > 20 else "")
        raise ValueError(
            f"{len(missing)} of {len(names)} pictures have no matte of the same name to themselves in "
            f"{folder or ' or '.join(REFERENCE_FOREGROUNDS)}:\n  {listed}\n"
            "Add them, in sub-folders as the pictures are where names are there twice, or use --foreground threshold "
            "(objects) or random (textures), which need no files"
        )
    return [matte for matte in found if matte is not None]


def _nearest(mattes: Sequence[Path], image: Path) -> Path | None:
    """Of mattes of one name the one whose folders are called most like the picture's; None if several are."""

    def shared_folders(matte: Path) -> int:
        pairs = zip(reversed(matte.parent.parts), reversed(image.parent.parts))
        return len(list(takewhile(lambda pair: pair[0] == pair[1], pairs)))

    likeness = [shared_folders(matte) for matte in mattes]
    if not mattes or likeness.count(max(likeness)) > 1:
        return None
    return mattes[likeness.index(max(likeness))]


def _read_mattes(paths: Sequence[Path], resolution: int, max_pixels: int = MAX_PIXELS) -> torch.Tensor:
    """`[N, 1, resolution, resolution]` uint8."""
    mattes = []
    for path in paths:
        matte = torch.from_numpy(read_matte(path, max_pixels=max_pixels))[None, None]  # [1, 1, h, w]
        resized = F.interpolate(matte, (resolution, resolution), mode="bilinear", antialias=True)[0]
        mattes.append((resized.clamp(0, 1) * 255).round().byte())
    return torch.stack(mattes)
