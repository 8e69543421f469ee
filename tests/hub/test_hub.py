"""Pipelines come from the Hub and go to it: real requests to a server on this machine."""

import json
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError

from diffusionad_pipe import DiffusionADPipeline, WeightsFileError
from tests.helpers.saved_files import Payload

REPO = "user/model"
CONFIGS = {"model_index.json", "scheduler/scheduler_config.json", "unet/config.json", "segmentation/config.json"}
WEIGHTS = {"unet/diffusion_pytorch_model.safetensors", "segmentation/diffusion_pytorch_model.safetensors"}
WEIGHTS_FP16 = {name.replace(".safetensors", ".fp16.safetensors") for name in WEIGHTS}


def half(pipeline):
    """Copy of a pipeline in float16, as `variant="fp16"` is made."""
    parts = [type(part).from_config(part.config) for part in (pipeline.unet, pipeline.segmentation)]
    for part, source in zip(parts, (pipeline.unet, pipeline.segmentation)):
        part.load_state_dict(source.state_dict())
    return DiffusionADPipeline(*(part.half().eval() for part in parts), pipeline.scheduler, image_size=32)


def add_what_training_leaves(folder: Path) -> None:
    """Files that lie beside a trained model and are not needed to use it."""
    for name in (
        "README.md",
        "log.jsonl",
        "training_config.yaml",
        "samples/step_100.png",
        "unet/diffusion_pytorch_model.bin",
        "unet/diffusion_pytorch_model.ckpt",
        "unet/diffusion_pytorch_model.non_ema.safetensors",
        "checkpoint-100/model.safetensors",
        "checkpoint-100/unet/config.json",
        "checkpoint-100/unet/diffusion_pytorch_model.safetensors",
        "checkpoint-100/optimizer.bin",
        "pipeline.py",
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"not needed")


def test_only_the_needed_files_are_downloaded(tiny_pipeline, saved, hub_server, assert_same):
    half(tiny_pipeline).save_pretrained(saved, variant="fp16")
    add_what_training_leaves(saved)
    hub_server.publish(REPO, saved)
    assert_same(tiny_pipeline, DiffusionADPipeline.from_pretrained(REPO))
    assert hub_server.downloaded == CONFIGS | WEIGHTS


def test_variant(tiny_pipeline, saved, hub_server, assert_same):
    half(tiny_pipeline).save_pretrained(saved, variant="fp16")
    add_what_training_leaves(saved)
    hub_server.publish(REPO, saved)
    loaded = DiffusionADPipeline.from_pretrained(REPO, variant="fp16", dtype=torch.float16)
    assert hub_server.downloaded == CONFIGS | WEIGHTS_FP16
    expected = half(tiny_pipeline)
    expected.segmentation.encoder_blocks[0][0].float()  # is computed in float32 whatever the dtype
    assert_same(expected, loaded)


def test_a_network_without_the_variant_uses_its_plain_weights(tiny_pipeline, saved, hub_server):
    tiny_pipeline.unet.save_pretrained(saved / "unet", variant="fp16")
    commit = hub_server.publish(REPO, saved)
    loaded = DiffusionADPipeline.from_pretrained(REPO, variant="fp16")
    wanted = {name for name in WEIGHTS_FP16 if "unet" in name} | {name for name in WEIGHTS if "segmentation" in name}
    assert hub_server.downloaded == CONFIGS | wanted
    assert torch.equal(loaded.segmentation.conv_out.weight, tiny_pipeline.segmentation.conv_out.weight)
    # Once more by its commit, and from the cache.
    DiffusionADPipeline.from_pretrained(REPO, variant="fp16", revision=commit)
    DiffusionADPipeline.from_pretrained(REPO, variant="fp16", local_files_only=True)


def test_unknown_variant_downloads_no_weights(saved, hub_server):
    hub_server.publish(REPO, saved)
    with pytest.raises(WeightsFileError, match="`variant=bf16`, but .* leave variant out"):
        DiffusionADPipeline.from_pretrained(REPO, variant="bf16")
    assert hub_server.downloaded == CONFIGS


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_shards(tiny_pipeline, tmp_path, hub_server, assert_same, variant):
    folder = tmp_path / "sharded"
    tiny_pipeline.save_pretrained(folder, max_shard_size="20KB", variant=variant)
    assert len(list(folder.glob("unet/*.safetensors"))) > 1
    hub_server.publish(REPO, folder)
    assert_same(tiny_pipeline, DiffusionADPipeline.from_pretrained(REPO, variant=variant))


def test_dtype(saved, hub_server):
    hub_server.publish(REPO, saved)
    loaded = DiffusionADPipeline.from_pretrained(REPO, dtype=torch.float16)
    assert loaded.unet.dtype == loaded.segmentation.dtype == torch.float16
    assert loaded(torch.rand(1, 3, 32, 32), output_type="pt").anomaly_maps.isfinite().all()


def test_revision(tiny_pipeline, saved, hub_server, assert_same):
    commit = hub_server.publish(REPO, saved)
    hub_server.publish(REPO, saved, branch="v1")
    with torch.no_grad():
        tiny_pipeline.unet.conv_out.bias += 1
    tiny_pipeline.save_pretrained(saved)
    hub_server.publish(REPO, saved)
    assert_same(tiny_pipeline, DiffusionADPipeline.from_pretrained(REPO))
    for revision in ("v1", commit):
        old = DiffusionADPipeline.from_pretrained(REPO, revision=revision)
        assert torch.equal(old.unet.conv_out.bias + 1, tiny_pipeline.unet.conv_out.bias)
    with pytest.raises(Exception, match="Revision Not Found"):
        DiffusionADPipeline.from_pretrained(REPO, revision="v2")


