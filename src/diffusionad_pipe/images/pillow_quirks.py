"""What Pillow decodes wrongly without a word, put right or refused with the tag's name; and limits it need not have.

Found by comparing it with tifffile and with pixels written by hand: `tests/odd_files.py`.
"""

import struct
import threading
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from PIL import Image, ImageFile, PngImagePlugin, TiffImagePlugin
from PIL.TiffImagePlugin import TiffImageFile

SAVE_AS_PNG = "save the picture as a PNG"
CANNOT_READ = f"Pillow cannot read pixels of this kind; {SAVE_AS_PNG}"
# What it says of files that are whole but that it has no decoder for.
NO_DECODER = ("unknown pixel mode", "unknown raw mode", "string index out of range", "unknown data organization")

SCALE_12_TO_16_BITS = 65535 / 4095
_globals = threading.Lock()


class MisreadError(ValueError):
    """A picture that Pillow would decode wrongly; the message names the tag and the cure."""


def load(image: Image.Image) -> Image.Image:
    """Decode a PIL image, and put right what Pillow would get wrong.

    Returns:
        `image` itself, or another one of the same information where its pixels had to be changed.

    Raises:
        MisreadError: one sentence with the cause and the cure, for what cannot be put right.
        Exception: whatever Pillow raises for damaged files.
    """
    tiles = getattr(image, "tile", [])
    bits = tiles[0].args if tiles else None  # such as "L;4", until the picture is decoded
    if isinstance(image, TiffImageFile):
        _prepare_tiff(image)
    if isinstance(image, PngImagePlugin.PngImageFile) and bits == "RGB;16B" and "transparency" in image.info:
        raise MisreadError(f"Pillow cannot read the chunk tRNS of 16-bit colours; {SAVE_AS_PNG} with an alpha channel")
    with own_limits(image.width * image.height):
        image.load()
    if isinstance(image, TiffImageFile):
        return _put_right_tiff(image)
    if isinstance(image, PngImagePlugin.PngImageFile):
        if bits in ("L;2", "L;4") and "transparency" in image.info:  # a value as stored, unlike the pixels
            image.info["transparency"] *= {"L;2": 85, "L;4": 17}[bits]
        if image.mode == "P" and np.asarray(image).max() >= len(image.getpalette() or ()) // 3:
            raise MisreadError("its palette lacks colours that it uses; copy or download it again")
    if image.format == "BMP" and image.mode == "RGBA" and image.getchannel("A").getextrema() == (0, 0):
        return image.convert("RGB")  # written by what knows no transparency
    return image


@contextmanager
def own_limits(pixels: float = float("inf")) -> Iterator[None]:
    """Decode by our rules, whatever the program has set for all of Pillow: it would show what is truncated in grey, and
    refuse pictures of more pixels than it likes."""
    limit = Image.MAX_IMAGE_PIXELS
    if not ImageFile.LOAD_TRUNCATED_IMAGES and (limit is None or pixels <= limit):
        yield
        return
    with _globals:
        before = ImageFile.LOAD_TRUNCATED_IMAGES, Image.MAX_IMAGE_PIXELS
        ImageFile.LOAD_TRUNCATED_IMAGES, Image.MAX_IMAGE_PIXELS = False, None
        try:
            yield
        finally:
            ImageFile.LOAD_TRUNCATED_IMAGES, Image.MAX_IMAGE_PIXELS = before


def without_long_texts(png: bytes) -> bytes:
    """A PNG file without the texts and colour profiles beyond Pillow's limits: it takes long ones for an attack
    and refuses the picture, of which they are no part."""
    kept, place, total = [png[:8]], 8, 0
    while place + 8 <= len(png):
        length, kind = struct.unpack(">I4s", png[place : place + 8])
        chunk = png[place : place + length + 12]
        if kind in (b"tEXt", b"zTXt", b"iTXt", b"iCCP"):
            size = _text_length(kind, chunk[8:-4])
            total += size
            if size <= PngImagePlugin.MAX_TEXT_CHUNK and total <= PngImagePlugin.MAX_TEXT_MEMORY // 2:
                kept.append(chunk)
        else:
            kept.append(chunk)
        place += length + 12
    return b"".join(kept)


