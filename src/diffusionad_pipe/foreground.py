"""Foreground mattes: where on a picture a synthetic anomaly may be put.

The paper uses salient-object mattes for objects and a random region for textures (section III-D). A matte is soft,
`[1, H, W]` in [0, 1]. `none` is everywhere, `random` a random region, `threshold` finds an object before a plain
background by itself.
"""

import numpy as np
import torch
from scipy import ndimage
from skimage.color import rgb2lab
from skimage.filters import threshold_otsu

from .synthesis import uniform

FOREGROUND_PROVIDERS = ("none", "random", "threshold")


def threshold_foreground(image: torch.Tensor) -> torch.Tensor:
    """The object in front of a plain background, bright, dark or coloured.

    The background's colour is the median of the picture's frame; what differs from it by more than Otsu's
    threshold is object. Lightness counts half, so that a cast shadow stays background.

    Args:
        image: `[3, H, W]` in [0, 1].

    Returns:
        Matte `[1, H, W]` in [0, 1], its edge about 1 % of the side wide. Everywhere 1 where no object stands out
        (less than 1 % of the area, or most of the frame), as on a texture.
    """
    lab = rgb2lab(image.permute(1, 2, 0).double().numpy()) * (0.5, 1, 1)
    height, width = lab.shape[:2]
    border = max(1, round(0.04 * min(height, width)))
    frame = np.ones((height, width), dtype=bool)
    frame[border:-border, border:-border] = False

    distance = np.linalg.norm(lab - np.median(lab[frame], axis=0), axis=-1)
    distance = ndimage.gaussian_filter(distance, sigma=0.005 * min(height, width))
    if distance.max() - distance.min() < 1e-6:
        return torch.ones(1, height, width)
    object_mask = distance > threshold_otsu(distance)

    side = max(1, round(0.01 * min(height, width)))
    object_mask = ndimage.binary_fill_holes(ndimage.binary_opening(object_mask, iterations=side))
    labels, count = ndimage.label(object_mask)
    areas = np.bincount(labels.ravel(), minlength=count + 1)
    areas[0] = 0
    object_mask = (areas >= 0.01 * height * width)[labels]
    if not object_mask.any() or object_mask[frame].mean() > 0.5:
        return torch.ones(1, height, width)
    matte = ndimage.gaussian_filter(object_mask.astype(np.float32), sigma=0.005 * min(height, width))
    return torch.from_numpy(matte)[None].clamp(0, 1)


def random_foreground(height: int, width: int, generator: torch.Generator) -> torch.Tensor:
    """A random rectangle of a quarter to the whole of each side, matte `[1, H, W]`."""
    matte = torch.zeros(1, height, width)
    sides = [max(1, round(side * uniform(0.25, 1, generator))) for side in (height, width)]
    top = int(uniform(0, height - sides[0] + 1, generator))
    left = int(uniform(0, width - sides[1] + 1, generator))
    matte[:, top : top + sides[0], left : left + sides[1]] = 1
    return matte
