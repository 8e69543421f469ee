"""The authors' checkpoints: read and written back bit by bit, and whatever is wrong with one is one clear error."""

import collections
from pathlib import Path

import pytest
import torch

from diffusionad_pipe import (
    DiffusionADPipeline,
    DiffusionADUNet2DModel,
    NormGuidedOneStepScheduler,
    SegmentationUNet2DModel,
    paper_unet_config,
)
from tests.helpers.saved_files import HUGE, Payload, public


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
