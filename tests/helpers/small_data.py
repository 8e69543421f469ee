"""A small data set with noise for pictures."""

from pathlib import Path

import numpy as np
from PIL import Image


def write_small_data(root: Path) -> Path:
    """Two good test pictures and three scratched ones: with a mask, with an empty one and without any."""
    random = np.random.RandomState(0)
    for name in ("train/good/0", "test/good/0", "test/good/1", "test/scratch/0", "test/scratch/1", "test/scratch/2"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.randint(0, 256, (40, 48, 3), dtype=np.uint8)).save(root / f"{name}.png")
    (root / "ground_truth" / "scratch").mkdir(parents=True)
    mask = np.zeros((40, 48), dtype=np.uint8)
    Image.fromarray(mask).save(root / "ground_truth" / "scratch" / "1_mask.png")
    mask[4:19, 7:38] = 255
    Image.fromarray(mask).save(root / "ground_truth" / "scratch" / "0_mask.png")
    return root
