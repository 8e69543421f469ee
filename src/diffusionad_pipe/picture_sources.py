"""Where the pictures that are to be judged come from: files, patterns, lists, rows of a dataset, a watched folder.

Nothing is opened here: a source says what a picture is called and how it is read.
"""

import glob
import io
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from .image_files import ImageFileError, decode_image, find_images, open_image, search_folder

WATCH_SECONDS = 1.0  # between two looks at a watched folder


class PictureSource(NamedTuple):
    """One picture that is yet to be read.

    Args:
        name: what tables call it: its path, or `dataset[split][row]`.
        place: what its outputs are named after; for a file its path.
        file: whose time of change is the picture's; None for a row on the Hub.
        read: called with the largest number of pixels, gives the decoded picture or raises ImageFileError.
    """

    name: str
    place: Path
    file: Path | None
    read: Callable[[int], Image.Image]


def find_files(arguments: Iterable[str], listed: Iterable[str] = ()) -> list[PictureSource]:
    """The pictures that the arguments of a command stand for.

    Args:
        arguments: files, folders (searched as [`find_images`] does), patterns such as `"line_3/**/*.png"`, and `"-"`.
        listed: the lines that `"-"` stands for, a file each. Those that are missing are found out when they are read:
            one wrong line must not stop a thousand right ones.

    Raises:
        ImageFileError: names the argument that stands for no picture, and the cure.
    """
    found: dict[str, Path] = {}
    for argument in arguments:
        if argument == "-":
            files = [Path(line) for line in (line.rstrip("\r\n") for line in listed) if line]
            if not files:
                raise ImageFileError("-: no paths came on the standard input; write one on each line")
        elif glob.has_magic(argument) and not os.path.exists(argument):
            files = find_images(sorted(glob.glob(argument, recursive=True)))
            if not files:
                raise ImageFileError(f"{argument}: no file has a name like this; check the pattern")
        else:
            files = find_images(argument)
        for file in files:
            found.setdefault(os.path.abspath(file), file)
    return [from_file(file) for file in found.values()]


def from_file(file: Path) -> PictureSource:
    """A picture that is a file."""
    return PictureSource(str(file), file, file, lambda max_pixels: open_image(file, max_pixels=max_pixels))


def find_rows(dataset: str, split: str | None = None, column: str = "image") -> list[PictureSource]:
    """The pictures in a dataset of Hugging Face `datasets`.

    Args:
        dataset: its Hub id, a Parquet file, or a folder that `load_dataset` reads.
        split: None takes `test`, or the only one.
        column: that holds the pictures.

    Raises:
        ValueError: names the dataset, the cause and the cure.
        ModuleNotFoundError: without the package `datasets`.
    """
    import datasets

    path = Path(dataset)
    is_file = path.suffix == ".parquet"
    if is_file and not path.is_file():
        raise ValueError(f"{dataset}: there is no such file; check the path")
    try:
        splits = datasets.load_dataset("parquet", data_files=dataset) if is_file else datasets.load_dataset(dataset)
    except Exception as error:  # every format has errors of its own
        cause = str(error).strip().splitlines()[0]
        raise ValueError(
            f"{dataset} cannot be read as a dataset ({cause}): give a Hub id, a Parquet file or a folder of them"
        ) from error
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
    place = Path(path.stem if is_file else path.name, str(split))

    def read(index: int, max_pixels: int) -> Image.Image:
        return _read_cell(rows[index][column], f"{dataset}[{split}][{index}]", max_pixels)

    return [
        PictureSource(
            f"{dataset}[{split}][{index}]", place / f"{index:06d}", path if is_file else None, partial(read, index)
        )
        for index in range(len(rows))
    ]


def watch_folders(folders: Sequence[Path], seconds: float = WATCH_SECONDS) -> Iterator[list[PictureSource]]:
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
    seen: dict[Path, tuple[int, int]] = {}
    given: dict[Path, tuple[int, int]] = {}
    while True:
        states = {}
        for folder in folders:
            if not folder.is_dir():
                raise ImageFileError(f"{folder}: there is no such folder to watch; check the path")
            for file in search_folder(folder):
                try:
                    status = file.stat()
                except FileNotFoundError:  # gone already
                    continue
                states[file] = status.st_size, status.st_mtime_ns
        complete = {f: state for f, state in states.items() if seen.get(f) == state and given.get(f) != state}
        seen = states
        given = {f: state for f, state in given.items() if f in states} | complete
        yield [from_file(file) for file in complete]
        time.sleep(seconds)


def output_names(places: Sequence[Path], taken: Iterable[str] = ()) -> list[str]:
    """A name without suffix for each picture's outputs: its stem, after as many of its folders as tell all apart.

    Args:
        places: what to name, each once.
        taken: names that are not to be given again.

    Returns:
        Different names, in order.
    """
    taken = set(taken)
    for depth in range(1, max((len(place.parts) for place in places), default=0) + 1):
        names = ["_".join(place.with_suffix("").parts[-depth:]).strip("/\\") for place in places]
        if len(set(names)) == len(names) and taken.isdisjoint(names):
            return names
    # Pictures that differ by their suffix alone keep it; what is still not told apart gets a number.
    unique: list[str] = []
    for place in places:
        name = stem = "_".join(place.parts).strip("/\\").replace(".", "_")
        number = 2
        while name in taken:
            name, number = f"{stem}_{number}", number + 1
        taken.add(name)
        unique.append(name)
    return unique


def _read_cell(cell: dict[str, Any] | None, name: str, max_pixels: int) -> Image.Image:
    if cell is None:
        raise ImageFileError(f"{name}: this row has no picture; remove it from the dataset")
    if cell["bytes"] is None:
        return open_image(cell["path"], max_pixels=max_pixels)
    return decode_image(io.BytesIO(cell["bytes"]), name, max_pixels=max_pixels)
