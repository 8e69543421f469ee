"""Networks may be elsewhere than the CPU: torch's device `meta` stands for a GPU, and refuses as a GPU does to compute
with what was left behind."""

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from diffusionad_pipe import DiffusionADPipeline, NormGuidedOneStepScheduler
from diffusionad_pipe.cli import app
from diffusionad_pipe.runtime.acceleration import find_device
from diffusionad_pipe.training.losses import distillation_losses, training_losses
from diffusionad_pipe.training.networks import TrainedNetworks

SHAPE = (2, 3, 32, 32)


@pytest.fixture
def elsewhere(tiny_pipeline: DiffusionADPipeline) -> DiffusionADPipeline:
    tiny_pipeline.unet.to("meta")
    tiny_pipeline.segmentation.to("meta")
    with pytest.raises(RuntimeError, match="device"):
        torch.ones(2, device="meta") + torch.ones(2)
    return tiny_pipeline


def test_an_image_is_judged_where_the_networks_are(elsewhere: DiffusionADPipeline) -> None:
    images = torch.empty(SHAPE, device="meta")
    for distilled in (False, True):
        config = elsewhere.scheduler.config
        elsewhere.scheduler = NormGuidedOneStepScheduler.from_config(
            config, prediction_type="sample", distilled=distilled
        )
        timesteps = elsewhere.scheduler.timesteps
        for noises in (elsewhere.fixed_noise(1, 32, 32).expand(1, 2, *SHAPE), torch.randn(1, 2, *SHAPE)):
            maps, reconstructions = elsewhere.detect(images, noises, timesteps)
            assert maps.device.type == reconstructions.device.type == "meta"


def test_training_happens_where_the_networks_are(elsewhere: DiffusionADPipeline) -> None:
    networks = TrainedNetworks(elsewhere.unet, elsewhere.segmentation)
    images, masks, noise = (torch.empty(shape, device="meta") for shape in (SHAPE, (2, 1, 32, 32), (2, *SHAPE)))
    labels, timesteps = (torch.empty(shape, dtype=torch.long, device="meta") for shape in ((2,), (2, 2)))
    scheduler = NormGuidedOneStepScheduler(prediction_type="sample")
    student = NormGuidedOneStepScheduler(prediction_type="sample", distilled=True)
    for losses in (
        networks(training_losses, scheduler, images, masks, labels, noise, timesteps),
        networks(training_losses, scheduler, images, masks, labels, noise, timesteps, originals=images),
        networks(distillation_losses, student, images, masks, noise, elsewhere.unet, scheduler),
    ):
        losses.loss.backward()
    assert all(parameter.grad is not None for parameter in networks.parameters())


@pytest.mark.parametrize("name", ["", "meta", "tpu9", "cuda:99", "cpu:cpu", "xla", "\n"])
def test_a_device_that_is_not_here_is_one_sentence(name: str) -> None:
    with pytest.raises(ValueError, match="there is no device .* here, only cpu"):
        find_device(name)


def test_devices_that_are_here() -> None:
    assert find_device("cpu") == torch.device("cpu")
    assert find_device().type in ("cpu", "cuda", "mps", "xpu")


@pytest.mark.parametrize(
    "command",
    [
        ["predict", "{model}/pictures", "--model", "{model}", "--output", "{model}/out"],
        ["evaluate", "--data", "{model}", "--model", "{model}", "--output", "{model}/out"],
        ["calibrate", "{model}", "{model}/pictures"],
    ],
)
def test_every_command_that_takes_a_device(tiny_pipeline, tmp_path, command: list[str]) -> None:
    tiny_pipeline.save_pretrained(tmp_path)
    (tmp_path / "pictures").mkdir()
    Image.new("RGB", (32, 32)).save(tmp_path / "pictures" / "a.png")
    arguments = [part.replace("{model}", str(tmp_path)) for part in command]
    result = CliRunner().invoke(app, [*arguments, "--device", "tpu9"])
    assert result.exit_code == 2 and "there is no device 'tpu9' here" in result.stderr
