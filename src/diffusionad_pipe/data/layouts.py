"""The layouts that datasets of defects come in: which pictures a folder holds, what for, and with which masks.

Masks are paired by name, never by position. Pictures of defects in a publisher's training folder get a split of their
own, `train_defective`: what is learned as normal must be.
"""

import csv
import random
import re
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

from ..images.files import IMAGE_SUFFIXES, ImageFileError, find_images, is_hidden, search_folder, without_products

# Where the authors keep mattes: beside the folder `train`, under the names of its pictures.
REFERENCE_FOREGROUNDS = ("DISthresh", "thresh")


class Entry(NamedTuple):
    """One picture of a dataset; neither of its files has been opened, and those that a list names may be missing.

    Args:
        image: its file.
        mask: the file that marks its defect, also where the publisher gives an empty one for a good picture.
        defect_type: `"good"` or what is wrong; None where only the mask tells, by being empty or not.
        split: `train`, `validation` (good pictures only), `train_defective` or `test`.
        unclear: files that may be its mask, and that others may as well be; then `mask` is None.
    """

    image: Path
    mask: Path | None
    defect_type: str | None
    split: str
    unclear: tuple[Path, ...] = ()


class Layout(NamedTuple):
    """How the folder of one category is laid out.

    Args:
        signature: a pattern that matches something in every such folder, and in no folder of a layout further down.
        read: lists the pictures of such a folder.
        unused: patterns for the publisher's pictures that are no test pictures or no photographs.
    """

    signature: str
    read: Callable[[Path], list[Entry]]
    unused: tuple[str, ...] = ()


def split_of(split: str, defect_type: str) -> str:
    """The split of a picture that its publisher puts into `split`."""
    return "train_defective" if split == "train" and defect_type != "good" else split


def is_image(file: Path) -> bool:
    """Whether a file's name is a picture's, and not that of a hidden file."""
    return file.suffix.lower() in IMAGE_SUFFIXES and not is_hidden(file.name)


def _read_folder(root: Path) -> list[Entry]:
    return [Entry(image, None, "good", "train") for image in _images(root)]


def _read_mvtec(root: Path, good: str = "good", test: str = "test", ground_truth: str = "ground_truth") -> list[Entry]:
    entries = [
        Entry(image, None, "good", split) for split in ("train", "validation") for image in _images(root / split / good)
    ]
    for folder in _folders(root / test):
        if folder != root / ground_truth:  # AD 2 keeps it beside the types
            defect_type = "good" if folder.name == good else folder.name
            entries += _with_masks(folder, root / ground_truth / folder.name, defect_type)
    return entries


def _read_mvtec_3d(root: Path) -> list[Entry]:
    entries = [
        Entry(image, None, "good", split)
        for split in ("train", "validation")
        for image in _images(root / split / "good" / "rgb")
    ]
    for folder in _folders(root / "test"):
        entries += _with_masks(folder / "rgb", folder / "gt", folder.name)
    return entries


def _read_visa(root: Path) -> list[Entry]:
    table = visa_table(root.parent)
    rows = [row for row in table if row["object"] == root.name]
    if not rows:
        raise ValueError(f"{root.parent}/split_csv/1cls.csv names no pictures of {root.name}: keep the folders' names")
    entries = []
    for row in rows:
        mask = root.parent / row["mask"] if row["mask"] else None
        defect_type = "good" if row["label"] == "normal" else "bad"
        entries.append(Entry(root.parent / row["image"], mask, defect_type, split_of(row["split"], defect_type)))
    return sorted(entries, key=lambda entry: entry.split == "test")  # otherwise in the order of the list


