"""Saved pipelines and checkpoints load bit by bit, and whatever is wrong with a file is one clear error."""

import collections
import json
import os
import pickle
import resource
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from diffusionad_pipe import (
    DiffusionADPipeline,
    DiffusionADUNet2DModel,
    NormGuidedOneStepScheduler,
    SegmentationUNet2DModel,
    WeightsFileError,
    paper_unet_config,
)

WEIGHTS = "diffusion_pytorch_model.safetensors"


class Payload:
    """A pickle of this makes a folder when it is loaded carelessly."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def edit_json(path: Path, **values) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def public(config: dict) -> dict:
    return {key: value for key, value in sorted(config.items()) if not key.startswith("_")}


def refused(folder: Path, message: str, names: str | Path = "", **options) -> None:
    """Loading must fail with an error that names a file, tells the cause, and is soon there and small."""
    start, memory = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(WeightsFileError, match=message) as caught:
        DiffusionADPipeline.from_pretrained(folder, **options)
    assert str(names) in str(caught.value)
    assert time.process_time() - start < 10
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 200_000  # kilobytes


# --- Saving and loading


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
            expected = tensor.to(dtype) if tensor.is_floating_point() else tensor
            assert torch.equal(getattr(loaded, part).state_dict()[key], expected), key
    picture = torch.rand(1, 3, 32, 32)
    maps = [pipe(picture, output_type="pt").anomaly_maps for pipe in (tiny_pipeline, loaded)]
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


# --- Damaged weights


def test_truncated(saved):
    path = saved / "unet" / WEIGHTS
    content = path.read_bytes()
    for length in (0, 1, 7, 8, 100, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:length])
        refused(saved, "download it again", path)
    path.write_bytes(content + b"\0")
    refused(saved, "download it again", path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "git lfs pull"),
        (b"<!doctype html><html>Sign in</html>", "not a safetensors file"),
        (b"\xff" * 1000, "not a safetensors file"),
        (b"\x10\0\0\0\0\0\0\0" + b"not json at all!", "not a safetensors file"),
        (b"\x02\0\0\0\0\0\0\0{}", "tensors are missing"),
        (b"\xa0\x86\x01\0\0\0\0\0" + b"[" * 100_000, "not a safetensors file"),
    ],
)
@pytest.mark.parametrize("part", ["unet", "segmentation"])
def test_other_content(saved, part, content, message):
    (saved / part / WEIGHTS).write_bytes(content)
    refused(saved, message, saved / part)


@pytest.mark.parametrize("part", ["unet", "segmentation"])
@pytest.mark.parametrize("writer", ["zip", "legacy", *range(5)])
def test_pickle_under_the_name_of_safetensors(saved, tmp_path, part, writer):
    path = saved / part / WEIGHTS
    if isinstance(writer, int):
        path.write_bytes(pickle.dumps(Payload(tmp_path / "ran"), protocol=writer))
    else:
        torch.save(Payload(tmp_path / "ran"), path, _use_new_zipfile_serialization=writer == "zip")
    refused(saved, "pickle|not a safetensors file", path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("suffix", [".bin", ".pt", ".pth", ".ckpt"])
def test_only_a_pickle(saved, tmp_path, suffix):
    path = saved / "segmentation" / WEIGHTS
    path.unlink()
    torch.save(Payload(tmp_path / "ran"), path.with_suffix(suffix))
    refused(saved, "is a pickle, which could run code", path.with_suffix(suffix))
    refused(saved, "is a pickle, which could run code", path.with_suffix(suffix), use_safetensors=None)
    assert not (tmp_path / "ran").exists()


def test_use_safetensors_false(saved):
    refused(saved, "Leave use_safetensors out", use_safetensors=False)
    DiffusionADPipeline.from_pretrained(saved, use_safetensors=True)


@pytest.mark.parametrize("part", ["unet", "segmentation"])
def test_tensors_that_do_not_fit(saved, part):
    path = saved / part / WEIGHTS
    tensors = load_file(path)
    first = sorted(tensors)[0]
    for changed, message in (
        ({k: v for k, v in tensors.items() if k != first}, f"1 tensors are missing, such as {first}"),
        ({**tensors, "surplus": torch.zeros(1)}, "1 are unknown, such as surplus"),
        ({**tensors, first: torch.zeros(5)}, rf"1 have another shape: {first} is \(5,\)"),
        ({}, f"{len(tensors)} tensors are missing"),
    ):
        save_file(changed, path, metadata={"format": "pt"})
        refused(saved, message, saved / part)
    save_file(tensors, path, metadata={"format": "pt"})
    DiffusionADPipeline.from_pretrained(saved)


def test_network_of_another_size(tiny_pipeline, saved):
    edit_json(saved / "segmentation" / "config.json", base_channels=8)
    refused(saved, "another shape", saved / "segmentation" / "config.json")


# --- Shards


@pytest.fixture
def sharded(tiny_pipeline, tmp_path) -> Path:
    tiny_pipeline.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    return tmp_path / "sharded"


def test_shards(tiny_pipeline, sharded, assert_same):
    shards = sorted((sharded / "unet").glob("*.safetensors"))
    assert len(shards) > 2
    assert_same(tiny_pipeline, DiffusionADPipeline.from_pretrained(sharded))

    content = shards[1].read_bytes()
    shards[1].write_bytes(content[:-1])
    refused(sharded, "truncated", shards[1])
    shards[1].unlink()
    refused(sharded, "is missing", shards[1])
    shards[1].write_bytes(content)
    tensors = load_file(shards[1])
    first = tensors.pop(sorted(tensors)[0])
    save_file(tensors or {"other": first}, shards[1], metadata={"format": "pt"})
    refused(sharded, "1 tensors are missing", sharded / "unet")


def test_index_of_shards(sharded, tmp_path):
    index_path = sharded / "unet" / f"{WEIGHTS}.index.json"
    index = json.loads(index_path.read_text())
    first = sorted(index["weight_map"])[0]
    torch.save(Payload(tmp_path / "ran"), sharded / "evil.bin")
    torch.save(Payload(tmp_path / "ran"), sharded / "unet" / "evil.bin")
    outside = sharded / "outside.safetensors"
    outside.write_bytes(next((sharded / "unet").glob("*.safetensors")).read_bytes())
    for name in ("evil.bin", "../evil.bin", "../outside.safetensors", str(outside), 5, None, ["x"]):
        edit_json(index_path, weight_map={**index["weight_map"], first: name})
        refused(sharded, "lists no safetensors files beside it", index_path)
    for weight_map in ({}, [], None, {k: v for k, v in index["weight_map"].items() if k != first}):
        edit_json(index_path, weight_map=weight_map)
        refused(sharded, "missing|lists no", sharded / "unet")
    index_path.write_text("{")
    refused(sharded, "cannot be read", index_path)
    index_path.unlink()
    (sharded / "unet" / "evil.bin").unlink()
    refused(sharded, "is missing", sharded / "unet" / WEIGHTS)
    assert not (tmp_path / "ran").exists()


def test_old_index_beside_whole_weights(tiny_pipeline, sharded):
    """diffusers goes by the index, so the check must, too."""
    tiny_pipeline.unet.save_pretrained(sharded / "unet")  # removes the shards, leaves their index
    refused(sharded, "is missing", sharded / "unet")


# --- Configs


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


HUGE = 10**9


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
    ],
    ids=str,
)
def test_unusable_unet_config(saved, values):
    edit_json(saved / "unet" / "config.json", **values)
    refused(saved, "download it again", saved / "unet" / "config.json")


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
        {"small_timestep": "early"},
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
        {"score_top_k": -1},
        {"score_top_k": None},
    ],
    ids=str,
)
def test_unusable_pipeline_config(saved, values):
    edit_json(saved / "model_index.json", **values)
    refused(saved, "cannot be used", saved / "model_index.json")


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
        ["diffusionad_pipe.weights_files", "os"],
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


# --- transformers' SegFormer


@pytest.fixture
def saved_segformer(tiny_pipeline, tiny_segformer, tmp_path) -> Path:
    tiny_pipeline.register_modules(segmentation=tiny_segformer)
    tiny_pipeline.save_pretrained(tmp_path / "segformer")
    return tmp_path / "segformer"


def test_segformer(tiny_pipeline, saved_segformer, assert_same):
    index = json.loads((saved_segformer / "model_index.json").read_text())
    assert index["segmentation"] == ["transformers", "SegformerForSemanticSegmentation"]
    assert_same(tiny_pipeline, DiffusionADPipeline.from_pretrained(saved_segformer))
    output = tiny_pipeline([torch.rand(3, 20, 40), torch.rand(3, 50, 30)], output_type="np")
    assert [m.shape[:2] for m in output.anomaly_maps] == [(20, 40), (50, 30)]


def test_damaged_segformer(saved_segformer, tmp_path):
    path = saved_segformer / "segmentation" / "model.safetensors"
    content, tensors = path.read_bytes(), load_file(path)
    first = sorted(tensors)[0]
    for changed in (
        {k: v for k, v in tensors.items() if k != first},
        {**tensors, "surplus": torch.zeros(1)},
        {**tensors, first: torch.zeros(5)},
    ):
        save_file(changed, path, metadata={"format": "pt"})
        refused(saved_segformer, "do not fit", path.with_name("config.json"))
    for damaged in (content[:-1], b"", b"version https://git-lfs.github.com/spec/v1\n"):
        path.write_bytes(damaged)
        refused(saved_segformer, "download it again|git lfs pull", path)
    path.write_bytes(content)
    for values in ({"hidden_sizes": [HUGE, HUGE]}, {"hidden_sizes": None}, {"num_channels": 3}, {"num_labels": 2}):
        before = path.with_name("config.json").read_bytes()
        edit_json(path.with_name("config.json"), **values)
        refused(saved_segformer, "do not fit", path.with_name("config.json"))
        path.with_name("config.json").write_bytes(before)
    path.unlink()
    torch.save(Payload(tmp_path / "ran"), path.with_name("pytorch_model.bin"))
    refused(saved_segformer, "is a pickle, which could run code", path.with_name("pytorch_model.bin"))
    assert not (tmp_path / "ran").exists()


# --- The authors' checkpoints


@pytest.fixture(scope="module")
def paper_pipeline() -> DiffusionADPipeline:
    """The narrowest network that the authors' code can build."""
    torch.manual_seed(0)
    unet = DiffusionADUNet2DModel(**paper_unet_config(32, base_channels=32))
    unet.load_state_dict({key: torch.randn_like(value) * 0.1 for key, value in unet.state_dict().items()})
    segmentation = SegmentationUNet2DModel(base_channels=4)
    return DiffusionADPipeline(unet.eval(), segmentation.eval(), NormGuidedOneStepScheduler(), image_size=32)


