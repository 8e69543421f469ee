"""What a mask or a matte marks, whichever way it is stored. A mask means what it shows; where that is in doubt it is
refused."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..images.files import MAX_PIXELS, ImageFileError, PathLike, open_marks, shown
from ..images.pixels import SIXTEEN_BITS, decode, oriented

HIGHEST_ID = 31  # a mask without larger values holds the numbers of defects: VisA's do, and anti-aliased ones do not
SAVE_AS_GRAY = "save it in grey, black where nothing is and white where something is"


def read_mask(
    mask: PathLike | Mapping[str, Any] | Image.Image, name: str = "", *, max_pixels: int = MAX_PIXELS
) -> NDArray[np.bool_]:
    """Where a mask marks a defect: where [`read_matte`] is above a half.

    Args:
        mask, name, max_pixels: as for [`read_matte`].

    Returns:
        bool `[H, W]`, of the size at which the mask is shown.

    Raises:
        ImageFileError: as of [`read_matte`].
    """
    return read_matte(mask, name, max_pixels=max_pixels) > 0.5


def read_matte(
    matte: PathLike | Mapping[str, Any] | Image.Image, name: str = "", *, max_pixels: int = MAX_PIXELS
) -> NDArray[np.float32]:
    """How much each pixel is marked.

    Integers without any above `HIGHEST_ID` are numbers of defects: all but 0 mark. Others are shades between black and
    white: 255, or 65535 where there are values above 255. Floats are shades in [0, 1], or whole numbers that are read
    as integers. Of colours the brightest channel counts. Of a palette its colours count where they are shades of grey;
    else its first colour must be the only black one, and all others mark, as numbers of classes do.

    Args:
        matte: its file, a dataset's cell as `datasets.Image(decode=False)` gives it, or the picture itself.
        name: what messages call a cell without a file, and a picture.
        max_pixels: files of more pixels are refused before they are decoded.

    Returns:
        float32 `[H, W]` in [0, 1], of the size at which the picture is shown.

    Raises:
        ImageFileError: if it cannot be read, or leaves open what it marks.
    """
    if not isinstance(matte, Image.Image):
        file = matte["path"] if isinstance(matte, Mapping) and matte["bytes"] is None else matte
        name = name if isinstance(file, Mapping) else shown(file)
        matte = open_marks(matte, name, max_pixels=max_pixels)
    try:
        return marked(matte)
    except ValueError as error:
        raise ImageFileError(f"{name}: {error}" if name else str(error)) from error


def check_mask_size(mask: NDArray[np.bool_], name: str, size: tuple[int, int], image: str) -> None:
    """Refuse a mask of another size than its picture, as both are shown.

    Args:
        mask: of [`read_mask`].
        name: what messages call it.
        size: height and width of the picture in pixels.
        image: what messages call the picture.

    Raises:
        ImageFileError: names both.
    """
    if mask.shape != size:
        raise ImageFileError(
            f"{name}: {mask.shape[1]} x {mask.shape[0]} pixels, and its picture {image} has {size[1]} x {size[0]}; "
            "make the mask again at the picture's size"
        )


def marked(image: Image.Image) -> NDArray[np.float32]:
    """[`read_matte`] of a picture in memory, whose messages call it nothing.

    Raises:
        ValueError: one sentence with the cause and the cure.
    """
    image = oriented(decode(image))
    opaque = _opacity(image)
    if image.mode in ("P", "PA"):
        marks = _of_palette(image)
    else:
        values = stored_values(image)
        marks = _of_shades(values)
        if values.min() == values.max() and opaque.min() != opaque.max():
            raise ValueError(f"this mask is drawn in its transparency alone; {SAVE_AS_GRAY}")
    if ((marks > 0.5) & (opaque <= 0.5)).any():
        raise ValueError(f"what this mask marks is transparent; {SAVE_AS_GRAY}")
    return marks


def stored_values(image: Image.Image) -> NDArray[Any]:
    """The values of a picture without a palette `[H, W]` as they are stored, the highest of a colour's three."""
    if image.mode in ("1", "L", "F", "I", *SIXTEEN_BITS):
        return np.asarray(image)
    image = image.convert("LA") if image.mode == "La" else image  # La converts to nothing else
    return np.asarray(image.convert("RGB")).max(axis=-1)


def _of_shades(values: NDArray[Any]) -> NDArray[np.float32]:
    low, high = values.min(), values.max()
    if values.dtype.kind == "f":
        if not (np.isfinite(low) and np.isfinite(high)):
            raise ValueError(f"this mask has values that are NaN or infinite; {SAVE_AS_GRAY}")
        if low >= 0 and high <= 1:
            return values.astype(np.float32)
        if (values != np.round(values)).any():
            raise ValueError(f"this mask has floats outside [0, 1], from {low:.3g} to {high:.3g}; {SAVE_AS_GRAY}")
    if low < 0 or high > 65535:
        raise ValueError(f"this mask has values outside 0 ... 65535, from {low:.0f} to {high:.0f}; {SAVE_AS_GRAY}")
    if high <= HIGHEST_ID:
        return (values > 0).astype(np.float32)
    return (values / (255 if high <= 255 else 65535)).astype(np.float32)


def _of_palette(image: Image.Image) -> NDArray[np.float32]:
    indices = np.asarray(image.getchannel(0))
    palette = np.array(image.getpalette("RGB"), np.uint8).reshape(-1, 3)
    colors = np.zeros((256, 3), np.uint8)
    colors[: len(palette)] = palette
    used = np.unique(indices)
    numbered = not colors[0].any() and colors[used[used > 0]].any(axis=1).all()  # the first colour alone is black
    if (colors[used] == colors[used, :1]).all():  # grey
        grays = colors[used, 0]
        if (grays == used).all():  # the same without a palette
            return _of_shades(indices)
        shades = (colors[indices, 0] / 255).astype(np.float32)
        if grays.min() <= 127 < grays.max():
            if not numbered or ((shades > 0.5) == (indices > 0)).all():
                return shades
            numbered = False  # soft edges, or numbers of classes: it cannot be told
        elif len(used) == 1 and grays[0] in (0, 255) and palette.any():
            return shades
    if numbered:
        return (indices > 0).astype(np.float32)
    raise ValueError(f"the palette of this mask leaves open what it marks; {SAVE_AS_GRAY}")


def _opacity(image: Image.Image) -> NDArray[np.float32]:
    """`[H, W]` in [0, 1]; 1 everywhere without transparency."""
    if image.mode in ("I", "F") or not image.has_transparency_data:
        return np.ones((image.height, image.width), np.float32)
    if image.mode in SIXTEEN_BITS:
        return (np.asarray(image) != image.info["transparency"]).astype(np.float32)
    image = image.convert("LA") if image.mode == "La" else image
    return (np.asarray(image.convert("RGBA").getchannel("A")) / 255).astype(np.float32)
