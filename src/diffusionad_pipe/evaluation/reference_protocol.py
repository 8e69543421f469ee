"""How the authors' code resizes pictures and masks, and scores maps."""

import numpy as np
import torch
import torch.nn.functional as F

REFERENCE_TOP_K = 50  # pixels whose mean is the authors' image score


def resize_8_bit(tensor: torch.Tensor, size: tuple[int, ...]) -> torch.Tensor:
    """Bilinear, without antialiasing and with 8 bits, as the authors' `cv2.resize` of pictures and masks.

    Args:
        tensor: `[B, C, H, W]` in [0, 1].
        size: (height, width) in pixels.
    """
    return F.interpolate(tensor, size, mode="bilinear", align_corners=False).mul(255).round().div(255)


def eroded_mask(mask: np.ndarray, size: tuple[int, ...]) -> np.ndarray:
    """A mask of booleans resized bilinearly: only what is exactly 1 is kept."""
    return (resize_8_bit(torch.from_numpy(mask).float()[None, None], size)[0, 0] == 1).numpy()
