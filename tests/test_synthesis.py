"""Synthetic anomalies and foregrounds, against the recipe."""

import math

import pytest
import torch

from diffusionad_pipe.foreground import random_foreground, threshold_foreground
from diffusionad_pipe.synthesis import (
    AUGMENTERS,
    augment,
    perlin_mask,
    perlin_noise,
    rotate,
    sample_generator,
    shuffle_tiles,
    synthesize_anomaly,
)
from diffusionad_pipe.synthetic_dataset import SyntheticAnomalyDataset


def picture(size: int = 64, seed: int = 0) -> torch.Tensor:
    return torch.rand(3, size, size, generator=sample_generator(seed))


def texture(size: int = 64) -> torch.Tensor:
    return (picture(size, 9) * 255).byte()


def test_a_generator_is_a_function_of_its_key() -> None:
    draws = {torch.rand(1, generator=sample_generator(*key)).item() for key in ((0, 0), (0, 1), (1, 1), (0, 0, 1))}
    assert len(draws) == 4
    assert torch.equal(torch.rand(5, generator=sample_generator(1, 2)), torch.rand(5, generator=sample_generator(1, 2)))


@pytest.mark.parametrize("cells", [(1, 1), (4, 32), (32, 32)])
def test_perlin_noise(cells: tuple[int, int]) -> None:
    noise = perlin_noise(96, 128, cells, sample_generator(0))
    assert noise.shape == (96, 128) and 0.1 < noise.abs().max() <= 1.01
    # Perlin noise vanishes at the corners of its cells.
    assert noise[:: 96 // cells[0], :: 128 // cells[1]].abs().max() < 1e-4
    # It is continuous: neighbours differ by little of a cell.
    step = max(cells[0] / 96, cells[1] / 128)
    assert noise.diff(dim=0).abs().max() < 4 * step and noise.diff(dim=1).abs().max() < 4 * step


def test_rotation_by_right_angles_is_exact() -> None:
    image = picture(16)
    torch.testing.assert_close(rotate(image, 0), image, rtol=0, atol=1e-5)
    torch.testing.assert_close(rotate(rotate(image, 90), -90), image, rtol=0, atol=1e-5)
    turned = rotate(image, 90)
    assert any(torch.allclose(turned, torch.rot90(image, k, (1, 2)), atol=1e-5) for k in (1, 3))


def test_masks_stay_on_the_foreground() -> None:
    foreground = torch.zeros(1, 64, 64)
    foreground[:, 20:40, 10:50] = 0.7
    coverages = []
    for index in range(40):
        mask = perlin_mask(foreground, sample_generator(index))
        assert not mask[foreground == 0].any() and mask.max() <= 0.7
        coverages.append((mask > 0).float().mean().item())
    assert min(coverages) >= 0 and max(coverages) > 0.02
    assert sum(c > 0 for c in coverages) >= 38  # fifty tries find the foreground nearly always
    assert not perlin_mask(torch.zeros(1, 64, 64), sample_generator(0)).any()


@pytest.mark.parametrize("augmenter", AUGMENTERS, ids=lambda function: function.__name__)
def test_augmenters(augmenter) -> None:
    image = picture()
    results = [augmenter(image, sample_generator(seed)) for seed in range(8)]
    for result in results:
        assert result.shape == image.shape and result.isfinite().all()
        assert result.min() >= -1e-6 and result.max() <= 1 + 1e-6
    assert torch.equal(results[0], augmenter(image, sample_generator(0)))
    assert any(not torch.equal(result, image) for result in results)


def test_three_augmenters_are_applied() -> None:
    outputs = [augment(picture(), sample_generator(seed)) for seed in range(20)]
    assert len({round(output.mean().item(), 5) for output in outputs}) > 15


def test_shuffled_tiles_are_the_same_tiles() -> None:
    image = torch.arange(64.0).reshape(1, 8, 8).repeat_interleave(2, 1).repeat_interleave(2, 2)
    shuffled = shuffle_tiles(image, sample_generator(0))
    assert not torch.equal(shuffled, image)
    assert torch.equal(shuffled[0, ::2, ::2], shuffled[0, 1::2, 1::2])
    assert sorted(shuffled.flatten().tolist()) == sorted(image.flatten().tolist())
    odd = torch.rand(3, 21, 19, generator=sample_generator(1))
    assert torch.equal(shuffle_tiles(odd, sample_generator(0))[:, 16:, :], odd[:, 16:, :])


def test_composition_is_the_equation() -> None:
    """S = (1−M)·N + M·(β·N + (1−β)·A): where A is black, S / N inside a hard mask is β itself."""
    image, black = torch.full((3, 64, 64), 0.9), torch.zeros(3, 64, 64, dtype=torch.uint8)
    foreground = torch.ones(1, 64, 64)
    opacities = []
    for index in range(200):
        sample = synthesize_anomaly(
            image, foreground, [black], sample_generator(index), anomaly_probability=1, texture_probability=1
        )
        inside, outside = sample.mask[0] == 1, sample.mask[0] == 0
        torch.testing.assert_close(sample.image[:, outside], image[:, outside], rtol=0, atol=1e-6)
        ratio = sample.image[:, inside].min() / 0.9
        opacities.append(ratio.item())
        assert sample.label == 1.0
    # Augmenters may brighten the black texture, never darken it: β is at least 0.2 and spread up to 0.8.
    assert min(opacities) >= 0.2 - 1e-6 and min(opacities) < 0.3


def test_half_of_the_draws_are_anomalous() -> None:
    labels = [
        synthesize_anomaly(picture(32), torch.ones(1, 32, 32), [texture(32)], sample_generator(5, index)).label
        for index in range(400)
    ]
    assert abs(sum(labels) / 400 - 0.5) < 4 * math.sqrt(0.25 / 400)


def test_empty_foreground_leaves_the_picture_normal() -> None:
    sample = synthesize_anomaly(
        picture(32), torch.zeros(1, 32, 32), [texture(32)], sample_generator(0), anomaly_probability=1
    )
    assert sample.label == 0 and torch.equal(sample.image, picture(32))


def test_without_textures_the_picture_itself_is_the_source() -> None:
    sample = synthesize_anomaly(picture(32), torch.ones(1, 32, 32), [], sample_generator(1), anomaly_probability=1)
    assert sample.label == 1 and not torch.equal(sample.image, picture(32))


@pytest.mark.parametrize("background, part", [(0.1, 0.8), (0.9, 0.3)])
def test_threshold_foreground_on_dark_and_bright_backgrounds(background: float, part: float) -> None:
    image = torch.full((3, 96, 96), background) + 0.02 * torch.randn(3, 96, 96, generator=sample_generator(0))
    truth = torch.zeros(96, 96, dtype=torch.bool)
    truth[30:70, 20:60] = True
    image[:, truth] += part - background
    matte = threshold_foreground(image.clamp(0, 1))
    found = matte[0] > 0.5
    assert (found & truth).sum() / (found | truth).sum() > 0.9
    assert 0 < ((matte > 0) & (matte < 1)).float().mean() < 0.1  # soft at the edge only


def test_threshold_foreground_gives_up_on_textures() -> None:
    assert threshold_foreground(torch.full((3, 64, 64), 0.5)).min() == 1
    stripes = (torch.arange(64) % 8 < 4).float().expand(3, 64, 64)
    assert threshold_foreground(stripes.contiguous()).min() == 1


def test_random_foreground() -> None:
    areas = [random_foreground(40, 60, sample_generator(index)).mean().item() for index in range(50)]
    assert 0.05 < min(areas) < 0.4 and 0.5 < max(areas) <= 1


def make_dataset(**options) -> SyntheticAnomalyDataset:
    pictures = torch.stack([(picture(32, seed) * 255).byte() for seed in range(3)])
    return SyntheticAnomalyDataset(pictures, [texture(32)], **{"length": 12, "seed": 7} | options)


def test_draws_do_not_depend_on_workers_or_order() -> None:
    dataset = make_dataset(foreground="random", horizontal_flip=True)
    expected = list(dataset)
    assert len(expected) == len(dataset) == 12
    loader = torch.utils.data.DataLoader(dataset, batch_size=4, num_workers=2)
    batches = list(loader)
    for key in expected[0]:
        assert torch.equal(torch.cat([batch[key] for batch in batches]), torch.stack([s[key] for s in expected])), key
    assert torch.equal(dataset[11]["noise"], expected[11]["noise"])


def test_every_epoch_sees_every_picture_once_and_draws_anew() -> None:
    dataset = make_dataset(anomaly_probability=0.0)
    originals = dataset.pictures.float() / 255
    for epoch in range(4):
        seen = [dataset[3 * epoch + position]["images"] for position in range(3)]
        matches = [[torch.equal(image, original) for original in originals].index(True) for image in seen]
        assert sorted(matches) == [0, 1, 2]
    noises = torch.stack([dataset[draw]["noise"].flatten() for draw in range(12)])
    assert len(noises.unique(dim=0)) == 12


def test_timesteps_of_both_scales() -> None:
    timesteps = torch.stack([sample["timesteps"] for sample in make_dataset(length=300)])
    assert timesteps[:, 0].max() < 300 <= timesteps[:, 1].min() and timesteps[:, 1].max() < 1000
    assert timesteps[:, 0].float().mean() == pytest.approx(150, abs=25)
    assert timesteps[:, 1].float().mean() == pytest.approx(650, abs=60)


def test_unknown_foreground() -> None:
    with pytest.raises(ValueError, match="none, random, threshold"):
        make_dataset(foreground="salient")