def test_the_second_load_comes_from_the_cache(tiny_pipeline, saved, hub_server, assert_same, tmp_path):
    hub_server.publish(REPO, saved)
    with pytest.raises(LocalEntryNotFoundError, match="cached"):
        DiffusionADPipeline.from_pretrained(REPO, local_files_only=True)
    assert not hub_server.requests

    DiffusionADPipeline.from_pretrained(REPO)
    hub_server.requests.clear()
    assert_same(tiny_pipeline, DiffusionADPipeline.from_pretrained(REPO, local_files_only=True))
    assert not hub_server.requests
    DiffusionADPipeline.from_pretrained(REPO)
    assert not hub_server.downloaded

    DiffusionADPipeline.from_pretrained(REPO, cache_dir=tmp_path / "elsewhere")
    assert hub_server.downloaded == CONFIGS | WEIGHTS


def test_push_to_hub(tiny_pipeline, hub_server, assert_same):
    tiny_pipeline.register_to_config(image_threshold=0.25, pixel_threshold=0.5)
    tiny_pipeline.push_to_hub(REPO)
    assert_same(tiny_pipeline, DiffusionADPipeline.from_pretrained(REPO))


def test_no_path_of_this_machine_is_published(saved, hub_server, tmp_path):
    DiffusionADPipeline.from_pretrained(saved).push_to_hub(REPO)
    DiffusionADPipeline.from_pretrained(REPO).push_to_hub("user/copy")
    for repo in (REPO, "user/copy"):
        for file in hub_server.find_commit(repo, "main").rglob("*.*"):
            assert str(tmp_path) not in file.read_text(encoding="latin-1"), file
    index = json.loads((hub_server.find_commit("user/copy", "main") / "model_index.json").read_text())
    assert index["_name_or_path"] == REPO


def test_thresholds(tiny_pipeline, tmp_path, hub_server):
    tiny_pipeline.register_to_config(image_threshold=0.25, pixel_threshold=0.5, score_top_k=0.1, noise_seed=7)
    tiny_pipeline.save_pretrained(tmp_path / "calibrated")
    hub_server.publish(REPO, tmp_path / "calibrated")
    config = DiffusionADPipeline.from_pretrained(REPO).config
    values = config.image_threshold, config.pixel_threshold, config.score_top_k, config.noise_seed, config.image_size
    assert values == (0.25, 0.5, 0.1, 7, 32)

    for threshold, expected in ((-1.0, True), (2.0, False)):
        loaded = DiffusionADPipeline.from_pretrained(REPO, image_threshold=threshold)
        assert loaded.config.image_threshold == threshold and loaded.config.pixel_threshold == 0.5
        assert loaded(torch.rand(1, 3, 32, 32), output_type="pt").is_anomalous.tolist() == [expected]
    assert DiffusionADPipeline.from_pretrained(REPO, image_threshold=None).config.image_threshold is None


def test_segformer(tiny_pipeline, tiny_segformer, tmp_path, hub_server, assert_same):
    tiny_pipeline.register_modules(segmentation=tiny_segformer)
    tiny_pipeline.save_pretrained(tmp_path / "segformer")
    hub_server.publish(REPO, tmp_path / "segformer")
    assert_same(tiny_pipeline, DiffusionADPipeline.from_pretrained(REPO))
    segmentation = {name for name in hub_server.downloaded if name.startswith("segmentation/")}
    assert segmentation == {"segmentation/config.json", "segmentation/model.safetensors"}


def test_repository_that_does_not_exist(hub_server):
    with pytest.raises(RepositoryNotFoundError, match="Repository Not Found.*user/nothing"):
        DiffusionADPipeline.from_pretrained("user/nothing")
    with pytest.raises(HFValidationError, match="my model"):
        DiffusionADPipeline.from_pretrained("my model")


def test_hub_that_does_not_answer(hub_server):
    hub_server.server.shutdown()
    hub_server.server.server_close()
    with pytest.raises(LocalEntryNotFoundError, match="check your internet connection"):
        DiffusionADPipeline.from_pretrained(REPO)


@pytest.mark.parametrize("options", [{}, {"use_safetensors": None}, {"use_safetensors": False}])
def test_pickles_are_refused(saved, hub_server, tmp_path, options):
    weights = saved / "unet" / "diffusion_pytorch_model.safetensors"
    torch.save(Payload(tmp_path / "ran"), weights.with_suffix(".bin"))
    weights.unlink()
    hub_server.publish(REPO, saved)
    with pytest.raises(WeightsFileError, match="only safetensors are loaded"):
        DiffusionADPipeline.from_pretrained(REPO, **options)
    assert not (tmp_path / "ran").exists()
    assert not any(name.endswith(".bin") for name in hub_server.downloaded)


def test_code_in_a_repository_is_not_run(saved, hub_server, tmp_path):
    index = json.loads((saved / "model_index.json").read_text())
    index["_class_name"] = ["pipeline", "Evil"]
    index["unet"] = ["network", "Evil"]
    (saved / "model_index.json").write_text(json.dumps(index))
    for name in ("pipeline.py", "unet/network.py"):
        (saved / name).write_text(f"import os\nos.mkdir({str(tmp_path / 'ran')!r})\nclass Evil: pass")
    hub_server.publish(REPO, saved)
    for source in (REPO, saved):
        with pytest.raises(WeightsFileError, match="only modules of diffusionad_pipe"):
            DiffusionADPipeline.from_pretrained(source)
    assert not (tmp_path / "ran").exists()
