"""Configs of a saved pipeline that cannot be used are one clear error, and only trusted modules are imported."""

import json

import pytest
from diffusers import DDIMScheduler

from diffusionad_pipe import DiffusionADPipeline
from tests.helpers.saved_files import HUGE, NAN, WEIGHTS, edit_json, refused


@pytest.mark.parametrize(
    "name", ["model_index.json", "unet/config.json", "segmentation/config.json", "scheduler/scheduler_config.json"]
)
def test_unreadable_json(saved, name):
    for content in (b"", b"{", b"not json", b"\xff\xfe", b"[" * 100_000):
        (saved / name).write_bytes(content)
        refused(saved, "cannot be read", saved / name)
    for content in (b"[]", b"5", b'"text"', b"null", b"[{}]"):
        (saved / name).write_bytes(content)
        refused(saved, "does not hold a JSON object", saved / name)
    (saved / name).unlink()
    refused(saved, "is missing", saved / name)
    (saved / name).mkdir()
    refused(saved, "cannot be read", saved / name)


@pytest.mark.parametrize(
    "values",
    [
        {"block_out_channels": [HUGE]},
        {"block_out_channels": [HUGE, HUGE]},
        {"block_out_channels": [8] * 1000, "attention": [True] * 1000},
        {"block_out_channels": []},
        {"block_out_channels": [0, 0]},
        {"block_out_channels": [-8, -8]},
        {"block_out_channels": "88"},
        {"block_out_channels": None},
        {"block_out_channels": [8.0, 8.0]},
        {"block_out_channels": 10**400},
        {"attention": [True]},
        {"attention": None},
        {"layers_per_block": HUGE},
        {"layers_per_block": 0},
        {"layers_per_block": "2"},
        {"layers_per_block": 1.5},
        {"patch_size": HUGE},
        {"patch_size": 0},
        {"in_channels": HUGE},
        {"in_channels": 10**30},
        {"out_channels": -1},
        {"num_attention_heads": 0},
        {"num_attention_heads": HUGE},
        {"num_attention_heads": [2]},
        {"norm_num_groups": 0},
        {"norm_num_groups": None},
        {"time_embedding_channels": HUGE},
        {"time_embedding_channels": 10**18},
        {"time_embedding_channels": -2},
        {"dropout": 7},
        {"dropout": "much"},
        {"dropout": NAN},
        {"norm_eps": "small"},
        {"norm_eps": -1},
        {"norm_eps": NAN},
        {"sample_size": "x"},
        {"patch_size": True},
        {"quantization_config": {"quant_method": "bitsandbytes_4bit"}},
    ],
    ids=str,
)
def test_unusable_unet_config(saved, values):
    edit_json(saved / "unet" / "config.json", **values)
    refused(saved, "download it again|take the plain ones", saved / "unet" / "config.json")


@pytest.mark.parametrize(
    "values",
    [
        {"base_channels": HUGE},
        {"base_channels": 0},
        {"base_channels": "4"},
        {"base_channels": 4.0},
        {"in_channels": HUGE},
        {"out_channels": HUGE},
        {"norm_type": "layer"},
        {"norm_type": "group", "norm_num_groups": 0},
        {"norm_type": ["batch"]},
    ],
    ids=str,
)
def test_unusable_segmentation_config(saved, values):
    edit_json(saved / "segmentation" / "config.json", **values)
    refused(saved, "download it again", saved / "segmentation" / "config.json")


@pytest.mark.parametrize(
    "values",
    [
        {"num_train_timesteps": HUGE},
        {"num_train_timesteps": -1},
        {"num_train_timesteps": "1000"},
        {"beta_schedule": "steep"},
        {"prediction_type": "picture"},
        {"trained_betas": "all"},
        {"trained_betas": [0.1]},
        {"trained_betas": [2.0] * 1000},
        {"beta_start": NAN},
        {"beta_end": 7},
        {"small_timestep": "early"},
        {"small_timestep": 1.5},
        {"small_timestep": 700},
        {"large_timestep": 1000},
        {"guidance_scale": "strong"},
        {"guidance_scale": NAN},
        {"clip_sample": "false"},
        {"clip_sample_range": None},
        {"clip_sample_range": -1},
    ],
    ids=str,
)
def test_unusable_scheduler_config(saved, values):
    edit_json(saved / "scheduler" / "scheduler_config.json", **values)
    refused(saved, "download it again", saved / "scheduler" / "scheduler_config.json")


