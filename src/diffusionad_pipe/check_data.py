"""Every problem of a dataset in one pass, before it spoils a training run or a figure."""

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from PIL import Image
from tqdm.auto import tqdm

from .data import decide, describe, find_categories, is_export
from .data_layouts import LAYOUTS, Entry, is_picture, visa_table
from .image_files import ImageFileError, PathLike, open_image, open_marks
from .masks import HIGHEST_ID, read_mask, stored_values

MANY_GREY_PIXELS = 0.1  # share of a mask that anti-aliased edges do not reach: Magnetic-Tile's stay below 0.02


class Problem(NamedTuple):
    """Something that was found in a dataset.

    Args:
        severity: `"error"`: training or a metric would fail or be wrong; `"warning"`: a metric leaves something out, or
            somebody should look; `"note"`: what there is.
        path: the file or folder.
        message: one sentence that names it, the cause and the cure.
    """

    severity: Literal["error", "warning", "note"]
    path: Path
    message: str


def check_data(path: PathLike, layout: str = "auto", category: str | None = "all") -> list[Problem]:
    """Report everything that is wrong with a dataset, and a note for each category that counts its pictures.

    Args:
        path, layout, category: as in [`load_anomaly_dataset`]; every picture and every mask is decoded.

    Returns:
        The problems, category by category.

    Raises:
        ValueError: if there is no such dataset; names the cause and the cure.
    """
    root = Path(path)
    if layout == "parquet" or (layout == "auto" and is_export(root)):
        raise ValueError(f"{root} holds an export to Parquet: check the folders of pictures that it was made from")
    found = find_categories(root, layout, category)
    problems = [problem for name, (folder, its) in found.items() for problem in _check_category(name, folder, its)]
    if category == "all" and (root / "split_csv" / "1cls.csv").is_file():
        for name in sorted({row["object"] for row in visa_table(root)} - set(found)):
            message = f"{root / name}: split_csv/1cls.csv names this category, but it is missing; download it again"
            problems.append(Problem("error", root / name, message))
    return problems


def _check_category(name: str, folder: Path, layout: str) -> list[Problem]:
    try:
        entries = LAYOUTS[layout].read(folder)
    except ValueError as error:  # without its list of files, say, nothing else can be known
        return [Problem("error", folder, str(error))]
    problems: list[Problem] = []
    seen: dict[bytes, Entry] = {}  # the first picture with these pixels
    for index, entry in enumerate(tqdm(entries, f"checking {name}", unit="picture", leave=False)):
        picture = _open(entry.picture, open_image, problems)
        mask = None if entry.mask is None else _open(entry.mask, open_marks, problems)
        if mask is not None:
            entries[index] = entry = decide(entry)
            problems += _mask_problems(entry, picture, mask)
        if picture is not None:
            twin = seen.setdefault(_digest(picture), entry)
            contradictory = "good" in (twin.defect_type, entry.defect_type) and twin.defect_type != entry.defect_type
            if twin.split == entry.split and contradictory:
                message = (
                    f"{entry.picture}: the same picture as {twin.picture}, but one is {entry.defect_type} and one "
                    f"{twin.defect_type}; remove one of them"
                )
                problems.append(Problem("error", entry.picture, message))
            elif twin.split != entry.split:
                message = (
                    f"{entry.picture}: the same picture as {twin.picture}, one is in {entry.split} and one in "
                    f"{twin.split}; remove one of them"
                )
                problems.append(Problem("error", entry.picture, message))
    problems += _missing_masks(folder, entries)
    problems += _stray_files(folder, layout, entries)
    problems += _lacking_pictures(folder, entries)
    return [*problems, Problem("note", folder, describe(name, layout, entries))]


def _open(file: Path, reader: Callable[[Path], Image.Image], problems: list[Problem]) -> Image.Image | None:
    if not file.is_file():
        problems.append(Problem("error", file, f"{file}: this file is missing; download the dataset again"))
        return None
    try:
        return reader(file)
    except ImageFileError as error:
        problems.append(Problem("error", file, str(error)))
        return None


def _digest(picture: Image.Image) -> bytes:
    """The same for the same pixels, whatever the file format; 16-bit values would not survive the conversion."""
    pixels = picture if picture.mode == "F" or picture.mode.startswith("I") else picture.convert("RGBA")
    return hashlib.sha256(f"{pixels.mode} {pixels.size}".encode() + pixels.tobytes()).digest()


