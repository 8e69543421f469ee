"""A student that needs one call of the UNet: its scheduler, its loss, its pipeline, and how it is trained."""

import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from diffusionad_pipe import DiffusionADPipeline, NormGuidedOneStepScheduler, open_image
from diffusionad_pipe.export.detector import ExportedDetector
from diffusionad_pipe.export.export import export_detector
from diffusionad_pipe.hub.summary import summarize
from diffusionad_pipe.training.losses import distillation_losses
from tests.helpers.script_processes import run_script
from tests.helpers.tiny_pipeline import build_tiny_pipeline

ROOT = Path(__file__).parents[2]
HAZELNUT = ROOT / "training" / "data" / "hazelnut_toy" / "hazelnut"
IMAGE = HAZELNUT / "test" / "colour" / "00.jpg"


@pytest.fixture
def student() -> DiffusionADPipeline:
    """Distilled, with the weights of the tiny pipeline."""
    pipe = build_tiny_pipeline()
    pipe.register_modules(scheduler=NormGuidedOneStepScheduler(prediction_type="sample", distilled=True))
    return pipe


def test_one_scale_is_one_call(student: DiffusionADPipeline) -> None:
    seen = []
    student.unet.register_forward_hook(lambda network, arguments, output: seen.append((arguments, output.sample)))
    steps: list[dict] = []
    output = student(
        [open_image(IMAGE)] * 3,
        output_type="pt",
        callback_on_step_end=lambda pipe, index, timesteps, tensors: steps.append(tensors),
    )
    [((noised, timesteps), sample)] = seen
    assert noised.shape == (3, 3, 32, 32) and timesteps.tolist() == [200] * 3
    # The noise of the small scale is that of the teacher, and what the UNet says is the reconstruction.
    images, _ = student.image_processor.preprocess(open_image(IMAGE), 32, 32)
    noise = student.fixed_noise(1, 32, 32)[0, 0]
    torch.testing.assert_close(noised[:1], student.scheduler.add_noise(images, noise, torch.tensor([200])))
    assert steps[0].keys() == {"prev_sample", "pred_small", "noised_small"}
    assert torch.equal(steps[0]["prev_sample"], sample.clamp(-1, 1))
    assert output.anomaly_scores.shape == (3,)


def test_what_is_built_in_cannot_be_changed(student: DiffusionADPipeline) -> None:
    image = open_image(IMAGE)
    expected = student(image, output_type="pt").anomaly_maps
    own = student(image, small_timestep=200, large_timestep=400, guidance_scale=1.0, output_type="pt")
    assert torch.equal(own.anomaly_maps, expected)
    for name, value in (("small_timestep", 100), ("large_timestep", 500), ("guidance_scale", 0.0)):
        with pytest.raises(ValueError, match=f"{name}={value} cannot be had of a distilled model"):
            student(image, **{name: value})
    with pytest.raises(ValueError, match="step needs the small scale alone"):
        student.scheduler.step(torch.zeros(2, 3, 4, 4), torch.tensor([200]), torch.zeros(3, 3, 4, 4))
    with pytest.raises(ValueError, match="distilled='yes' must be true or false"):
        NormGuidedOneStepScheduler(distilled="yes")


@pytest.mark.slow
def test_saved_loaded_exported_and_tiled(student: DiffusionADPipeline, tmp_path: Path) -> None:
    student.save_pretrained(tmp_path / "model")
    loaded = DiffusionADPipeline.from_pretrained(tmp_path / "model")
    image = open_image(IMAGE)
    expected = student(image, output_type="np")
    # Not bit for bit: weights that lie elsewhere in memory are multiplied in another order.
    maps = loaded(image, output_type="np").anomaly_maps
    np.testing.assert_allclose(maps, expected.anomaly_maps, rtol=0, atol=1e-6)
    assert "distilled into one call" in summarize(str(tmp_path / "model"))["noise scales"]
    with pytest.raises(ValueError, match="the authors' code has no scheduler with .*distilled"):
        student.save_single_file(tmp_path / "params.pt")

    export_detector(loaded, tmp_path / "detector.pt2", "torch")
    exported = ExportedDetector(tmp_path / "detector.pt2")([image, image], output_type="np")
    np.testing.assert_allclose(exported.anomaly_scores, [expected.anomaly_scores[0]] * 2, rtol=0, atol=1e-4)

    student.enable_tiling(32, overlap=0.0)
    tile = image.crop((0, 0, 32, 32))
    wide = Image.fromarray(np.concatenate([np.asarray(tile)] * 2, axis=1))
    assert student(wide, output_type="pt").anomaly_maps.shape == (1, 1, 32, 64)


