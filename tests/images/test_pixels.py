"""PIL pictures of every mode are read with the values and the colours that they have."""

import io

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

from tests.helpers.tiny_images import COLOR, HEIGHT, PIXELS, RNG, UNIT, WIDTH, plain, read, shade, stored


@pytest.mark.parametrize("mode", ["RGB", "RGBX", "RGBA", "YCbCr", "HSV"])
def test_color_modes(mode):
    image = plain("RGB", COLOR).convert(mode)
    assert image.mode == mode
    assert np.abs(np.subtract(shade(read(image)), COLOR)).max() <= 2


def test_cmyk_and_lab():
    assert shade(read(plain("CMYK", (0, 255, 255, 0)))) == (255, 0, 0)
    to_lab = ImageCms.buildTransform(ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), "RGB", "LAB")
    lab = ImageCms.applyTransform(plain("RGB", COLOR), to_lab)
    assert np.abs(np.subtract(shade(read(lab)), COLOR)).max() <= 2


def test_a_cmyk_jpeg_is_not_inverted():
    image = stored(plain("CMYK", (0, 255, 255, 0)), "JPEG")
    red, green, blue = shade(read(image))
    assert red > 250
    assert max(green, blue) < 5


def test_gray_and_bilevel_modes():
    assert shade(read(plain("L", 77))) == (77, 77, 77)
    assert shade(read(plain("1", 1))) == (255, 255, 255)
    assert shade(read(plain("F", 0.2))) == (51, 51, 51)


@pytest.mark.parametrize("background", [(255, 255, 255), (0, 0, 0), (255, 0, 128)])
def test_transparent_pixels_show_the_background(background):
    clear, half = (*COLOR, 0), (*COLOR, 128)
    options = {"background": background}
    assert shade(read(plain("RGBA", clear), **options)) == background
    assert shade(read(plain("RGBA", (*COLOR, 255)), **options)) == COLOR
    mixed = np.array(COLOR) * (128 / 255) + np.array(background) * (127 / 255)
    for image in (plain("RGBA", half), plain("RGBA", half).convert("RGBa")):
        assert np.abs(np.subtract(shade(read(image, **options)), mixed)).max() <= 2
    for image in (plain("LA", (9, 0)), plain("LA", (9, 0)).convert("La"), plain("RGBA", clear).convert("PA")):
        assert shade(read(image, **options)) == background
    assert shade(read(np.full((HEIGHT, WIDTH, 4), (*COLOR, 0), np.uint8), **options)) == background
    assert shade(read(torch.zeros(4, HEIGHT, WIDTH), **options)) == background


def test_palettes_give_their_colors_and_transparency():
    image = plain("P", 1)
    image.putpalette([0, 0, 0, *COLOR])
    image.putpixel((0, 0), 0)
    opaque = read(image)
    assert shade(opaque[:, 1:]) == COLOR
    assert shade(opaque[:, :1, :1]) == (0, 0, 0)
    for transparency in (0, b"\x00\xff"):
        reopened = stored(image, transparency=transparency)
        assert reopened.mode == "P"
        result = read(reopened)
        assert shade(result[:, :1, :1]) == (255, 255, 255)
        assert shade(result[:, 1:]) == COLOR


@pytest.mark.parametrize(("mode", "color"), [("RGB", COLOR), ("L", 9), ("1", 0)])
def test_a_transparent_color_shows_the_background(mode, color):
    image = stored(plain(mode, color), transparency=color)
    assert image.mode == mode
    assert shade(read(image)) == (255, 255, 255)


@pytest.mark.parametrize("mode", ["I;16", "I;16B", "I;16L", "I"])
def test_a_16_bit_ramp_is_scaled_and_not_saturated(mode):
    ramp = np.linspace(0, 65535, HEIGHT * WIDTH).astype(np.uint16).reshape(HEIGHT, WIDTH)
    stored_as = {"I;16B": ">u2", "I": "<i4"}.get(mode, "<u2")
    image = Image.frombytes(mode, (WIDTH, HEIGHT), ramp.astype(stored_as).tobytes())
    result = read(image)
    assert torch.equal(result[0], torch.from_numpy(ramp.astype(np.float32)) / 65535)
    assert len(result.unique()) == HEIGHT * WIDTH


def test_a_16_bit_png_file_is_scaled_and_not_saturated():
    ramp = np.linspace(0, 65535, HEIGHT * WIDTH).astype(np.uint16).reshape(HEIGHT, WIDTH)
    result = read(stored(Image.fromarray(ramp)))
    assert len(result.unique()) == HEIGHT * WIDTH


@pytest.mark.parametrize("value", [-1, 65536])
def test_wider_integers_are_refused(value):
    with pytest.raises(ValueError, match=r"must lie in 0 \.\.\. 65535, not -?\d+ to -?\d+; scale them"):
        read(plain("I", value))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_exif_orientation_is_applied(processor, orientation, kind):
    exif = Image.Exif()
    exif[0x0112] = orientation
    turn = {
        2: lambda x: x[:, ::-1],
        3: lambda x: x[::-1, ::-1],
        4: lambda x: x[::-1],
        5: lambda x: x.swapaxes(0, 1),
        6: lambda x: np.rot90(x, -1),
        7: lambda x: np.rot90(x, 2).swapaxes(0, 1),
        8: lambda x: np.rot90(x),
    }.get(orientation, lambda x: x)
    expected = np.ascontiguousarray(turn(PIXELS))
    image = stored(Image.fromarray(PIXELS), kind, exif=exif)
    batch, sizes = processor.preprocess(image, *expected.shape[:2])
    assert sizes == [expected.shape[:2]]
    assert torch.equal(batch, read(expected, *expected.shape[:2])[None])
    # The round trip: a map of the batch comes back at the size of the oriented picture.
    (heat,) = processor.postprocess(batch.mean(1, keepdim=True), "pil", sizes)
    assert (heat.height, heat.width) == expected.shape[:2]
    assert processor.visualize_anomaly_map(image, heat).size == heat.size


def test_a_malformed_exif_block_is_no_orientation():
    image = Image.fromarray(PIXELS)
    image.info["exif"] = b"Exif\0\0garbage"
    assert torch.equal(read(image), UNIT)


def test_animations_are_refused_but_phone_jpegs_read():
    image = Image.fromarray(PIXELS)
    more = {"save_all": True, "append_images": [image.rotate(180)]}
    for kind in ("GIF", "PNG", "TIFF"):
        with pytest.raises(ValueError, match="several frames or pages; save the one to use as a PNG"):
            read(stored(image, kind, **more))
    first = stored(image, "GIF", **more)
    first.seek(0)
    assert read(first.copy()).shape == (3, HEIGHT, WIDTH)
    assert read(stored(image, "MPO", **more)).shape == (3, HEIGHT, WIDTH)
    assert read(stored(image, "GIF")).shape == (3, HEIGHT, WIDTH)


def test_a_truncated_image_is_refused():
    file = io.BytesIO()
    Image.fromarray(RNG.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(file, "PNG")
    with pytest.raises(ValueError, match=r"truncated or damaged .*; copy or download it again"):
        read(Image.open(io.BytesIO(file.getvalue()[:6000])))
