"""The networks and equations are DiffusionAD's: golden values of the authors' code, in float32 on the CPU."""

import collections
import json
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from diffusionad_pipe import (
    DiffusionADPipeline,
    DiffusionADUNet2DModel,
    SegmentationUNet2DModel,
    paper_unet_config,
)
from diffusionad_pipe.single_file import read_checkpoint
from diffusionad_pipe.training.losses import training_losses
from diffusionad_pipe.unet_2d_diffusionad import CHANNEL_MULTIPLIERS

REFERENCE = Path(__file__).parent / "reference"
STATE_DICTS = ("unet_model_state_dict", "seg_model_state_dict")
TOLERANCE = {"rtol": 0, "atol": 1e-4}


def golden_weight(key: str, shape: list[int]) -> torch.Tensor:
    """The weights that the golden values were computed with, built from their names."""
    if key.endswith("num_batches_tracked"):
        return torch.zeros((), dtype=torch.int64)
    random = np.random.RandomState(zlib.crc32(key.encode()) % 2**32)
    if key.endswith("running_var"):
        value = 0.75 + 0.5 * random.random_sample(shape)
    elif key.endswith("running_mean"):
        value = 0.05 * random.standard_normal(shape)
    elif len(shape) == 1:
        value = key.endswith("weight") + 0.1 * random.standard_normal(shape)
    else:
        value = (8 if "fin_out" in key else 1) * random.standard_normal(shape) / np.sqrt(np.prod(shape[1:]))
    return torch.from_numpy(np.asarray(value, dtype=np.float32))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file as the authors' code saves it."""
    layout = json.loads((REFERENCE / "state_dict_layout.json").read_text())
    content = {"n_epoch": 3000, "args": collections.defaultdict(str, layout["args"])}
    content |= {name: {key: golden_weight(key, shape) for key, shape in layout[name].items()} for name in STATE_DICTS}
    path = tmp_path_factory.mktemp("reference") / "params-best.pt"
    torch.save(content, path)
    return path


@pytest.fixture(scope="module")
def pipe(checkpoint: Path) -> DiffusionADPipeline:
    return DiffusionADPipeline.from_single_file(checkpoint)


@pytest.fixture(scope="module")
def golden() -> dict[str, torch.Tensor]:
    return load_file(REFERENCE / "tensors.safetensors")


def test_pipeline_call(pipe: DiffusionADPipeline, golden: dict[str, torch.Tensor]) -> None:
    noise = torch.stack([golden["noise_small"], golden["noise_large"]])
    output = pipe(golden["image"], height=64, width=64, noise=noise, output_type="pt")
    torch.testing.assert_close(output.anomaly_maps, golden["anomaly_map"], **TOLERANCE)
    torch.testing.assert_close(output.anomaly_scores, golden["image_score"], **TOLERANCE)
    torch.testing.assert_close(output.reconstructions, golden["x0_guided"].clamp(0, 1), **TOLERANCE)


@torch.no_grad()
def test_scheduler(pipe: DiffusionADPipeline, golden: dict[str, torch.Tensor]) -> None:
    timesteps = torch.tensor([200, 200, 400, 400])
    noise = torch.cat([golden["noise_small"], golden["noise_large"]])
    noised = pipe.scheduler.add_noise(golden["image"].repeat(2, 1, 1, 1), noise, timesteps)
    model_output = pipe.unet(noised, timesteps).sample
    step = pipe.scheduler.step(model_output, timesteps, noised)
    noised_from_large = pipe.scheduler.add_noise(step.pred_large, model_output[:2], timesteps[:2])
    for ours, name in (
        (step.noised_small, "x_t_small"),
        (step.noised_large, "x_t_large"),
        (step.pred_small.clamp(-1, 1), "x0_small"),
        (step.pred_large, "x0_large"),
        (noised_from_large, "x_t_small_from_large"),
        (step.prev_sample, "x0_guided"),
    ):
        torch.testing.assert_close(ours, golden[name], **TOLERANCE, msg=lambda text, name=name: f"{name}: {text}")


@torch.no_grad()
def test_guidance_is_the_papers_equation(pipe: DiffusionADPipeline, golden: dict[str, torch.Tensor]) -> None:
    """ε̂ = ε_s − w·√(1−ᾱ_s)·(n_s − x_s), written out, equals the closed form that `step` uses, for any weight."""
    scheduler, small, large = pipe.scheduler, torch.tensor([200]), torch.tensor([400])
    noised_small, noised_large = golden["x_t_small"].double(), golden["x_t_large"].double()
    generator = torch.Generator().manual_seed(0)
    eps_small, eps_large = torch.randn(2, 2, 3, 64, 64, generator=generator, dtype=torch.float64)
    for weight in (0.0, 0.5, 1.0, 3.0):
        sigma = (1 - scheduler.alphas_cumprod[200]).sqrt().double()
        norm = scheduler.predict_original_sample(eps_large, large, noised_large).clamp(-1, 1)
        renoised = scheduler.add_noise(norm, eps_small, small)
        guided_eps = eps_small - weight * sigma * (renoised - noised_small)
        expected = scheduler.predict_original_sample(guided_eps, small, noised_small).clamp(-1, 1)
        actual = scheduler.step(
            torch.cat([eps_small, eps_large]),
            torch.tensor([200, 400]),
            torch.cat([noised_small, noised_large]),
            guidance_scale=weight,
        ).prev_sample
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-6)


