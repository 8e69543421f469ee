"""Pictures of every kind in, pictures and drawings out, on tiny real pictures."""

import io
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

from diffusionad_pipe.image_processor import COLOUR_SCALE, CONTOUR_COLOUR, DiffusionADImageProcessor, _colourize

HEIGHT, WIDTH = 12, 16
RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
UNIT = torch.from_numpy(PIXELS).permute(2, 0, 1).float() / 255  # [3, H, W]
COLOUR = (200, 100, 50)
TOP_COLOUR = tuple(bytes.fromhex(COLOUR_SCALE.split()[-1]))  # of a map that is 1


@pytest.fixture
def processor():
    return DiffusionADImageProcessor()


def read(picture, height=HEIGHT, width=WIDTH, **options) -> torch.Tensor:
    """Preprocess one picture: `[3, height, width]`."""
    return DiffusionADImageProcessor(**options).preprocess(picture, height, width)[0][0]


def stored(image: Image.Image, kind: str = "PNG", **options) -> Image.Image:
    """Write a picture to memory and open it again."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return Image.open(file)


def plain(mode: str, colour) -> Image.Image:
    return Image.new(mode, (WIDTH, HEIGHT), colour)


def shade(picture: torch.Tensor) -> tuple[int, ...]:
    """The colour of a plain picture, 0 to 255."""
    assert (picture == picture[:, :1, :1]).all()
    return tuple((picture[:, 0, 0] * 255).round().int().tolist())


# Preprocessing: kinds and layouts


@pytest.mark.parametrize(
    "picture",
    [
        Image.fromarray(PIXELS),
        PIXELS,
        PIXELS[None],
        PIXELS.astype(np.uint16) * 257,
        PIXELS.astype(np.uint16).astype(">u2") * 257,
        PIXELS.astype(np.float32) / 255,
        PIXELS.astype(np.float64) / 255,
        np.ascontiguousarray(PIXELS[::-1, ::-1])[::-1, ::-1],
        torch.from_numpy(PIXELS).permute(2, 0, 1),
        torch.from_numpy(PIXELS).permute(2, 0, 1)[None],
        torch.from_numpy(PIXELS.astype(np.uint16) * 257).permute(2, 0, 1),
        UNIT,
        UNIT.double(),
        UNIT.clone().requires_grad_(),
    ],
)
def test_every_kind_of_colour_picture_is_read_alike_and_bit_exactly(processor, picture):
    batch, sizes = processor.preprocess(picture, HEIGHT, WIDTH)
    assert batch.shape == (1, 3, HEIGHT, WIDTH)
    assert batch.dtype == torch.float32
    assert torch.equal(batch[0], UNIT)
    assert not batch.requires_grad
    assert sizes == [(HEIGHT, WIDTH)]


@pytest.mark.parametrize(
    "picture",
    [
        Image.fromarray(PIXELS[..., 0]),
        PIXELS[..., 0],
        PIXELS[..., :1],
        PIXELS[None, ..., :1],
        UNIT[0],
        UNIT[:1],
        UNIT[None, :1],
        Image.fromarray(PIXELS[..., 0].astype(np.float32) / 255),
    ],
)
def test_grey_pictures_become_three_equal_channels(picture):
    assert torch.equal(read(picture), UNIT[:1].expand(3, -1, -1))


def test_half_precision_and_bool_are_read():
    assert torch.equal(read(UNIT.half()), UNIT.half().float())
    assert torch.equal(read(UNIT.bfloat16()), UNIT.bfloat16().float())
    assert torch.equal(read(PIXELS > 99), (UNIT * 255 > 99.5).float())
    assert torch.equal(read(torch.from_numpy(PIXELS[..., 0] > 99)), (UNIT[:1] * 255 > 99.5).float().expand(3, -1, -1))


def test_lists_mix_kinds_and_sizes(processor):
    pictures = (Image.new("L", (30, 20)), np.zeros((2, 9, 10, 3), np.uint8), torch.zeros(3, 40, 50))
    batch, sizes = processor.preprocess(pictures, 8, 24)
    assert batch.shape == (4, 3, 8, 24)
    assert sizes == [(20, 30), (9, 10), (9, 10), (40, 50)]


def test_the_input_is_never_changed_or_shared(processor):
    picture = torch.full((3, HEIGHT, WIDTH), 0.5)
    batch, _ = processor.preprocess(picture, HEIGHT, WIDTH)
    batch.zero_()
    assert (picture == 0.5).all()


def test_resizing_is_antialiased_and_stays_in_range(processor):
    stripes = np.zeros((64, 64), np.uint8)
    stripes[:, ::2] = 255
    shrunk = read(stripes, 16, 16)
    assert (shrunk[..., 1:-1] - 0.5).abs().max() < 0.02  # nearest pixels would be black or white
    expected = torch.nn.functional.interpolate(UNIT[None], (9, 30), mode="bilinear", antialias=True)[0]
    assert torch.equal(read(PIXELS, 9, 30), expected.clamp(0, 1))
    white = read(np.full((33, 47), 255, np.uint8), 16, 64)
    assert white.max() <= 1


# Preprocessing: PIL modes


@pytest.mark.parametrize("mode", ["RGB", "RGBX", "RGBA", "YCbCr", "HSV"])
def test_colour_modes(mode):
    image = plain("RGB", COLOUR).convert(mode)
    assert image.mode == mode
    assert np.abs(np.subtract(shade(read(image)), COLOUR)).max() <= 2


def test_cmyk_and_lab():
    assert shade(read(plain("CMYK", (0, 255, 255, 0)))) == (255, 0, 0)
    to_lab = ImageCms.buildTransform(ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), "RGB", "LAB")
    lab = ImageCms.applyTransform(plain("RGB", COLOUR), to_lab)
    assert np.abs(np.subtract(shade(read(lab)), COLOUR)).max() <= 2


def test_a_cmyk_jpeg_is_not_inverted():
    image = stored(plain("CMYK", (0, 255, 255, 0)), "JPEG")
    red, green, blue = shade(read(image))
    assert red > 250
    assert max(green, blue) < 5


def test_grey_and_bilevel_modes():
    assert shade(read(plain("L", 77))) == (77, 77, 77)
    assert shade(read(plain("1", 1))) == (255, 255, 255)
    assert shade(read(plain("F", 0.2))) == (51, 51, 51)


@pytest.mark.parametrize("background", [(255, 255, 255), (0, 0, 0), (255, 0, 128)])
def test_transparent_pixels_show_the_background(background):
    clear, half = (*COLOUR, 0), (*COLOUR, 128)
    options = {"background": background}
    assert shade(read(plain("RGBA", clear), **options)) == background
    assert shade(read(plain("RGBA", (*COLOUR, 255)), **options)) == COLOUR
    mixed = np.array(COLOUR) * (128 / 255) + np.array(background) * (127 / 255)
    for image in (plain("RGBA", half), plain("RGBA", half).convert("RGBa")):
        assert np.abs(np.subtract(shade(read(image, **options)), mixed)).max() <= 2
    for image in (plain("LA", (9, 0)), plain("LA", (9, 0)).convert("La"), plain("RGBA", clear).convert("PA")):
        assert shade(read(image, **options)) == background
    assert shade(read(np.full((HEIGHT, WIDTH, 4), (*COLOUR, 0), np.uint8), **options)) == background
    assert shade(read(torch.zeros(4, HEIGHT, WIDTH), **options)) == background


def test_palettes_give_their_colours_and_transparency():
    image = plain("P", 1)
    image.putpalette([0, 0, 0, *COLOUR])
    image.putpixel((0, 0), 0)
    opaque = read(image)
    assert shade(opaque[:, 1:]) == COLOUR
    assert shade(opaque[:, :1, :1]) == (0, 0, 0)
    for transparency in (0, b"\x00\xff"):
        reopened = stored(image, transparency=transparency)
        assert reopened.mode == "P"
        result = read(reopened)
        assert shade(result[:, :1, :1]) == (255, 255, 255)
        assert shade(result[:, 1:]) == COLOUR


@pytest.mark.parametrize(("mode", "colour"), [("RGB", COLOUR), ("L", 9), ("1", 0)])
def test_a_transparent_colour_shows_the_background(mode, colour):
    image = stored(plain(mode, colour), transparency=colour)
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
    with pytest.raises(ValueError, match=r"mode I must be 16-bit, 0 to 65535; scale them"):
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
        with pytest.raises(ValueError, match=r"several frames; choose one by image\.seek\(0\) and image\.copy\(\)"):
            read(stored(image, kind, **more))
    first = stored(image, "GIF", **more)
    first.seek(0)
    assert read(first.copy()).shape == (3, HEIGHT, WIDTH)
    assert read(stored(image, "MPO", **more)).shape == (3, HEIGHT, WIDTH)
    assert read(stored(image, "GIF")).shape == (3, HEIGHT, WIDTH)


def test_a_truncated_picture_is_refused():
    file = io.BytesIO()
    Image.fromarray(RNG.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(file, "PNG")
    with pytest.raises(ValueError, match=r"cannot be decoded .*copy or save it again"):
        read(Image.open(io.BytesIO(file.getvalue()[:6000])))


# Preprocessing: refusals


@pytest.mark.parametrize(
    ("picture", "message"),
    [
        ("a.png", "'a.png' is a path; open it with diffusionad_pipe.open_image(path) first"),
        (Path("a.png"), "open it with diffusionad_pipe.open_image(path) first"),
        (None, "must be a PIL image, a NumPy array or a torch tensor, not NoneType"),
        ([[PIXELS]], "must be a PIL image, a NumPy array or a torch tensor, not list"),
    ],
)
def test_refuses_wrong_types(picture, message):
    with pytest.raises(TypeError, match=re.escape(message)):
        read(picture)


@pytest.mark.parametrize(
    ("picture", "message"),
    [
        ([], "no pictures; give at least one"),
        (np.zeros((0, 16, 16, 3), np.uint8), "no pictures; give at least one"),
        (np.zeros((3, 16, 20), np.uint8), "make it [H, W, C] by array.transpose(1, 2, 0)"),
        (np.zeros((2, 3, 16, 20), np.uint8), "make it [H, W, C] by array.transpose(1, 2, 0)"),
        (torch.zeros(16, 20, 3), "make it [C, H, W] by tensor.permute(2, 0, 1)"),
        (np.zeros((16, 20, 2), np.uint8), "make it [H, W] or [H, W, C] with C = 1, 3 or 4"),
        (torch.zeros(5, 16, 20), "make it [H, W] or [C, H, W] with C = 1, 3 or 4"),
        (np.zeros(16, np.uint8), "array of shape (16,); make it [H, W]"),
        (torch.zeros(1, 1, 3, 16, 20), "tensor of shape (1, 1, 3, 16, 20); make it [H, W]"),
        (np.zeros((16, 20), np.int64), "range of int64 is not known; pass uint8, uint16 or floats"),
        (torch.zeros(16, 20, dtype=torch.int32), "range of int32 is not known; pass uint8, uint16 or floats"),
        (np.zeros((16, 20), complex), "range of complex128 is not known"),
        (np.full((16, 20), np.nan), "NaN or infinity; replace them"),
        (torch.full((16, 20), torch.inf), "NaN or infinity; replace them"),
        (np.full((16, 20), 200.0), "not 200 to 200; divide 0..255 by 255 or pass uint8"),
        (torch.full((16, 20), 200.0), "divide 0..255 by 255 or pass uint8"),
        (Image.new("F", (20, 16), 200.0), "divide 0..255 by 255 or pass uint8"),
        (torch.full((16, 20), -0.5), "map [-1, 1] by x / 2 + 0.5"),
        (torch.full((16, 20), 1.1), "not 1.1 to 1.1; clip them"),
        (np.zeros((7, 20), np.uint8), "7 x 20 pixels; crop it with sides of at least 8"),
        (np.zeros((0, 20), np.uint8), "0 x 20 pixels; crop it with sides of at least 8"),
        (np.zeros((8, 257), np.uint8), "8 x 257 pixels; crop it to an aspect ratio of at most 32"),
        (Image.new("L", (8, 257)), "257 x 8 pixels; crop it to an aspect ratio of at most 32"),
    ],
)
def test_refuses_unusable_pictures_and_says_the_cure(picture, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        read(picture)


def test_the_limits_are_inclusive_and_can_be_set():
    assert read(np.zeros((8, 256), np.uint8)).shape == (3, HEIGHT, WIDTH)
    assert read(np.zeros((2, 200), np.uint8), min_side=2, max_aspect_ratio=100).shape == (3, HEIGHT, WIDTH)


def test_rounding_around_the_range_is_clamped():
    picture = torch.full((16, 20), 1 + 1e-6)
    picture[0] = -1e-6
    result = read(picture, 16, 20)
    assert result.min() == 0
    assert result.max() == 1


def test_an_error_names_the_picture_among_several():
    good = Image.fromarray(PIXELS)
    with pytest.raises(ValueError, match=r"^picture 2: 4 x 4 pixels"):
        read([good, PIXELS, np.zeros((4, 4), np.uint8)])
    with pytest.raises(TypeError, match=r"^picture 1: 'b.png' is a path"):
        read([good, "b.png"])
    batch = np.full((3, 16, 20, 3), 0.5)
    batch[1] = np.nan
    with pytest.raises(ValueError, match=r"^picture 2: .*NaN"):
        read([good, batch])
    with pytest.raises(ValueError, match=r"^4 x 4 pixels"):
        read([np.zeros((4, 4), np.uint8)])


# Postprocessing


def test_values_beyond_the_range_do_not_wrap(processor):
    tensor = torch.tensor([-0.1, 0.0, 1.0, 1.1]).view(1, 1, 2, 2)
    (image,) = processor.postprocess(tensor, "pil")
    assert np.asarray(image).tolist() == [[0, 0], [255, 255]]
    assert processor.postprocess(tensor, "np").tolist() == [[[[0], [0]], [[1], [1]]]]
    assert processor.postprocess(tensor, "pt").tolist() == [[[[0, 0], [1, 1]]]]


def test_pil_values_are_rounded(processor):
    values = (torch.arange(256) + 0.4).div(255).view(1, 1, 16, 16)
    below = np.asarray(processor.postprocess(values, "pil")[0]).ravel()
    above = np.asarray(processor.postprocess(values + 0.2 / 255, "pil")[0]).ravel()
    assert below.tolist() == list(range(256))
    assert above.tolist() == [*range(1, 256), 255]


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_every_output_type(processor, channels, mode, dtype):
    tensor = torch.rand(2, channels, 8, 9).to(dtype).requires_grad_()
    images = processor.postprocess(tensor, "pil")
    assert [(image.mode, image.size) for image in images] == [(mode, (9, 8))] * 2
    arrays = processor.postprocess(tensor, "np")
    assert arrays.shape == (2, 8, 9, channels)
    assert arrays.dtype == np.float32
    tensors = processor.postprocess(tensor, "pt")
    assert tensors.shape == (2, channels, 8, 9)
    assert torch.equal(tensors, tensor.detach().float())


def test_results_have_the_sizes_asked_for(processor):
    tensor = torch.rand(2, 1, 8, 9)
    sizes = [(16, 10), (4, 5)]
    assert [image.size for image in processor.postprocess(tensor, "pil", sizes)] == [(10, 16), (5, 4)]
    assert [array.shape for array in processor.postprocess(tensor, "np", sizes)] == [(16, 10, 1), (4, 5, 1)]
    assert [item.shape for item in processor.postprocess(tensor, "pt", sizes)] == [(1, 16, 10), (1, 4, 5)]
    assert processor.postprocess(tensor, "np", [(6, 7), (6, 7)]).shape == (2, 6, 7, 1)
    assert processor.postprocess(tensor, "pt", [(6, 7), (6, 7)]).shape == (2, 1, 6, 7)


def test_resize_to_antialiases_only_what_shrinks(processor):
    tensor = torch.rand(3, 2, 8, 8, dtype=torch.float64) * 3 - 1
    same, larger, smaller = processor.resize_to(tensor, [(8, 8), (20, 16), (4, 4)])
    resize = torch.nn.functional.interpolate
    assert torch.equal(same, tensor[0].float())
    assert torch.equal(larger, resize(tensor[1:2].float(), (20, 16), mode="bilinear")[0])
    assert torch.equal(smaller, resize(tensor[2:].float(), (4, 4), mode="bilinear", antialias=True)[0])


@pytest.mark.parametrize(
    ("shape", "output_type", "sizes", "message"),
    [
        ((1, 1, 8, 8), "numpy", None, "output_type must be one of ('pil', 'np', 'pt'), not 'numpy'"),
        ((1, 2, 8, 8), "pt", None, "must be [B, 1, H, W] or [B, 3, H, W], not [1, 2, 8, 8]"),
        ((1, 8, 8), "pt", None, "must be [B, 1, H, W] or [B, 3, H, W], not [1, 8, 8]"),
        ((2, 1, 8, 8), "pt", [(4, 4)], "1 sizes for 2 pictures; give one size for each"),
    ],
)
def test_postprocess_refuses(processor, shape, output_type, sizes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        processor.postprocess(torch.zeros(shape), output_type, sizes)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_tensors_on_a_gpu(processor):
    batch, _ = processor.preprocess([UNIT.cuda(), (UNIT * 255).to(torch.uint8).cuda()], HEIGHT, WIDTH)
    assert batch.device.type == "cpu"
    tensor = torch.rand(1, 1, HEIGHT, WIDTH, device="cuda", dtype=torch.float16)
    assert processor.postprocess(tensor, "pt").device.type == "cpu"
    assert processor.postprocess(tensor, "np", [(5, 6)]).shape == (1, 5, 6, 1)
    mask = tensor[0] > 0.5
    assert processor.visualize_anomaly_map(UNIT.cuda(), tensor[0], mask).size == (WIDTH, HEIGHT)


# Drawing


def test_the_colour_scale_is_even_and_grows_lighter():
    to_oklab = np.array([[0.4122, 0.5363, 0.0514], [0.2119, 0.6807, 0.1074], [0.0883, 0.2817, 0.6300]])
    lms_to_lab = np.array([[0.2105, 0.7936, -0.0041], [1.9780, -2.4286, 0.4506], [0.0259, 0.7828, -0.8087]])
    encoded = _colourize(torch.linspace(0, 1, 11)[None])[:, 0].T.numpy()  # [11, 3]
    linear = np.where(encoded <= 0.04045, encoded / 12.92, ((encoded + 0.055) / 1.055) ** 2.4)
    lab = np.cbrt(linear @ to_oklab.T) @ lms_to_lab.T
    steps = np.linalg.norm(np.diff(lab, axis=0), axis=1)
    assert steps.max() / steps.min() < 1.3
    assert (np.diff(lab[:, 0]) > 0.045).all()  # readable without colour


def test_the_picture_is_unchanged_where_the_map_is_zero(processor):
    heat = np.zeros((HEIGHT, WIDTH), np.float32)
    heat[3:6, 4:9] = 1
    drawn = np.asarray(processor.visualize_anomaly_map(PIXELS, heat))
    assert np.array_equal(drawn[heat == 0], PIXELS[heat == 0])
    top = np.array(TOP_COLOUR)
    expected = (PIXELS[heat == 1].astype(float) + top) / 2
    assert np.abs(drawn[heat == 1] - expected).max() <= 1


def test_the_blend_grows_with_the_map_on_a_fixed_scale(processor):
    black = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    ramp = np.tile(np.linspace(0, 1, WIDTH, dtype=np.float32), (HEIGHT, 1))
    brightness = np.asarray(processor.visualize_anomaly_map(black, ramp)).astype(int).sum(-1)[0]
    assert brightness[0] == 0
    assert (np.diff(brightness) > 0).all()
    # The scale does not depend on the rest of the map, and half of it is shown alike with half the range.
    low = np.asarray(processor.visualize_anomaly_map(black, ramp / 2, vmax=0.5)).astype(int).sum(-1)[0]
    assert np.abs(low - brightness).max() <= 1
    high = np.asarray(processor.visualize_anomaly_map(black, ramp / 2 + 0.5, vmin=0.5)).astype(int).sum(-1)[0]
    assert np.abs(high - brightness).max() <= 1
    none = np.asarray(processor.visualize_anomaly_map(PIXELS, ramp, opacity=0))
    assert np.array_equal(none, PIXELS)


@pytest.mark.parametrize(
    "heat",
    [
        Image.new("L", (WIDTH, HEIGHT), 255),
        Image.new("F", (WIDTH, HEIGHT), 1.0),
        np.ones((HEIGHT, WIDTH)),
        np.ones((HEIGHT, WIDTH, 1), np.float32),
        torch.ones(HEIGHT, WIDTH),
        torch.ones(1, HEIGHT, WIDTH, dtype=torch.bfloat16),
    ],
)
def test_every_kind_of_map(processor, heat):
    drawn = processor.visualize_anomaly_map(PIXELS, heat, opacity=1)
    assert drawn.mode == "RGB"
    assert (np.asarray(drawn) == TOP_COLOUR).all()


@pytest.mark.parametrize(
    ("heat", "options", "message"),
    [
        (
            np.zeros((WIDTH, HEIGHT)),
            {},
            "the anomaly map has shape (16, 12) but the picture (12, 16); resize",
        ),
        (np.zeros((HEIGHT, WIDTH, 3)), {}, "the anomaly map has shape (12, 16, 3)"),
        (np.full((HEIGHT, WIDTH), 7.0), {}, "anomaly map: float values must be in [0, 1]"),
        (np.zeros((HEIGHT, WIDTH)), {"mask": np.zeros((4, 4))}, "the mask has shape (4, 4) but the picture"),
        (np.zeros((HEIGHT, WIDTH)), {"opacity": 1.5}, "opacity must be in [0, 1], not 1.5"),
        (np.zeros((HEIGHT, WIDTH)), {"vmin": 1.0}, "vmin must be below vmax, not 1.0 and 1.0"),
    ],
)
def test_drawing_refuses(processor, heat, options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        processor.visualize_anomaly_map(PIXELS, heat, **options)


def contour(drawn: Image.Image) -> np.ndarray:
    return (np.asarray(drawn) == CONTOUR_COLOUR).all(-1)


def test_a_contour_is_the_inner_border_of_the_mask(processor):
    mask = np.zeros((HEIGHT, WIDTH), bool)
    mask[2:8, 3:10] = True
    expected = mask.copy()
    expected[3:7, 4:9] = False
    drawn = processor.visualize_mask(PIXELS, mask)
    assert np.array_equal(contour(drawn), expected)
    assert np.array_equal(np.asarray(drawn)[~expected], PIXELS[~expected])
    heat = np.zeros((HEIGHT, WIDTH), np.float32)
    assert np.array_equal(contour(processor.visualize_anomaly_map(PIXELS, heat, mask)), expected)


def test_contours_close_at_the_edge_and_keep_single_pixels(processor):
    mask = np.ones((HEIGHT, WIDTH), bool)
    assert contour(processor.visualize_mask(PIXELS, mask)).sum() == 2 * (HEIGHT + WIDTH) - 4
    mask[:] = False
    mask[5, 6] = True
    assert np.array_equal(contour(processor.visualize_mask(PIXELS, mask)), mask)
    assert not contour(processor.visualize_mask(PIXELS, mask & False)).any()


@pytest.mark.parametrize(("side", "width"), [(64, 1), (400, 2), (1000, 3)])
def test_contours_are_wider_on_larger_pictures(processor, side, width):
    mask = np.zeros((side, side), bool)
    mask[20:44, 20:44] = True
    drawn = contour(processor.visualize_mask(np.zeros((side, side), np.uint8), mask))
    assert drawn[32].sum() == 2 * width


def test_every_kind_of_mask(processor):
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    mask[2:8, 3:10] = 1
    expected = contour(processor.visualize_mask(PIXELS, mask))
    palette = Image.fromarray(mask)
    palette.putpalette([255, 255, 255, 0, 0, 0])  # index 1 is anomalous, black as it may be
    assert palette.mode == "P"
    tensor = torch.from_numpy(mask)
    for kind in (
        palette,
        Image.fromarray(mask * 255),
        mask > 0,
        mask[..., None],
        tensor.long(),
        tensor[None].half(),
    ):
        assert np.array_equal(contour(processor.visualize_mask(PIXELS, kind)), expected)


@pytest.mark.parametrize("size", [(64, 64), (256, 256), (512, 512), (700, 1400), (1200, 40), (16, 500)])
def test_panels(processor, size):
    height, width = size
    scale = min(max(max(size), 256), 512) / max(size)
    picture = Image.new("RGB", (width, height), COLOUR)
    heat = np.zeros(size, np.float32)
    mask = np.zeros(size, bool)
    mask[height // 2, width // 2] = True  # one pixel must survive the shrinking
    panel = processor.panel(picture, Image.new("RGB", (20, 30), (0, 0, 255)), heat, mask, title="word " * 200)
    assert panel.mode == "RGB"
    pixels = np.asarray(panel)
    area = round(height * scale) * round(width * scale)
    drawn = contour(panel).sum()
    assert drawn >= 1
    assert (pixels == (0, 0, 255)).all(-1).sum() == area
    assert (pixels == COLOUR).all(-1).sum() == 2 * area - drawn
    assert (pixels[:, :15] == 255).all()
    assert (pixels[:, -15:] == 255).all()
    assert panel.width <= 3 * 512 + 150
    assert panel.height <= 512 + 150


def test_a_panel_without_mask_and_title(processor):
    heat = torch.rand(1, 64, 64)
    bare = processor.panel(PIXELS.repeat(6, 0)[:64].repeat(4, 1), PIXELS, heat)
    titled = processor.panel(PIXELS.repeat(6, 0)[:64].repeat(4, 1), PIXELS, heat, title="a\nb")
    assert bare.width == titled.width
    assert bare.height < titled.height
