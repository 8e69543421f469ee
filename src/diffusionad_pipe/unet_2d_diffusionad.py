"""The reconstruction UNet of DiffusionAD, built from diffusers' blocks.

Paper: Zhang et al., "DiffusionAD: Norm-guided One-step Denoising Diffusion for Anomaly Detection",
arXiv 2303.08730. The layers are those of the authors' network (guided-diffusion style, MIT), checked against
golden values; the patch size is ours (Li & He, 2025, "Back to Basics: Let Denoising Generative Models Denoise").
"""

from dataclasses import dataclass
from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.attention import AttentionMixin
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.unets.unet_2d_blocks import UNetMidBlock2D, get_down_block, get_up_block
from diffusers.utils import BaseOutput
from torch import nn

from .runtime.config_values import is_finite, is_whole

# Channel multipliers of the authors' network by picture side. Attention sits where the features are 32, 16 or
# 8 pixels wide. The authors' code crashes at 512; here its first level really is half as wide as the base.
CHANNEL_MULTIPLIERS: dict[int, tuple[float, ...]] = {
    512: (0.5, 1, 1, 2, 2, 4, 4),
    256: (1, 1, 2, 2, 4, 4),
    128: (1, 1, 2, 3, 4),
    64: (1, 2, 3, 4),
    32: (1, 2, 3, 4),
}
ATTENTION_SIZES = (32, 16, 8)