@torch.no_grad()
def test_unet(pipe: DiffusionADPipeline, golden: dict[str, torch.Tensor]) -> None:
    for timestep, expected in zip(golden["unet_timesteps"], golden["unet_eps"]):
        actual = pipe.unet(golden["image"][:1], timestep).sample[0]
        torch.testing.assert_close(actual, expected, **TOLERANCE)


@torch.no_grad()
def test_training_forward(pipe: DiffusionADPipeline, golden: dict[str, torch.Tensor]) -> None:
    noise = torch.stack([golden["noise_small"], golden["noise_large"]])
    masks = torch.zeros(2, 1, 64, 64)
    networks = (pipe.unet, pipe.segmentation, pipe.scheduler, golden["image"], masks)
    timesteps = torch.stack([golden["train_t_small"], golden["train_t_large"]])
    losses = training_losses(*networks, golden["train_label"], noise, timesteps)
    torch.testing.assert_close(losses.noise_loss, golden["train_noise_loss"].squeeze(), **TOLERANCE)
    # The large scale divides the rounding of its predicted noise by √ᾱ: by 1/156 at t_b = 998 of the second picture,
    # where the golden values themselves are 1e-4 from what float64 gives.
    rounding = 3e-6 / pipe.scheduler.alphas_cumprod[timesteps[1]].sqrt()
    errors = (losses.reconstructions - golden["train_x0_guided"]).abs().amax(dim=(1, 2, 3))
    assert (errors <= rounding).all(), (errors, rounding)

    # Despite its name this is what the authors' training forward returns beside it: the picture noised to t_b.
    noised = pipe.scheduler.add_noise(golden["image"], golden["noise_large"], timesteps[1])
    torch.testing.assert_close(noised, golden["train_x0_large"], **TOLERANCE)

    fixed = torch.tensor([[200, 200], [400, 400]])
    losses = training_losses(*networks, torch.zeros(2), noise, fixed)
    torch.testing.assert_close(losses.noise_loss, golden["eval_loss"].squeeze(), **TOLERANCE)


def test_checkpoint_round_trip_is_bit_exact(checkpoint: Path, pipe: DiffusionADPipeline, tmp_path: Path) -> None:
    pipe.save_single_file(tmp_path / "again.pt")
    before, after = read_checkpoint(checkpoint), read_checkpoint(tmp_path / "again.pt")
    for name in STATE_DICTS:
        assert before[name].keys() == after[name].keys()
        for key, value in before[name].items():
            assert value.dtype == after[name][key].dtype and torch.equal(value, after[name][key]), key
    for key in ("img_size", "base_channels", "T", "beta_schedule", "num_heads", "attention_resolutions", "condition_w"):
        assert before["args"][key] == after["args"][key], key


def test_paper_size() -> None:
    with torch.device("meta"):
        unet, segmentation = DiffusionADUNet2DModel(), SegmentationUNet2DModel()
    assert sum(p.numel() for p in unet.parameters()) == 131_654_403
    assert sum(p.numel() for p in segmentation.parameters()) == 28_373_569
    defaults = {key: unet.config[key] for key in ("block_out_channels", "attention", "sample_size")}
    assert {key: paper_unet_config(256)[key] for key in defaults} == defaults


@torch.no_grad()
@pytest.mark.parametrize("size", sorted(CHANNEL_MULTIPLIERS))
def test_every_preset_runs_at_its_size(size: int) -> None:
    unet = DiffusionADUNet2DModel(**paper_unet_config(size, base_channels=32)).eval()
    assert unet(torch.zeros(1, 3, size, size), 10).sample.shape == (1, 3, size, size)
    side = size // 2 ** (len(unet.config.block_out_channels) - 1)
    assert side == {512: 8, 256: 8, 128: 8, 64: 8, 32: 4}[size]


def test_new_networks_start_as_the_authors(golden: dict[str, torch.Tensor]) -> None:
    unet = DiffusionADUNet2DModel(**paper_unet_config(64, base_channels=32)).eval()
    assert not unet(golden["image"], 5).sample.any()
    zero = {name for name, value in unet.named_parameters() if name.endswith("weight") and not value.any()}
    blocks = [name for name in unet.state_dict() if name.endswith(("conv2.weight", "to_out.0.weight"))]
    assert zero == {*blocks, "conv_out.weight"}
