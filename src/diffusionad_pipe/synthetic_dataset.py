"""Endless training draws from a few normal pictures, each a function of (seed, epoch, index) alone."""

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Dataset

from .foreground import FOREGROUND_PROVIDERS, random_foreground, threshold_foreground
from .objective import sample_timesteps
from .synthesis import sample_generator, synthesize_anomaly, uniform


class SyntheticAnomalyDataset(Dataset[dict[str, torch.Tensor]]):
    """Draw n takes one picture of epoch n // N in that epoch's random order, flips it, maybe puts a synthetic anomaly
    on it, and brings the noise and the timesteps of its training step along. So a draw does not depend on the
    number of workers, the batch size or where a run was resumed.

    Args:
        pictures: N normal pictures `[N, 3, H, W]`, uint8.
        textures: anomaly sources, uint8 `[3, H, W]` each, of the same size; may be empty.
        length: number of draws.
        seed: of everything.
        foreground: `"none"`, `"random"` (texture categories) or `"threshold"` (objects).
        anomaly_probability: share of draws with an anomaly.
        texture_probability: share of anomalies that are textures.
        horizontal_flip: flip every other draw left to right.
        vertical_flip: flip every other draw upside down.
        timestep_boundary: first timestep of the large noise scale.
        timestep_maximum: end of the large noise scale.

    Raises:
        ValueError: for an unknown foreground provider.
    """

    def __init__(
        self,
        pictures: torch.Tensor,
        textures: Sequence[torch.Tensor],
        *,
        length: int,
        seed: int,
        foreground: str = "none",
        anomaly_probability: float = 0.5,
        texture_probability: float = 0.5,
        horizontal_flip: bool = False,
        vertical_flip: bool = False,
        timestep_boundary: int = 300,
        timestep_maximum: int = 1000,
    ):
        if foreground not in FOREGROUND_PROVIDERS:
            raise ValueError(f"foreground must be one of {', '.join(FOREGROUND_PROVIDERS)}, not {foreground!r}")
        self.pictures = pictures
        self.textures = textures
        self.length = length
        self.seed = seed
        self.foreground = foreground
        self.anomaly_probability = anomaly_probability
        self.texture_probability = texture_probability
        self.horizontal_flip = horizontal_flip
        self.vertical_flip = vertical_flip
        self.timestep_boundary = timestep_boundary
        self.timestep_maximum = timestep_maximum
        self.mattes = torch.empty(0)
        if foreground == "threshold":
            mattes = [threshold_foreground(picture.float() / 255) for picture in pictures]
            self.mattes = (torch.stack(mattes) * 255).round().byte()  # [N, 1, H, W]

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        return (self[draw] for draw in range(self.length))

    def __getitem__(self, draw: int) -> dict[str, torch.Tensor]:
        """One draw: images `[3, H, W]`, masks `[1, H, W]`, labels `[]`, timesteps `[2]` and noise `[2, 3, H, W]`."""
        epoch, position = divmod(draw, len(self.pictures))
        order = torch.randperm(len(self.pictures), generator=sample_generator(self.seed, epoch))
        index = int(order[position])
        generator = sample_generator(self.seed, epoch, index)

        image = self.pictures[index].float() / 255
        height, width = image.shape[-2:]
        if self.foreground == "threshold":
            matte = self.mattes[index].float() / 255
        elif self.foreground == "random":
            matte = random_foreground(height, width, generator)
        else:
            matte = torch.ones(1, height, width)
        for flip, axis in ((self.horizontal_flip, -1), (self.vertical_flip, -2)):
            if flip and uniform(0, 1, generator) < 0.5:
                image, matte = image.flip(axis), matte.flip(axis)

        sample = synthesize_anomaly(
            image,
            matte,
            self.textures,
            generator,
            anomaly_probability=self.anomaly_probability,
            texture_probability=self.texture_probability,
        )
        timesteps = sample_timesteps(1, generator, boundary=self.timestep_boundary, maximum=self.timestep_maximum)
        return {
            "images": sample.image,
            "masks": sample.mask,
            "labels": torch.tensor(sample.label),
            "timesteps": timesteps[:, 0],
            "noise": torch.randn(2, *image.shape, generator=generator),
        }