@pytest.mark.parametrize(
    "values",
    [
        {"image_size": HUGE},
        {"image_size": 0},
        {"image_size": "32"},
        {"image_size": 32.5},
        {"image_size": True},
        {"score_top_k": -1},
        {"score_top_k": None},
        {"score_top_k": NAN},
        {"noise_seed": "x"},
        {"noise_seed": 10**30},
        {"image_threshold": "abc"},
        {"image_threshold": NAN},
        {"image_threshold": {}},
        {"pixel_threshold": "abc"},
        {"pixel_threshold": float("inf")},
    ],
    ids=str,
)
def test_unusable_pipeline_config(saved, values):
    edit_json(saved / "model_index.json", **values)
    refused(saved, f"cannot be used: {list(values)[0]}=", saved / "model_index.json")


def test_unusable_value_in_place_of_the_stored_one(saved):
    refused(saved, "cannot be used: image_threshold='abc'", image_threshold="abc")
    edit_json(saved / "model_index.json", image_threshold="abc")
    assert DiffusionADPipeline.from_pretrained(saved, image_threshold=0.5).config.image_threshold == 0.5


@pytest.mark.parametrize(
    "values",
    [
        {"depths": [HUGE, 1]},
        {"depths": [3000, 3000]},
        {"num_labels": HUGE},
        {"num_encoder_blocks": HUGE},
        {"hidden_sizes": [HUGE, HUGE]},
        {"hidden_sizes": None},
        {"num_channels": 3},
        {"num_labels": 2},
        {"quantization_config": {"quant_method": "bitsandbytes_4bit"}},
    ],
    ids=str,
)
def test_unusable_segformer_config(saved_segformer, values):
    edit_json(saved_segformer / "segmentation" / "config.json", **values)
    refused(saved_segformer, "do not fit|take the plain ones", saved_segformer / "segmentation" / "config.json")


# --- What model_index.json asks for


@pytest.mark.parametrize("part", ["unet", "segmentation", "scheduler", "surplus"])
@pytest.mark.parametrize("library", ["os", "antigravity", "diffusers_evil", "evil.diffusers", "", ".", 5, None])
def test_other_modules_are_not_imported(saved, tmp_path, monkeypatch, part, library):
    for name in ("diffusers_evil", "evil"):
        (tmp_path / f"{name}.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'ran')!r})")
    monkeypatch.syspath_prepend(tmp_path)
    edit_json(saved / "model_index.json", **{part: [library, "system"]})
    refused(saved, "only modules of diffusionad_pipe, diffusers, transformers are trusted", saved / "model_index.json")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("part", ["unet", "segmentation", "scheduler"])
@pytest.mark.parametrize(
    "entry",
    [
        None,
        [None, None],
        "diffusers",
        ["diffusionad_pipe.unet_2d_diffusionad"],
        ["diffusionad_pipe.unet_2d_diffusionad", None],
        ["diffusionad_pipe.unet_2d_diffusionad", "Missing"],
        ["diffusionad_pipe.unet_2d_diffusionad", "torch"],
        ["diffusionad_pipe.unet_2d_diffusionad", "DiffusionADUNet2DOutput"],
        ["diffusionad_pipe.unet_2d_diffusionad", "ModelMixin"],
        ["diffusionad_pipe.unet_of_the_future", "UNet"],
        ["diffusionad_pipe.loading", "os"],
        ["diffusionad_pipe.", "UNet"],
        ["transformers", "Missing"],
        ["transformers", "AutoModel"],
    ],
    ids=str,
)
def test_unusable_entry(saved, part, entry):
    edit_json(saved / "model_index.json", **{part: entry})
    refused(saved, "names no|cannot be|does not describe|do not fit|is missing", saved)


def test_components_in_each_others_place(saved):
    index = json.loads((saved / "model_index.json").read_text())
    edit_json(saved / "model_index.json", unet=index["segmentation"], segmentation=index["unet"])
    refused(saved, "do not fit|does not describe", saved)


def test_another_scheduler(saved):
    (saved / "scheduler" / "scheduler_config.json").write_text(DDIMScheduler().to_json_string())
    edit_json(saved / "model_index.json", scheduler=["diffusers", "DDIMScheduler"])
    refused(saved, "a DDIMScheduler stands in place of a NormGuided", saved / "model_index.json")


def test_missing_folders(saved, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in (tmp_path / "nowhere", "./nowhere", "../nowhere", "~/nowhere", "a/b/c", "C:\\models\\nowhere"):
        refused(name, "there is no folder", repr(str(name)))
    refused(saved / "model_index.json", "there is no folder")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "give the folder that save_pretrained wrote", "model_index.json")
    refused(saved / "unet", "give the folder that save_pretrained wrote", "model_index.json")
    (saved / "unet" / "config.json").unlink()
    (saved / "unet" / WEIGHTS).unlink()
    (saved / "unet").rmdir()
    refused(saved, "is missing", saved / "unet" / "config.json")
