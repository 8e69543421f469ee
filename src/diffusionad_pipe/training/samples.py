"""From the settings of a run to its samples: what is read, what is held out, what is made of it.

Training and the preview share it, so that the preview shows what training sees.
"""

import logging
import math
from typing import Literal, NamedTuple

import torch

from ..evaluation.calibration import smallest_rate, split_held_out
from ..files.output_folder import OutputFolder
from .config import TrainingConfig
from .dataset import SyntheticAnomalyDataset, validation_samples
from .images import ImageInputs, foreground_mattes, read_good_images, read_textures

logger = logging.getLogger("train")


class SampleInputs(NamedTuple):
    """What samples are made of.

    Args:
        images: N good pictures.
        mattes: where anomalies may be, as [`SyntheticAnomalyDataset`] takes it.
        is_held_out: bool `[N]`.
    """

    images: ImageInputs
    mattes: torch.Tensor | Literal["random"] | None
    is_held_out: torch.Tensor

    @property
    def held_out_count(self) -> int:
        return int(self.is_held_out.sum())

    @property
    def trained_count(self) -> int:
        return len(self.is_held_out) - self.held_out_count


def read_inputs(config: TrainingConfig, cache: OutputFolder | None = None) -> SampleInputs:
    """Read the good pictures and their mattes.

    Args:
        config: says which.
        cache: folder of a run, where mattes of a model are kept.

    Raises:
        ValueError: names what is missing or cannot be used.
    """
    images = read_good_images(
        config.train_data_dir,
        config.resize_to or config.resolution,
        category=config.category,
        dataset_name=config.dataset_name,
        image_column=config.image_column,
        streaming=config.streaming,
        max_unreadable=config.max_unreadable,
        max_pixels=config.max_pixels,
    )
    mattes = foreground_mattes(
        config.foreground,
        images,
        folder=config.foreground_dir,
        model=config.foreground_model,
        cache=cache,
        max_pixels=config.max_pixels,
    )
    inputs = SampleInputs(images, mattes, split_held_out(len(images.names), config.validation_fraction))
    logger.info("%d good pictures to train on, %d held out", inputs.trained_count, inputs.held_out_count)
    return inputs


def warn_of_few_held_out(config: TrainingConfig, count: int) -> None:
    """Say where the held-out pictures are too few to guarantee the false positive rate."""
    if smallest_rate(count) > config.false_positive_rate:
        logger.warning(
            "%d held-out pictures guarantee at best %.0f %% false alarms, not %g %%: the thresholds also use the "
            "synthetic anomalies; hold out %d pictures or more for the guarantee",
            count,
            100 * smallest_rate(count),
            100 * config.false_positive_rate,
            math.ceil(1 / config.false_positive_rate) - 1,
        )


def training_samples(
    config: TrainingConfig, inputs: SampleInputs, length: int, device: torch.device
) -> SyntheticAnomalyDataset:
    """The samples of a run: of all pictures that are not held out.

    Args:
        config: the settings.
        inputs: of [`read_inputs`].
        length: how many samples there are.
        device: that they are made on.
    """
    return SyntheticAnomalyDataset(
        inputs.images.pixels[~inputs.is_held_out].to(device),
        _textures(config, config.resolution, device),
        config,
        length=length,
        seed=config.seed,
        foregrounds=_chosen_mattes(inputs.mattes, ~inputs.is_held_out, device),
        horizontal_flip=config.horizontal_flip,
        vertical_flip=config.vertical_flip,
        rotation=config.rotation,
        crop_size=config.resolution,
        timestep_boundary=config.timestep_boundary,
        timestep_maximum=config.timestep_maximum,
    )


def held_out_samples(
    config: TrainingConfig, inputs: SampleInputs, device: torch.device
) -> list[dict[str, torch.Tensor]]:
    """The validation samples of a run, see [`validation_samples`]; the arguments are those of [`training_samples`]."""
    return validation_samples(
        inputs.images.pixels[inputs.is_held_out].to(device),
        _textures(config, config.resize_to or config.resolution, device),
        config,
        repeats=config.validation_repeats,
        seed=config.seed + 1,
        foregrounds=_chosen_mattes(inputs.mattes, inputs.is_held_out, device),
    )


def _textures(config: TrainingConfig, side: int, device: torch.device) -> torch.Tensor | None:
    textures = read_textures(
        config.texture_dir, side, max_unreadable=config.max_unreadable, max_pixels=config.max_pixels
    )
    return None if textures is None else textures.to(device)


def _chosen_mattes(
    mattes: torch.Tensor | Literal["random"] | None, chosen: torch.Tensor, device: torch.device
) -> torch.Tensor | Literal["random"] | None:
    return mattes[chosen].to(device) if isinstance(mattes, torch.Tensor) else mattes
