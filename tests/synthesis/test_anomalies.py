"""Synthetic anomalies, against the recipe: DRAEM's with DiffusionAD's changes."""

import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch.nn import functional as F

from diffusionad_pipe.synthesis.anomalies import (
    perlin_masks,
    perlin_noise,
    procedural_textures,
    shuffle_tiles,
    soften_edges,
    synthesize_anomalies,
    thin_lines,
)
from diffusionad_pipe.synthesis.augmenters import AUGMENTERS, augment, rotate
from diffusionad_pipe.synthesis.config import SynthesisConfig
from diffusionad_pipe.synthesis.sampling import integers, sample_generator, uniform

CPU = torch.device("cpu")


def generators(count: int, seed: int = 0) -> list[torch.Generator]:
    return [sample_generator(seed, index) for index in range(count)]


def make_images(count: int, size: int = 64, seed: int = 0) -> torch.Tensor:
    return torch.rand(count, 3, size, size, generator=sample_generator(seed))


def paper(**options: float) -> SynthesisConfig:
    """The paper's anomalies, but for some options."""
    return SynthesisConfig(grayscale_anomalies=False, **options)


def textures(size: int = 64) -> torch.Tensor:
    return (make_images(2, size, 9) * 255).byte()


def test_a_generator_is_a_function_of_its_key() -> None:
    keys = [(0,), (0, 0), (0, 1), (1, 1), (0, 0, 1), (0, 0, 0), (2, 0), (2,)]
    assert len({torch.rand(1, generator=sample_generator(*key)).item() for key in keys}) == len(keys)
    assert torch.equal(torch.rand(5, generator=sample_generator(1, 2)), torch.rand(5, generator=sample_generator(1, 2)))


def test_each_sample_has_its_own_generator() -> None:
    together = uniform(-2, 3, generators(5), 4)
    assert together.shape == (5, 4) and together.min() >= -2 and together.max() < 3
    assert torch.equal(together[3], uniform(-2, 3, [sample_generator(0, 3)], 4)[0])
    assert sorted(integers(1, 3, generators(60)).unique().tolist()) == [1, 2, 3]


