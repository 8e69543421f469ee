"""Saved pipelines load bit by bit, whatever their networks, dtype and variant."""

import json
from pathlib import Path

import pytest
import torch

from diffusionad_pipe import (
    DiffusionADPipeline,
    DiffusionADUNet2DModel,
    NormGuidedOneStepScheduler,
    SegmentationUNet2DModel,
)
from diffusionad_pipe.runtime.acceleration import fastest_dtype
from tests.helpers.saved_files import WEIGHTS, public, refused


def test_round_trip(tiny_pipeline, saved, assert_same):
    loaded = DiffusionADPipeline.from_pretrained(saved)
    assert_same(tiny_pipeline, loaded)
    assert not loaded.unet.training and not loaded.segmentation.training
    assert_same(tiny_pipeline, DiffusionADPipeline.from_pretrained(str(saved) + "/"))


def test_configs_survive(tmp_path, assert_same, tiny_pipeline):
    unet = DiffusionADUNet2DModel(
        sample_size=32,
        patch_size=2,
        block_out_channels=(8, 16),
        attention=(True, False),
        num_attention_heads=(2, 4),
        layers_per_block=1,
        time_embedding_channels=16,
        norm_num_groups=4,
        norm_eps=1e-6,
        dropout=0.1,
    )
    unet.load_state_dict({key: torch.randn_like(value) * 0.3 for key, value in unet.state_dict().items()})
    segmentation = SegmentationUNet2DModel(base_channels=8, norm_type="group", norm_num_groups=4)
    scheduler = NormGuidedOneStepScheduler(
        num_train_timesteps=100,
        beta_schedule="squaredcos_cap_v2",
        prediction_type="sample",
        small_timestep=10,
        large_timestep=60,
        guidance_scale=0.5,
        clip_sample=False,
    )
    pipe = DiffusionADPipeline(unet.eval(), segmentation.eval(), scheduler, 32, 0.05, 3, 0.25, 0.75)
    pipe.save_pretrained(tmp_path)
    loaded = DiffusionADPipeline.from_pretrained(tmp_path)
    assert_same(pipe, loaded)
    for part in ("unet", "segmentation"):
        before, after = getattr(pipe, part).config, getattr(loaded, part).config
        assert json.dumps(public(before)) == json.dumps(public(after))  # a tuple comes back as a list


def test_model_index(saved):
    """The modules' names are part of the file format: moving a class makes every published model unreadable."""
    index = json.loads((saved / "model_index.json").read_text())
    del index["_diffusers_version"]
    assert index == {
        "_class_name": "DiffusionADPipeline",
        "image_size": 32,
        "image_threshold": None,
        "noise_seed": 0,
        "pixel_threshold": None,
        "scheduler": ["diffusionad_pipe.scheduling_norm_guided_one_step", "NormGuidedOneStepScheduler"],
        "score_top_k": 50,
        "segmentation": ["diffusionad_pipe.unet_2d_segmentation", "SegmentationUNet2DModel"],
        "unet": ["diffusionad_pipe.unet_2d_diffusionad", "DiffusionADUNet2DModel"],
    }
    files = {str(path.relative_to(saved)) for path in saved.rglob("*") if path.is_file()}
    assert files == {
        "model_index.json",
        "scheduler/scheduler_config.json",
        "segmentation/config.json",
        "segmentation/diffusion_pytorch_model.safetensors",
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
    }


def test_no_path_of_this_machine_is_saved(saved, tmp_path):
    DiffusionADPipeline.from_pretrained(saved).save_pretrained(tmp_path / "again")
    for file in (tmp_path / "again").rglob("*.json"):
        assert str(tmp_path) not in file.read_text(), file


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("network", ["unet_2d", "segformer"])
def test_dtype(tiny_pipeline, tiny_segformer, tmp_path, dtype, network):
    if network == "segformer":
        tiny_pipeline.register_modules(segmentation=tiny_segformer)
    tiny_pipeline.save_pretrained(tmp_path)
    loaded = DiffusionADPipeline.from_pretrained(tmp_path, dtype=dtype)
    for part in ("unet", "segmentation"):
        for key, tensor in getattr(tiny_pipeline, part).state_dict().items():
            kept = network == "unet_2d" and part == "segmentation" and key.startswith("encoder_blocks.0.0.")
            expected = tensor.to(dtype) if tensor.is_floating_point() and not kept else tensor
            assert torch.equal(getattr(loaded, part).state_dict()[key], expected), key
    image = torch.rand(1, 3, 32, 32)
    maps = [pipe(image, output_type="pt").anomaly_maps for pipe in (tiny_pipeline, loaded)]
    assert maps[1].dtype == torch.float32
    torch.testing.assert_close(*maps, rtol=0, atol=0.1)


