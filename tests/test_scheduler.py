"""The scheduler by itself."""

import threading

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler

from diffusionad_pipe import NormGuidedOneStepScheduler


def images_and_noise(batch: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(batch, 3, 8, 8, generator=generator), torch.randn(2 * batch, 3, 8, 8, generator=generator)


@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
def test_noise_schedule_is_diffusers(schedule: str) -> None:
    ours, theirs = NormGuidedOneStepScheduler(beta_schedule=schedule), DDPMScheduler(beta_schedule=schedule)
    torch.testing.assert_close(ours.alphas_cumprod, theirs.alphas_cumprod, rtol=1e-4, atol=1e-6)
    images, noise = images_and_noise()
    timesteps = torch.tensor([3, 700])
    for method in ("add_noise", "get_velocity"):
        expected = getattr(theirs, method)(images, noise[:2], timesteps)
        torch.testing.assert_close(getattr(ours, method)(images, noise[:2], timesteps), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
def test_a_perfect_network_returns_the_image(prediction_type: str) -> None:
    scheduler = NormGuidedOneStepScheduler(prediction_type=prediction_type)
    images, noise = images_and_noise()
    both, timesteps = torch.cat([images, images]), torch.tensor([200, 150, 400, 300])
    noised = scheduler.add_noise(both, noise, timesteps)
    perfect = {
        "epsilon": noise,
        "sample": both,
        "v_prediction": scheduler.get_velocity(both, noise, timesteps),
    }[prediction_type]
    output = scheduler.step(perfect, timesteps, noised)
    for prediction in (output.prev_sample, output.pred_small, output.pred_large):
        torch.testing.assert_close(prediction, images, rtol=0, atol=1e-5)


def test_guidance_weights_at_the_papers_setting() -> None:
    """At t_s = 200 and w = 1: 65.6 % small scale and 34.4 % norm image."""
    scheduler = NormGuidedOneStepScheduler(prediction_type="sample")
    small, large = torch.full((1, 3, 2, 2), 0.0), torch.full((1, 3, 2, 2), 1.0)
    both = torch.cat([small, large])
    output = scheduler.step(both, torch.tensor([200, 400]), both)
    assert output.prev_sample.mean().item() == pytest.approx(0.344, abs=5e-4)
    unguided = scheduler.step(both, torch.tensor([200, 400]), both, guidance_scale=0.0)
    assert not unguided.prev_sample.any()


def test_clipping() -> None:
    far = torch.full((2, 3, 2, 2), 5.0)
    timesteps = torch.tensor([200, 400])
    clipped = NormGuidedOneStepScheduler(prediction_type="sample").step(far, timesteps, far)
    assert clipped.prev_sample.max() == 1 and clipped.pred_large.max() == 1 and clipped.pred_small.max() == 5
    free = NormGuidedOneStepScheduler(prediction_type="sample", clip_sample=False).step(far, timesteps, far)
    assert free.prev_sample.max() == 5


def test_one_timestep_a_scale_equals_one_an_image() -> None:
    scheduler = NormGuidedOneStepScheduler()
    _, noise = images_and_noise()
    short = scheduler.step(noise, torch.tensor([200, 400]), noise.flip(0)).prev_sample
    long = scheduler.step(noise, torch.tensor([200, 200, 400, 400]), noise.flip(0)).prev_sample
    assert torch.equal(short, long)


def test_bad_arguments() -> None:
    scheduler = NormGuidedOneStepScheduler()
    odd, even = torch.zeros(3, 3, 4, 4), torch.zeros(4, 3, 4, 4)
    with pytest.raises(ValueError, match="both scales in one batch"):
        scheduler.step(odd, torch.tensor([200, 400]), odd)
    with pytest.raises(ValueError, match="both scales in one batch"):
        scheduler.step(odd, torch.tensor([200, 400]), even)
    with pytest.raises(ValueError, match="2 or 4 timesteps"):
        scheduler.step(even, torch.tensor([200, 300, 400]), even)
    with pytest.raises(ValueError, match="prediction_type must be"):
        NormGuidedOneStepScheduler(prediction_type="noise")
    with pytest.raises(ValueError, match="beta_schedule must be"):
        NormGuidedOneStepScheduler(beta_schedule="square")
    with pytest.raises(ValueError, match="outside 2"):
        NormGuidedOneStepScheduler(num_train_timesteps=10**12)


@pytest.mark.parametrize("other", [DDPMScheduler, DDIMScheduler])
def test_config_to_and_from_diffusers(other: type) -> None:
    ours = NormGuidedOneStepScheduler(beta_end=0.015, prediction_type="sample", small_timestep=100)
    theirs = other.from_config(ours.config)
    assert theirs.config.beta_end == 0.015 and theirs.config.prediction_type == "sample"
    back = NormGuidedOneStepScheduler.from_config(theirs.config)
    assert back.config.small_timestep == 100 and torch.equal(back.alphas_cumprod, ours.alphas_cumprod)
    plain = NormGuidedOneStepScheduler.from_config(other().config)
    assert plain.config.large_timestep == 400


def test_trained_betas() -> None:
    betas = np.linspace(1e-4, 0.02, 1000)
    ours = NormGuidedOneStepScheduler(trained_betas=betas)
    torch.testing.assert_close(ours.alphas_cumprod, NormGuidedOneStepScheduler().alphas_cumprod)


def test_two_threads_do_not_disturb_each_other() -> None:
    scheduler = NormGuidedOneStepScheduler()
    _, noise = images_and_noise()
    pairs = [torch.tensor(pair) for pair in ((10, 20), (200, 400), (500, 999), (0, 1))]
    expected = [scheduler.step(noise, pair, noise.flip(0)).prev_sample for pair in pairs]
    wrong = []

    def work(index: int) -> None:
        for _ in range(100):
            if not torch.equal(scheduler.step(noise, pairs[index], noise.flip(0)).prev_sample, expected[index]):
                wrong.append(index)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(pairs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
