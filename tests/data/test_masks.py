"""What masks and mattes mark, however they are stored."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis.extra.numpy import arrays
from PIL import Image

from diffusionad_pipe.data.masks import read_mask, read_matte
from diffusionad_pipe.images.files import ImageFileError

REGION = np.zeros((8, 12), np.uint8)
REGION[2:5, 3:9] = 1
CLASSES = np.arange(96, dtype=np.uint8).reshape(8, 12) % 4
OPEN = "leaves open what it marks"


def with_palette(indices: np.ndarray, *colors: tuple[int, int, int]) -> Image.Image:
    mask = Image.fromarray(indices, "L")
    mask.putpalette([value for color in colors for value in color])
    return mask


BLACK, WHITE, RED, DARK = (0, 0, 0), (255, 255, 255), (128, 0, 0), (0, 40, 0)


@pytest.mark.parametrize(
    "mask",
    [
        Image.fromarray(REGION * 255),
        Image.fromarray(REGION),
        Image.fromarray(REGION * 7),
        Image.fromarray(REGION > 0),
        Image.fromarray(REGION.astype(np.uint16) * 65535),
        Image.fromarray(REGION.astype(np.uint16) * 3),
        Image.fromarray(REGION.astype(np.int32) * 40000),
        Image.fromarray(REGION.astype(np.float32)),
        Image.fromarray(REGION.astype(np.float32) * 255),
        Image.fromarray(REGION.astype(np.float32) * 9),
        Image.fromarray(np.dstack([REGION * 0, REGION * 200, REGION * 0])),
        Image.fromarray(np.dstack([REGION * 255] * 3 + [REGION * 255])),
        Image.fromarray(np.dstack([REGION * 255, REGION * 255])),
        with_palette(REGION, BLACK, WHITE),
        with_palette(1 - REGION, WHITE, BLACK),
        with_palette(REGION, BLACK, RED),
        with_palette(REGION, BLACK, DARK),
        with_palette(REGION * 2, BLACK, RED, DARK),
        with_palette(REGION * 20, *([BLACK] + [RED] * 30)),
        with_palette(REGION, (3, 3, 3), (250, 250, 250)),
        with_palette(1 - REGION, (250, 250, 250), (3, 3, 3)),
        with_palette(REGION * 9, *((gray, gray, gray) for gray in range(256))),
        Image.fromarray(REGION * 255).convert("P"),
        Image.fromarray(REGION * 255).convert("RGB").quantize(2),
    ],
)
def test_a_mask_means_what_it_shows(mask: Image.Image) -> None:
    assert (read_mask(mask) == (REGION > 0)).all()


@pytest.mark.parametrize(
    ("mask", "cause"),
    [
        (with_palette(REGION, RED, WHITE), OPEN),
        (with_palette(1 - REGION, RED, BLACK), OPEN),
        (with_palette(REGION, BLACK, BLACK), OPEN),
        (with_palette(REGION + 1, BLACK, BLACK, BLACK), OPEN),
        (with_palette(REGION, RED, RED), OPEN),
        (with_palette(REGION * 2 + (REGION == 0), BLACK, BLACK, RED), OPEN),
        (with_palette(REGION + 1, WHITE, (9, 9, 9), (99, 99, 99)), OPEN),
        (
            with_palette(
                np.arange(96).reshape(8, 12).astype(np.uint8) % 4, BLACK, *((g, g, g) for g in (85, 170, 255))
            ),
            OPEN,
        ),
        (Image.fromarray(np.dstack([REGION * 0 + 255] * 3 + [REGION * 255])), "transparency alone"),
        (Image.fromarray(np.dstack([REGION * 0, REGION * 255])), "transparency alone"),
        (Image.fromarray(np.dstack([REGION * 255] * 3 + [255 - REGION * 255])), "marks is transparent"),
        (Image.fromarray(REGION.astype(np.float32) * np.nan), "NaN"),
        (Image.fromarray(REGION.astype(np.float32) * 2.5), "floats outside"),
        (Image.fromarray(REGION.astype(np.float32) - 0.5), "floats outside"),
        (Image.fromarray(REGION.astype(np.int32) * -1), "outside 0 ... 65535"),
        (Image.fromarray(REGION.astype(np.int32) * 70000), "outside 0 ... 65535"),
    ],
)
def test_doubt_is_refused(mask: Image.Image, cause: str, tmp_path: Path) -> None:
    with pytest.raises(ImageFileError, match=f"{cause}.*; save it in grey"):
        read_mask(mask)
    path = tmp_path / "mask.tif"
    mask.save(path)
    with pytest.raises(ImageFileError, match=f"^{path}: .*{cause}"):
        read_matte(path)


@settings(max_examples=40, deadline=None)
@given(arrays(np.uint8, (5, 6)))
def test_a_matte_is_the_same_in_every_container(values: np.ndarray) -> None:
    values[0, 0] = 255  # white is there, so that nothing looks like numbers of defects
    expected = values / np.float32(255)
    for image in (
        Image.fromarray(values),
        Image.fromarray(values.astype(np.uint16) * 257),
        Image.fromarray(values.astype(np.int32) * 257),
        Image.fromarray(values.astype(np.float32)),
        Image.fromarray(expected),
        Image.fromarray(np.dstack([values] * 3)),
        Image.fromarray(values).convert("P"),
    ):
        np.testing.assert_allclose(read_matte(image), expected, rtol=0, atol=1e-6)
        assert (read_mask(image) == (values >= 128)).all()


def test_the_orientation_is_applied_and_cells_are_read(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[274] = 6
    path = tmp_path / "mask.png"
    Image.fromarray(REGION * 255).save(path, exif=exif)
    turned = np.rot90(REGION, -1) > 0
    assert (read_mask(path) == turned).all()
    assert (read_mask({"bytes": None, "path": str(path)}) == turned).all()
    assert (read_mask({"bytes": path.read_bytes(), "path": None}, "row 3") == turned).all()
    with pytest.raises(ImageFileError, match="^row 3: the file is empty"):
        read_mask({"bytes": b"", "path": None}, "row 3")
