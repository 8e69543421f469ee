"""Anomaly maps, contours and panels drawn on tiny real pictures."""

import re

import numpy as np
import pytest
import torch
from PIL import Image

from diffusionad_pipe.images.colors import COLOR_SCALE
from diffusionad_pipe.images.panels import CONTOUR_COLOR, colorize
from tests.helpers.tiny_images import COLOR, HEIGHT, PIXELS, WIDTH

TOP_COLOR = tuple(bytes.fromhex(COLOR_SCALE.split()[-1]))  # of a map that is 1


def test_the_color_scale_is_even_and_grows_lighter():
    to_oklab = np.array([[0.4122, 0.5363, 0.0514], [0.2119, 0.6807, 0.1074], [0.0883, 0.2817, 0.6300]])
    lms_to_lab = np.array([[0.2105, 0.7936, -0.0041], [1.9780, -2.4286, 0.4506], [0.0259, 0.7828, -0.8087]])
    encoded = colorize(torch.linspace(0, 1, 11)[None])[:, 0].T.numpy()  # [11, 3]
    linear = np.where(encoded <= 0.04045, encoded / 12.92, ((encoded + 0.055) / 1.055) ** 2.4)
    lab = np.cbrt(linear @ to_oklab.T) @ lms_to_lab.T
    steps = np.linalg.norm(np.diff(lab, axis=0), axis=1)
    assert steps.max() / steps.min() < 1.3
    assert (np.diff(lab[:, 0]) > 0.045).all()  # readable without colour


def test_the_image_is_unchanged_where_the_map_is_zero(processor):
    heat = np.zeros((HEIGHT, WIDTH), np.float32)
    heat[3:6, 4:9] = 1
    drawn = np.asarray(processor.visualize_anomaly_map(PIXELS, heat))
    assert np.array_equal(drawn[heat == 0], PIXELS[heat == 0])
    top = np.array(TOP_COLOR)
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
    assert (np.asarray(drawn) == TOP_COLOR).all()


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
    return (np.asarray(drawn) == CONTOUR_COLOR).all(-1)


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
def test_contours_are_wider_on_larger_images(processor, side, width):
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
    image = Image.new("RGB", (width, height), COLOR)
    heat = np.zeros(size, np.float32)
    mask = np.zeros(size, bool)
    mask[height // 2, width // 2] = True  # one pixel must survive the shrinking
    panel = processor.panel(image, Image.new("RGB", (20, 30), (0, 0, 255)), heat, mask, title="word " * 200)
    assert panel.mode == "RGB"
    pixels = np.asarray(panel)
    area = round(height * scale) * round(width * scale)
    drawn = contour(panel).sum()
    assert drawn >= 1
    assert (pixels == (0, 0, 255)).all(-1).sum() == area
    assert (pixels == COLOR).all(-1).sum() == 2 * area - drawn
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