@pytest.fixture
def checkpoint(paper_pipeline, tmp_path) -> Path:
    paper_pipeline.save_single_file(tmp_path / "params-best.pt")
    return tmp_path / "params-best.pt"


def rewrite(path: Path, change) -> None:
    """Change a checkpoint's content, given as a dictionary, in place."""
    allowed = [(lambda factory: {}, "collections.defaultdict"), (str, "builtins.str")]
    with torch.serialization.safe_globals(allowed):
        content = torch.load(path, weights_only=True)
    torch.save(change(content), path)


def unreadable(path: Path, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        DiffusionADPipeline.from_single_file(path)
    assert str(path) in str(caught.value) and "weights_only" not in str(caught.value)


def test_single_file_round_trip(paper_pipeline, checkpoint, assert_same):
    assert_same(paper_pipeline, DiffusionADPipeline.from_single_file(checkpoint))
    loaded = DiffusionADPipeline.from_single_file(checkpoint, image_threshold=0.3, score_top_k=0.1)
    assert loaded.config.image_threshold == 0.3 and loaded.config.score_top_k == 0.1


def test_single_file_keeps_the_scheduler(paper_pipeline, checkpoint):
    schedulers = [
        {"small_timestep": 0, "large_timestep": 1, "guidance_scale": 0.0},
        {"beta_schedule": "squaredcos_cap_v2", "num_train_timesteps": 500},
        {"num_train_timesteps": 500, "beta_start": 2e-4, "beta_end": 0.04},
    ]
    for options in schedulers:
        scheduler = NormGuidedOneStepScheduler(**options)
        pipe = DiffusionADPipeline(paper_pipeline.unet, paper_pipeline.segmentation, scheduler, image_size=32)
        pipe.save_single_file(checkpoint)
        loaded = DiffusionADPipeline.from_single_file(checkpoint)
        assert public(loaded.scheduler.config) == public(scheduler.config)
        assert torch.equal(loaded.scheduler.alphas_cumprod, scheduler.alphas_cumprod)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("place", ["whole", "args", "weight", "extra"])
def test_payload_is_never_run(checkpoint, tmp_path, place, legacy):
    payload = Payload(tmp_path / "ran")
    content = {"unet_model_state_dict": {}, "seg_model_state_dict": {}, "args": {}}
    content = {
        "whole": payload,
        "args": {**content, "args": {"T": payload}},
        "weight": {**content, "unet_model_state_dict": {"down.0.0.weight": payload}},
        "extra": {**content, "optimizer": payload},
    }[place]
    torch.save(content, checkpoint, _use_new_zipfile_serialization=not legacy)
    unreadable(checkpoint, "nothing in it was run")
    assert not (tmp_path / "ran").exists()


def test_damaged_checkpoint(checkpoint, tmp_path):
    content = checkpoint.read_bytes()
    for length in (0, 1, 10, 1000, len(content) // 2, len(content) - 1):
        checkpoint.write_bytes(content[:length])
        unreadable(checkpoint, "damaged")
    pickles = (b"\x80\x05.", b"(lp0\n.", b"}", b"I5\n.")  # cut short, or of plain values
    for other in (b"just some text\n", b"\x89PNG\r\n\x1a\n", b"<html></html>", *pickles):
        checkpoint.write_bytes(other)
        unreadable(checkpoint, "damaged")
    checkpoint.unlink()
    unreadable(checkpoint, "there is no file")
    checkpoint.mkdir()
    unreadable(checkpoint, "cannot be read")


def test_damaged_old_format(tmp_path):
    """Files of torch before 1.6 are a bare pickle, whose damage comes out as any kind of error."""
    path = tmp_path / "old.pt"
    torch.save({"args": {"T": 1000}, "weight": torch.ones(3)}, path, _use_new_zipfile_serialization=False)
    content = path.read_bytes()
    random = torch.Generator().manual_seed(0)
    for position in range(0, len(content), 3):
        damaged = bytearray(content)
        damaged[position] = int(torch.randint(256, (1,), generator=random))
        path.write_bytes(damaged)
        unreadable(path, "cannot be read|needs the entries")
        path.write_bytes(content[:position])
        unreadable(path, "cannot be read")


@pytest.mark.parametrize(
    "content",
    [
        {},
        [],
        torch.zeros(2),
        {"unet_model_state_dict": {}},
        {"unet_model_state_dict": [], "seg_model_state_dict": {}},
        {"unet_model_state_dict": {}, "seg_model_state_dict": {}},
        {"unet_model_state_dict": {5: 5}, "seg_model_state_dict": {5: 5}, 5: 5},
        {"unet_model_state_dict": {"down.0.0.weight": 5}, "seg_model_state_dict": {}},
        {"unet_model_state_dict": {"down.0.0.weight": torch.zeros(())}, "seg_model_state_dict": {}},
        {"state_dict": {}, 5: {}},
    ],
    ids=lambda content: str(content)[:70],
)
def test_other_checkpoints(tmp_path, content):
    torch.save(content, tmp_path / "other.pt")
    unreadable(tmp_path / "other.pt", "needs the entries|does not hold the authors' networks")


@pytest.mark.parametrize("name", ["unet_model_state_dict", "seg_model_state_dict"])
def test_weights_that_do_not_fit(checkpoint, name):
    def change(key, value):
        def edit(content):
            if value is None:
                del content[name][key]
            else:
                content[name][key] = value
            return content

        return edit

    key = "middle.1.to_qkv.bias" if name.startswith("unet") else "decoder_segment.fin_out.0.bias"
    original = checkpoint.read_bytes()
    for edit in (
        change(key, None),
        change(key, torch.zeros(7)),
        change(key, 5),
        change("surplus", torch.zeros(1)),
        change(5, torch.zeros(1)),
    ):
        checkpoint.write_bytes(original)
        rewrite(checkpoint, edit)
        unreadable(checkpoint, "does not hold the authors' networks")


def test_left_out_args_are_the_papers(paper_pipeline, checkpoint):
    rewrite(checkpoint, lambda content: {**content, "args": {"img_size": [32, 32], "condition_w": ""}})
    loaded = DiffusionADPipeline.from_single_file(checkpoint)
    assert public(loaded.scheduler.config) == public(NormGuidedOneStepScheduler().config)
    assert public(loaded.unet.config) == public(paper_pipeline.unet.config)
    for args in (None, {}, collections.defaultdict(str)):  # without the size it is a network for 256 pixels
        rewrite(checkpoint, lambda content, args=args: {**content, "args": args})
        unreadable(checkpoint, "does not hold the authors' networks")


@pytest.mark.parametrize(
    "values",
    [
        {"img_size": [HUGE, HUGE]},
        {"img_size": 32},
        {"img_size": ["x"]},
        {"num_heads": "x"},
        {"num_heads": HUGE},
        {"num_heads": -4},
        {"attention_resolutions": "16,x"},
        {"attention_resolutions": "16"},
        {"dropout": "much"},
        {"T": HUGE},
        {"T": 0},
        {"T": "x"},
        {"T": float("inf")},
        {"T": [1000]},
        {"beta_schedule": "steep"},
        {"beta_schedule": 5},
        {"beta_schedule": ["linear"]},
        {"condition_w": "strong"},
        {"condition_w": [1]},
        {"eval_normal_t": "x"},
        {"eval_noisier_t": {}},
    ],
    ids=str,
)
def test_unusable_args(checkpoint, values):
    rewrite(checkpoint, lambda content: {**content, "args": {**content["args"], **values}})
    unreadable(checkpoint, "args")


@pytest.mark.parametrize("args", ["text", [1, 2], 5])
def test_args_of_another_kind(checkpoint, args):
    rewrite(checkpoint, lambda content: {**content, "args": args})
    unreadable(checkpoint, "args")


@pytest.mark.parametrize(
    "options",
    [
        {"prediction_type": "sample"},
        {"prediction_type": "v_prediction"},
        {"beta_schedule": "scaled_linear"},
        {"beta_end": 0.03},
        {"beta_start": 1e-4, "num_train_timesteps": 500},  # theirs would start at 2e-4
        {"trained_betas": [0.1] * 1000},
        {"clip_sample": False},
        {"clip_sample_range": 2.0},
    ],
    ids=str,
)
def test_schedulers_that_the_authors_do_not_have(paper_pipeline, tmp_path, options):
    scheduler = NormGuidedOneStepScheduler(**options)
    pipe = DiffusionADPipeline(paper_pipeline.unet, paper_pipeline.segmentation, scheduler)
    with pytest.raises(ValueError, match=f"the authors' code has no scheduler with.*{list(options)[0]}"):
        pipe.save_single_file(tmp_path / "params.pt")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "options",
    [
        {"patch_size": 2},
        {"in_channels": 1},
        {"layers_per_block": 1},
        {"norm_num_groups": 8},
        {"norm_eps": 1e-6},
        {"num_attention_heads": (4, 4, 4, 4)},
        {"attention": (False, False, True, True)},
        {"sample_size": 100},
        {"block_out_channels": (32, 32, 32, 32)},
    ],
    ids=str,
)
def test_networks_that_the_authors_do_not_have(paper_pipeline, tmp_path, options):
    unet = DiffusionADUNet2DModel(**{**paper_unet_config(32, base_channels=32), **options})
    pipe = DiffusionADPipeline(unet, paper_pipeline.segmentation, NormGuidedOneStepScheduler())
    with pytest.raises(ValueError, match="the authors' format holds the paper's networks only"):
        pipe.save_single_file(tmp_path / "params.pt")
    assert not list(tmp_path.iterdir())


def test_segmentation_that_the_authors_do_not_have(paper_pipeline, tiny_segformer, tmp_path):
    group = SegmentationUNet2DModel(base_channels=8, norm_type="group")
    for segmentation in (group, SegmentationUNet2DModel(base_channels=4, out_channels=2), tiny_segformer):
        pipe = DiffusionADPipeline(paper_pipeline.unet, segmentation, NormGuidedOneStepScheduler())
        with pytest.raises(ValueError, match="the authors' format holds the paper's networks only.*segmentation"):
            pipe.save_single_file(tmp_path / "params.pt")
    assert not list(tmp_path.iterdir())


def test_other_attention_heads_round_trip(paper_pipeline, checkpoint, assert_same):
    unet = DiffusionADUNet2DModel(**paper_unet_config(32, base_channels=32), num_attention_heads=2, dropout=0.1)
    unet.load_state_dict(paper_pipeline.unet.state_dict())
    pipe = DiffusionADPipeline(unet.eval(), paper_pipeline.segmentation, NormGuidedOneStepScheduler(), image_size=32)
    pipe.save_single_file(checkpoint)
    loaded = DiffusionADPipeline.from_single_file(checkpoint)
    assert_same(pipe, loaded)
    assert loaded.unet.config.num_attention_heads == 2 and loaded.unet.config.dropout == 0.1
