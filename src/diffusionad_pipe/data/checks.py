"""Every problem of a dataset in one pass, before it spoils a training run or a figure."""

import hashlib
import os
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..files.record import OwnProducts
from ..images.files import MAX_PIXELS, ImageFileError, PathLike, is_hidden, open_image, open_marks, search_folder, shown
from ..images.pixels import oriented, read_pil
from ..runtime.progress import tracked
from .layouts import LAYOUTS, REFERENCE_FOREGROUNDS, Entry, is_image, split_of, visa_table
from .loading import describe, find_categories, is_export, unclear_masks
from .masks import HIGHEST_ID, check_mask_size, read_mask, read_matte, stored_values

MOST_NAMED = 5  # files of one suffix that a note names
MANY_GRAY_PIXELS = 0.1  # share of a mask that anti-aliased edges do not reach: Magnetic-Tile's stay below 0.02


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


def check_data(
    path: PathLike, layout: str = "auto", category: str | None = "all", max_pixels: int = MAX_PIXELS
) -> list[Problem]:
    """Report everything that is wrong with a dataset, and a note for each category that counts its pictures.

    Args:
        path: as in [`load_anomaly_dataset`]; every picture, mask and matte is decoded, as training and evaluation do.
        layout: likewise.
        category: likewise.
        max_pixels: pictures, masks and mattes of more are refused, as there.

    Returns:
        The problems, category by category.

    Raises:
        ValueError: if there is no such dataset; names the cause and the cure.
    """
    root = Path(path)
    if layout == "parquet" or (layout == "auto" and is_export(root)):
        raise ValueError(f"{root} holds an export to Parquet: check the folders of pictures that it was made from")
    found = find_categories(root, layout, category)
    problems = [
        problem for name, (folder, kind) in found.items() for problem in _check_category(name, folder, kind, max_pixels)
    ]
    if category == "all" and (root / "split_csv" / "1cls.csv").is_file():
        for name in sorted({row["object"] for row in visa_table(root)} - set(found)):
            message = f"{root / name}: split_csv/1cls.csv names this category, but it is missing; download it again"
            problems.append(Problem("error", root / name, message))
    return problems


def _check_category(name: str, folder: Path, layout: str, max_pixels: int) -> list[Problem]:
    try:
        entries = LAYOUTS[layout].read(folder)
    except ValueError as error:  # without its list of files, say, nothing else can be known
        return [Problem("error", folder, str(error))]
    problems: list[Problem] = []
    seen: dict[bytes, Entry] = {}  # the first picture with these pixels
    readable = 0  # good pictures to train on
    for index, entry in enumerate(tracked(entries, f"checking {name}", unit="picture")):
        image = _read(entry.image, partial(open_image, max_pixels=max_pixels), problems)
        if entry.unclear:
            problems.append(Problem("error", entry.image, unclear_masks(entry)))
        if entry.mask is not None:
            mask = _read(entry.mask, partial(open_marks, max_pixels=max_pixels), problems)
            marked = None if mask is None else _read(entry.mask, partial(_marked, mask), problems)
            if mask is not None and marked is not None:
                if entry.defect_type is None:
                    defect_type = "defect" if marked.any() else "good"
                    entry = entry._replace(defect_type=defect_type, split=split_of(entry.split, defect_type))
                    entries[index] = entry
                problems += _mask_problems(entry, image, mask, marked)
        if image is None:
            continue
        readable += (entry.split, entry.defect_type) == ("train", "good")
        twin = seen.setdefault(_digest(image), entry)
        contradictory = "good" in (twin.defect_type, entry.defect_type) and twin.defect_type != entry.defect_type
        if twin.split == entry.split and contradictory:
            message = (
                f"{shown(entry.image)}: the same picture as {shown(twin.image)}, but one is {entry.defect_type} "
                f"and one {twin.defect_type}; remove one of them"
            )
            problems.append(Problem("error", entry.image, message))
        elif twin.split != entry.split:
            message = (
                f"{shown(entry.image)}: the same picture as {shown(twin.image)}, one is in {entry.split} and one "
                f"in {twin.split}; remove one of them"
            )
            problems.append(Problem("error", entry.image, message))
    problems += _missing_masks(folder, entries)
    problems += _matte_problems(folder, entries, max_pixels)
    problems += _stray_files(folder, layout, entries)
    problems += _odd_names(folder, entries)
    problems += _lacking_images(folder, entries, readable)
    problems.append(Problem("note", folder, describe(name, layout, entries)))
    return sorted(problems, key=lambda problem: problem.severity == "note" and problem.path != folder)


