"""Large pictures tile by tile in an exported detector, as in the pipeline ([`tiling`] tells how)."""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from ..tile_grid import blend_weights, tile_starts

# Tiles [B, N, N, 3] uint8 and their corners [B, 2] int64, (top, left) in the picture -> maps [B, N, N], scores [B]
# and, if wanted, reconstructions [B, N, N, 3].
TileGraph = Callable[[NDArray[np.uint8], NDArray[np.int64]], Sequence[NDArray[np.float32]]]


def detect_in_tiles(
    image: NDArray[np.uint8], tile: int, overlap: float, batch_size: int, graph: TileGraph
) -> list[NDArray[np.float32]]:
    """The blended map `[H, W, 1]` and, if wanted, the reconstruction `[H, W, 3]` of one picture.

    Args:
        image: `[H, W, 3]`, both sides at least `tile`.
        tile: side of a tile in pixels.
        overlap: the least share of a side that two neighbours have in common, in [0, 1).
        batch_size: tiles in one run of the graph.
        graph: runs them.
    """
    height, width = image.shape[:2]
    rows, columns = tile_starts(height, tile, overlap), tile_starts(width, tile, overlap)
    row_weights, column_weights = blend_weights(rows, tile), blend_weights(columns, tile)
    positions = [(row, column) for row in range(len(rows)) for column in range(len(columns))]
    blended: list[NDArray[np.float32]] = []
    for start in range(0, len(positions), batch_size):
        batch = positions[start : start + batch_size]
        corners = np.array([(rows[row], columns[column]) for row, column in batch], dtype=np.int64)
        maps, _, *others = graph(cut(image, corners, tile), corners)
        found = [maps[..., None], *others]
        blended = blended or [np.zeros((height, width, part.shape[-1]), dtype=np.float32) for part in found]
        for index, ((row, column), (top, left)) in enumerate(zip(batch, corners)):
            weight = (row_weights[row][:, None] * column_weights[column])[..., None]  # [N, N, 1]
            for whole, part in zip(blended, found):
                whole[top : top + tile, left : left + tile] += weight * part[index]
    return blended


def cut(image: NDArray[np.uint8], corners: NDArray[np.int64], tile: int) -> NDArray[np.uint8]:
    """The tiles `[B, N, N, 3]` of a picture with these corners `[B, 2]`."""
    return np.stack([image[top : top + tile, left : left + tile] for top, left in corners])


def can_be_cut(image: NDArray[np.uint8], tile: int) -> bool:
    """Whether both sides of a picture are at least a tile's, or none is larger: the graph has tiles of one size."""
    return min(image.shape[:2]) >= tile or max(image.shape[:2]) <= tile


def tiles_of(images: Sequence[NDArray[np.uint8]], tile: int, overlap: float) -> list[NDArray[np.uint8]]:
    """As many tiles as there are pictures, spread over all of them; a picture no larger than a tile is its own."""
    tiles: list[NDArray[np.uint8]] = []
    for image in images:
        height, width = image.shape[:2]
        if max(height, width) <= tile:
            tiles.append(image)
            continue
        rows, columns = tile_starts(height, tile, overlap), tile_starts(width, tile, overlap)
        tiles += list(cut(image, np.array([(top, left) for top in rows for left in columns]), tile))
    return tiles[:: -(-len(tiles) // len(images))]


def mean_of_largest(anomaly_map: NDArray[np.float32], count: int) -> NDArray[np.float32]:
    """The image score: the mean of the `count` largest pixels, `[]`."""
    flat = anomaly_map.ravel()
    return np.array(np.partition(flat, flat.size - count)[flat.size - count :].mean(dtype=np.float64), np.float32)
