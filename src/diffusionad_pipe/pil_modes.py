"""PIL images of every mode as arrays. Needs no torch: the pipeline and exported detectors read pictures alike."""

from contextlib import suppress
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps


def read_pil(image: Image.Image) -> NDArray[Any]:
    """Decode and orient a PIL image.

    Returns:
        `[h, w]` or `[h, w, 3|4]`, uint8, uint16 or float32, with the values that it has.

    Raises:
        ValueError: for a picture that is damaged, has several frames or a mode of unknown range.
    """
    try:
        # The further images of an MPO, the JPEG of many phones, are previews and depths of the first one.
        frames = getattr(image, "is_animated", False) and image.format != "MPO"
        image.load()
    except Exception as error:  # damaged files fail in many ways in the depths of the decoders
        raise ValueError(f"the picture cannot be decoded ({error}); copy or save it again") from error
    if frames:
        raise ValueError("the image has several frames; choose one by image.seek(0) and image.copy()")
    with suppress(Exception):  # a malformed EXIF block, which fails in many ways, holds no orientation
        image = ImageOps.exif_transpose(image)
    if image.mode == "F" or image.mode.startswith("I;16"):
        return np.asarray(image)
    if image.mode == "I":
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError("values of PIL mode I must be 16-bit, 0 to 65535; scale them to that range")
        return values.astype(np.uint16)
    if image.mode in ("La", "LA", "PA", "RGBA", "RGBa"):
        image = image.convert("LA") if image.mode == "La" else image  # La converts to nothing else
        return np.asarray(image.convert("RGBA"))
    if image.mode in ("1", "L", "P", "RGB"):
        return np.asarray(image.convert("RGBA" if image.has_transparency_data else "RGB"))
    if image.mode in ("CMYK", "HSV", "LAB", "RGBX", "YCbCr"):
        return np.asarray(image.convert("RGB"))
    raise ValueError(f"PIL mode {image.mode} is not supported; convert it to RGB")
