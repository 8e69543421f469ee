"""Large pictures tile by tile: overlapping tiles of the networks' size, blended into one map and one reconstruction.

Seams are avoided three times. Tiles overlap, and near its edges a tile counts less and less: the weights are ramps over
the whole overlap and add up to 1 at every pixel. The noise is one tile's fixed noise, repeated over the picture like
wallpaper, so that two tiles see the same noise where they overlap, and each still sees every value of it once, only
shifted (a field as large as the picture would have the same merits and need more memory than the picture itself). And
the tiles are spread evenly, so that none overlaps its neighbour more than the others do.

The score is that of the blended map: the mean of its `score_top_k` largest pixels, where a share counts the pixels of
one tile. A defect therefore scores as it does in a picture of a tile's size, however large the rest is. A large picture
takes more draws of the same lottery, though: the highest score of a thousand good tiles is above that of one. Where
every false alarm counts, calibrate `image_threshold` on large pictures.
"""

from copy import copy
from dataclasses import fields
from math import ceil, inf
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from diffusers.utils.torch_utils import randn_tensor
from numpy.typing import NDArray

from .runtime.acceleration import explained_out_of_memory

if TYPE_CHECKING:
    from .pipeline_diffusionad import DiffusionADPipeline, DiffusionADPipelineOutput


class Tiling(NamedTuple):
    """How pictures are cut.

    Args:
        tile_size: side of the square tiles in pixels, one that the networks can take.
        overlap: the least share of a side that two neighbours have in common, in [0, 1).
    """

    tile_size: int
    overlap: float


def tile_starts(length: int, tile: int, overlap: float) -> list[int]:
    """Where tiles begin along one side: evenly spread, the first at 0, the last ending with the picture.

    Args:
        length: of the side in pixels, at least `tile`.
        tile: length of a tile in pixels.
        overlap: the least share of a tile that its neighbour has in common with it, in [0, 1).
    """
    stride = max(1, tile - round(tile * overlap))
    steps = ceil((length - tile) / stride)
    return [round(step * (length - tile) / max(steps, 1)) for step in range(steps + 1)]


def blend_weights(starts: list[int], tile: int) -> torch.Tensor:
    """Weight of each pixel of each tile along one side, `[tiles, tile]` float32; they add up to 1 at every pixel.

    Where two tiles overlap, one falls linearly from 1 to 0 as the other rises.

    Args:
        starts: as [`tile_starts`] gives them.
        tile: length of a tile in pixels.
    """
    length = starts[-1] + tile
    # The least overlap: a ramp as long is 1 in the middle of every tile, where there is a middle.
    ramp = min([tile] + [a + tile - b for a, b in zip(starts, starts[1:])])
    position = torch.arange(tile, dtype=torch.float64, device="cpu")
    edge = torch.minimum(position + 0.5, tile - position - 0.5)
    weights = (edge / max(ramp, 1)).clamp(max=1).expand(len(starts), -1)
    total = torch.zeros(length, dtype=torch.float64, device="cpu")
    for start, weight in zip(starts, weights):
        total[start : start + tile] += weight
    return torch.stack([weight / total[start : start + tile] for start, weight in zip(starts, weights)]).float()


def call_in_tiles(
    pipe: "DiffusionADPipeline",
    image: Any,
    tiling: Tiling,
    *,
    height: int | None,
    width: int | None,
    num_noise_samples: int,
    noise: torch.Tensor | None,
    generator: Any,
    batch_size: int,
    output_type: str,
    **scales: Any,
) -> "DiffusionADPipelineOutput":
    """The pipeline's call with tiling, picture by picture.

    Args:
        pipe: the pipeline.
        image: as the pipeline takes it.
        tiling: how to cut. A picture no larger than a tile is treated as without tiling.
        height: height to which pictures are resized before they are cut; None is their own.
        width: likewise.
        num_noise_samples: as the pipeline takes it.
        noise: must be None.
        generator: as the pipeline takes it; what it draws for a picture is the noise of one tile.
        batch_size: tiles in one pass of the networks.
        output_type: as the pipeline takes it.
        scales: `small_timestep`, `large_timestep`, `guidance_scale` and `callback_on_step_end`.

    Raises:
        ValueError: for pictures or arguments that cannot be used.
        MemoryError: names the settings to change.
    """
    if noise is not None:
        raise ValueError("noise cannot be given with tiling: use a generator, or call disable_tiling()")
    arguments: dict[str, Any] = {
        "num_noise_samples": num_noise_samples,
        "batch_size": batch_size,
        "output_type": output_type,
    }
    timesteps = {name: scales[name] for name in ("small_timestep", "large_timestep")}
    singles = pipe.image_processor.split(image)
    tiles = torch.empty(len(singles), 3, tiling.tile_size, tiling.tile_size, device="meta")
    pipe.check_inputs(tiles, noise=None, generator=generator, **timesteps, **arguments)

    untiled = copy(pipe)  # it shares the networks, and other threads may use the original meanwhile
    untiled.disable_tiling()
    outputs = []
    for index, single in enumerate(singles):
        own = generator[index] if isinstance(generator, list) else generator
        with pipe.image_processor.named(index, len(singles)):
            array = pipe.image_processor.decode(single, max_aspect_ratio=inf)
        size = pipe.image_processor.size(array)
        working = (size[0] if height is None else height, size[1] if width is None else width)
        is_strip = max(size) > pipe.image_processor.max_aspect_ratio * min(size)  # which must not become a square
        if max(working) <= tiling.tile_size and not is_strip:
            with pipe.image_processor.named(index, len(singles)):
                outputs.append(untiled(single, height=height, width=width, generator=own, **scales, **arguments))
            continue
        # A side shorter than a tile must still be one that the networks can take; the others stay as they are.
        sides = [side if side > tiling.tile_size else pipe.round_size(side, "side") for side in working]
        tile_area = min(sides[0], tiling.tile_size) * min(sides[1], tiling.tile_size)
        used = (
            f"num_noise_samples={num_noise_samples}, batch_size={batch_size} and tile_size={tiling.tile_size} for a "
            f"picture of {size[0]} x {size[1]} pixels"
        )
        advice = "a smaller batch_size, fewer noise samples, a smaller tile_size in enable_tiling, or height and width"
        with pipe.image_processor.named(index, len(singles)), explained_out_of_memory(used, advice):
            if sides != list(size):
                pixels = pipe.image_processor.to_rgb(array)[None]  # [1, 3, h, w]
                array = pipe.image_processor.resize_to(pixels, [(sides[0], sides[1])])[0].clamp(0, 1)
            blended = blend_tiles(pipe, array, tiling, num_noise_samples, own, batch_size, **scales)
            outputs.append(pipe.to_output(*blended, [size], output_type, tile_area))
    pipe.maybe_free_model_hooks()
    return join_outputs(outputs, output_type)


