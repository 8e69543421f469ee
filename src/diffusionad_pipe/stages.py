"""What passes between the stages of a call of the pipeline: its arguments, prepared pictures, and what was detected."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch

from .image_processor import OUTPUT_TYPES
from .runtime.config_values import is_whole
from .scheduling_norm_guided_one_step import NormGuidedOneStepScheduler

# (pipeline, number of the noise, timesteps [2B], tensors of the step)
StepCallback = Callable[[Any, int, torch.Tensor, dict[str, torch.Tensor]], object]

DEFAULT_BATCH_SIZE = 8


class CallArguments(NamedTuple):
    """What [`DiffusionADPipeline.__call__`] was asked for, checked, with values of the configs in the place of None.

    Args:
        height: at which the networks work; with tiling, to which pictures are resized before, or None.
        width: likewise.
        small_timestep: t_s.
        large_timestep: t_b.
        guidance_scale: w; None takes the scheduler's.
        num_noise_samples: K.
        batch_size: pictures, or tiles, in one pass of the networks.
        output_type: `"pil"`, `"np"` or `"pt"`.
        match_input_resolution: whether results have the size of each picture.
        callback_on_step_end: as of the call.
    """

    height: int | None
    width: int | None
    small_timestep: int
    large_timestep: int
    guidance_scale: float | None
    num_noise_samples: int
    batch_size: int
    output_type: str
    match_input_resolution: bool
    callback_on_step_end: StepCallback | None


class PreparedImages(NamedTuple):
    """A batch as the networks take it.

    Args:
        pixels: `[B, 3, H, W]` in [0, 1].
        sizes: (height, width) that each picture came with.
    """

    pixels: torch.Tensor
    sizes: list[tuple[int, int]]


class DetectedImages(NamedTuple):
    """What the networks made of a batch, on the CPU.

    Args:
        maps: `[B, 1, H, W]`.
        reconstructions: `[B, 3, H, W]` in [0, 1].
        sizes: (height, width) that each picture came with.
        score_area: the pixels that a `score_top_k` below 1 is a share of; None is H · W.
    """

    maps: torch.Tensor
    reconstructions: torch.Tensor
    sizes: list[tuple[int, int]]
    score_area: int | None = None

    def split(self) -> Iterator["DetectedImages"]:
        """Each picture by itself."""
        for index, size in enumerate(self.sizes):
            item = slice(index, index + 1)
            yield DetectedImages(self.maps[item], self.reconstructions[item], [size], self.score_area)


def join_prepared(batches: Sequence[Any]) -> Any:
    """One batch of several; a single one, of whatever kind, is that one."""
    if len(batches) == 1:
        return batches[0]
    sizes = [size for batch in batches for size in batch.sizes]
    return PreparedImages(torch.cat([batch.pixels for batch in batches]), sizes)


def resolve_arguments(
    scheduler: NormGuidedOneStepScheduler,
    *,
    height: int | None = None,
    width: int | None = None,
    small_timestep: int | None = None,
    large_timestep: int | None = None,
    guidance_scale: float | None = None,
    num_noise_samples: int = 1,
    batch_size: int | None = None,
    output_type: str = "pil",
    match_input_resolution: bool = True,
    callback_on_step_end: StepCallback | None = None,
) -> CallArguments:
    """The arguments of a call, checked but for its sizes and its noise.

    Args:
        scheduler: whose config says what None stands for.
        height, width, ...: as of [`DiffusionADPipeline.__call__`].

    Raises:
        ValueError: for values that cannot be used.
    """
    config = scheduler.config
    if config.distilled:
        scales = {"small_timestep": small_timestep, "large_timestep": large_timestep, "guidance_scale": guidance_scale}
        for name, value in scales.items():
            if value is not None and value != config[name]:
                raise ValueError(
                    f"{name}={value} cannot be had of a distilled model: {config[name]} is built in. Use the model "
                    "that it was distilled from"
                )
    small_timestep = config.small_timestep if small_timestep is None else small_timestep
    large_timestep = config.large_timestep if large_timestep is None else large_timestep
    batch_size = DEFAULT_BATCH_SIZE if batch_size is None else batch_size
    for number in (small_timestep, large_timestep, num_noise_samples, batch_size):
        if not is_whole(number):
            raise ValueError(f"timesteps, num_noise_samples and batch_size are whole numbers, not {number!r}")
    last = len(scheduler) - 1
    if not 0 <= small_timestep < large_timestep <= last:
        raise ValueError(
            f"small_timestep={small_timestep} and large_timestep={large_timestep} must be in order, "
            f"0 <= small < large <= {last}"
        )
    if num_noise_samples < 1 or batch_size < 1:
        raise ValueError(f"num_noise_samples={num_noise_samples} and batch_size={batch_size} must be at least 1")
    if output_type not in OUTPUT_TYPES:
        raise ValueError(f"output_type must be 'pil', 'np' or 'pt', not {output_type!r}")
    return CallArguments(
        height, width, small_timestep, large_timestep, guidance_scale, num_noise_samples, batch_size, output_type,
        match_input_resolution, callback_on_step_end,
    )  # fmt: skip


def check_noise(noise: Any, generator: Any, count: int, call: CallArguments, in_tiles: bool) -> None:
    """Refuse noise and generators that do not belong to the pictures of a call.

    Args:
        noise: must be None or `[2, count, 3, height, width]`.
        generator: None, one, or a list of `count`.
        count: of the pictures.
        call: the other arguments.
        in_tiles: whether pictures are cut, whose tiles have one noise.

    Raises:
        ValueError: says what to give.
    """
    if noise is not None and in_tiles:
        raise ValueError("noise cannot be given with tiling: use a generator, or call disable_tiling()")
    if noise is not None and not isinstance(noise, torch.Tensor):
        raise ValueError(f"noise must be a tensor, not {type(noise).__name__}: use torch.as_tensor(noise)")
    expected = (2, count, 3, call.height, call.width)
    given = generator is not None or call.num_noise_samples != 1
    if noise is not None and (tuple(noise.shape) != expected or given):
        raise ValueError(
            f"noise must be {list(expected)} ([2, B, 3, height, width], small scale first), not "
            f"{list(noise.shape)}, without a generator and with num_noise_samples=1"
        )
    for one in generator if isinstance(generator, list) else [generator]:
        if not isinstance(one, torch.Generator) and generator is not None:
            raise ValueError(f"generator={one!r} is none: use torch.Generator().manual_seed(0), or a list of them")
    if isinstance(generator, list) and len(generator) != count:
        raise ValueError(f"{len(generator)} generators for {count} pictures: give one for each, or one for all")