@pytest.mark.parametrize("cells", [(1, 1), (4, 32), (32, 32)])
def test_perlin_noise(cells: tuple[int, int]) -> None:
    noise = perlin_noise(96, 128, torch.tensor([cells]), generators(1))[0, 0]
    assert noise.shape == (96, 128) and 0.1 < noise.abs().max() <= 1.01
    # Perlin noise vanishes at the corners of its cells.
    assert noise[:: 96 // cells[0], :: 128 // cells[1]].abs().max() < 1e-4
    # It is continuous: neighbours differ by little of a cell.
    step = max(cells[0] / 96, cells[1] / 128)
    assert noise.diff(dim=0).abs().max() < 4 * step and noise.diff(dim=1).abs().max() < 4 * step


def test_perlin_noise_of_a_batch_is_that_of_each() -> None:
    cells = torch.tensor([[1, 8], [32, 2], [4, 4]])
    batch = perlin_noise(40, 56, cells, generators(3))
    for index in range(3):
        alone = perlin_noise(40, 56, cells[index : index + 1], [sample_generator(0, index)])
        assert torch.equal(batch[index], alone[0])


def test_rotation_by_right_angles_is_exact() -> None:
    image = make_images(2, 16)
    torch.testing.assert_close(rotate(image, torch.zeros(2)), image, rtol=0, atol=1e-5)
    turned = rotate(image, torch.tensor([90.0, -90.0]))
    torch.testing.assert_close(rotate(turned, torch.tensor([-90.0, 90.0])), image, rtol=0, atol=1e-5)
    turns = [[torch.allclose(t, torch.rot90(i, k, (1, 2)), atol=1e-5) for k in (1, 3)] for t, i in zip(turned, image)]
    assert sorted(turns) == [[False, True], [True, False]]


def test_masks_stay_on_the_foreground() -> None:
    foregrounds = torch.zeros(40, 1, 64, 64)
    foregrounds[:, :, 20:40, 10:50] = 0.7
    masks = perlin_masks(foregrounds, generators(40))
    assert not masks[foregrounds == 0].any() and masks.max() <= 0.7
    coverages = (masks > 0).float().mean((1, 2, 3))
    assert coverages.max() > 0.02 and (coverages > 0).sum() >= 38  # fifty tries find the foreground nearly always
    assert not perlin_masks(torch.zeros(2, 1, 64, 64), generators(2)).any()


def test_coarse_masks_are_few_large_blobs_and_fine_ones_many() -> None:
    """Mask coverage by scale: the share of pixels above the threshold hardly depends on it, the blobs' number does."""
    from scipy import ndimage

    blobs, coverage = {}, {}
    for exponent in (1, 3, 5):
        cells = torch.full((30, 2), 2**exponent)
        masks = perlin_noise(128, 128, cells, generators(30, exponent))[:, 0] > 0.5
        blobs[exponent] = np.mean([ndimage.label(mask)[1] for mask in masks.numpy()])
        coverage[exponent] = masks.float().mean().item()
    assert blobs[1] < blobs[3] / 4 < blobs[5] / 16
    assert all(0.02 < share < 0.12 for share in coverage.values()), coverage


@pytest.mark.parametrize("augmenter", AUGMENTERS, ids=lambda function: function.__name__)
def test_augmenters(augmenter) -> None:
    images = make_images(1).expand(8, -1, -1, -1)
    results = augmenter(images, generators(8))
    assert results.shape == images.shape and results.isfinite().all()
    assert results.min() >= -1e-6 and results.max() <= 1 + 1e-6
    assert torch.equal(results[:1], augmenter(images[:1], generators(1)))
    assert any(not torch.equal(result, image) for result, image in zip(results, images))


def test_three_augmenters_are_applied() -> None:
    outputs = augment(make_images(1).expand(20, -1, -1, -1), generators(20))
    assert len({round(output.mean().item(), 5) for output in outputs}) > 15


def test_shuffled_tiles_are_the_same_tiles() -> None:
    image = torch.arange(64.0).reshape(1, 1, 8, 8).repeat_interleave(2, 2).repeat_interleave(2, 3)
    shuffled = shuffle_tiles(image, generators(1))
    assert not torch.equal(shuffled, image)
    assert torch.equal(shuffled[..., ::2, ::2], shuffled[..., 1::2, 1::2])
    assert sorted(shuffled.flatten().tolist()) == sorted(image.flatten().tolist())
    odd = torch.rand(2, 3, 21, 19, generator=sample_generator(1))
    assert torch.equal(shuffle_tiles(odd, generators(2))[:, :, 16:, :], odd[:, :, 16:, :])


def test_procedural_textures_go_from_noise_to_plain_color() -> None:
    made = procedural_textures(48, 64, generators(200), CPU)
    assert made.shape == (200, 3, 48, 64) and made.min() >= 0 and made.max() <= 1 and made.isfinite().all()
    roughness = made.diff(dim=3).abs().mean((1, 2, 3))
    assert roughness.min() < 0.002 and roughness.max() > 0.05
    colors = made.mean((2, 3))
    assert colors.min() < 0.1 and colors.max() > 0.9


def test_composition_is_the_equation() -> None:
    """S = (1−M)·N + M·(β·N + (1−β)·A): where N is known and A alike in all places, one β explains every pixel."""
    normal = make_images(200)
    black = torch.zeros(1, 3, 64, 64, dtype=torch.uint8)
    matte = torch.full((200, 1, 64, 64), 0.6)
    images, masks, labels = synthesize_anomalies(
        normal, matte, black, generators(200), paper(anomaly_probability=1, texture_probability=1)
    )
    assert labels.min() == 1 and torch.equal(masks.unique(), torch.tensor([0.0, 0.6]))
    opacities = []
    for image, mask, original in zip(images, masks, normal):
        inside = mask[0] > 0
        assert torch.equal(image[:, ~inside], original[:, ~inside])
        # Inside, S = (0.4 + 0.6·β)·N + 0.6·(1−β)·A with a plain A per channel: a line in N whose slope is known.
        for channel in range(3):
            x, y = original[channel, inside].double(), image[channel, inside].double()
            if len(x) < 3 or (y - y.mean()).abs().max() < 1e-9:
                continue
            slope, intercept = np.polyfit(x, y, 1)
            residual = (y - (slope * x + intercept)).abs().max()
            if residual < 1e-6:  # autocontrast and the like leave black plain; a rotation does too
                opacities.append((slope - 0.4) / 0.6)
    assert len(opacities) > 500
    # β ~ U[0.2, 0.8)
    assert min(opacities) >= 0.2 - 1e-5 and max(opacities) <= 0.8 + 1e-5
    assert stats.kstest(opacities[::3], stats.uniform(0.2, 0.6).cdf).pvalue > 1e-3


def test_half_of_the_samples_are_anomalous() -> None:
    labels = synthesize_anomalies(
        make_images(400, 32), torch.ones(400, 1, 32, 32), textures(32), generators(400), paper()
    ).labels
    assert abs(labels.mean() - 0.5) < 4 * math.sqrt(0.25 / 400)


def test_sources_are_sampled_as_often_as_asked() -> None:
    """White pictures keep their own color when they are their own source; black textures stay apart from both."""
    images, black = torch.full((300, 3, 32, 32), 0.5), torch.zeros(1, 3, 32, 32, dtype=torch.uint8)

    def share_unchanged(**options: float) -> float:
        made = synthesize_anomalies(
            images, torch.ones(300, 1, 32, 32), black, generators(300), paper(anomaly_probability=1, **options)
        )
        flat = [made.images[i][:, made.masks[i, 0] > 0].std(dim=1).max() < 1e-3 for i in range(300)]
        return sum(map(bool, flat)) / 300

    assert share_unchanged(texture_probability=1, procedural_probability=0) > 0.9
    assert share_unchanged(texture_probability=1, procedural_probability=1) < 0.6


def test_gray_images_get_gray_anomalies() -> None:
    """Colored ones in the same batch get the same as without the setting."""
    colored = make_images(40, 32)
    images = torch.cat([colored, colored.mean(1, keepdim=True).expand(-1, 3, -1, -1)])
    options = {"anomaly_probability": 1, "procedural_probability": 0.5}
    mattes = torch.ones(80, 1, 32, 32)
    gray, colorful = (
        synthesize_anomalies(images, mattes, textures(32), generators(80), SynthesisConfig(**options, **setting))
        for setting in ({"grayscale_anomalies": True}, {"grayscale_anomalies": False})
    )
    assert torch.equal(gray.masks, colorful.masks)
    assert torch.equal(gray.images[:40], colorful.images[:40])
    color = [(made.images[40:].amax(1) - made.images[40:].amin(1)).flatten(1).amax(1) for made in (gray, colorful)]
    assert color[0].max() < 1e-6 and color[1].median() > 0.05
    assert not torch.equal(gray.images[40:], images[40:])


def test_thin_lines_are_thin_and_stay_in_the_foreground() -> None:
    """Three in ten masks are lines of 1 to 5 pixels at 256; one sample alone gives the same."""
    mattes = torch.zeros(60, 1, 256, 256)
    mattes[..., 64:, :] = 0.5
    masks = perlin_masks(mattes, generators(60))
    lines = thin_lines(masks, mattes, generators(60), 0.3)
    changed = (lines != masks).flatten(1).any(1)
    assert 8 < changed.sum() < 30 and lines.amax() == 0.5 and not lines[..., :64, :].any()
    # A line of 5 pixels, with its soft edges, is gone when 3 are taken off every side; a blob is not.
    eroded = -F.max_pool2d(-(lines[changed] > 0).float(), 7, stride=1, padding=3)
    assert eroded.mean() < 5e-4 and (lines[changed] > 0).float().mean() > 0.02
    assert (-F.max_pool2d(-(masks > 0).float(), 7, stride=1, padding=3)).mean() > 5e-3
    index = changed.nonzero()[0].item()
    alone = thin_lines(masks[[index]], mattes[[index]], [sample_generator(0, index)], 0.3)[0]
    torch.testing.assert_close(alone, lines[index], rtol=0, atol=1e-5)


def test_no_room_for_a_line_leaves_the_mask() -> None:
    mattes = torch.zeros(20, 1, 64, 64)
    mattes[:, :, 0, 0] = 1  # one pixel
    masks = mattes.clone()
    lines = thin_lines(masks, mattes, generators(20), 1.0)
    assert lines.flatten(1).any(1).all()


def test_softened_edges_stay_in_the_foreground() -> None:
    """A blurred mask is 1 somewhere, soft at its edge and nothing beyond the matte; half of them are blurred."""
    mattes = torch.zeros(60, 1, 64, 64)
    mattes[..., 16:, :] = 1
    masks = perlin_masks(mattes, generators(60))
    softened = soften_edges(masks, mattes, generators(60), 0.5)
    changed = (softened != masks).flatten(1).any(1)
    assert 15 < changed.sum() < 45
    assert torch.allclose(softened.amax((1, 2, 3)), torch.ones(60)) and softened.min() >= 0
    assert not softened[..., :16, :].any()
    # No step from pixel to pixel but at the matte's border: a Gaussian's steepest slope is 1 / (σ √2π).
    assert softened[changed][..., 16:, :].diff(dim=-1).abs().amax((1, 2, 3)).median() < 0.5
    for i in (3, 41):
        alone = soften_edges(masks[[i]], mattes[[i]], [sample_generator(0, i)], 0.5)[0]
        torch.testing.assert_close(alone, softened[i], rtol=0, atol=1e-6)


def test_softened_masks_are_no_stronger_than_the_matte() -> None:
    mattes = torch.full((20, 1, 64, 64), 0.3)
    masks = perlin_masks(mattes, generators(20))
    softened = soften_edges(masks, mattes, generators(20), 1.0)
    torch.testing.assert_close(softened.amax((1, 2, 3)), torch.full((20,), 0.3))
    assert (softened[softened > 0] >= 0.3 / 255).all() and (softened == 0).any()


def test_lines_and_soft_edges_are_composed_like_hard_ones() -> None:
    """And a probability of 0 leaves the paper's samples as they are."""
    images, mattes = torch.zeros(40, 3, 64, 64), torch.ones(40, 1, 64, 64)
    white = torch.full((1, 3, 64, 64), 255, dtype=torch.uint8)
    options = {"anomaly_probability": 1, "texture_probability": 1}
    hard, same, lines, soft = (
        synthesize_anomalies(images, mattes, white, generators(40), paper(**options, **extra))
        for extra in (
            {},
            {"soft_edge_probability": 0.0, "thin_line_probability": 0.0},
            {"thin_line_probability": 1.0},
            {"soft_edge_probability": 1.0},
        )
    )
    assert torch.equal(hard.images, same.images) and torch.equal(hard.masks, same.masks)
    inside = (soft.masks > 0) & (soft.masks < 1)
    assert inside.flatten(1).any(1).all()
    assert ((lines.masks > 0) != (hard.masks > 0)).flatten(1).any(1).all()
    # S = M · (1 − β) · A on black, with A at most 1 and β at least 0.2
    for made in (lines, soft):
        assert (made.images <= 0.8 * made.masks + 1e-6).all() and made.images.amax() > 0.5 and made.labels.all()


@pytest.mark.parametrize(
    "setting, cause",
    [
        ({"thin_line_probability": 1.5}, "thin_line_probability must be a share from 0 to 1, not 1.5"),
        ({"foreground": "salient"}, "foreground must be one of none, random, threshold, folder, transformers"),
    ],
)
def test_settings_that_cannot_be(setting: dict, cause: str) -> None:
    with pytest.raises(ValueError, match=cause):
        SynthesisConfig(**setting)


def test_empty_foreground_leaves_the_image_normal() -> None:
    images, masks, labels = synthesize_anomalies(
        make_images(3, 32), torch.zeros(3, 1, 32, 32), textures(32), generators(3), paper(anomaly_probability=1)
    )
    assert not labels.any() and not masks.any() and torch.equal(images, make_images(3, 32))


@pytest.mark.parametrize("procedural", [0.0, 0.5])
def test_without_textures_there_is_still_a_source(procedural: float) -> None:
    images, _, labels = synthesize_anomalies(
        make_images(4, 32),
        torch.ones(4, 1, 32, 32),
        None,
        generators(4),
        paper(anomaly_probability=1, texture_probability=1, procedural_probability=procedural),
    )
    assert labels.all() and not any(torch.equal(a, b) for a, b in zip(images, make_images(4, 32)))


def test_a_sample_does_not_depend_on_its_batch() -> None:
    options = {"anomaly_probability": 0.8, "procedural_probability": 0.5}
    images, mattes = make_images(9, 40), torch.ones(9, 1, 40, 40)
    together = synthesize_anomalies(images, mattes, textures(40), generators(9), paper(**options))
    for index in range(9):
        part = slice(index, index + 1)
        alone = synthesize_anomalies(
            images[part], mattes[part], textures(40), [sample_generator(0, index)], paper(**options)
        )
        torch.testing.assert_close(alone.images[0], together.images[index], rtol=0, atol=1e-6)
        assert torch.equal(alone.masks[0], together.masks[index])
