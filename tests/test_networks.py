"""Both networks by themselves; their agreement with the authors' is in test_reference.py."""

from pathlib import Path

import pytest
import torch

from diffusionad_pipe import DiffusionADUNet2DModel, SegmentationUNet2DModel, paper_unet_config
from diffusionad_pipe.unet_2d_diffusionad import GroupNorm


def tiny_unet(**options) -> DiffusionADUNet2DModel:
    torch.manual_seed(0)
    defaults = {"block_out_channels": (8, 16), "attention": (False, True), "norm_num_groups": 4}
    unet = DiffusionADUNet2DModel(**defaults | options).eval()
    for parameter in unet.parameters():  # also those that start at zero
        torch.nn.init.normal_(parameter, std=0.1)
    return unet


@torch.no_grad()
@pytest.mark.parametrize("patch_size", [1, 2, 4])
def test_patches(patch_size: int) -> None:
    unet = tiny_unet(patch_size=patch_size)
    assert unet.size_divisor == 2 * patch_size
    assert unet.conv_in.in_channels == 3 * patch_size**2
    for height, width in ((16, 16), (16, 32)):
        assert unet(torch.rand(2, 3, height, width), 7).sample.shape == (2, 3, height, width)


@torch.no_grad()
def test_a_patch_is_a_channel_per_pixel() -> None:
    """Patches of 4 are the same network on the pixel-unshuffled picture."""
    patched, image = tiny_unet(patch_size=4), torch.rand(1, 3, 16, 16)
    plain = tiny_unet(in_channels=48, out_channels=48)
    plain.load_state_dict(patched.state_dict())
    features = plain(torch.nn.functional.pixel_unshuffle(image, 4), 3).sample
    assert torch.equal(patched(image, 3).sample, torch.nn.functional.pixel_shuffle(features, 4))


@torch.no_grad()
def test_timesteps_by_number_and_by_image_are_the_same() -> None:
    unet, images = tiny_unet(), torch.rand(3, 3, 16, 16)
    outputs = [unet(images, t).sample for t in (5, torch.tensor(5), torch.tensor([5]), torch.tensor([5, 5, 5]))]
    assert all(torch.equal(outputs[0], output) for output in outputs)
    assert not torch.equal(outputs[0], unet(images, 6).sample)
    assert torch.equal(outputs[0], unet(images, 5, return_dict=False)[0])


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_close(dtype: torch.dtype) -> None:
    unet, images = tiny_unet(), torch.rand(2, 3, 16, 16)
    expected = unet(images, 100).sample
    actual = unet.to(dtype)(images.to(dtype), 100).sample
    assert actual.dtype == dtype
    torch.testing.assert_close(actual.float(), expected, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(2, 64, 16, 16), (2, 64, 32, 32), (2, 512, 8, 8), (2, 64, 256)])
@pytest.mark.parametrize("channels_last", [False, True])
def test_group_norm_is_torchs_in_any_layout(dtype: torch.dtype, shape: tuple[int, ...], channels_last: bool) -> None:
    torch.manual_seed(0)
    plain, features = torch.nn.GroupNorm(32, shape[1]).to(dtype), torch.randn(shape)
    for parameter in plain.parameters():
        torch.nn.init.normal_(parameter)
    expected = plain.float()(features.to(dtype).float())
    network = GroupNorm(32, shape[1]).to(dtype)
    network.load_state_dict(plain.to(dtype).state_dict())
    features = features.to(dtype)
    if channels_last and len(shape) == 4:
        features = features.contiguous(memory_format=torch.channels_last)
    assert network._is_slow(features) == (channels_last and shape == (2, 64, 16, 16))
    actual = network(features)
    assert actual.stride() == features.stride() and actual.dtype == dtype
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    torch.testing.assert_close(actual.float(), expected, rtol=tolerance, atol=tolerance)


def test_the_unet_has_no_other_group_norm() -> None:
    norms = [module for module in tiny_unet().modules() if isinstance(module, torch.nn.GroupNorm)]
    assert len(norms) > 20 and {type(norm) for norm in norms} == {GroupNorm}


def test_heads_can_differ_by_level() -> None:
    unet = tiny_unet(attention=(True, True), num_attention_heads=(2, 4))
    heads = [block.attentions[0].heads for block in unet.down_blocks]
    assert heads == [2, 4] and unet.mid_block.attentions[0].heads == 4