def paper_unet_config(sample_size: int = 256, base_channels: int = 128) -> dict[str, Any]:
    """The configuration of the authors' UNet for one picture side.

    Args:
        sample_size: side of the square picture in pixels: 32, 64, 128, 256 or 512.
        base_channels: the width that the multipliers scale; 128 in the paper, a multiple of 32.

    Returns:
        Keyword arguments of [`DiffusionADUNet2DModel`].

    Raises:
        ValueError: for a side that the authors define no network for.
    """
    if sample_size not in CHANNEL_MULTIPLIERS:
        raise ValueError(f"the paper's UNet is defined for {sorted(CHANNEL_MULTIPLIERS)} px, not {sample_size}")
    multipliers = CHANNEL_MULTIPLIERS[sample_size]
    return {
        "sample_size": sample_size,
        "block_out_channels": tuple(int(base_channels * m) for m in multipliers),
        "attention": tuple(sample_size // 2**level in ATTENTION_SIZES for level in range(len(multipliers))),
        "time_embedding_channels": base_channels,
        # GroupNorm(32) needs channels divisible by 32; only narrow 512-px networks have fewer.
        "norm_num_groups": min(32, int(base_channels * min(multipliers))),
    }


@dataclass
class DiffusionADUNet2DOutput(BaseOutput):
    """Output of [`DiffusionADUNet2DModel`].

    Args:
        sample: `[B, out_channels, H, W]`, what the scheduler's `prediction_type` says: the noise, the clean
            picture or the velocity.
    """

    sample: torch.Tensor


class DiffusionADUNet2DModel(ModelMixin, AttentionMixin, ConfigMixin):
    """A UNet that predicts, in one step, the clean picture (or its noise) from a noised one. The defaults are
    the paper's network at 256 pixels: 131,654,403 parameters, 563 GFLOP a forward pass.

    Args:
        sample_size: nominal side of the picture in pixels. Other sizes work when divisible by `size_divisor`.
        in_channels: channels of the noised picture.
        out_channels: channels of the prediction.
        patch_size: side of the square patches that become channels before the first convolution; 1 is the paper.
            A patch size of 4 runs the network at a quarter of the side, and asks for `prediction_type="sample"`.
        block_out_channels: width of each level, finest first; multiples of `norm_num_groups`.
        attention: for each level, whether its residual blocks are followed by self-attention. The middle block
            always has it.
        num_attention_heads: heads of every attention layer, or one number a level.
        layers_per_block: residual blocks a level on the way down; one more on the way up.
        time_embedding_channels: width of the sinusoidal embedding; None takes the first level's.
        norm_num_groups: groups of every GroupNorm.
        norm_eps: epsilon of every GroupNorm.
        dropout: dropout inside the residual blocks.

    Raises:
        ValueError: when the sizes do not fit one another or are outside what any network here would have.

    Example:
        >>> import torch
        >>> from diffusionad_pipe import DiffusionADUNet2DModel
        >>> unet = DiffusionADUNet2DModel(sample_size=64, block_out_channels=(32, 64), attention=(False, True))
        >>> noised, timesteps = torch.randn(2, 3, 64, 64), torch.tensor([200, 400])  # one scale for each
        >>> unet(noised, timesteps).sample.shape
        torch.Size([2, 3, 64, 64])
    """

    _supports_gradient_checkpointing = True
    _skip_layerwise_casting_patterns = ["norm"]
    _repeated_blocks = ["ResnetBlock2D", "Attention"]

    @register_to_config
    def __init__(
        self,
        sample_size: int = 256,
        in_channels: int = 3,
        out_channels: int = 3,
        patch_size: int = 1,
        block_out_channels: tuple[int, ...] = (128, 128, 256, 256, 512, 512),
        attention: tuple[bool, ...] = (False, False, False, True, True, True),
        num_attention_heads: int | tuple[int, ...] = 4,
        layers_per_block: int = 2,
        time_embedding_channels: int | None = None,
        norm_num_groups: int = 32,
        norm_eps: float = 1e-5,
        dropout: float = 0.0,
    ):
        super().__init__()
        levels = len(block_out_channels)
        heads = (num_attention_heads,) * levels if isinstance(num_attention_heads, int) else num_attention_heads
        if len(attention) != levels or len(heads) != levels:
            raise ValueError(
                f"block_out_channels has {levels} levels, attention {len(attention)}, num_attention_heads {len(heads)}"
            )
        if not is_whole(sample_size) or not is_whole(patch_size):
            raise ValueError(f"sample_size={sample_size!r} and patch_size={patch_size!r} must be whole numbers")
        # A damaged or hostile config.json must not ask for terabytes: these bounds are far above any real use.
        if not (1 <= levels <= 10 and 1 <= layers_per_block <= 16 and 1 <= patch_size <= 64):
            raise ValueError(
                f"not a UNet configuration: {levels} levels (1 to 10), layers_per_block={layers_per_block} (1 to 16), "
                f"patch_size={patch_size} (1 to 64)"
            )
        if not (is_finite(norm_eps) and norm_eps > 0 and is_finite(dropout) and 0 <= dropout < 1):
            raise ValueError(f"norm_eps={norm_eps!r} must be above 0, and dropout={dropout!r} in [0, 1)")
        for channels, head_count in zip(block_out_channels, heads):
            if not 1 <= channels <= 4096 or channels % norm_num_groups or channels % head_count:
                raise ValueError(
                    f"a level of {channels} channels: use 1 to 4096, divisible by norm_num_groups={norm_num_groups} "
                    f"and by num_attention_heads={head_count}"
                )

        time_channels = time_embedding_channels or block_out_channels[0]
        embedding_channels = 4 * time_channels
        head_dims = [channels // head_count for channels, head_count in zip(block_out_channels, heads)]
        block_options = {
            "temb_channels": embedding_channels,
            "resnet_eps": norm_eps,
            "resnet_act_fn": "silu",
            "resnet_groups": norm_num_groups,
            "dropout": dropout,
        }

        self.time_proj = Timesteps(time_channels, flip_sin_to_cos=False, downscale_freq_shift=0)
        self.time_embedding = TimestepEmbedding(time_channels, embedding_channels)
        self.conv_in = nn.Conv2d(in_channels * patch_size**2, block_out_channels[0], kernel_size=3, padding=1)

        self.down_blocks = nn.ModuleList()
        for level, channels in enumerate(block_out_channels):
            self.down_blocks.append(
                get_down_block(
                    "AttnDownBlock2D" if attention[level] else "ResnetDownsampleBlock2D",
                    num_layers=layers_per_block,
                    in_channels=block_out_channels[max(level - 1, 0)],
                    out_channels=channels,
                    add_downsample=level < levels - 1,
                    downsample_type="resnet",
                    attention_head_dim=head_dims[level],
                    **block_options,
                )
            )

        self.mid_block = UNetMidBlock2D(
            in_channels=block_out_channels[-1], attention_head_dim=head_dims[-1], **block_options
        )

        self.up_blocks = nn.ModuleList()
        for level in reversed(range(levels)):
            self.up_blocks.append(
                get_up_block(
                    "AttnUpBlock2D" if attention[level] else "ResnetUpsampleBlock2D",
                    num_layers=layers_per_block + 1,
                    in_channels=block_out_channels[max(level - 1, 0)],
                    out_channels=block_out_channels[level],
                    prev_output_channel=block_out_channels[min(level + 1, levels - 1)],
                    add_upsample=level > 0,
                    upsample_type="resnet",
                    attention_head_dim=head_dims[level],
                    **block_options,
                )
            )

        self.conv_norm_out = nn.GroupNorm(norm_num_groups, block_out_channels[0], eps=norm_eps)
        self.conv_act = nn.SiLU()
        self.conv_out = nn.Conv2d(block_out_channels[0], out_channels * patch_size**2, kernel_size=3, padding=1)
        _replace_group_norms(self)

        # Every residual branch starts as the identity, and the network as zero (the authors' zero_module).
        zero_layers: list[nn.Module] = [self.conv_out]
        zero_layers += [m.conv2 for m in self.modules() if hasattr(m, "conv2")]
        zero_layers += [m.to_out[0] for m in self.modules() if hasattr(m, "to_out")]
        for layer in zero_layers:
            for parameter in layer.parameters():
                nn.init.zeros_(parameter)

    @property
    def size_divisor(self) -> int:
        """Heights and widths must be multiples of this many pixels."""
        return int(self.config.patch_size) * 2 ** (len(self.config.block_out_channels) - 1)

    def forward(
        self, sample: torch.Tensor, timestep: torch.Tensor | float | int, return_dict: bool = True
    ) -> DiffusionADUNet2DOutput | tuple[torch.Tensor]:
        """Predict from noised pictures.

        Args:
            sample: noised pictures `[B, in_channels, H, W]`.
            timestep: one timestep, or `[B]`, in 0 ... num_train_timesteps - 1.
            return_dict: False returns a tuple.

        Returns:
            [`DiffusionADUNet2DOutput`] with the prediction `[B, out_channels, H, W]`.
        """
        # 1. Time. Sines and cosines are computed in float32 whatever the network's dtype.
        timesteps = torch.as_tensor(timestep, device=sample.device).expand(sample.shape[0])  # [B]
        embedding = self.time_embedding(self.time_proj(timesteps).to(sample.dtype))  # [B, 4 * time_channels]

        # 2. Patches become channels: [B, C, H, W] -> [B, C * p * p, H / p, W / p]
        sample = nn.functional.pixel_unshuffle(sample, self.config.patch_size)
        sample = self.conv_in(sample)

        # 3. Down, middle, up
        skips: tuple[torch.Tensor, ...] = (sample,)
        for block in self.down_blocks:
            sample, block_skips = block(sample, embedding)
            skips += block_skips
        sample = self.mid_block(sample, embedding)
        for block in self.up_blocks:
            count = self.config.layers_per_block + 1
            sample = block(sample, skips[-count:], embedding)
            skips = skips[:-count]

        # 4. Out, and channels become patches again
        sample = self.conv_out(self.conv_act(self.conv_norm_out(sample)))
        sample = nn.functional.pixel_shuffle(sample, self.config.patch_size)

        if not return_dict:
            return (sample,)
        return DiffusionADUNet2DOutput(sample=sample)


class GroupNorm(nn.GroupNorm):
    """torch's layer, but for a case that its kernel for channels last on CPUs is slow in: fewer than 1024 pixels, and
    fewer channels in a group than a vector register holds. There the detour over channels first is four times as fast
    (32 groups of 128 channels at 16 × 16).
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Normalise `[B, C, ...]`; the memory layout stays as it is."""
        if self._is_slow(input):
            return super().forward(input.contiguous()).contiguous(memory_format=torch.channels_last)
        return super().forward(input)

    def _is_slow(self, input: torch.Tensor) -> bool:
        if input.ndim != 4 or input.device.type != "cpu" or input.is_contiguous():
            return False
        few_pixels, few_channels = input.shape[-2:].numel() < 1024, self.num_channels < 16 * self.num_groups
        return few_pixels and few_channels and input.is_contiguous(memory_format=torch.channels_last)


def _replace_group_norms(network: nn.Module) -> None:
    """Put [`GroupNorm`] in the place of torch's layers, which diffusers' blocks are built with; the weights stay."""
    for parent in list(network.modules()):
        for name, layer in parent.named_children():
            if type(layer) is nn.GroupNorm:
                own = GroupNorm(layer.num_groups, layer.num_channels, layer.eps, layer.affine)
                own.weight, own.bias = layer.weight, layer.bias
                setattr(parent, name, own)
