"""A hash of a network's weights, which tells it from others wherever it lies and whatever it is called."""

import hashlib

import torch
from torch import nn


def weights_digest(network: nn.Module) -> str:
    """The sha256 of all names and values, as hexadecimal digits.

    Args:
        network: on any device, of any precision.
    """
    digest = hashlib.sha256()
    for name, tensor in network.state_dict().items():
        digest.update(repr((name, tensor.dtype, tuple(tensor.shape))).encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
