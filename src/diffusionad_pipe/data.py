"""Pictures with labels and masks from a folder, as a `datasets.DatasetDict`."""

import os
from pathlib import Path
from typing import Any

import datasets

from .image_files import IMAGE_SUFFIXES, find_images

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
            with or without `_mask`; `"folder"`: any folder of good pictures, all for training; `"auto"`: whichever
            fits.
        category: the sub-folder, where `path` holds several.

    Returns:
        Splits `train` and, if there are test pictures, `test`, with the columns image, mask (None for good pictures
        and where there is none), label (0 good, 1 defective), defect_type, category, split and path.

    Raises:
        ValueError: names the folder, the cause and the cure.
    """
    root = Path(path)
    if not root.is_dir():
        raise ValueError(f"{root} is not a folder: give the folder that holds the pictures")
    categories = sorted(folder.parent.parent.name for folder in root.glob("*/train/good"))
    if category is not None:
        if not (root / category).is_dir():
            raise ValueError(f"{root} has no category {category!r}; it has: {', '.join(categories) or 'none'}")
        root = root / category
    elif categories:
        if len(categories) > 1:
            raise ValueError(f"{root} holds several categories, choose one: {', '.join(categories)}")
        root = root / categories[0]

    if layout == "auto":
        layout = "mvtec" if (root / "train" / "good").is_dir() else "folder"
    if layout not in ("mvtec", "folder"):
        raise ValueError(f"layout must be auto, mvtec or folder, not {layout!r}")
    good_folder = root / "train" / "good" if layout == "mvtec" else root
    rows = {"train": [_row(picture, None, "good", root.name, "train") for picture in find_images([good_folder])]}
    if layout == "mvtec" and (root / "test").is_dir():
        rows["test"] = []
        for folder in sorted(p for p in (root / "test").iterdir() if p.is_dir()):
            masks = _masks_by_stem(root / "ground_truth" / folder.name)
            for picture in find_images([folder]):
                rows["test"].append(_row(picture, masks.get(picture.stem), folder.name, root.name, "test"))
    return datasets.DatasetDict(
        {split: datasets.Dataset.from_list(entries, features=FEATURES) for split, entries in rows.items()}
    )


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