def blend_tiles(
    pipe: "DiffusionADPipeline",
    image: NDArray[Any] | torch.Tensor,
    tiling: Tiling,
    num_noise_samples: int,
    generator: torch.Generator | None,
    batch_size: int,
    small_timestep: int,
    large_timestep: int,
    guidance_scale: float | None,
    callback_on_step_end: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Map `[1, 1, H, W]` and reconstruction `[1, 3, H, W]` of one picture, on the CPU.

    Args:
        image: `[H, W, C]` or `[C, H, W]` as the image processor decoded it; only tiles of it become floats.
    """
    processor = pipe.image_processor
    height, width = processor.size(image)
    tile_height, tile_width = min(height, tiling.tile_size), min(width, tiling.tile_size)
    rows, columns = tile_starts(height, tile_height, tiling.overlap), tile_starts(width, tile_width, tiling.overlap)
    row_weights, column_weights = blend_weights(rows, tile_height), blend_weights(columns, tile_width)

    device = pipe._execution_device
    timesteps = torch.tensor([small_timestep, large_timestep], dtype=torch.int64, device=device)
    if generator is None:
        noise = pipe.fixed_noise(num_noise_samples, tile_height, tile_width)  # [K, 2, 1, 3, h, w]
    else:
        shape = (num_noise_samples, 2, 1, 3, tile_height, tile_width)
        noise = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)

    maps, reconstructions = (
        torch.zeros(1, channels, height, width, dtype=torch.float32, device="cpu") for channels in (1, 3)
    )
    positions = [(row, column) for row in range(len(rows)) for column in range(len(columns))]
    starts = range(0, len(positions), batch_size)
    for start in starts if len(starts) == 1 else pipe.progress_bar(starts):
        batch = positions[start : start + batch_size]
        corners = [(rows[row], columns[column]) for row, column in batch]
        tiles = torch.stack([processor.to_rgb(image, (*corner, tile_height, tile_width)) for corner in corners])
        # The tile's window of the wallpaper: [K, 2, B, 3, h, w]
        shifted = torch.cat([noise.roll((-top, -left), (-2, -1)) for top, left in corners], dim=2)
        with torch.inference_mode():
            detected = pipe.detect(tiles.to(device), shifted, timesteps, guidance_scale, callback_on_step_end)
        for index, ((row, column), (top, left)) in enumerate(zip(batch, corners)):
            weight = row_weights[row][:, None] * column_weights[column]  # [h, w]
            for whole, tiles_of_it in zip((maps, reconstructions), detected):
                tile = tiles_of_it[index].cpu()
                whole[0, :, top : top + tile_height, left : left + tile_width] += weight * tile
    return maps, reconstructions


def join_outputs(outputs: list[Any], output_type: str) -> Any:
    """One output from those of single pictures, as a call with all of them returns it."""

    def join(values: list[Any]) -> Any:
        if values[0] is None:
            return None
        if isinstance(values[0], list):  # pictures
            return [item for value in values for item in value]
        if len({value.shape for value in values}) > 1:
            return [value[0] for value in values]
        return torch.cat(values) if output_type == "pt" else np.concatenate(values)

    kind = type(outputs[0])
    return kind(*[join([getattr(output, field.name) for output in outputs]) for field in fields(kind)])
