"""Damaged weights of a saved pipeline are one clear error, and no pickle is ever run."""

import json
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from diffusionad_pipe import DiffusionADPipeline
from tests.helpers.saved_files import WEIGHTS, Payload, edit_json, refused


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


# --- transformers' SegFormer


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
    path.unlink()
    torch.save(Payload(tmp_path / "ran"), path.with_name("pytorch_model.bin"))
    refused(saved_segformer, "is a pickle, which could run code", path.with_name("pytorch_model.bin"))
    assert not (tmp_path / "ran").exists()
