"""Where the pictures that are to be predicted come from: files, patterns, lists, rows of a dataset, a watched folder.

Nothing is opened here: a source says what a picture is called and how it is read.
"""

import codecs
import glob
import hashlib
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from PIL import Image

from ..files.names import LONGEST_NAME, folded, safe_name
from ..files.record import OwnProducts, sha256_of
from .dataset_rows import load_rows
from .files import ImageFileError, list_images, open_cell, open_image, search_folder, without_products
from .pixels import MAX_ASPECT_RATIO

LONGEST_ENDING = 20  # bytes of what follows an output's name: a number, `_map.npy`
WATCH_SECONDS = 1.0  # between two looks at a watched folder


class ImageSource(NamedTuple):
    """One picture that is yet to be read.

    Args:
        name: what tables call it: its path, or `dataset[split][row]`.
        place: what its outputs are named after; for a file its path.
        read: called with the largest number of pixels, and maybe the largest aspect ratio; gives the decoded picture or
            raises ImageFileError.
        sha256: of the bytes that it is decoded from, whatever its name; raises OSError.
        file: that must not change while it is read; None for a row of a dataset.
    """

    name: str
    place: Path
    read: Callable[..., Image.Image]
    sha256: Callable[[], str]
    file: Path | None = None


def find_files(arguments: Iterable[str], listed: BinaryIO | None = None) -> list[ImageSource]:
    """The pictures that the arguments of a command stand for.

    What this package wrote itself is left out, see [`find_images`]. What stands for no picture is a source too, whose
    reading fails: one wrong name must not stop a thousand right ones.

    Args:
        arguments: files, folders (searched as [`find_images`] does), patterns such as `"line_3/**/*.png"`, and `"-"`.
        listed: what `"-"` stands for: paths, one on each line or with NUL between, as `find -print0` writes them.

    Raises:
        ImageFileError: when nothing is found at all; names the first argument that stands for no picture, and the cure.
    """
    found: dict[str, ImageSource] = {}
    problems: list[ImageFileError] = []
    for argument in arguments:
        try:
            if argument == "-":
                sources = [from_file(file) for file in _read_list(listed)]
            elif glob.has_magic(argument) and not os.path.lexists(argument):
                sources = [source for place in _match(argument) for source in _find(Path(place), problems)]
            else:
                sources = _find(Path(argument), problems)
        except ImageFileError as error:
            problems.append(error)
            sources = [_unreadable(Path(argument), error)]
        for source in sources:
            found.setdefault(os.path.abspath(source.place), source)
    kept = {os.path.abspath(file) for file in without_products([source.place for source in found.values()])}
    images = [source for place, source in found.items() if place in kept]
    if found and not any(source.file for source in images):  # nothing but what cannot be read
        if problems:
            raise problems[0]
        raise ImageFileError(f"all {len(found)} pictures were written by diffusionad itself; give other pictures")
    return images


def _find(place: Path, problems: list[ImageFileError]) -> list[ImageSource]:
    """The pictures of one file or folder, and what fails in their place."""
    failures: list[str] = []  # of folders in it that may not be read
    try:
        sources = [from_file(file) for file in list_images(place, failures)]
    except ImageFileError as error:
        problems.append(error)
        return [_unreadable(place, error)]
    errors = [ImageFileError(failure) for failure in failures]
    problems += errors
    return [*sources, *(_unreadable(Path(str(error).partition(": ")[0]), error) for error in errors)]


def _match(pattern: str) -> list[str]:
    if not (places := sorted(glob.glob(pattern, recursive=True))):
        raise ImageFileError(f"{pattern}: no file has a name like this; check the pattern")
    return places


def _read_list(listed: BinaryIO | None) -> list[Path]:
    """The paths of a list, which may begin with a byte-order mark. Those that are missing are found out when they are
    read."""
    content = b"" if listed is None else listed.read().removeprefix(codecs.BOM_UTF8)
    lines = content.split(b"\0") if b"\0" in content else content.replace(b"\r\n", b"\n").split(b"\n")
    if not (paths := [Path(os.fsdecode(line)) for line in lines if line.strip()]):
        raise ImageFileError("-: no paths came on the standard input; write one on each line")
    return paths


def from_file(file: Path) -> ImageSource:
    """A picture that is a file."""
    return ImageSource(str(file), file, partial(_open, file), partial(sha256_of, file), file)


def _open(file: Path, max_pixels: int, max_aspect_ratio: float = MAX_ASPECT_RATIO) -> Image.Image:
    return open_image(file, max_pixels=max_pixels, max_aspect_ratio=max_aspect_ratio)


def _unreadable(place: Path, error: ImageFileError) -> ImageSource:
    """What stands for no picture, and says so when it is to be read."""
    return ImageSource(str(place), place, partial(_fail, error), partial(_fail, FileNotFoundError(place)))


