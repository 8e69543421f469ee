"""Endless training samples from a few normal pictures, each a function of (seed, epoch, index) alone."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch.utils.data import Dataset

from ..synthesis.anomalies import synthesize_anomalies
from ..synthesis.augmenters import rotate
from ..synthesis.config import SynthesisConfig
from ..synthesis.foregrounds import random_foregrounds
from ..synthesis.sampling import sample_generator, uniform
from .losses import sample_timesteps


class SyntheticAnomalyDataset(Dataset[dict[str, torch.Tensor]]):
    """Sample n takes one picture of epoch n // N in that epoch's random order, flips and turns it as declared, maybe
    puts a synthetic anomaly on it, and brings the noise and the timesteps of its training step along. So a sample does
    not depend on the number of workers, the batch size or where a run was resumed. Samples are made where the pictures
    are: on the CPU or on a GPU.

    Args:
        images: N normal pictures `[N, 3, H, W]`, uint8.
        textures: anomaly sources `[T, 3, H, W]`, uint8, of the size of the samples, or None.
        config: of the synthetic anomalies.
        length: number of samples.
        seed: of everything.
        foregrounds: mattes `[N, 1, H, W]`, uint8, where anomalies may be; `"random"`: a region of each sample's own
            (texture categories); None: everywhere.
        horizontal_flip: flip every other sample left to right.
        vertical_flip: flip every other sample upside down.
        crop_size: side of a random square that is cut from each sample; None keeps the whole picture.
        rotation: turn each sample by up to so many degrees to either side; what comes in at the border is mirrored.
        timestep_boundary: first timestep of the large noise scale.
        timestep_maximum: end of the large noise scale.

    Example:
        >>> import torch
        >>> from diffusionad_pipe.synthesis.config import SynthesisConfig
        >>> from diffusionad_pipe.training.dataset import SyntheticAnomalyDataset
        >>> images = torch.randint(0, 256, (4, 3, 64, 64), dtype=torch.uint8)
        >>> dataset = SyntheticAnomalyDataset(images, None, SynthesisConfig(anomaly_probability=1.0), length=8, seed=0)
        >>> {name: tuple(value.shape) for name, value in dataset[0].items()}["masks"]
        (1, 64, 64)
    """

    def __init__(
        self,
        images: torch.Tensor,
        textures: torch.Tensor | None,
        config: SynthesisConfig,
        *,
        length: int,
        seed: int,
        foregrounds: torch.Tensor | Literal["random"] | None = None,
        horizontal_flip: bool = False,
        vertical_flip: bool = False,
        rotation: float = 0.0,
        crop_size: int | None = None,
        timestep_boundary: int = 300,
        timestep_maximum: int = 1000,
    ):
        self.images = images
        self.textures = textures
        self.config = config
        self.length = length
        self.seed = seed
        self.foregrounds = foregrounds
        self.flips = ((horizontal_flip, -1), (vertical_flip, -2))
        self.rotation = rotation
        self.crop_size = crop_size
        self.timestep_boundary = timestep_boundary
        self.timestep_maximum = timestep_maximum

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        return (self[number] for number in range(self.length))

    def __getitem__(self, number: int) -> dict[str, torch.Tensor]:
        """One sample: images and originals (without the anomaly) `[3, H, W]`, masks `[1, H, W]`, labels `[]`,
        timesteps `[2]` and noise `[2, 3, H, W]`."""
        return self.__getitems__([number])[0]

    def __getitems__(self, numbers: Sequence[int]) -> list[dict[str, torch.Tensor]]:
        """Several samples at once, which is how a `DataLoader` asks for a batch."""
        images, foregrounds, generators = self.augmented_images(numbers)
        made = synthesize_anomalies(images, foregrounds, self.textures, generators, self.config)
        return [
            {
                "images": image,
                "originals": original,
                "masks": mask,
                "labels": label,
                "timesteps": sample_timesteps(
                    1, generator, boundary=self.timestep_boundary, maximum=self.timestep_maximum
                )[:, 0],
                "noise": torch.randn(2, *image.shape, generator=generator, dtype=torch.float32, device="cpu"),
            }
            for original, image, mask, label, generator in zip(images, *made, generators)
        ]

    def augmented_images(self, numbers: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor, list[torch.Generator]]:
        """The pictures of some samples before anything is put on them.

        Args:
            numbers: of B samples.

        Returns:
            The pictures `[B, 3, H, W]` and their mattes `[B, 1, H, W]`, both in [0, 1] and augmented as declared, and
            the generators that all further random numbers of these samples come from.
        """
        indices, generators = [], []
        for number in numbers:
            epoch, position = divmod(number, len(self.images))
            order = torch.randperm(len(self.images), generator=sample_generator(self.seed, epoch), device="cpu")
            indices.append(int(order[position]))
            generators.append(sample_generator(self.seed, epoch, indices[-1]))

        images = self.images[indices].float() / 255
        if isinstance(self.foregrounds, torch.Tensor):
            foregrounds = self.foregrounds[indices].float() / 255
        elif self.foregrounds == "random":
            foregrounds = random_foregrounds(images.shape[-2], images.shape[-1], generators).to(images.device)
        else:
            foregrounds = torch.ones_like(images[:, :1])
        return *self._augment(images, foregrounds, generators), generators

    def _augment(
        self, images: torch.Tensor, foregrounds: torch.Tensor, generators: Sequence[torch.Generator]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The declared augmentation of normal pictures, with their mattes."""
        both = torch.cat([images, foregrounds], dim=1)  # [B, 4, H, W]
        for flip, axis in self.flips:
            if flip:
                chosen = uniform(0, 1, generators) < 0.5
                both[chosen] = both[chosen].flip(axis)
        if self.rotation:
            # Bicubic: a blurred picture would teach that normal surface is smooth.
            degrees = uniform(-self.rotation, self.rotation, generators)
            both = rotate(both, degrees, mode="bicubic", padding="reflection").clamp(0, 1)
        if self.crop_size is not None and self.crop_size < min(both.shape[-2:]):
            rooms = torch.tensor(both.shape[-2:], dtype=torch.int64, device="cpu") - self.crop_size + 1
            corners = (uniform(0, 1, generators, 2) * rooms).long().tolist()
            crops = zip(both, corners)
            both = torch.stack([p[:, y : y + self.crop_size, x : x + self.crop_size] for p, (y, x) in crops])
        return both[:, :3], both[:, 3:]


