"""Large pictures tile by tile: overlapping tiles of the networks' size, blended into one map and one reconstruction.

Seams are avoided three times. Tiles overlap, and near its edges a tile counts less and less: the weights are ramps over
the whole overlap and add up to 1 at every pixel. The noise is one tile's fixed noise, repeated over the picture like
wallpaper, so that two tiles see the same noise where they overlap, and each still sees every value of it once, only
shifted (a field as large as the picture would have the same merits and need more memory than the picture itself). And
the tiles are spread evenly, so that none overlaps its neighbour more than the others do.

The score is that of the blended map: the mean of its `score_top_k` largest pixels, where a share counts the pixels of
one tile. A defect therefore scores as it does in a picture of a tile's size, however large the rest is. But the highest
score of a thousand good tiles is above that of one: calibrate `image_threshold` on large pictures, in the same tiles.
"""

from collections.abc import Callable, Iterable
from math import inf
from typing import Any, NamedTuple

import torch
from numpy.typing import NDArray

from .image_processor import DiffusionADImageProcessor, ImageInput
from .runtime.acceleration import explained_out_of_memory
from .tile_grid import blend_weights, tile_starts


class Tiling(NamedTuple):
    """How pictures are cut.

    Args:
        tile_size: side of the square tiles in pixels, one that the networks can take.
        overlap: the least share of a side that two neighbours have in common, in [0, 1).
    """

    tile_size: int
    overlap: float


class LargeImage(NamedTuple):
    """A picture that is cut into tiles.

    Args:
        pixels: `[H, W, C]` or `[C, H, W]` as the image processor decoded it, or floats `[3, H, W]` in [0, 1] where it
            was resized before.
        sizes: its own (height, width), the only one.
        tile: (height, width) of a tile.
    """

    pixels: NDArray[Any] | torch.Tensor
    sizes: list[tuple[int, int]]
    tile: tuple[int, int]


def prepare_large(
    processor: DiffusionADImageProcessor,
    image: ImageInput,
    tiling: Tiling,
    height: int | None,
    width: int | None,
    round_size: Callable[[int, str], int],
) -> LargeImage | None:
    """A picture as it is going to be cut.

    Args:
        processor: that decodes it.
        image: as the pipeline takes it.
        tiling: how to cut.
        height: height to which it is resized before; None is its own.
        width: likewise.
        round_size: gives the nearest side that the networks can take.

    Returns:
        None for a picture no larger than a tile, which is treated as without tiling.

    Raises:
        TypeError, ValueError: for a picture that cannot be used.
        MemoryError: names the settings to change.
    """
    array = processor.decode(image, max_aspect_ratio=inf)
    size = processor.size(array)
    working = (size[0] if height is None else height, size[1] if width is None else width)
    is_strip = max(size) > processor.max_aspect_ratio * min(size)  # which must not become a square
    if max(working) <= tiling.tile_size and not is_strip:
        return None
    # A side shorter than a tile must still be one that the networks can take; the others stay as they are.
    rows, columns = (side if side > tiling.tile_size else round_size(side, "side") for side in working)
    if (rows, columns) != size:
        with explained_out_of_memory(f"a picture of {rows} x {columns} pixels", "a smaller height and width"):
            pixels = processor.to_rgb(array)[None]  # [1, 3, h, w]
            array = processor.resize_to(pixels, [(rows, columns)])[0].clamp(0, 1)
    return LargeImage(array, [size], (min(rows, tiling.tile_size), min(columns, tiling.tile_size)))


def detect_in_tiles(
    image: LargeImage,
    overlap: float,
    noise: torch.Tensor,
    detect: Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]],
    batch_size: int,
    processor: DiffusionADImageProcessor,
    progress_bar: Callable[[range], Iterable[int]],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Map `[1, 1, H, W]` and reconstruction `[1, 3, H, W]` of one picture, on the CPU.

    Args:
        image: only tiles of it become floats.
        overlap: the least share of a side that two neighbours have in common, in [0, 1).
        noise: of one tile, `[K, 2, 1, 3, h, w]`.
        detect: gives maps and reconstructions of a batch of tiles `[B, 3, h, w]` with their noises
            `[K, 2, B, 3, h, w]`.
        batch_size: B at most.
        processor: that decoded the picture.
        progress_bar: wraps what takes several passes.
    """
    (height, width), (tile_height, tile_width) = processor.size(image.pixels), image.tile
    rows, columns = tile_starts(height, tile_height, overlap), tile_starts(width, tile_width, overlap)
    row_weights = torch.from_numpy(blend_weights(rows, tile_height))
    column_weights = torch.from_numpy(blend_weights(columns, tile_width))
    maps, reconstructions = (
        torch.zeros(1, channels, height, width, dtype=torch.float32, device="cpu") for channels in (1, 3)
    )
    positions = [(row, column) for row in range(len(rows)) for column in range(len(columns))]
    starts = range(0, len(positions), batch_size)
    for start in starts if len(starts) == 1 else progress_bar(starts):
        batch = positions[start : start + batch_size]
        corners = [(rows[row], columns[column]) for row, column in batch]
        tiles = torch.stack([processor.to_rgb(image.pixels, (*corner, tile_height, tile_width)) for corner in corners])
        # The tile's window of the wallpaper: [K, 2, B, 3, h, w]
        shifted = torch.cat([noise.roll((-top, -left), (-2, -1)) for top, left in corners], dim=2)
        detected = detect(tiles, shifted)
        for index, ((row, column), (top, left)) in enumerate(zip(batch, corners)):
            weight = row_weights[row][:, None] * column_weights[column]  # [h, w]
            for whole, of_tiles in zip((maps, reconstructions), detected):
                window = whole[0, :, top : top + tile_height, left : left + tile_width]
                window += weight * of_tiles[index].cpu()
    return maps, reconstructions
