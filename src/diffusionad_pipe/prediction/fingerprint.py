"""A hash that tells a pipeline from others, for results that are kept."""

import hashlib
import json

import torch

from ..pipeline_diffusionad import DiffusionADPipeline


def fingerprint(pipe: DiffusionADPipeline) -> str:
    """A hash of a pipeline's weights and noise: predictions of equal ones are equal."""
    digest = hashlib.sha256()
    for network in (pipe.unet, pipe.segmentation):
        for name, tensor in network.state_dict().items():
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    settings = {k: pipe.config[k] for k in ("image_size", "score_top_k", "noise_seed")}
    digest.update(json.dumps([settings, dict(pipe.scheduler.config)], sort_keys=True, default=str).encode())
    return digest.hexdigest()