def validation_samples(
    images: torch.Tensor,
    textures: torch.Tensor | None,
    config: SynthesisConfig,
    *,
    repeats: int,
    seed: int,
    **options: Any,
) -> list[dict[str, torch.Tensor]]:
    """Held-out pictures as they are: each once as a good one, and several times with a synthetic anomaly.

    Args:
        images: N normal pictures `[N, 3, H, W]`, uint8.
        textures: anomaly sources `[T, 3, H, W]`, uint8, or None.
        config: of the synthetic anomalies, but for their share.
        repeats: anomalous samples made of each; those whose mask came out empty are left out.
        seed: of the anomalies.
        options: of [`SyntheticAnomalyDataset`].

    Raises:
        ValueError: when no mask has anything in it.
    """
    normal, anomalous = (
        [
            {name: value.cpu() for name, value in sample.items()}  # a GPU's memory is for training
            for sample in SyntheticAnomalyDataset(
                images,
                textures,
                replace(config, anomaly_probability=label),
                length=count * len(images),
                seed=seed,
                **options,
            )
            if sample["labels"] == label
        ]
        for label, count in ((0.0, 1), (1.0, repeats))
    )
    if not anomalous:
        raise ValueError(
            f"none of {repeats * len(images)} synthetic anomalies on {len(images)} held-out pictures has a mask "
            "that is not empty: look at the foregrounds with `diffusionad preview-synthesis`, choose another "
            "--foreground or raise --validation_repeats"
        )
    return normal + anomalous
