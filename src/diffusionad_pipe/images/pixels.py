"""Pictures in memory: whether they can be used, and PIL images of every mode as arrays.

Whatever reads a picture decides here, with these sentences. Needs no torch: the pipeline and exported detectors read
pictures alike.
"""

import math
from contextlib import suppress
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from .pillow_quirks import CANNOT_READ, NO_DECODER, MisreadError, load

WHITE = (255, 255, 255)
MIN_SIDE = 8
MAX_ASPECT_RATIO = 32.0

# The value that means white, by dtype. Other integers are refused: nothing says where their white is.
FULL_SCALE = {"bool": 1.0, "uint8": 255.0, "uint16": 65535.0}
TOLERANCE = 1e-6  # rounding of the caller's own arithmetic around 0 and 1

MODES = ("1", "CMYK", "F", "HSV", "I", "L", "LA", "LAB", "La", "P", "PA", "RGB", "RGBA", "RGBX", "RGBa", "YCbCr")
SIXTEEN_BITS = ("I;16", "I;16B", "I;16L", "I;16N")


def check_image(
    image: Image.Image, *, min_side: int = MIN_SIDE, max_aspect_ratio: float = MAX_ASPECT_RATIO
) -> Image.Image:
    """Decode a PIL image and find out whether it can be used.

    Args:
        image: of any mode; may be yet to be decoded.
        min_side: as in [`check_size`].
        max_aspect_ratio: as in [`check_size`].

    Returns:
        The decoded image as it is stored; its EXIF orientation, if any, is yet to be applied.

    Raises:
        ValueError: one sentence with the cause and the cure.
    """
    image = decode(image)
    check_size(image.height, image.width, min_side=min_side, max_aspect_ratio=max_aspect_ratio)
    if image.mode not in (*MODES, *SIXTEEN_BITS):
        raise ValueError(f"pixels of PIL mode {image.mode} are not supported; convert the picture to RGB")
    if image.mode == "F":
        values = np.asarray(image)
        check_unit_range(values.min(), values.max())
    if image.mode == "I":
        values = np.asarray(image)
        low, high = values.min(), values.max()
        if low < 0 or high > 65535:
            raise ValueError(f"integers of more than 8 bits must lie in 0 ... 65535, not {low} to {high}; scale them")
    return image


def decode(image: Image.Image) -> Image.Image:
    """Decode a PIL image that may be yet to be decoded.

    Raises:
        ValueError: for a picture that is damaged or has several frames.
    """
    try:
        # The further images of an MPO, the JPEG of many phones, are previews and depths of the first one.
        frames = getattr(image, "is_animated", False) and image.format != "MPO"
    except Exception as error:
        raise damaged(error) from error
    if frames:
        raise ValueError("the picture has several frames or pages; save the one to use as a PNG")
    try:
        return load(image)
    except Exception as error:
        raise damaged(error) from error


def damaged(error: Exception) -> ValueError:
    """What a decoder's error says of a picture: damaged ones fail in many ways in its depths."""
    if isinstance(error, MisreadError):
        return error
    if any(text in str(error) for text in NO_DECODER):
        return ValueError(CANNOT_READ)
    return ValueError(f"the picture is truncated or damaged ({error}); copy or download it again")


def check_size(
    height: int, width: int, *, min_side: int = MIN_SIDE, max_aspect_ratio: float = MAX_ASPECT_RATIO
) -> None:
    """Refuse a picture by its size.

    Args:
        height: in pixels.
        width: in pixels.
        min_side: pictures with a side of fewer pixels are refused.
        max_aspect_ratio: pictures whose longer side is more than this many times the shorter are refused; infinity
            where they are cut into tiles.

    Raises:
        ValueError: one sentence with the cause and the cure.
    """
    if min(height, width) < min_side:
        raise ValueError(f"{width} x {height} pixels are too few; take a picture with sides of at least {min_side}")
    if max(height, width) > max_aspect_ratio * min(height, width):
        raise ValueError(
            f"{width} x {height} pixels are too long a strip; crop it to an aspect ratio of at most "
            f"{max_aspect_ratio:g}"
        )