def _read(file: Path, reader: Callable[[Path], Any], problems: list[Problem]) -> Any:
    """What `reader` gives, or None and a problem."""
    if not os.path.lexists(file):
        problems.append(Problem("error", file, f"{shown(file)}: this file is missing; download the dataset again"))
        return None
    try:
        return reader(file)
    except ImageFileError as error:
        problems.append(Problem("error", file, str(error)))
        return None


def _marked(mask: Image.Image, file: Path) -> NDArray[np.bool_]:
    return read_mask(mask, shown(file))


def _digest(image: Image.Image) -> bytes:
    """The same for the same pixels as they are shown, whatever the file format."""
    pixels = read_pil(image)
    return hashlib.sha256(f"{pixels.dtype} {pixels.shape}".encode() + pixels.tobytes()).digest()


def _mask_problems(
    entry: Entry, image: Image.Image | None, mask: Image.Image, marked: NDArray[np.bool_]
) -> Iterator[Problem]:
    file = entry.mask
    assert file is not None
    name = shown(file)
    try:
        if image is not None:
            width, height = oriented(image).size
            check_mask_size(marked, name, (height, width), shown(entry.image))
    except ImageFileError as error:
        yield Problem("error", file, str(error))
    doubt = _doubt(mask, marked)
    if doubt is not None:
        yield Problem("warning", file, f"{name}: {doubt}")
    if marked.any() and entry.defect_type == "good":
        yield Problem(
            "error", file, f"{name}: marks a defect, but {shown(entry.image)} counts as good; correct one of the two"
        )
    if not marked.any() and entry.defect_type != "good":
        yield Problem(
            "warning",
            file,
            f"{name}: marks nothing, but {shown(entry.image)} is defective, so pixel metrics leave it out; mark the "
            "defect",
        )


