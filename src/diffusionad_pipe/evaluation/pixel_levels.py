"""A threshold from the pixels of good pictures of any sizes, in little memory whatever their number and size."""

import numpy as np
from numpy.typing import NDArray

DROPPED_BITS = 8  # of a float32's 23 bits of mantissa: levels are told apart to a 30,000th of their height
LEVELS = (np.float32(1).view(np.int32) >> DROPPED_BITS) + 1  # of floats in [0, 1]


class PixelLevels:
    """How high the pixels of anomaly maps are. Every map counts the same, however large it is.

    Floats that are not negative have the order of their bits, so these are counted without the last ones.
    """

    def __init__(self) -> None:
        self.shares = np.zeros(LEVELS)  # of a map's pixels at each level, summed over the maps
        self.count = 0

    def add(self, anomaly_map: NDArray[np.float32]) -> None:
        """Count the pixels of one map in [0, 1], of any shape."""
        bits = (anomaly_map + np.float32(0)).ravel().view(np.int32)  # the sum makes -0.0 the same bits as 0.0
        self.shares += np.bincount(bits >> DROPPED_BITS, minlength=LEVELS) / bits.size
        self.count += 1

    def threshold(self, share: float) -> float:
        """The smallest level above which at most this share of a map's pixels lies, on average over the maps; rounded
        up, so that never more do."""
        above = self.count - np.cumsum(self.shares)  # falling
        level = int(np.argmax(above <= share * self.count + 1e-9))
        highest = ((level + 1) << DROPPED_BITS) - 1
        return min(float(np.int32(highest).view(np.float32)), 1.0)