def _fail(error: Exception, *_: object) -> Any:
    raise error


def find_rows(dataset: str, split: str | None = None, column: str = "image") -> list[ImageSource]:
    """The pictures in a dataset of Hugging Face `datasets`.

    Args:
        dataset: its Hub id, a Parquet file, or a folder that `load_dataset` reads.
        split: None takes `test`, or the only one.
        column: that holds the pictures.

    Raises:
        ValueError: names the dataset, the cause and the cure.
        OutputError: where the caches of `datasets` cannot be written.
        ModuleNotFoundError: without the package `datasets`.
    """
    import datasets

    path = Path(dataset)
    splits = load_rows(dataset)
    split = split or ("test" if "test" in splits else next(iter(splits)) if len(splits) == 1 else None)
    if split not in splits:
        raise ValueError(f"{dataset} has no split {split or 'test'!r}: choose one of {', '.join(splits)} with --split")
    rows = splits[split]
    if column not in rows.column_names:
        names = ", ".join(rows.column_names)
        raise ValueError(f"{dataset} has no column {column!r}: choose one of {names} with --image-column")
    try:
        rows = rows.select_columns([column]).cast_column(column, datasets.Image(decode=False))
    except Exception as error:  # of pyarrow, which has many
        raise ValueError(
            f"{dataset}: the column {column!r} holds no pictures: choose another --image-column"
        ) from error
    place = Path(path.stem if path.suffix == ".parquet" else path.name, str(split))

    def name(index: int) -> str:
        return f"{dataset}[{split}][{index}]"

    def read(index: int, max_pixels: int, max_aspect_ratio: float = MAX_ASPECT_RATIO) -> Image.Image:
        cell = rows[index][column]
        return open_cell(cell, name(index), max_pixels=max_pixels, max_aspect_ratio=max_aspect_ratio)

    def sha256(index: int) -> str:
        if (cell := rows[index][column]) is None:
            raise FileNotFoundError(name(index))
        return sha256_of(cell["path"]) if cell.get("bytes") is None else hashlib.sha256(cell["bytes"]).hexdigest()

    return [
        ImageSource(name(index), place / f"{index:06d}", partial(read, index), partial(sha256, index))
        for index in range(len(rows))
    ]


def watch_folders(folders: Sequence[Path], seconds: float = WATCH_SECONDS) -> Iterator[list[ImageSource]]:
    """Look again and again for pictures that are new or have changed, and are completely written.

    A picture counts as completely written when its size and its time of change were the same in two looks. One that is
    written so slowly that this is wrong cannot be decoded, and comes again when it has changed.

    Args:
        folders: searched with what lies in them.
        seconds: between two looks.

    Yields:
        What is to be judged, each state of a picture once; often nothing.

    Raises:
        ImageFileError: when a folder is missing.
    """
    seen: dict[Path, tuple[int, int]] = {}  # what this package wrote is left out, as everywhere
    given: dict[Path, tuple[int, int]] = {}
    while True:
        states, products = {}, OwnProducts()
        for folder in folders:
            if not folder.is_dir():
                raise ImageFileError(f"{folder}: there is no such folder to watch; check the path")
            for file in search_folder(folder):
                try:
                    status = file.stat()
                except OSError:  # gone already, or a loop of links
                    continue
                if file in products:
                    continue
                states[file] = status.st_size, status.st_mtime_ns
        complete = {f: state for f, state in states.items() if seen.get(f) == state and given.get(f) != state}
        seen = states
        given = {f: state for f, state in given.items() if f in states} | complete
        yield [from_file(file) for file in complete]
        time.sleep(seconds)


def output_names(places: Sequence[Path]) -> list[str]:
    """A name without suffix for each picture's outputs: its stem, after as many of its folders as tell all apart.

    Pictures that differ by their suffix alone keep it. Every file system takes the names, and none takes two for one,
    unless two pictures have the same place.

    Args:
        places: what to name.

    Returns:
        The names, in order.
    """
    stems = Counter(folded(str(place.with_name(place.stem))) for place in places)
    alone = [stems[folded(str(place.with_name(place.stem)))] == 1 for place in places]
    ends = [place.stem if own else f"{place.stem}_{place.suffix[1:]}" for place, own in zip(places, alone)]
    names: list[str] = []
    for depth in range(max((len(place.parts) for place in places), default=0)):
        folders = (place.parent.parts[-depth:] if depth else () for place in places)
        names = ["_".join([*parts, end]).strip("/\\") for parts, end in zip(folders, ends)]
        if len({folded(name) for name in names}) == len(names):
            break
    return [safe_name(name, LONGEST_NAME - LONGEST_ENDING) for name in names]