def visa_table(root: Path) -> list[dict[str, str]]:
    """The rows of VisA's list of all pictures, `split_csv/1cls.csv`: object, split, label, image and mask."""
    path = root / "split_csv" / "1cls.csv"
    if not path.is_file():
        raise ValueError(f"{path}: there is no such file, which says what is for training; copy it from VisA's archive")
    with open(path, newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
        reader = csv.DictReader(file)
        missing = {"object", "split", "label", "image", "mask"} - set(reader.fieldnames or ())
        if missing:
            raise ValueError(f"{path} has no column {', '.join(sorted(missing))}; copy it again from VisA's archive")
        return list(reader)


def _read_dagm(root: Path) -> list[Entry]:
    entries = []
    for split in ("train", "test"):
        folder = root / split.title()
        files = without_products([file for file in folder.glob("*") if is_image(file)])
        images = {file.stem: file for file in files}
        masks = {file.stem.removesuffix("_label"): file for file in folder.glob("Label/*_label.*")}
        for table in folder.glob("Label/[Ll]abels.txt"):  # names also what was not downloaded
            names = re.findall(r"[\w-]+\.[A-Za-z]\w*", table.read_text(encoding="utf-8"))
            for name in map(Path, names):
                if name.stem.endswith("_label"):
                    masks.setdefault(name.stem.removesuffix("_label"), folder / "Label" / name)
                else:
                    images.setdefault(name.stem, folder / name)
        for stem, image in sorted(images.items()):
            defect_type = "defect" if stem in masks else "good"
            entries.append(Entry(image, masks.get(stem), defect_type, split_of(split, defect_type)))
    return entries


def _read_kolektor_sdd2(root: Path) -> list[Entry]:
    return [
        Entry(image, image.with_name(f"{image.stem}_GT.png"), None, split)
        for split in ("train", "test")
        for image in _images(root / split)
        if "_GT" not in image.stem  # nor copies of masks
    ]


def _read_magnetic_tile(root: Path) -> list[Entry]:
    """There is no official split: 80 % of the good pictures, drawn with a fixed seed, are for training; the others and
    all defective ones are for testing."""
    good = _read_tiles(root / "MT_Free" / "Imgs", "good")
    random.Random(0).shuffle(good)
    count = len(good) * 4 // 5
    # Sorted again, as in the other layouts, so that pictures held out for validation are spread over the series.
    entries = [entry._replace(split="train") for entry in sorted(good[:count])] + sorted(good[count:])
    for folder in sorted(root.glob("MT_*/Imgs")):
        defect_type = folder.parent.name.removeprefix("MT_").lower()
        if defect_type != "free":
            entries += _read_tiles(folder, defect_type)
    return entries


def _read_tiles(folder: Path, defect_type: str) -> list[Entry]:
    """The pictures of a folder of Magnetic-Tile-Defect by name, with their masks: only the suffixes differ."""
    files = _images(folder)
    images = sorted((file for file in files if file.suffix.lower() == ".jpg"), key=lambda file: file.name)
    if not images:
        raise ValueError(f"{folder} has no pictures that end in .jpg: those that end in .png are taken for masks")
    masks = {file.stem: file for file in files if file.suffix.lower() == ".png"}
    return [Entry(image, masks.get(image.stem), defect_type, "test") for image in images]


def _images(folder: Path) -> list[Path]:
    try:
        return find_images([folder])
    except ImageFileError as error:
        if error.__cause__ is not None:  # the folder may not be read
            raise
        return []


def _folders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*/") if not is_hidden(path.name))


def _with_masks(folder: Path, mask_folder: Path, defect_type: str) -> list[Entry]:
    """The test pictures of a defect type with the masks of their names.

    Masks lie in the sub-folders that their pictures lie in, or all in one folder as long as every name is there once.
    Where two pictures could have one mask, or one picture two, it is not known which is meant.
    """
    images = _images(folder)
    masks: dict[Path, list[Path]] = {}  # by sub-folder and stem
    for mask in without_products(search_folder(mask_folder) if mask_folder.is_dir() else []):
        masks.setdefault(mask.relative_to(mask_folder).with_suffix(""), []).append(mask)

    def named_after(place: Path) -> list[Path]:
        return masks.get(place.with_name(f"{place.name}_mask")) or masks.get(place) or []

    places = [image.relative_to(folder).with_suffix("") for image in images]
    here, stems = Counter(places), Counter(place.name for place in places)
    entries = []
    for image, place in zip(images, places):
        found, sharing = named_after(place), here[place]
        if not found:
            found, sharing = named_after(Path(place.name)), stems[place.name]
        if len(found) == 1 and sharing == 1:
            entries.append(Entry(image, found[0], defect_type, "test"))
        else:
            entries.append(Entry(image, None, defect_type, "test", tuple(found)))
    return entries


# The first whose signature matches is the layout of a folder.
LAYOUTS: dict[str, Layout] = {
    "visa": Layout("Data/Images", _read_visa),
    "mvtec_3d": Layout("train/good/rgb", _read_mvtec_3d, unused=("*/*/xyz/*",)),
    "mvtec_ad_2": Layout(
        "test_public",
        partial(_read_mvtec, test="test_public", ground_truth="test_public/ground_truth"),
        unused=("test_private/*", "test_private_mixed/*"),
    ),
    "mvtec": Layout("train/good", _read_mvtec),
    "btad": Layout("train/ok", partial(_read_mvtec, good="ok")),
    "dagm": Layout("Train/Label", _read_dagm),
    "kolektor_sdd2": Layout("train/*_GT.png", _read_kolektor_sdd2),
    "magnetic_tile": Layout("MT_Free/Imgs", _read_magnetic_tile),
    "folder": Layout("*", _read_folder),
}
