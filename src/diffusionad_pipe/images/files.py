"""Picture files: finding and opening them. Every error names the path, the cause and the cure."""

import logging
import os
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

from PIL import Image, ImageFile

from ..files.record import OwnProducts
from .pillow_quirks import own_limits, without_long_texts
from .pixels import MAX_ASPECT_RATIO, check_image, damaged, decode

logger = logging.getLogger(__name__)

PathLike: TypeAlias = str | os.PathLike[str]

IMAGE_SUFFIXES = (
    ".png", ".jpg", ".jpeg", ".jfif", ".jpe", ".bmp", ".tif", ".tiff", ".webp", ".gif", ".jp2", ".avif", ".ppm", ".pgm",
    ".pnm",
)  # fmt: skip
MAX_PIXELS = 100_000_000
OR_RAISE_MAX_PIXELS = " or raise max_pixels (--max-pixels)"  # which a visitor of the Space cannot

# Raster formats with a signature: of Pillow's others, EPS runs an external program and TGA takes any file.
FORMATS = ("PNG", "JPEG", "BMP", "TIFF", "WEBP", "GIF", "PPM", "JPEG2000", "AVIF")

LOOKS_LIKE = (
    (b"<!doctype html", "an HTML page"),
    (b"<html", "an HTML page"),
    (b"<svg", "an SVG drawing"),
    (b"<?xml", "XML"),
    (b"{", "JSON"),
    (b"[", "JSON"),
    (b"%pdf", "a PDF"),
    (b"pk\x03\x04", "a zip archive"),
    (b"\x93numpy", "a NumPy array"),
    (b"par1", "a Parquet file"),
)


class ImageFileError(ValueError):
    """A picture file that cannot be found or used."""


def open_image(
    path: PathLike, *, max_pixels: int = MAX_PIXELS, max_aspect_ratio: float = MAX_ASPECT_RATIO
) -> Image.Image:
    """Open, check and fully decode one picture; the file is closed again. The pipeline takes what this returns.

    Args:
        path: a PNG, JPEG, BMP, TIFF, WebP, GIF, PPM, JPEG 2000 or AVIF file, whatever its suffix.
        max_pixels: pictures of more pixels are refused before they are decoded.
        max_aspect_ratio: pictures whose longer side is more than this many times the shorter are refused; infinity
            where they are cut into tiles.

    Returns:
        The decoded picture as it is stored; its EXIF orientation, if any, is yet to be applied.

    Raises:
        ImageFileError: if the file is missing, unreadable, not a picture, damaged, animated or too large, or has a
            size, a kind of pixels or values that the pipeline refuses.
    """
    with _opened(path) as (file, name):
        return decode_image(file, name, max_pixels=max_pixels, max_aspect_ratio=max_aspect_ratio)


def decode_image(
    file: BinaryIO, name: str, *, max_pixels: int = MAX_PIXELS, max_aspect_ratio: float = MAX_ASPECT_RATIO
) -> Image.Image:
    """[`open_image`] for a picture that is not in a file of its own.

    Args:
        file: its bytes, at their beginning.
        name: what messages call it.
        max_pixels: as in [`open_image`].
        max_aspect_ratio: as in [`open_image`].

    Raises:
        ImageFileError: as of [`open_image`].
    """
    return _decoded(file, name, max_pixels, partial(check_image, max_aspect_ratio=max_aspect_ratio))


def open_cell(
    cell: Mapping[str, Any] | None,
    name: str,
    *,
    max_pixels: int = MAX_PIXELS,
    max_aspect_ratio: float = MAX_ASPECT_RATIO,
) -> Image.Image:
    """[`open_image`] for a picture in a dataset.

    Args:
        cell: what `datasets.Image(decode=False)` gives.
        name: what messages call it where it has no file.
        max_pixels: as in [`open_image`].
        max_aspect_ratio: as in [`open_image`].

    Raises:
        ImageFileError: as of [`open_image`], and for an empty cell.
    """
    with _opened_cell(cell, name) as (file, name):
        return decode_image(file, name, max_pixels=max_pixels, max_aspect_ratio=max_aspect_ratio)


