"""Foreground mattes: where on a picture a synthetic anomaly may be put.

The paper uses salient-object mattes for objects and a random region for textures (section III-D). A matte is soft,
`[1, H, W]` in [0, 1]. `none` is everywhere, `random` a random region, `threshold` finds an object before a plain
background by itself, `transformers` asks a segmentation model; `folder` reads mattes made elsewhere, in
`training.images`.
"""

import hashlib
import json
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from scipy import ndimage
from skimage.color import rgb2lab
from skimage.filters import threshold_otsu
from torch.nn import functional as F
from transformers import AutoImageProcessor, AutoModelForSemanticSegmentation

from ..files.hub_caches import explained_caches
from ..runtime.weights_digest import weights_digest
from .sampling import uniform


def threshold_foreground(image: torch.Tensor) -> torch.Tensor:
    """The object in front of a plain background, bright, dark or colored.

    The background's color is the median of the picture's frame; what differs from it by more than Otsu's
    threshold is object. Lightness counts half, so that less of a cast shadow is taken for object.

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
        return torch.ones(1, height, width, dtype=torch.float32, device="cpu")
    object_mask = distance > threshold_otsu(distance)

    side = max(1, round(0.01 * min(height, width)))
    object_mask = ndimage.binary_fill_holes(ndimage.binary_opening(object_mask, iterations=side))
    labels, count = ndimage.label(object_mask)
    areas = np.bincount(labels.ravel(), minlength=count + 1)
    areas[0] = 0
    object_mask = (areas >= 0.01 * height * width)[labels]
    if not object_mask.any() or object_mask[frame].mean() > 0.5:
        return torch.ones(1, height, width, dtype=torch.float32, device="cpu")
    matte = ndimage.gaussian_filter(object_mask.astype(np.float32), sigma=0.005 * min(height, width))
    return torch.from_numpy(matte)[None].clamp(0, 1)


def random_foregrounds(height: int, width: int, generators: Sequence[torch.Generator]) -> torch.Tensor:
    """A random rectangle for each generator, mattes `[B, 1, H, W]`: a quarter to the whole of each side, centered
    anywhere and cut at the frame, so that the border is reached as well."""
    mattes = torch.zeros(len(generators), 1, height, width, dtype=torch.float32, device="cpu")
    sides = torch.tensor([height, width], dtype=torch.int64, device="cpu")
    sizes = uniform(0.25, 1, generators, 2) * sides
    centers = uniform(0, 1, generators, 2) * sides
    starts = (centers - sizes / 2).round().long().clamp(min=0)
    stops = (centers + sizes / 2).round().long()
    for matte, (top, left), (bottom, right) in zip(mattes, starts, stops):
        matte[:, top:bottom, left:right] = 1
    return mattes


@lru_cache(maxsize=1)
@explained_caches()
def _load_segmentation_model(model: str) -> tuple[Any, Any]:
    try:
        return AutoImageProcessor.from_pretrained(model), AutoModelForSemanticSegmentation.from_pretrained(model).eval()
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{model} is not a semantic segmentation model that transformers can load without remote code ({error}); "
            "give such a model, or use --foreground threshold"
        ) from error


def segmentation_model_digest(model: str) -> str:
    """A hash of a segmentation model's weights and settings, as hexadecimal digits: the same under every name and in
    every folder.

    Args:
        model: as in [`segmentation_model_foreground`].
    """
    (processor, network), digest = _load_segmentation_model(model), hashlib.sha256()
    for config in (processor.to_dict(), network.config.to_dict()):
        named = {name: value for name, value in config.items() if name not in ("_name_or_path", "transformers_version")}
        digest.update(json.dumps(named, sort_keys=True, default=str).encode())
    digest.update(weights_digest(network).encode())
    return digest.hexdigest()


@torch.inference_mode()
def segmentation_model_foreground(image: torch.Tensor, model: str) -> torch.Tensor:
    """Everything that a semantic segmentation or salient-object model of transformers does not call background.

    Args:
        image: `[3, H, W]` in [0, 1].
        model: Hub id or folder. With one label its logit is the foreground's; with several, what belongs to labels
            named background, or to the first label where none is, is not foreground.

    Returns:
        Matte `[1, H, W]` in [0, 1]: probabilities.

    Raises:
        ValueError: when the model cannot be loaded.
    """
    processor, network = _load_segmentation_model(model)
    pixels = (image * 255).round().byte().permute(1, 2, 0).numpy()
    logits = network(**processor(images=pixels, return_tensors="pt")).logits
    logits = F.interpolate(logits.float(), size=image.shape[-2:], mode="bilinear", align_corners=False)[0]
    if len(logits) == 1:
        return logits.sigmoid()
    names = network.config.id2label
    background = [index for index in range(len(logits)) if "background" in str(names.get(index, "")).lower()] or [0]
    return (1 - logits.softmax(0)[background].sum(0, keepdim=True)).clamp(0, 1)