def check_kind(name: str, floating: bool) -> None:
    """Refuse pixels by the name of their dtype, NumPy's or torch's.

    Raises:
        ValueError: for integers whose white is not known.
    """
    if not floating and name not in FULL_SCALE:
        raise ValueError(f"the range of {name} is not known; pass uint8, uint16 or floats in [0, 1]")


def check_unit_range(low: float, high: float) -> None:
    """Refuse floats by their lowest and highest, NaN if one is.

    Raises:
        ValueError: if they are not in [0, 1].
    """
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ValueError("the values include NaN or infinity; replace them first")
    if low >= -TOLERANCE and high <= 1 + TOLERANCE:
        return
    found = f"float values must be in [0, 1], not {low:.3g} to {high:.3g}"
    if low < 0:
        raise ValueError(f"{found}; map [-1, 1] by x / 2 + 0.5")
    if high < 2:
        raise ValueError(f"{found}; clip them")
    raise ValueError(f"{found}; divide 0..255 by 255 or use uint8")


def read_pil(
    image: Image.Image, *, min_side: int = MIN_SIDE, max_aspect_ratio: float = MAX_ASPECT_RATIO
) -> NDArray[Any]:
    """Decode, check and orient a PIL image.

    Args:
        image: of any mode.
        min_side: as in [`check_size`].
        max_aspect_ratio: as in [`check_size`].

    Returns:
        `[h, w]` or `[h, w, 3|4]`, uint8, uint16 or float32, with the values that it has.

    Raises:
        ValueError: for a picture that cannot be used, as [`check_image`].
    """
    image = oriented(check_image(image, min_side=min_side, max_aspect_ratio=max_aspect_ratio))
    if image.mode in SIXTEEN_BITS and "transparency" in image.info:  # one value, which Pillow would leave opaque
        values = np.asarray(image).astype(np.uint16)
        opaque = np.where(values == image.info["transparency"], 0, 65535).astype(np.uint16)
        return np.stack([values, values, values, opaque], axis=-1)
    if image.mode == "F" or image.mode in SIXTEEN_BITS:
        return np.asarray(image)
    if image.mode == "I":
        return np.asarray(image).astype(np.uint16)
    if image.mode in ("La", "LA", "PA", "RGBA", "RGBa"):
        image = image.convert("LA") if image.mode == "La" else image  # La converts to nothing else
        return np.asarray(image.convert("RGBA"))
    if image.mode in ("1", "L", "P", "RGB"):
        return np.asarray(image.convert("RGBA" if image.has_transparency_data else "RGB"))
    return np.asarray(image.convert("RGB"))


def oriented(image: Image.Image) -> Image.Image:
    """A decoded PIL image as it is shown, its EXIF orientation applied."""
    with suppress(Exception):  # a malformed EXIF block, which fails in many ways, holds no orientation
        return ImageOps.exif_transpose(image)
    return image


def to_unit_range(values: NDArray[Any], dtype_name: str) -> NDArray[np.float32]:
    """Pixels as new floats in [0, 1], in C order.

    Args:
        values: of any shape; checked before.
        dtype_name: of the pixels as they came, which says where their white is.
    """
    floats = values.astype(np.float32, order="C")
    if dtype_name in FULL_SCALE:
        floats /= np.float32(FULL_SCALE[dtype_name])
        return floats
    return floats.clip(0, 1)


def over_background(values: NDArray[np.float32], background: tuple[int, int, int] = WHITE) -> NDArray[np.float32]:
    """Transparent pixels `[4, h, w]` on a background, as `[3, h, w]`; those without transparency stay as they are.

    Args:
        values: `[1|3|4, h, w]` in [0, 1].
        background: RGB, 0 to 255.
    """
    if len(values) != 4:
        return values
    behind = (np.array(background, dtype=np.float32) / np.float32(255))[:, None, None]
    return values[:3] * values[3:] + behind * (1 - values[3:])
