"""The optimizer of both networks, and how their learning rates go."""

import math

import torch
from diffusers.optimization import get_scheduler
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from .config import TrainingConfig


def build_optimizer(config: TrainingConfig, unet: nn.Module, segmentation: nn.Module) -> torch.optim.AdamW:
    """One optimizer with a learning rate for each network: Adam, where the weight decay is 0."""
    groups = [
        {"params": list(unet.parameters()), "lr": config.learning_rate},
        {"params": list(segmentation.parameters()), "lr": config.segmentation_learning_rate},
    ]
    return torch.optim.AdamW(groups, weight_decay=config.weight_decay, fused=True)


def build_schedules(config: TrainingConfig, optimizer: torch.optim.Optimizer) -> LambdaLR:
    """The schedules of the UNet and of the segmentation network."""
    schedule = get_scheduler(
        config.lr_scheduler,
        optimizer,
        num_warmup_steps=config.lr_warmup_steps,
        num_training_steps=config.max_train_steps,
    ).lr_lambdas[0]
    return LambdaLR(optimizer, [schedule, reference_schedule if config.seg_schedule == "reference" else schedule])


def reference_schedule(step: int) -> float:
    """The authors' schedule of the segmentation network: CosineAnnealingLR(T_max=10), stepped every iteration."""
    return (1 + math.cos(math.pi * step / 10)) / 2