def _mask_problems(entry: Entry, picture: Image.Image | None, mask: Image.Image) -> Iterator[Problem]:
    file = entry.mask
    assert file is not None
    if picture is not None and picture.size != mask.size:
        yield Problem(
            "error",
            file,
            f"{file}: {mask.width} x {mask.height} pixels, and its picture {entry.picture} has {picture.width} x "
            f"{picture.height}; make the mask again at the picture's size",
        )
    doubt = _doubt(mask)
    marked = read_mask(mask).any()
    if doubt is not None:
        yield Problem("warning", file, f"{file}: {doubt}")
    if marked and entry.defect_type == "good":
        yield Problem(
            "error", file, f"{file}: marks a defect, but {entry.picture} counts as good; correct one of the two"
        )
    if not marked and entry.defect_type != "good":
        yield Problem(
            "warning",
            file,
            f"{file}: marks nothing, but {entry.picture} is defective, so pixel metrics leave it out; mark the defect",
        )


def _doubt(mask: Image.Image) -> str | None:
    """What makes one doubt that the values of a mask mean what [`read_mask`] takes them for."""
    if mask.format == "JPEG":
        return "a mask in JPEG, which changes values; save it as PNG"
    values = stored_values(mask)
    if read_mask(mask).all():
        return "marks every pixel; check that it is a mask, and not inverted"
    if mask.mode in ("1", "P") or values.max() <= HIGHEST_ID:
        return None
    white = 255 if values.max() <= 255 else 65535
    if values.max() <= white // 2:
        return (
            f"its values end at {values.max()}, which is no number of a defect (up to {HIGHEST_ID}) nor white "
            f"({white}), so it marks nothing; save it as black and white"
        )
    grey = np.mean((values > white // 16) & (values < white - white // 16))
    if grey > MANY_GREY_PIXELS:
        return f"{grey:.0%} of its pixels are neither black nor white; check that it is a mask"
    return None


def _missing_masks(folder: Path, entries: list[Entry]) -> Iterator[Problem]:
    defective = [entry for entry in entries if entry.defect_type != "good"]
    unmarked = [entry.picture for entry in defective if entry.mask is None]
    if unmarked and len(unmarked) == len(defective):
        message = f"{folder}: none of the {len(defective)} defective pictures has a mask, so there are no pixel metrics"
        yield Problem("warning", folder, f"{message}; add masks to have them")
        return
    for picture in unmarked:
        message = f"{picture}: defective without a mask of its name, so pixel metrics leave it out; add the mask"
        yield Problem("warning", picture, message)


def _stray_files(folder: Path, layout: str, entries: list[Entry]) -> Iterator[Problem]:
    known = {file for entry in entries for file in (entry.picture, entry.mask)}
    known.update(file for pattern in LAYOUTS[layout].unused for file in folder.glob(pattern))
    for file in sorted(folder.rglob("*")):
        if is_picture(file) and file not in known and not file.is_dir():
            message = (
                f"{file}: the layout {layout} has no use for it here; name a mask after its picture, put a picture "
                "where the others of its kind are, or remove it"
            )
            yield Problem("warning", file, message)
    for parent, folders, names in os.walk(folder):
        if not folders and not names:
            yield Problem("warning", Path(parent), f"{parent}: this folder is empty; fill it or remove it")


def _lacking_pictures(folder: Path, entries: Iterable[Entry]) -> Iterator[Problem]:
    kinds = {(entry.split, entry.defect_type == "good") for entry in entries}
    if ("train", True) not in kinds:
        yield Problem("error", folder, f"{folder}: has no good pictures to train on; add some")
    if ("test", True) not in kinds and ("test", False) not in kinds:
        yield Problem("warning", folder, f"{folder}: has no test pictures, so nothing can be measured; add some")
    elif ("test", True) not in kinds:
        yield Problem("warning", folder, f"{folder}: has no good test pictures, so there is no AUROC; add some")
    elif ("test", False) not in kinds:
        yield Problem("warning", folder, f"{folder}: has no defective test pictures, so there is no AUROC; add some")