def _doubt(mask: Image.Image, marked: NDArray[np.bool_]) -> str | None:
    """What makes one look again at a mask that can be read."""
    if mask.format == "JPEG":
        return "a mask in JPEG, which changes values; save it as PNG"
    if marked.all():
        return "marks every pixel; check that it is a mask, and not inverted"
    if mask.mode in ("1", "P", "PA"):
        return None
    values = stored_values(mask)
    if values.max() <= (1 if values.dtype.kind == "f" else HIGHEST_ID):
        return None
    white = 255 if values.max() <= 255 else 65535
    if values.max() <= white // 2:
        return (
            f"its values end at {values.max():g}, which is no number of a defect (up to {HIGHEST_ID}) nor white "
            f"({white}), so it marks nothing; save it as black and white"
        )
    gray = np.mean((values > white // 16) & (values < white - white // 16))
    if gray > MANY_GRAY_PIXELS:
        return f"{gray:.0%} of its pixels are neither black nor white; check that it is a mask"
    return None


def _matte_problems(folder: Path, entries: list[Entry], max_pixels: int) -> list[Problem]:
    """Of the mattes that come with a dataset, which training with --foreground folder reads."""
    problems: list[Problem] = []
    for place in (folder / name for name in REFERENCE_FOREGROUNDS):
        if not place.is_dir():
            continue
        mattes = search_folder(place, [])
        for matte in mattes:
            _read(matte, partial(read_matte, max_pixels=max_pixels), problems)
        stems = {matte.stem for matte in mattes}
        for entry in entries:
            if (entry.split, entry.defect_type) == ("train", "good") and entry.image.stem not in stems:
                message = f"{shown(entry.image)}: has no matte of its name in {shown(place)}; add it"
                problems.append(Problem("warning", entry.image, message))
    return problems


def _missing_masks(folder: Path, entries: list[Entry]) -> Iterator[Problem]:
    defective = [entry for entry in entries if entry.defect_type != "good"]
    unmarked = [entry.image for entry in defective if entry.mask is None and not entry.unclear]
    if unmarked and len(unmarked) == len(defective):
        message = f"{folder}: none of the {len(defective)} defective pictures has a mask, so there are no pixel metrics"
        yield Problem("warning", folder, f"{message}; add masks to have them")
        return
    for image in unmarked:
        message = f"{image}: defective without a mask of its name, so pixel metrics leave it out; add the mask"
        yield Problem("warning", image, message)


def _stray_files(folder: Path, layout: str, entries: list[Entry]) -> Iterator[Problem]:
    known = {file for entry in entries for file in (entry.image, entry.mask, *entry.unclear)}
    known.update(file for pattern in LAYOUTS[layout].unused for file in folder.glob(pattern))
    mattes = {folder / name for name in REFERENCE_FOREGROUNDS}
    others: dict[str, list[Path]] = {}  # that are no pictures, by suffix
    unreadable: list[OSError] = []
    products = OwnProducts()
    for where, folders, names in os.walk(folder, onerror=unreadable.append):
        parent = Path(where)
        if not folders and not names:
            yield Problem("warning", parent, f"{shown(parent)}: this folder is empty; fill it or remove it")
        folders[:] = sorted(name for name in folders if not is_hidden(name))
        for file in sorted(parent / name for name in names if not is_hidden(name)):
            if file in known or file in products or not mattes.isdisjoint(file.parents):
                continue
            if not is_image(file):
                others.setdefault(file.suffix.lower(), []).append(file)
                continue
            message = (
                f"{shown(file)}: the layout {layout} has no use for it here; name a mask after its picture, put a "
                "picture where the others of its kind are, or remove it"
            )
            yield Problem("warning", file, message)
    for error in unreadable:
        name = shown(error.filename)
        yield Problem("error", Path(error.filename), f"{name}: the folder may not be read; change its permissions")
    for suffix, files in sorted(others.items()):
        listed = ", ".join(shown(file.relative_to(folder)) for file in files[:MOST_NAMED])
        more = f" and {len(files) - MOST_NAMED} more" if len(files) > MOST_NAMED else ""
        message = f"{shown(folder)}: no command reads {listed}{more}, as {suffix or 'no suffix'} is no picture's"
        yield Problem("note", files[0], message)


def _odd_names(folder: Path, entries: list[Entry]) -> Iterator[Problem]:
    """Names that a file system, a table or a person elsewhere would take for another, or cannot write."""
    seen: dict[str, Path] = {}
    for file in (file for entry in entries for file in (entry.image, entry.mask) if file is not None):
        if shown(file) != str(file):
            yield Problem(
                "warning", file, f"{shown(file)}: the name is no UTF-8, so tables have it escaped; rename the file"
            )
        folded = unicodedata.normalize("NFC", str(file)).casefold()
        twin = seen.setdefault(folded, file)
        if twin != file:
            yield Problem(
                "warning",
                file,
                f"{shown(file)}: differs from {shown(twin)} only in case or in how its letters are composed, which "
                "other systems take for one file; rename one of them",
            )


def _lacking_images(folder: Path, entries: Iterable[Entry], readable: int) -> Iterator[Problem]:
    kinds = {(entry.split, entry.defect_type == "good") for entry in entries}
    if ("train", True) not in kinds:
        yield Problem("error", folder, f"{folder}: has no good pictures to train on; add some")
    elif readable < 2:
        yield Problem("error", folder, f"{folder}: has {readable} good picture to train on that can be read; add some")
    if ("test", True) not in kinds and ("test", False) not in kinds:
        yield Problem("warning", folder, f"{folder}: has no test pictures, so nothing can be measured; add some")
    elif ("test", True) not in kinds:
        yield Problem("warning", folder, f"{folder}: has no good test pictures, so there is no AUROC; add some")
    elif ("test", False) not in kinds:
        yield Problem("warning", folder, f"{folder}: has no defective test pictures, so there is no AUROC; add some")
