"""What a call of the pipeline returns."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from diffusers.utils import BaseOutput


@dataclass
class DiffusionADPipelineOutput(BaseOutput):
    """Output of [`DiffusionADPipeline`]. Maps, pictures and masks have the size of each input picture, or without
    `match_input_resolution` that of the networks.

    Args:
        anomaly_maps: probability of an anomaly at each pixel, in [0, 1]. `"pt"`: `[B, 1, H, W]`, `"np"`:
            `[B, H, W, 1]`, `"pil"`: pictures of mode L (1 is 255). Inputs of different sizes give a list.
        anomaly_scores: `[B]`, in [0, 1]: the mean of the largest pixels at the model's size. An array, or a tensor
            for `"pt"`.
        reconstructions: the anomaly-free pictures, in [0, 1]. `"pt"`: `[B, 3, H, W]`, `"np"`: `[B, H, W, 3]`.
        predicted_masks: where the map is above `pixel_threshold`, booleans in the layout of the maps (`"pil"`: mode
            L, 0 or 255). None without that threshold.
        is_anomalous: `[B]`, where the score is above `image_threshold`. None without that threshold.
    """

    anomaly_maps: Any
    anomaly_scores: Any
    reconstructions: Any
    predicted_masks: Any
    is_anomalous: Any


def join_outputs(outputs: Sequence[DiffusionADPipelineOutput], output_type: str) -> DiffusionADPipelineOutput:
    """One output from those of several batches, as one of all of them."""

    def join(values: list[Any]) -> Any:
        if len(values) == 1 or values[0] is None:
            return values[0]
        items = [item for value in values for item in value]
        if output_type == "pil" and isinstance(values[0], list):
            return items
        if len({item.shape for item in items}) > 1:
            return items
        return torch.stack(items) if output_type == "pt" else np.stack(items)

    names = [field.name for field in fields(DiffusionADPipelineOutput)]
    return DiffusionADPipelineOutput(*(join([getattr(output, name) for output in outputs]) for name in names))
