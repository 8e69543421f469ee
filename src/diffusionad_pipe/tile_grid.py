"""Where tiles lie on a picture, and how much each counts at each pixel. Without torch: exported detectors cut too."""

from math import ceil

import numpy as np
from numpy.typing import NDArray


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


def blend_weights(starts: list[int], tile: int) -> NDArray[np.float32]:
    """Weight of each pixel of each tile along one side, `[tiles, tile]`; they add up to 1 at every pixel.

    Where two tiles overlap, one falls linearly from 1 to 0 as the other rises.

    Args:
        starts: as [`tile_starts`] gives them.
        tile: length of a tile in pixels.
    """
    length = starts[-1] + tile
    # The least overlap: a ramp as long is 1 in the middle of every tile, where there is a middle.
    ramp = min([tile] + [a + tile - b for a, b in zip(starts, starts[1:])])
    position = np.arange(tile, dtype=np.float64)
    edge = np.minimum(position + 0.5, tile - position - 0.5)
    weights = np.minimum(edge / max(ramp, 1), 1)
    total = np.zeros(length)
    for start in starts:
        total[start : start + tile] += weights
    return np.stack([weights / total[start : start + tile] for start in starts]).astype(np.float32)