def open_marks(marks: PathLike | Mapping[str, Any], name: str = "", *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Open and fully decode a picture whose values mark something, and need not be those of a photograph.

    Args:
        marks: its file, or a dataset's cell as in [`open_cell`].
        name: of a cell without a file.
        max_pixels: as in [`open_image`].

    Returns:
        The decoded picture as it is stored; [`masks`] says what it marks.

    Raises:
        ImageFileError: if the file is missing, unreadable, not a picture, damaged, animated or too large.
    """
    with _opened_cell(marks, name) if isinstance(marks, Mapping) else _opened(marks) as (file, name):
        return _decoded(file, name, max_pixels, decode)


def shown(path: PathLike) -> str:
    """A path as messages and tables have it: bytes that are no UTF-8 are escaped, as in `M\\xfcnchen.png`."""
    return os.fsencode(path).decode("utf-8", errors="backslashreplace")


def find_images(paths: PathLike | Iterable[PathLike]) -> list[Path]:
    """List the pictures that files and folders stand for.

    Args:
        paths: files, taken as they are whatever their suffix, and folders, searched recursively for files
            with one of `IMAGE_SUFFIXES`. Hidden files and folders are skipped, links are followed. What this package
            wrote itself, drawings, maps and samples, is left out, with a warning that counts it.

    Returns:
        The files in the order of `paths`, those of a folder sorted, each once.

    Raises:
        ImageFileError: if a path does not exist, or a folder cannot be read or has no pictures.
    """
    paths = [paths] if isinstance(paths, str | os.PathLike) else paths
    found: dict[str, Path] = {}
    for file in (file for path in paths for file in list_images(path)):
        found.setdefault(os.path.abspath(file), file)
    images = without_products(list(found.values()))
    if found and not images:
        first = shown(next(iter(found.values())))
        raise ImageFileError(f"{first}: diffusionad wrote it itself; give pictures to look at")
    return images


def list_images(path: PathLike, failures: list[str] | None = None) -> list[Path]:
    """[`find_images`] for one path, with what this package wrote itself; `failures` as of [`search_folder`]."""
    if not os.path.lexists(path):
        raise ImageFileError(f"{shown(path)}: there is no such file or folder; check the path")
    files = search_folder(path, failures) if os.path.isdir(path) else [Path(path)]
    if not files and not failures:
        raise ImageFileError(
            f"{shown(path)}: this folder has no pictures; their names must end in one of {' '.join(IMAGE_SUFFIXES)}"
        )
    return files


def without_products(files: Sequence[Path]) -> list[Path]:
    """The files that this package did not write itself; a warning counts the others."""
    products = OwnProducts()
    kept = [file for file in files if file not in products]
    if len(kept) < len(files):
        logger.warning(
            f"{len(files) - len(kept)} pictures are left out, which diffusionad wrote itself: drawings, maps, masks or "
            "samples"
        )
    return kept


def search_folder(folder: PathLike, failures: list[str] | None = None) -> list[Path]:
    """The pictures in a folder as [`find_images`] finds them, sorted; there may be none.

    Args:
        folder: searched with what lies in it.
        failures: gets a sentence for each folder that may not be read; None refuses such a one.

    Raises:
        ImageFileError: if it, or a folder in it, may not be read, and there are no `failures`.
    """

    def refuse(error: OSError) -> None:
        failure = f"{shown(error.filename)}: the folder may not be read; change its permissions"
        if failures is None:
            raise ImageFileError(failure) from error
        failures.append(failure)

    files: list[Path] = []
    seen: set[str] = set()  # links may lead in circles
    for parent, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        real = os.path.realpath(parent)
        folders[:] = [] if real in seen else [name for name in folders if not is_hidden(name)]
        if real not in seen:
            files += [Path(parent, name) for name in names if not is_hidden(name)]
        seen.add(real)
    return sorted(file for file in files if file.suffix.lower() in IMAGE_SUFFIXES)


def is_hidden(name: str) -> bool:
    """Whether a file's or folder's name says that it is no data: `.thumbs`, or `@eaDir` of Synology's disks."""
    return name.startswith((".", "@eaDir"))


@contextmanager
def _opened(path: PathLike) -> Iterator[tuple[BinaryIO, str]]:
    """An open file and what messages call it."""
    name = shown(path)
    try:
        status = os.stat(path)
        if stat.S_ISDIR(status.st_mode):
            raise ImageFileError(f"{name}: this is a folder; give a picture in it, or list it with find_images")
        if not stat.S_ISREG(status.st_mode):  # reading a pipe or a device might never end
            raise ImageFileError(f"{name}: this is not a regular file; copy the picture into one")
        with open(path, "rb") as file:
            yield file, name
    except FileNotFoundError as error:
        raise ImageFileError(f"{name}: there is no such file; check the path") from error
    except PermissionError as error:
        raise ImageFileError(f"{name}: the file may not be read; change its permissions") from error
    except OSError as error:
        raise ImageFileError(f"{name}: the file cannot be read ({error.strerror}); check the path") from error
    except ImageFileError:
        raise
    except ValueError as error:  # the character NUL
        raise ImageFileError(f"{name!r}: no file can have this name; check the path") from error


@contextmanager
def _opened_cell(cell: Mapping[str, Any] | None, name: str) -> Iterator[tuple[BinaryIO, str]]:
    if cell is None:
        raise ImageFileError(f"{name}: this row has no picture; remove it from the dataset")
    if cell["bytes"] is not None:
        yield BytesIO(cell["bytes"]), name
    else:
        with _opened(cell["path"]) as opened:
            yield opened


def _decoded(file: BinaryIO, name: str, max_pixels: int, check: Callable[[Image.Image], Image.Image]) -> Image.Image:
    """The picture that a file holds, once it has passed `check`, which decodes it."""
    head = file.read(512)
    if not head:
        raise ImageFileError(f"{name}: the file is empty, 0 bytes; copy or download it again")
    if head.startswith(b"version https://git-lfs"):
        raise ImageFileError(f"{name}: this is a Git LFS pointer, not the picture; run git lfs pull")
    try:
        try:
            return _checked(file, head, max_pixels, check)
        except ValueError as error:
            if "MAX_TEXT" not in str(error):
                raise
            file.seek(0)
            return _checked(BytesIO(without_long_texts(file.read())), head, max_pixels, check)
    except ValueError as error:
        raise ImageFileError(f"{name}: {error}") from error


def _checked(file: BinaryIO, head: bytes, max_pixels: int, check: Callable[[Image.Image], Image.Image]) -> Image.Image:
    image = _identify(file, head)
    width, height = image.size
    if width * height > max_pixels:
        raise ValueError(
            f"{width} x {height} pixels are more than {max_pixels}; make the picture smaller{OR_RAISE_MAX_PIXELS}"
        )
    return check(image)


def _identify(file: BinaryIO, head: bytes) -> ImageFile.ImageFile:
    """Open a picture lazily, as `Image.open` does but by our limits."""
    Image.init()
    for kind in FORMATS:
        factory, accept = Image.OPEN[kind]
        accepted = accept is None or accept(head[:16])
        if isinstance(accepted, str):
            raise ValueError(f"this Pillow cannot read {kind} ({accepted}); convert the picture to PNG")
        if accepted:
            file.seek(0)
            try:
                with own_limits():
                    return factory(file, "")
            except Exception as error:
                raise damaged(error) from error
    raise ValueError(f"this is not a picture but {_describe(head)}; give a PNG or JPEG file")


def _describe(head: bytes) -> str:
    if head[4:8] == b"ftyp":
        return "a HEIC photo" if head[8:11] in (b"hei", b"hev", b"mif") else "a video"
    for start, description in LOOKS_LIKE:
        if head.removeprefix(b"\xef\xbb\xbf").lstrip().lower().startswith(start):
            return description
    text = head.decode("utf-8", errors="ignore")  # the last character may be cut
    return "plain text" if len(text.encode()) >= len(head) - 3 and "\0" not in text else "unknown data"
