"""The training objective."""

import pytest
import torch
import torch.nn.functional as F

from diffusionad_pipe import DiffusionADUNet2DModel, NormGuidedOneStepScheduler, SegmentationUNet2DModel
from diffusionad_pipe.runtime.acceleration import train_channels_last
from diffusionad_pipe.training.losses import denoising_loss, mask_loss, sample_timesteps, training_losses


def batch(labels: list[float]) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    count = len(labels)
    masks = torch.zeros(count, 1, 32, 32)
    masks[torch.tensor(labels) == 1, :, 8:16, 8:16] = 1
    return {
        "images": torch.rand(count, 3, 32, 32, generator=generator),
        "masks": masks,
        "labels": torch.tensor(labels),
        "noise": torch.randn(2, count, 3, 32, 32, generator=generator),
        "timesteps": sample_timesteps(count, generator),
    }


def networks(prediction_type: str = "epsilon") -> tuple:
    torch.manual_seed(0)
    unet = DiffusionADUNet2DModel(block_out_channels=(8, 16), attention=(False, True), norm_num_groups=4)
    torch.nn.init.normal_(unet.conv_out.weight, std=0.1)
    segmentation = SegmentationUNet2DModel(base_channels=8, norm_type="group")
    return unet, segmentation, NormGuidedOneStepScheduler(prediction_type=prediction_type)


def test_noise_loss_counts_normal_images_only() -> None:
    parts, mixed = networks(), batch([0.0, 1.0, 0.0])
    losses = training_losses(*parts, **mixed)
    only_normal = {key: value[:, ::2] if key in ("noise", "timesteps") else value[::2] for key, value in mixed.items()}
    torch.testing.assert_close(losses.noise_loss, training_losses(*parts, **only_normal).noise_loss)
    torch.testing.assert_close(losses.loss, losses.noise_loss + losses.mask_loss)


def test_a_batch_without_normal_images_still_teaches() -> None:
    unet, segmentation, scheduler = networks()
    losses = training_losses(unet, segmentation, scheduler, **batch([1.0, 1.0]))
    assert losses.noise_loss == 0 and losses.loss.isfinite()
    losses.loss.backward()
    # The reconstruction is not detached: the segmentation loss alone reaches the UNet.
    assert unet.conv_in.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
def test_a_perfect_prediction_costs_nothing(prediction_type: str) -> None:
    scheduler = NormGuidedOneStepScheduler(prediction_type=prediction_type)
    data = batch([0.0, 0.0])
    images, noise, timesteps = data["images"], data["noise"][0], data["timesteps"][0]
    perfect = {"epsilon": noise, "sample": images, "v_prediction": scheduler.get_velocity(images, noise, timesteps)}
    assert denoising_loss(scheduler, perfect[prediction_type], images, noise, timesteps).max() == 0
    wrong = denoising_loss(scheduler, perfect[prediction_type] + 0.5, images, noise, timesteps)
    weight = 1 / (1 - scheduler.alphas_cumprod[timesteps]).clamp(min=0.1) if prediction_type == "sample" else 1.0
    torch.testing.assert_close(wrong, torch.full((2,), 0.25) * weight)


def test_mask_loss_is_focal_and_smooth_l1() -> None:
    logits = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    masks = (torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(1)) > 0.7).float()
    p = logits.sigmoid()
    p_true = torch.where(masks == 1, p, 1 - p)
    expected = 5 * (-0.5 * (1 - p_true) ** 4 * p_true.log()).mean() + F.smooth_l1_loss(p, masks)
    torch.testing.assert_close(mask_loss(logits, masks), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_mask_loss_is_finite_where_probabilities_saturate(dtype: torch.dtype) -> None:
    logits = torch.tensor([-200.0, 200.0, 0.0, 60.0], dtype=dtype).reshape(1, 1, 2, 2).requires_grad_()
    loss = mask_loss(logits, torch.tensor([1.0, 0.0, 1.0, 1.0]).reshape(1, 1, 2, 2))
    loss.backward()
    assert loss.isfinite() and logits.grad.isfinite().all() and loss.dtype == torch.float32


@pytest.mark.parametrize("labels", [[0.0, 1.0, 0.0, 1.0], [0.0, 0.0, 0.0, 1.0], [1.0, 1.0, 1.0, 0.0], [1.0] * 4])
def test_accumulated_gradients_equal_the_big_batch(labels: list[float]) -> None:
    """With group norm, and the mean number of normal pictures of a part, however they are spread over the parts."""
    unet, segmentation, scheduler = networks("sample")
    data = batch(labels)
    parameters = [*unet.parameters(), *segmentation.parameters()]

    def gradients(parts: list[slice]) -> list[torch.Tensor]:
        for parameter in parameters:
            parameter.grad = None
        for part in parts:
            piece = {k: v[:, part] if k in ("noise", "timesteps") else v[part] for k, v in data.items()}
            normal_count = (data["labels"] == 0).sum() / len(parts)
            losses = training_losses(unet, segmentation, scheduler, **piece, normal_count=normal_count)
            (losses.loss / len(parts)).backward()
        return [parameter.grad.clone() for parameter in parameters]

    for big, small in zip(gradients([slice(0, 4)]), gradients([slice(0, 2), slice(2, 4)])):
        torch.testing.assert_close(big, small, rtol=1e-4, atol=1e-5)


def test_channels_last_gives_the_same_gradients() -> None:
    """And no convolution gets its input in the other layout, but for the first of each network."""
    data, gradients = batch([0.0, 1.0, 0.0, 1.0]), []
    copied: list[torch.nn.Module] = []

    def note(module: torch.nn.Module, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
        if not inputs[0].is_contiguous(memory_format=torch.channels_last):
            copied.append(module)

    for channels_last in (False, True):
        unet, segmentation, scheduler = networks("sample")
        modules = [*unet.modules(), *segmentation.modules()]
        if channels_last:
            train_channels_last(unet, segmentation)
            hooks = [m.register_forward_hook(note) for m in modules if isinstance(m, torch.nn.Conv2d)]
            assert len(hooks) > 40
        training_losses(unet, segmentation, scheduler, **data).loss.backward()
        gradients.append([parameter.grad for parameter in [*unet.parameters(), *segmentation.parameters()]])
    assert copied == [unet.conv_in, next(m for m in segmentation.modules() if isinstance(m, torch.nn.Conv2d))]
    for contiguous, last in zip(*gradients):  # single small entries round differently on every processor
        assert (last - contiguous).norm() <= 1e-4 * contiguous.norm() + 1e-6


def test_timesteps() -> None:
    small, large = sample_timesteps(5000, torch.Generator().manual_seed(0), boundary=100, maximum=150)
    assert (small.min(), small.max(), large.min(), large.max()) == (0, 99, 100, 149)