def test_the_student_learns_what_the_teacher_rebuilds() -> None:
    teacher, student = build_tiny_pipeline(), build_tiny_pipeline()
    scheduler = NormGuidedOneStepScheduler.from_config(
        teacher.scheduler.config, prediction_type="sample", distilled=True
    )
    generator = torch.Generator().manual_seed(0)
    images, masks = torch.rand(2, 3, 32, 32, generator=generator), torch.zeros(2, 1, 32, 32)
    noise = torch.randn(2, 2, 3, 32, 32, generator=generator)
    losses = distillation_losses(
        student.unet, student.segmentation, scheduler, images, masks, noise, teacher.unet, teacher.scheduler
    )
    losses.loss.backward()
    assert student.unet.conv_in.weight.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in teacher.unet.parameters())

    # The target is the reconstruction that the teacher's own pipeline makes of the same noise.
    guided: list[torch.Tensor] = []
    teacher(images, noise=noise, callback_on_step_end=lambda *call: guided.append(call[3]["prev_sample"]))
    noised = scheduler.add_noise(images, noise[0], torch.tensor([200]))
    distance = (student.unet(noised, torch.tensor([200, 200])).sample - guided[0]).pow(2).mean()
    torch.testing.assert_close(losses.noise_loss, distance / (1 - scheduler.alphas_cumprod[200]))

    # A student that already says it has nothing left to learn.
    class Oracle(torch.nn.Module):
        def forward(self, sample: torch.Tensor, timestep: torch.Tensor):
            return type(student.unet(sample, timestep))(sample=guided[0] + 0 * sample)

    perfect = distillation_losses(
        Oracle(), student.segmentation, scheduler, images, masks, noise, teacher.unet, teacher.scheduler
    )
    assert perfect.noise_loss.item() == pytest.approx(0, abs=1e-10)


def test_train_distill(student: DiffusionADPipeline, tmp_path: Path) -> None:
    """The command itself: a student from a teacher's weights, and teachers and settings that cannot be."""
    build_tiny_pipeline().save_pretrained(tmp_path / "teacher")
    settings = {
        "train_data_dir": str(HAZELNUT), "resolution": 32, "patch_size": 1, "block_out_channels": [32, 32],
        "segmentation_channels": 4, "segmentation_norm": "batch", "train_batch_size": 4, "max_train_steps": 2,
        "validation_steps": 2, "checkpointing_steps": 2, "save_dtype": "fp32", "mixed_precision": "no",
        "cpu_threads": 1,
    }  # fmt: skip
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(settings))

    def train(*flags: str) -> subprocess.CompletedProcess[str]:
        arguments = ["--config", tmp_path / "tiny.yaml", "--output_dir", tmp_path / "run", *flags]
        return run_script([ROOT / "training" / "train.py", *arguments], os.environ | {"ACCELERATE_USE_CPU": "1"})

    result = train("--distill", str(tmp_path / "teacher"))
    assert result.returncode == 0, result.stderr
    assert f"segmentation: 191 of 191 weights start from {tmp_path / 'teacher'}" in result.stderr
    pipe = DiffusionADPipeline.from_pretrained(tmp_path / "run")
    assert pipe.scheduler.config.distilled and pipe.scheduler.config.prediction_type == "sample"
    assert pipe(open_image(IMAGE)).is_anomalous is not None
    # Four rows: picture, reconstruction, map, mask.
    assert Image.open(tmp_path / "run" / "samples" / "step-0000002.png").size == (8 * 32, 4 * 32)

    student.save_pretrained(tmp_path / "student")
    result = train("--distill", str(tmp_path / "student"), "--overwrite")
    assert result.returncode == 1 and "student is distilled itself" in result.stderr
    result = train("--distill", str(tmp_path / "teacher"), "--resolution", "64", "--overwrite")
    assert result.returncode == 1 and "teacher works at 32 pixels and this run at 64" in result.stderr
    result = train("--distill", str(tmp_path / "teacher"), "--large_timestep", "300")
    assert result.returncode == 2 and "takes these from the teacher: large_timestep" in result.stderr
    result = train("--distill", str(tmp_path / "teacher"), "--prediction_type", "epsilon")
    assert result.returncode == 2 and "--distill needs --prediction_type sample" in result.stderr