def test_variant(tiny_pipeline, saved, assert_same):
    half = DiffusionADPipeline.from_pretrained(saved, dtype=torch.float16)
    half.save_pretrained(saved, variant="fp16")
    assert_same(half, DiffusionADPipeline.from_pretrained(saved, variant="fp16", dtype=torch.float16))
    assert_same(tiny_pipeline, DiffusionADPipeline.from_pretrained(saved))  # both lie side by side
    refused(saved, "`variant=bf16`.* leave variant out", saved, variant="bf16")
    refused(saved, "fp1.safetensors is missing", saved, variant="fp1")


def test_passed_components_need_no_files(tiny_pipeline, saved, assert_same):
    (saved / "unet" / WEIGHTS).unlink()
    refused(saved, "is missing", saved / "unet" / WEIGHTS)
    assert_same(tiny_pipeline, DiffusionADPipeline.from_pretrained(saved, unet=tiny_pipeline.unet))


def test_segformer(tiny_pipeline, saved_segformer, assert_same):
    index = json.loads((saved_segformer / "model_index.json").read_text())
    assert index["segmentation"] == ["transformers", "SegformerForSemanticSegmentation"]
    assert_same(tiny_pipeline, DiffusionADPipeline.from_pretrained(saved_segformer))
    output = tiny_pipeline([torch.rand(3, 20, 40), torch.rand(3, 50, 30)], output_type="np")
    assert [m.shape[:2] for m in output.anomaly_maps] == [(20, 40), (50, 30)]


def test_another_pipeline_around_the_same_networks(tiny_pipeline: DiffusionADPipeline) -> None:
    tiny_pipeline.register_to_config(image_threshold=0.25, pixel_threshold=0.5)
    tiny_pipeline.segmentation.cast(torch.bfloat16)
    tiny_pipeline.unet.to(torch.bfloat16)
    dtypes = [parameter.dtype for parameter in tiny_pipeline.segmentation.parameters()]
    other = DiffusionADPipeline.from_pipe(tiny_pipeline, noise_seed=1, image_threshold=None)
    assert other.unet is tiny_pipeline.unet and other.segmentation is tiny_pipeline.segmentation
    assert [
        parameter.dtype for parameter in other.segmentation.parameters()
    ] == dtypes  # the originals stay as they are
    assert other.unet.dtype == torch.bfloat16
    values = {"image_size": 32, "score_top_k": 50, "pixel_threshold": 0.5, "image_threshold": None, "noise_seed": 1}
    assert {name: other.config[name] for name in values} == values
    assert tiny_pipeline.config.noise_seed == 0 and tiny_pipeline.config.image_threshold == 0.25

    scheduler = NormGuidedOneStepScheduler(guidance_scale=0.0)
    assert DiffusionADPipeline.from_pipe(tiny_pipeline, scheduler=scheduler).scheduler is scheduler
    assert DiffusionADPipeline.from_pipe(tiny_pipeline, torch_dtype=torch.float32).unet.dtype == torch.float32
    with pytest.raises(ValueError, match="image_size=0"):
        DiffusionADPipeline.from_pipe(tiny_pipeline, image_size=0)


def test_auto_is_the_same_by_either_name(tiny_pipeline: DiffusionADPipeline, tmp_path: Path) -> None:
    tiny_pipeline.save_pretrained(tmp_path)
    fastest = fastest_dtype("cuda" if torch.cuda.is_available() else "cpu")
    for name in ("dtype", "torch_dtype"):
        assert DiffusionADPipeline.from_pretrained(tmp_path, **{name: "auto"}).unet.dtype == fastest
        assert DiffusionADPipeline.from_pretrained(tmp_path, **{name: torch.bfloat16}).unet.dtype == torch.bfloat16
