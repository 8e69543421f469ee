"""Training samples: the same whatever the workers, the batch and the order."""

import pytest
import torch

from diffusionad_pipe.synthesis.config import SynthesisConfig
from diffusionad_pipe.synthesis.sampling import sample_generator
from diffusionad_pipe.training.dataset import SyntheticAnomalyDataset, validation_samples


def make_dataset(size: int = 32, **options) -> SyntheticAnomalyDataset:
    pixels = torch.rand(4, 3, size, size, generator=sample_generator(3))
    pixels = (pixels * 255).byte()
    anomalies = {name: options.pop(name) for name in list(options) if name in SynthesisConfig.__dataclass_fields__}
    config = SynthesisConfig(**{"grayscale_anomalies": False} | anomalies)
    return SyntheticAnomalyDataset(pixels[:3], pixels[3:], config, **{"length": 12, "seed": 7} | options)


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_samples_do_not_depend_on_workers_or_order(workers: int) -> None:
    dataset = make_dataset(foregrounds="random", horizontal_flip=True, rotation=20, procedural_probability=0.5)
    expected = [dataset.__getitems__(range(start, start + 4)) for start in (0, 4, 8)]
    loader = torch.utils.data.DataLoader(dataset, batch_size=4, num_workers=workers)
    for batch, samples in zip(loader, expected, strict=True):
        for key in batch:
            assert torch.equal(batch[key], torch.stack([sample[key] for sample in samples])), key
    alone = dataset[11]
    for key, value in expected[2][3].items():
        torch.testing.assert_close(alone[key], value, rtol=0, atol=1e-6)
    assert len(list(dataset)) == len(dataset) == 12


def test_every_epoch_sees_every_image_once_and_samples_anew() -> None:
    dataset = make_dataset(anomaly_probability=0.0)
    originals = dataset.images.float() / 255
    for epoch in range(4):
        seen = [dataset[3 * epoch + position]["images"] for position in range(3)]
        matches = [[torch.equal(image, original) for original in originals].index(True) for image in seen]
        assert sorted(matches) == [0, 1, 2]
    noises = torch.stack([dataset[number]["noise"].flatten() for number in range(12)])
    assert len(noises.unique(dim=0)) == 12


def test_timesteps_of_both_scales() -> None:
    timesteps = torch.stack([sample["timesteps"] for sample in make_dataset(length=300)])
    assert timesteps[:, 0].max() < 300 <= timesteps[:, 1].min() and timesteps[:, 1].max() < 1000
    assert timesteps[:, 0].float().mean() == pytest.approx(150, abs=25)
    assert timesteps[:, 1].float().mean() == pytest.approx(650, abs=60)


def test_flips_and_mattes_go_together() -> None:
    mattes = torch.zeros(3, 1, 32, 32, dtype=torch.uint8)
    mattes[..., :8] = 255  # the left quarter
    options = {"foregrounds": mattes, "anomaly_probability": 1.0, "length": 30}
    sides = [sample["masks"][0].any(0) for sample in make_dataset(**options) if sample["labels"]]
    assert sides and all(not side[8:].any() for side in sides)
    sides = [sample["masks"][0].any(0) for sample in make_dataset(horizontal_flip=True, **options) if sample["labels"]]
    left, right = sum(bool(s[:8].any()) for s in sides), sum(bool(s[24:].any()) for s in sides)
    assert left and right and left + right == len(sides)


def test_rotation_keeps_size_range_and_the_middle() -> None:
    dataset = make_dataset(anomaly_probability=0.0, rotation=180)
    samples = list(dataset)
    assert all(sample["images"].min() >= 0 and sample["images"].max() <= 1 for sample in samples)
    plain = list(make_dataset(anomaly_probability=0.0))
    assert sum(torch.equal(a["images"], b["images"]) for a, b in zip(samples, plain)) == 0


def test_crops_are_parts_of_the_images() -> None:
    dataset = make_dataset(size=32, crop_size=16, anomaly_probability=0.0)
    originals = dataset.images.float() / 255
    for sample in list(dataset)[:6]:
        windows = originals.unfold(2, 16, 1).unfold(3, 16, 1)  # [3, 3, 17, 17, 16, 16]
        same = (windows == sample["images"][None, :, None, None]).all(-1).all(-1).all(1)
        assert same.any()


def test_validation_samples_are_good_images_and_anomalies_on_them() -> None:
    source = make_dataset()
    mattes = torch.zeros(3, 1, 32, 32, dtype=torch.uint8)
    mattes[:2] = 255  # the third picture gets no anomaly
    samples = validation_samples(source.images, source.textures, source.config, repeats=5, seed=1, foregrounds=mattes)
    good = [sample["images"] for sample in samples[:3]]
    assert sorted(map(torch.sum, good)) == sorted(map(torch.sum, source.images.float() / 255))
    labels = [float(sample["labels"]) for sample in samples]
    assert labels[:3] == [0, 0, 0] and 5 < len(labels[3:]) <= 10 and all(labels[3:])
    assert all(sample["masks"].any() == sample["labels"] for sample in samples)
    with pytest.raises(ValueError, match="none of 6 synthetic anomalies on 3 held-out pictures"):
        validation_samples(source.images, None, source.config, repeats=2, seed=1, foregrounds=torch.zeros_like(mattes))