@pytest.mark.parametrize("network", ["unet", "segmentation"])
def test_gradient_checkpointing_changes_nothing_but_memory(network: str) -> None:
    torch.manual_seed(0)
    model = tiny_unet() if network == "unet" else SegmentationUNet2DModel(base_channels=8, norm_type="group")
    model.train()
    arguments = (torch.rand(1, 3, 32, 32), 3) if network == "unet" else (torch.rand(1, 6, 32, 32),)
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.enable_gradient_checkpointing()
        model.zero_grad()
        model(*arguments, return_dict=False)[0].square().mean().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for plain, checkpointed in zip(*gradients):
        torch.testing.assert_close(plain, checkpointed)


def test_gradient_checkpointing_counts_a_batch_once() -> None:
    """Running statistics of batch norm must not see the batch again when a block is computed again."""
    statistics = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = SegmentationUNet2DModel(base_channels=8, norm_type="batch").train()
        if checkpointing:
            model.enable_gradient_checkpointing()
        model(torch.rand(2, 6, 32, 32)).logits.mean().backward()
        statistics.append(dict(model.named_buffers()))
    assert all(torch.equal(value, statistics[1][name]) for name, value in statistics[0].items())


@torch.no_grad()
@pytest.mark.parametrize("norm_type", ["batch", "group"])
def test_segmentation(norm_type: str) -> None:
    network = SegmentationUNet2DModel(base_channels=8, norm_type=norm_type).eval()
    assert network(torch.rand(2, 6, 32, 64)).logits.shape == (2, 1, 32, 64)
    assert network.size_divisor == 32


def test_the_first_convolution_stays_float32(tmp_path: Path) -> None:
    """However the network is loaded, folded or stored, and with hooks on its blocks as before."""
    SegmentationUNet2DModel(base_channels=4).save_pretrained(tmp_path)
    image = torch.rand(1, 6, 32, 32)
    loaded = SegmentationUNet2DModel.from_pretrained(tmp_path, torch_dtype=torch.bfloat16, low_cpu_mem_usage=False)
    other, info = SegmentationUNet2DModel.from_pretrained(tmp_path, dtype=torch.bfloat16, output_loading_info=True)
    assert not info["missing_keys"] and torch.equal(loaded(image).logits, other(image).logits)
    for network in (loaded, loaded.fold_batch_norm()):
        assert network.dtype == torch.bfloat16 and network.input_dtype == torch.float32
        assert {parameter.dtype for parameter in network.encoder_blocks[1].parameters()} == {torch.bfloat16}
        assert network(image).logits.dtype == torch.bfloat16
    assert SegmentationUNet2DModel.from_pretrained(tmp_path).cast(torch.bfloat16).float().dtype == torch.float32

    called = []
    for block in loaded.encoder_blocks:
        block.register_forward_pre_hook(lambda block, inputs: called.append(block))
    loaded(image)
    assert called == list(loaded.encoder_blocks)

    stored = SegmentationUNet2DModel.from_pretrained(tmp_path)
    exact = stored(image).logits
    stored.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16)
    torch.testing.assert_close(stored(image).logits.float(), exact, rtol=0, atol=0.2)


@pytest.mark.parametrize(
    "options, cause",
    [
        ({"attention": (True,)}, "2 levels"),
        ({"num_attention_heads": (4,)}, "num_attention_heads 1"),
        ({"block_out_channels": (10, 16)}, "divisible by norm_num_groups"),
        ({"block_out_channels": (4, 10**9)}, "1 to 4096"),
        ({"layers_per_block": 10**9}, "layers_per_block"),
        ({"patch_size": 0}, "patch_size=0"),
    ],
)
def test_unet_refuses_absurd_configurations(options: dict, cause: str) -> None:
    with pytest.raises(ValueError, match=cause):
        tiny_unet(**options)


@pytest.mark.parametrize(
    "options, cause",
    [
        ({"norm_type": "layer"}, "batch.*group"),
        ({"base_channels": 10**9}, "1 to 512"),
        ({"base_channels": 10, "norm_type": "group"}, "divisible"),
    ],
)
def test_segmentation_refuses_absurd_configurations(options: dict, cause: str) -> None:
    with pytest.raises(ValueError, match=cause):
        SegmentationUNet2DModel(**options)


def test_paper_table_names_its_sizes() -> None:
    with pytest.raises(ValueError, match="32, 64, 128, 256, 512"):
        paper_unet_config(300)
    wide = paper_unet_config(512)
    assert wide["block_out_channels"][0] == 64 and wide["time_embedding_channels"] == 128
