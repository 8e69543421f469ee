"""Picture files: finding, opening and writing them. Every error names the path, the cause and the cure."""

import logging
import os
import stat
import uuid
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import BinaryIO, TypeAlias

from PIL import Image, ImageFile

from .output_folder import OwnProducts

logger = logging.getLogger(__name__)

PathLike: TypeAlias = str | os.PathLike[str]

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".gif", ".jp2", ".avif")

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


def open_image(path: PathLike, *, max_pixels: int = 100_000_000) -> Image.Image:
    """Open, check and fully decode one picture; the file is closed again.

    Args:
        path: a PNG, JPEG, BMP, TIFF, WebP, GIF, PPM, JPEG 2000 or AVIF file, whatever its suffix.
        max_pixels: pictures of more pixels are refused before they are decoded.

    Returns:
        The decoded picture as it is stored; its EXIF orientation, if any, is yet to be applied.

    Raises:
        ImageFileError: if the file is missing, unreadable, not a picture, damaged, animated or too large.
    """
    try:
        status = os.stat(path)
        if stat.S_ISDIR(status.st_mode):
            raise ImageFileError(f"{path}: this is a folder; give a picture in it, or list it with find_images")
        if not stat.S_ISREG(status.st_mode):  # reading a pipe or a device might never end
            raise ImageFileError(f"{path}: this is not a regular file; copy the picture into one")
        with open(path, "rb") as file:
            return decode_image(file, path, max_pixels=max_pixels)
    except FileNotFoundError as error:
        raise ImageFileError(f"{path}: there is no such file; check the path") from error
    except PermissionError as error:
        raise ImageFileError(f"{path}: the file may not be read; change its permissions") from error
    except OSError as error:
        raise ImageFileError(f"{path}: the file cannot be read ({error.strerror}); check the path") from error


def decode_image(file: BinaryIO, path: PathLike, *, max_pixels: int = 100_000_000) -> Image.Image:
    """[`open_image`] for a picture that is not in a file of its own.

    Args:
        file: its bytes, at their beginning.
        path: what messages call it.
        max_pixels: as in [`open_image`].

    Raises:
        ImageFileError: if it is not a picture, damaged, animated or too large.
    """
    head = file.read(512)
    if not head:
        raise ImageFileError(f"{path}: the file is empty, 0 bytes; copy or download it again")
    if head.startswith(b"version https://git-lfs"):
        raise ImageFileError(f"{path}: this is a Git LFS pointer, not the picture; run git lfs pull")
    try:
        image = _identify(file, head, path)
        if image is None:
            raise ImageFileError(f"{path}: this is not a picture but {_describe(head)}; give a PNG or JPEG file")
        width, height = image.size
        if width * height > max_pixels:
            raise ImageFileError(
                f"{path}: {width} x {height} pixels are more than {max_pixels}; "
                "make the picture smaller or raise max_pixels (--max-pixels)"
            )
        # The further images of an MPO, the JPEG of many phones, are previews and depths of the first one.
        if getattr(image, "is_animated", False) and image.format != "MPO":
            raise ImageFileError(f"{path}: the file has several frames or pages; save the one to use as a PNG")
        image.load()
    except ImageFileError:
        raise
    except Exception as error:  # damaged files fail in many ways in the depths of the decoders
        if "unknown pixel mode" in str(error):  # a TIFF of float64, of float RGB, ...: whole, but not for Pillow
            raise ImageFileError(f"{path}: Pillow cannot read pixels of this kind; save it as a PNG") from error
        raise ImageFileError(
            f"{path}: the picture is truncated or damaged ({error}); copy or download it again"
        ) from error
    return image


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
    found: dict[str, Path] = {}
    products, left_out = OwnProducts(), 0
    for path in [paths] if isinstance(paths, str | os.PathLike) else paths:
        path = Path(path)
        if not os.path.exists(path):
            raise ImageFileError(f"{path}: there is no such file or folder; check the path")
        files = search_folder(path) if path.is_dir() else [path]
        if not files:
            suffixes = " ".join(IMAGE_SUFFIXES)
            raise ImageFileError(f"{path}: this folder has no pictures; their names must end in one of {suffixes}")
        pictures = [file for file in files if file not in products]
        left_out += len(files) - len(pictures)
        for file in pictures:
            found.setdefault(os.path.abspath(file), file)
    if left_out:
        sentence = f"{left_out} pictures are left out, which diffusionad wrote itself: drawings, maps, masks or samples"
        if not found:
            raise ImageFileError(f"{path}: {sentence}; give other pictures")
        logger.warning(sentence)
    return list(found.values())


def search_folder(folder: PathLike) -> list[Path]:
    """The pictures in a folder as [`find_images`] finds them, sorted; there may be none.

    Raises:
        ImageFileError: if it, or a folder in it, may not be read.
    """

    def refuse(error: OSError) -> None:
        raise ImageFileError(f"{error.filename}: the folder may not be read; change its permissions") from error

    files: list[Path] = []
    seen: set[str] = set()  # links may lead in circles
    for parent, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        real = os.path.realpath(parent)
        folders[:] = [] if real in seen else [name for name in folders if not name.startswith(".")]
        if real not in seen:
            files += [Path(parent, name) for name in names if not name.startswith(".")]
        seen.add(real)
    return sorted(file for file in files if file.suffix.lower() in IMAGE_SUFFIXES)


def write_atomically(path: PathLike, write: Callable[[Path], object]) -> None:
    """Write a file so that nobody ever sees half of it, and an older one survives a failure.

    Args:
        path: the file to write; its folder must exist.
        write: writes a temporary file at the path it is called with, in the same folder with the same suffix.
    """
    path = Path(path)
    temporary = path.with_name(f".{uuid.uuid4().hex}{path.suffix}")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)  # gone already after a success


def _identify(file: BinaryIO, head: bytes, path: PathLike) -> ImageFile.ImageFile | None:
    """Open a picture lazily, as `Image.open` does but without Pillow's own limits on pixels: they are one
    global of the process, and whether they warn or raise depends on its warning filters."""
    Image.init()
    for name in FORMATS:
        factory, accept = Image.OPEN[name]
        accepted = accept is None or accept(head[:16])
        if isinstance(accepted, str):
            raise ImageFileError(f"{path}: this Pillow cannot read {name} ({accepted}); convert it to PNG")
        if accepted:
            file.seek(0)
            return factory(file, "")
    return None


def _describe(head: bytes) -> str:
    if head[4:8] == b"ftyp":
        return "a HEIC photo" if head[8:11] in (b"hei", b"hev", b"mif") else "a video"
    for start, description in LOOKS_LIKE:
        if head.removeprefix(b"\xef\xbb\xbf").lstrip().lower().startswith(start):
            return description
    text = head.decode("utf-8", errors="ignore")  # the last character may be cut
    return "plain text" if len(text.encode()) >= len(head) - 3 and "\0" not in text else "unknown data"
