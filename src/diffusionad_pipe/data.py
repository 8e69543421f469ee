"""Pictures with labels and masks from a folder, as a `datasets.DatasetDict`."""

import os
import random
from pathlib import Path
from typing import Any

import datasets

from .image_files import IMAGE_SUFFIXES, find_images

LAYOUTS = ("mvtec", "magnetic_tile", "folder")

FEATURES = datasets.Features(
    {
        "image": datasets.Image(),
        "mask": datasets.Image(),
        "label": datasets.ClassLabel(names=["good", "defective"]),
        "defect_type": datasets.Value("string"),
        "category": datasets.Value("string"),
        "split": datasets.Value("string"),
        "path": datasets.Value("string"),
    }
)


def load_anomaly_dataset(
    path: str | os.PathLike[str], layout: str = "auto", category: str | None = None
) -> datasets.DatasetDict:
    """Load the pictures of one category.

    Args:
        path: a folder in one of the layouts, or with one such folder for each category.
        layout: `"mvtec"`: `train/good`, `test/<defect type>`, `ground_truth/<defect type>` with masks paired by stem,
            with or without `_mask`; `"magnetic_tile"`: `MT_Free/Imgs` and `MT_<Defect type>/Imgs` with JPEG pictures
            and PNG masks of the same stems beside them, as Magnetic-Tile-Defect (Huang et al.) comes; `"folder"`: any
            folder of good pictures, all for training; `"auto"`: whichever fits.
        category: the sub-folder, where `path` holds several.

    Returns:
        Splits `train` and, if there are test pictures, `test`, with the columns image, mask (None for good pictures
        and where there is none), label (0 good, 1 defective), defect_type, category, split and path. Masks are not
        opened, so one may be empty.

    Raises:
        ValueError: names the folder, the cause and the cure.
    """
    root = Path(path)
    if not root.is_dir():
        raise ValueError(f"{root} is not a folder: give the folder that holds the pictures")
    good_folders = [folder for pattern in ("*/train/good", "*/MT_Free/Imgs") for folder in root.glob(pattern)]
    categories = sorted({folder.parent.parent.name for folder in good_folders})
    if category is not None:
        if not (root / category).is_dir():
            raise ValueError(f"{root} has no category {category!r}; it has: {', '.join(categories) or 'none'}")
        root = root / category
    elif categories:
        if len(categories) > 1:
            raise ValueError(f"{root} holds several categories, choose one: {', '.join(categories)}")
        root = root / categories[0]

    if layout == "auto":
        is_magnetic_tile = (root / "MT_Free" / "Imgs").is_dir()
        layout = "mvtec" if (root / "train" / "good").is_dir() else "magnetic_tile" if is_magnetic_tile else "folder"
    if layout == "mvtec":
        rows = _mvtec_rows(root)
    elif layout == "magnetic_tile":
        rows = _magnetic_tile_rows(root)
    elif layout == "folder":
        rows = {"train": [_row(picture, None, "good", root.name, "train") for picture in find_images([root])]}
    else:
        raise ValueError(f"layout must be auto, {', '.join(LAYOUTS[:-1])} or {LAYOUTS[-1]}, not {layout!r}")
    return datasets.DatasetDict(
        {split: datasets.Dataset.from_list(entries, features=FEATURES) for split, entries in rows.items()}
    )


def _mvtec_rows(root: Path) -> dict[str, list[dict[str, Any]]]:
    good = find_images([root / "train" / "good"])
    rows = {"train": [_row(picture, None, "good", root.name, "train") for picture in good]}
    if (root / "test").is_dir():
        rows["test"] = []
        for folder in sorted(p for p in (root / "test").iterdir() if p.is_dir()):
            masks = _masks_by_stem(root / "ground_truth" / folder.name)
            for picture in find_images([folder]):
                rows["test"].append(_row(picture, masks.get(picture.stem), folder.name, root.name, "test"))
    return rows


def _magnetic_tile_rows(root: Path) -> dict[str, list[dict[str, Any]]]:
    """There is no official split: 80 % of the good pictures, drawn with a fixed seed, are for training; the others and
    all defective ones are for testing."""
    good, _ = _tiles(root / "MT_Free" / "Imgs")  # its masks, where a release has them, are empty
    random.Random(0).shuffle(good)
    count = len(good) * 4 // 5
    # Sorted again, as in the other layouts, so that pictures held out for validation are spread over the series.
    rows = {
        "train": [_row(picture, None, "good", root.name, "train") for picture in sorted(good[:count])],
        "test": [_row(picture, None, "good", root.name, "test") for picture in sorted(good[count:])],
    }
    for folder in sorted(root.glob("MT_*/Imgs")):
        defect_type = folder.parent.name.removeprefix("MT_").lower()
        if defect_type != "free":
            pictures, masks = _tiles(folder)
            rows["test"] += [_row(p, masks.get(p.stem), defect_type, root.name, "test") for p in pictures]
    return rows


def _tiles(folder: Path) -> tuple[list[Path], dict[str, Path]]:
    """The pictures of a folder of Magnetic-Tile-Defect by name, and its masks by stem: only their suffixes differ."""
    files = find_images([folder])
    pictures = sorted((file for file in files if file.suffix.lower() == ".jpg"), key=lambda file: file.name)
    if not pictures:
        raise ValueError(f"{folder} has no pictures that end in .jpg: those that end in .png are taken for masks")
    return pictures, {file.stem: file for file in files if file.suffix.lower() == ".png"}


def _masks_by_stem(folder: Path) -> dict[str, Path]:
    if not folder.is_dir():
        return {}
    masks = sorted(p for p in folder.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES)
    return {mask.stem.removesuffix("_mask"): mask for mask in masks}


def _row(picture: Path, mask: Path | None, defect_type: str, category: str, split: str) -> dict[str, Any]:
    return {
        "image": str(picture),
        "mask": None if mask is None else str(mask),
        "label": int(defect_type != "good"),
        "defect_type": defect_type,
        "category": category,
        "split": split,
        "path": str(picture),
    }
