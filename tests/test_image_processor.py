"""Pictures of every kind become tensors, and tensors pictures of every kind, on tiny real pictures."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from diffusionad_pipe import DiffusionADImageProcessor
from tests.helpers.tiny_images import HEIGHT, PIXELS, RNG, UNIT, WIDTH, read

# Preprocessing: kinds and layouts


@pytest.mark.parametrize(
    "image",
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
def test_every_kind_of_color_image_is_read_alike_and_bit_exactly(processor, image):
    batch, sizes = processor.preprocess(image, HEIGHT, WIDTH)
    assert batch.shape == (1, 3, HEIGHT, WIDTH)
    assert batch.dtype == torch.float32
    assert torch.equal(batch[0], UNIT)
    assert not batch.requires_grad
    assert sizes == [(HEIGHT, WIDTH)]


@pytest.mark.parametrize(
    "image",
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
def test_gray_images_become_three_equal_channels(image):
    assert torch.equal(read(image), UNIT[:1].expand(3, -1, -1))


def test_half_precision_and_bool_are_read():
    assert torch.equal(read(UNIT.half()), UNIT.half().float())
    assert torch.equal(read(UNIT.bfloat16()), UNIT.bfloat16().float())
    assert torch.equal(read(PIXELS > 99), (UNIT * 255 > 99.5).float())
    assert torch.equal(read(torch.from_numpy(PIXELS[..., 0] > 99)), (UNIT[:1] * 255 > 99.5).float().expand(3, -1, -1))


def test_lists_mix_kinds_and_sizes(processor):
    images = (Image.new("L", (30, 20)), np.zeros((2, 9, 10, 3), np.uint8), torch.zeros(3, 40, 50))
    batch, sizes = processor.preprocess(images, 8, 24)
    assert batch.shape == (4, 3, 8, 24)
    assert sizes == [(20, 30), (9, 10), (9, 10), (40, 50)]


def test_the_input_is_never_changed_or_shared(processor):
    image = torch.full((3, HEIGHT, WIDTH), 0.5)
    batch, _ = processor.preprocess(image, HEIGHT, WIDTH)
    batch.zero_()
    assert (image == 0.5).all()


def test_resizing_is_antialiased_and_stays_in_range(processor):
    stripes = np.zeros((64, 64), np.uint8)
    stripes[:, ::2] = 255
    shrunk = read(stripes, 16, 16)
    assert (shrunk[..., 1:-1] - 0.5).abs().max() < 0.02  # nearest pixels would be black or white
    expected = torch.nn.functional.interpolate(UNIT[None], (9, 30), mode="bilinear", antialias=True)[0]
    assert torch.equal(read(PIXELS, 9, 30), expected.clamp(0, 1))
    white = read(np.full((33, 47), 255, np.uint8), 16, 64)
    assert white.max() <= 1


# Preprocessing: refusals


@pytest.mark.parametrize(
    ("image", "message"),
    [
        ("a.png", "'a.png' is a path; open it with diffusionad_pipe.open_image(path) first"),
        (Path("a.png"), "open it with diffusionad_pipe.open_image(path) first"),
        (None, "must be a PIL image, a NumPy array or a torch tensor, not NoneType"),
        ([[PIXELS]], "must be a PIL image, a NumPy array or a torch tensor, not list"),
    ],
)
def test_refuses_wrong_types(image, message):
    with pytest.raises(TypeError, match=re.escape(message)):
        read(image)


@pytest.mark.parametrize(
    ("image", "message"),
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
        (np.full((16, 20), 200.0), "not 200 to 200; divide 0..255 by 255 or use uint8"),
        (torch.full((16, 20), 200.0), "divide 0..255 by 255 or use uint8"),
        (Image.new("F", (20, 16), 200.0), "divide 0..255 by 255 or use uint8"),
        (torch.full((16, 20), -0.5), "map [-1, 1] by x / 2 + 0.5"),
        (torch.full((16, 20), 1.1), "not 1.1 to 1.1; clip them"),
        (np.zeros((7, 20), np.uint8), "20 x 7 pixels are too few; take a picture with sides of at least 8"),
        (np.zeros((0, 20), np.uint8), "20 x 0 pixels are too few; take a picture with sides of at least 8"),
        (np.zeros((8, 257), np.uint8), "257 x 8 pixels are too long a strip; crop it to an aspect ratio of at most 32"),
        (Image.new("L", (8, 257)), "8 x 257 pixels are too long a strip; crop it to an aspect ratio of at most 32"),
    ],
)
def test_refuses_unusable_images_and_says_the_cure(image, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        read(image)


def test_the_limits_are_inclusive_and_can_be_set():
    assert read(np.zeros((8, 256), np.uint8)).shape == (3, HEIGHT, WIDTH)
    assert read(np.zeros((2, 200), np.uint8), min_side=2, max_aspect_ratio=100).shape == (3, HEIGHT, WIDTH)


def test_rounding_around_the_range_is_clamped():
    image = torch.full((16, 20), 1 + 1e-6)
    image[0] = -1e-6
    result = read(image, 16, 20)
    assert result.min() == 0
    assert result.max() == 1


def test_an_error_names_the_image_among_several():
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


@pytest.mark.parametrize("size", [(700, 90), (513, 257), (256, 300), (90, 700)])
@pytest.mark.parametrize("target", [(64, 64), (32, 96), (600, 320)])
def test_strips_give_the_whole(size: tuple[int, int], target: tuple[int, int]) -> None:
    """Only strips of a picture are floats at once, and nothing of the result tells."""
    rows: list[int] = []

    class Recording(DiffusionADImageProcessor):
        def to_rgb(self, array, window=None):
            rgb = super().to_rgb(array, window)
            rows.append(rgb.shape[1])
            return rgb

    pixels = RNG.integers(0, 256, (*size, 4), dtype=np.uint8)
    tensor = torch.from_numpy(pixels).permute(2, 0, 1).float() / 255
    whole = tensor[:3] * tensor[3:] + (1 - tensor[3:])  # [3, h, w], on white
    expected = torch.nn.functional.interpolate(whole[:, None], target, mode="bilinear", antialias=True)[:, 0]
    processor = Recording()
    found, sizes = processor.preprocess(pixels, *target)
    assert sizes == [size] and torch.equal(found[0], expected.clamp(0, 1))
    drawn = processor.visualize_anomaly_map(pixels, np.zeros(size, dtype=np.float32))
    assert np.array_equal(np.asarray(drawn), whole.mul(255).round().byte().permute(1, 2, 0).numpy())
    assert max(rows) <= 256 and sum(rows) == 2 * size[0]