def _text_length(kind: bytes, data: bytes) -> int:
    """How long a text is, or a little more than the limit."""
    keyword, _, rest = data.partition(b"\0")
    if kind == b"tEXt" or (kind == b"iTXt" and rest[:1] == b"\0"):
        return len(data)
    if kind == b"iTXt":
        rest = rest[1:].split(b"\0", 2)[-1]
    try:
        return len(keyword) + len(zlib.decompressobj().decompress(rest[1:], PngImagePlugin.MAX_TEXT_CHUNK + 1))
    except zlib.error:
        return len(data)


def _prepare_tiff(image: TiffImageFile) -> None:
    tag = image.tag_v2.get
    bits, photometric, planar = max(tag(258, (1,))), tag(262), tag(284, 1)
    samples, extra = tag(277, 1), tag(338, ())
    if tag(254, 0) & 1:
        raise MisreadError(f"the first picture in the file is a thumbnail (tag NewSubfileType 1); {SAVE_AS_PNG}")
    if photometric is None and image.info.get("compression") not in ("jpeg", "tiff_jpeg"):
        raise MisreadError(f"the tag PhotometricInterpretation, which says what is white, is missing; {SAVE_AS_PNG}")
    if max(tag(339, (1,))) == 2 and bits < 32:
        raise MisreadError(f"signed integers (tag SampleFormat 2) have no known white; {SAVE_AS_PNG}")
    if photometric == 6 and image.info.get("compression") == "raw":
        raise MisreadError(
            f"Pillow cannot read YCbCr (tag PhotometricInterpretation 6) without compression; {SAVE_AS_PNG}"
        )
    if photometric == 5 and tag(332, 1) != 1:
        raise MisreadError(f"the inks are not cyan, magenta, yellow and black (tag InkSet {tag(332)}); {SAVE_AS_PNG}")
    if photometric == 5 and tag(336, (0, 255))[0] > tag(336, (0, 255))[1]:
        raise MisreadError(f"the inks are inverted (tag DotRange {tag(336)}); {SAVE_AS_PNG}")
    if planar == 2 and bits > 8 and image.info.get("compression") == "raw" and samples > 1 + len(extra):
        # Pillow takes every plane for one of 8 bits.
        order = ";16L" if image.tag_v2.prefix == b"II" else ";16B"
        if image.mode not in ("RGB", "RGBA") or 1 in extra or not image.tile:
            raise MisreadError(f"Pillow cannot read planes of more than 8 bits (PlanarConfiguration 2); {SAVE_AS_PNG}")
        for index, tile in enumerate(image.tile):
            assert isinstance(tile.args, tuple)
            image.tile[index] = tile._replace(args=(tile.args[0][0] + order, *tile.args[1:]))
        del image.tag_v2[TiffImagePlugin.PLANAR_CONFIGURATION]  # as they will be decoded


def _put_right_tiff(image: TiffImageFile) -> Image.Image:
    tag = image.tag_v2.get
    bits, photometric, samples = max(tag(258, (1,))), tag(262), tag(277, 1)
    change: list[Callable[[Any], Any]] = []
    if image.tag_v2.prefix == b"MM" and image.info.get("compression") != "raw" and image.mode in ("F", "I"):
        change.append(lambda values: values.byteswap())  # libtiff has done it already
    if bits == 12:
        change.append(lambda values: (values * SCALE_12_TO_16_BITS).round().astype(np.uint16))
    if photometric == 0 and image.mode == "F":
        change.append(lambda values: 1 - values)
    if photometric == 0 and image.mode.startswith("I;16"):
        change.append(lambda values: 65535 - values)
    if change:
        values = np.asarray(image)
        for function in change:
            values = function(values)
        right = Image.fromarray(values)
        right.info = dict(image.info)
        return right
    if image.mode == "P" and 0 < max(tag(TiffImagePlugin.COLORMAP, (0,))) < 256:  # of 8 bits, as libtiff knows
        colors = np.array(tag(TiffImagePlugin.COLORMAP), np.uint8).reshape(3, -1).T
        right = image.copy()
        right.putpalette(colors.tobytes())
        return right
    if photometric == 2 and samples == 4 and not tag(338) and image.getchannel(3).getextrema() != (255, 255):
        raise MisreadError(f"nothing says what the fourth channel is (the tag ExtraSamples is missing); {SAVE_AS_PNG}")
    return image
