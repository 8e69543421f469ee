"""Random numbers that are functions of a key, for many samples at once.

Each sample has a generator of its own, made from (seed, epoch, index). A function that samples for a batch takes one
number from each of the batch's generators, so what a sample becomes does not depend on the samples beside it, the
worker that made it, or the device that the pictures are on.
"""

from collections.abc import Sequence

import numpy as np
import torch


def sample_generator(*key: int) -> torch.Generator:
    """A CPU generator that is a function of the key alone, e.g. of (seed, epoch, index).

    Args:
        key: non-negative integers. Keys of different lengths are different, (3,) and (3, 0) too.
    """
    state = np.random.SeedSequence([len(key), *key]).generate_state(1, np.uint64)[0]
    return torch.Generator("cpu").manual_seed(int(state >> np.uint64(1)))


def uniform(low: float, high: float, generators: Sequence[torch.Generator], *shape: int) -> torch.Tensor:
    """One number of U[low, high), or a tensor of `shape` of them, by each of the B generators: `[B, *shape]`."""
    samples = torch.stack(
        [torch.rand(shape, generator=generator, dtype=torch.float32, device="cpu") for generator in generators]
    )
    return low + (high - low) * samples


def integers(low: int, high: int, generators: Sequence[torch.Generator], *shape: int) -> torch.Tensor:
    """One number of {low, ..., high}, or a tensor of `shape` of them, by each of the B generators: `[B, *shape]`."""
    return torch.stack(
        [
            torch.randint(low, high + 1, shape, generator=generator, dtype=torch.int64, device="cpu")
            for generator in generators
        ]
    )
