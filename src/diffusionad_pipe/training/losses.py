"""The training objective of DiffusionAD (section III-C and III-D): noise loss, segmentation loss, and their sum."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from ..scheduling_norm_guided_one_step import NormGuidedOneStepScheduler


class TrainingLosses(NamedTuple):
    """Losses of one batch and what they were computed from.

    Args:
        loss: noise_loss + mask_loss, a scalar.
        noise_loss: mean over the normal pictures of both scales' denoising losses, a scalar.
        mask_loss: 5 · focal + smooth L1, a scalar.
        reconstructions: x̂0_g `[B, 3, H, W]`.
        logits: of the segmentation network `[B, 1, H, W]`.
    """

    loss: torch.Tensor
    noise_loss: torch.Tensor
    mask_loss: torch.Tensor
    reconstructions: torch.Tensor
    logits: torch.Tensor


def sample_timesteps(
    batch_size: int,
    generator: torch.Generator,
    *,
    boundary: int = 300,
    maximum: int = 1000,
) -> torch.Tensor:
    """Sample t_s ~ U{0 ... boundary−1} and t_b ~ U{boundary ... maximum−1} for each picture.

    Args:
        batch_size: B.
        generator: source of the random numbers (CPU).
        boundary: first timestep of the large scale; 300 in the paper.
        maximum: end of the large scale; 1000 in the paper. Above about 700 an ε-network's one-step prediction
            mostly saturates, so a lower cap is worth trying.

    Returns:
        `[2, B]`, small scale first.
    """
    small = torch.randint(0, boundary, (batch_size,), generator=generator, device="cpu")
    large = torch.randint(boundary, maximum, (batch_size,), generator=generator, device="cpu")
    return torch.stack([small, large])


def mask_loss(logits: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
    """L_mask = 5 · focal(α = 0.5, γ = 4) + smooth L1 on probabilities.

    Computed from logits in float32, so it is finite under mixed precision. The focal term needs classes: a pixel
    of the soft mask is anomalous from one half on. The smooth L1 term sees the mask as it is.

    Args:
        logits: `[B, 1, H, W]`.
        masks: soft masks `[B, 1, H, W]` in [0, 1].
    """
    logits = logits.float()
    anomalous = masks >= 0.5
    log_p = F.logsigmoid(torch.where(anomalous, logits, -logits))  # of the true class
    focal = (-0.5 * (1 - log_p.exp()) ** 4 * log_p).mean()
    return 5 * focal + F.smooth_l1_loss(logits.sigmoid(), masks)


def denoising_loss(
    scheduler: NormGuidedOneStepScheduler,
    model_output: torch.Tensor,
    images: torch.Tensor,
    noise: torch.Tensor,
    timesteps: torch.Tensor,
) -> torch.Tensor:
    """The denoising loss of each picture, a mean over its pixels and channels.

    For `prediction_type="epsilon"` the paper's ‖ε_θ − ε‖². For `"sample"` it is ‖x̂0 − x0‖² / max(1 − ᾱ_t, 0.1): the
    more noise, the harder the picture and the smaller its weight, but for the floor.

    Args:
        scheduler: knows the prediction type and ᾱ.
        model_output: `[B, 3, H, W]`.
        images: clean pictures `[B, 3, H, W]`.
        noise: `[B, 3, H, W]`.
        timesteps: `[B]`.

    Returns:
        `[B]`.
    """
    if scheduler.config.prediction_type == "epsilon":
        return (model_output - noise).pow(2).flatten(1).mean(1)
    if scheduler.config.prediction_type == "v_prediction":
        velocity = scheduler.get_velocity(images, noise, timesteps)
        return (model_output - velocity).pow(2).flatten(1).mean(1)
    noise_power = 1 - scheduler.alphas_cumprod.to(images.device)[timesteps]
    return (model_output - images).pow(2).flatten(1).mean(1) / noise_power.clamp(min=0.1)


def training_losses(
    unet: nn.Module,
    segmentation: nn.Module,
    scheduler: NormGuidedOneStepScheduler,
    images: torch.Tensor,
    masks: torch.Tensor,
    labels: torch.Tensor,
    noise: torch.Tensor,
    timesteps: torch.Tensor,
    guidance_scale: float | None = None,
    normal_count: torch.Tensor | None = None,
    originals: torch.Tensor | None = None,
) -> TrainingLosses:
    """One training forward pass: both noise scales in one call of the UNet, guidance, segmentation, losses.

    The reconstruction is not detached: the segmentation loss teaches the UNet through both scales, on anomalous
    pictures too. The noise loss counts normal pictures only; a batch without any contributes zero.

    Args:
        unet: the reconstruction network (may be wrapped for distributed training).
        segmentation: the segmentation network, likewise.
        scheduler: its configuration says what the UNet predicts.
        images: normal and synthetically anomalous pictures `[B, 3, H, W]` in [0, 1].
        masks: `[B, 1, H, W]` in [0, 1].
        labels: `[B]`, 1 where the mask is not empty.
        noise: `[2, B, 3, H, W]`, small scale first.
        timesteps: `[2, B]`, small scale first.
        guidance_scale: None takes the scheduler's.
        normal_count: what the normal pictures' losses are divided by, a scalar; None takes their number. Where a step
            has several passes or processes, their mean number makes the sum of the gradients that of one big batch.
        originals: the pictures without their synthetic anomalies `[B, 3, H, W]`. Where given, anomalous pictures count
            in the noise loss too, and their target is the original: the UNet learns to restore, as DRAEM's
            reconstructive network does. Not in the paper; for `prediction_type="sample"` only. `normal_count` is then
            the number of all pictures.

    Returns:
        [`TrainingLosses`].
    """
    both_images = torch.cat([images, images])  # [2B, 3, H, W]
    both_noise, both_timesteps = noise.flatten(0, 1), timesteps.flatten()
    noised = scheduler.add_noise(both_images, both_noise, both_timesteps)
    model_output = unet(noised, both_timesteps).sample.float()

    targets = both_images if originals is None else torch.cat([originals, originals])
    per_image = denoising_loss(scheduler, model_output, targets, both_noise, both_timesteps)  # [2B]
    small, large = per_image.chunk(2)
    normal = (labels == 0).float() if originals is None else torch.ones_like(labels)
    if normal_count is None:
        normal_count = normal.sum()
    # A mean number may be below 1; without any normal picture the sum is 0, and divided by 1.
    noise_loss = ((small + large) * normal).sum() / torch.where(normal_count > 0, normal_count, 1.0)

    step = scheduler.step(model_output, both_timesteps, noised, guidance_scale)
    logits = segmentation(torch.cat([images, step.prev_sample], dim=1)).logits.float()
    segmentation_loss = mask_loss(logits, masks)
    return TrainingLosses(noise_loss + segmentation_loss, noise_loss, segmentation_loss, step.prev_sample, logits)


def distillation_losses(
    unet: nn.Module,
    segmentation: nn.Module,
    scheduler: NormGuidedOneStepScheduler,
    images: torch.Tensor,
    masks: torch.Tensor,
    noise: torch.Tensor,
    teacher: nn.Module,
    teacher_scheduler: NormGuidedOneStepScheduler,
) -> TrainingLosses:
    """One training forward pass of a student that needs one call of the UNet. Not in the paper.

    The teacher makes its norm-guided reconstruction of each picture from both noise scales, as at inference. The
    student sees the small scale alone, with the same noise, and learns to predict that reconstruction; the
    segmentation network learns from the student's, as in [`training_losses`].

    Args:
        unet: the student.
        segmentation: the segmentation network.
        scheduler: the student's, with `prediction_type="sample"`, `distilled` and the teacher's noise scales.
        images: normal and synthetically anomalous pictures `[B, 3, H, W]` in [0, 1].
        masks: `[B, 1, H, W]` in [0, 1].
        noise: `[2, B, 3, H, W]`, small scale first.
        teacher: the reconstruction network that teaches, in eval mode.
        teacher_scheduler: its scheduler.

    Returns:
        [`TrainingLosses`]; `noise_loss` is the student's distance from the teacher, weighted as a denoising loss.
    """
    timesteps = teacher_scheduler.timesteps.to(images.device)  # [2]
    with torch.no_grad():
        both_images, both_timesteps = torch.cat([images, images]), timesteps.repeat_interleave(len(images))
        noised = teacher_scheduler.add_noise(both_images, noise.flatten(0, 1), both_timesteps)
        output = teacher(noised.to(next(teacher.parameters()).dtype), both_timesteps).sample.float()
        targets = teacher_scheduler.step(output, both_timesteps, noised).prev_sample

    small, noised_small = both_timesteps[: len(images)], noised[: len(images)]
    model_output = unet(noised_small, small).sample.float()
    noise_loss = denoising_loss(scheduler, model_output, targets, noise[0], small).mean()

    step = scheduler.step(model_output, small, noised_small)
    logits = segmentation(torch.cat([images, step.prev_sample], dim=1)).logits.float()
    segmentation_loss = mask_loss(logits, masks)
    return TrainingLosses(noise_loss + segmentation_loss, noise_loss, segmentation_loss, step.prev_sample, logits)
