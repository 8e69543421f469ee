"""The segmentation network of DiffusionAD: DRAEM's discriminative U-Net (Zavrtanik et al., ICCV 2021).

The layers are those of the authors' network, checked against golden values. It emits logits: the sigmoid
belongs to the loss and to the pipeline, so that training is safe under mixed precision.
"""

import copy
import os
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.utils import BaseOutput
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

ENCODER_MULTIPLIERS = (1, 2, 4, 8, 8, 8)


@dataclass
class SegmentationUNet2DOutput(BaseOutput):
    """Output of [`SegmentationUNet2DModel`].

    Args:
        logits: `[B, out_channels, H, W]`; a sigmoid turns them into the anomaly map in [0, 1].
    """

    logits: torch.Tensor


class InputBlock(nn.Sequential):
    """The first block, whose first convolution may be more precise than the layers after it."""

    def forward(self, input: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Run the layers on `[B, 6, H, W]`, after the first one in `dtype`; None leaves it as it comes."""
        first, *others = self
        sample = first(input)
        sample = sample if dtype is None else sample.to(dtype)
        for layer in others:
            sample = layer(sample)
        return sample


class SegmentationUNet2DModel(ModelMixin, ConfigMixin):
    """A U-Net that sees a picture beside its anomaly-free reconstruction and marks where they really differ.
    The defaults are the paper's network: 28,373,569 parameters. [`cast`] and `from_pretrained(..., dtype=...)` leave
    the first convolution in float32.

    Args:
        in_channels: channels of the concatenated picture and reconstruction.
        out_channels: channels of the logits.
        base_channels: width of the first of six levels; the others have 2, 4, 8, 8, 8 times as much.
        norm_type: `"batch"` (the paper), `"group"`, which does not depend on the batch while training, or `"none"`, as
            [`fold_batch_norm`] leaves it.
        norm_num_groups: groups of each GroupNorm when `norm_type="group"`.

    Raises:
        ValueError: for an unknown `norm_type` or absurd widths.

    Example:
        >>> import torch
        >>> from diffusionad_pipe import SegmentationUNet2DModel
        >>> segmentation = SegmentationUNet2DModel(base_channels=8).eval()
        >>> images, reconstructions = torch.rand(2, 3, 64, 64), torch.rand(2, 3, 64, 64)
        >>> logits = segmentation(torch.cat([images, reconstructions], dim=1)).logits
        >>> anomaly_maps = logits.sigmoid()
        >>> anomaly_maps.shape
        torch.Size([2, 1, 64, 64])
    """

    _supports_gradient_checkpointing = True
    # Picture and reconstruction differ by little, which bfloat16 would round away before it is seen.
    _keep_in_fp32_modules = ["encoder_blocks.0.0"]

    @register_to_config
    def __init__(
        self,
        in_channels: int = 6,
        out_channels: int = 1,
        base_channels: int = 64,
        norm_type: str = "batch",
        norm_num_groups: int = 8,
    ):
        super().__init__()
        if norm_type not in ("batch", "group", "none"):
            raise ValueError(f"norm_type must be 'batch', 'group' or 'none', not {norm_type!r}")
        # A damaged or hostile config.json must not ask for terabytes.
        if not (1 <= base_channels <= 512 and 1 <= in_channels <= 64 and 1 <= out_channels <= 64):
            raise ValueError(
                f"not a segmentation network: base_channels={base_channels} (1 to 512), in_channels={in_channels} "
                f"and out_channels={out_channels} (1 to 64)"
            )
        if norm_type == "group" and base_channels % norm_num_groups:
            raise ValueError(f"base_channels={base_channels} must be divisible by norm_num_groups={norm_num_groups}")

        def norm(channels: int) -> nn.Module:
            if norm_type == "none":
                return nn.Identity()
            return nn.BatchNorm2d(channels) if norm_type == "batch" else nn.GroupNorm(norm_num_groups, channels)

        def conv(channels_in: int, channels_out: int) -> list[nn.Module]:
            return [nn.Conv2d(channels_in, channels_out, 3, padding=1), norm(channels_out), nn.ReLU(inplace=True)]

        widths = [base_channels * m for m in ENCODER_MULTIPLIERS]
        self.pool = nn.MaxPool2d(2)
        self.upsample = nn.UpsamplingBilinear2d(scale_factor=2)  # corners aligned, as in the authors' network
        self.encoder_blocks = nn.ModuleList(
            (InputBlock if level == 0 else nn.Sequential)(*conv(channels_in, channels), *conv(channels, channels))
            for level, (channels_in, channels) in enumerate(zip([in_channels, *widths[:-1]], widths))
        )
        # Each stage: upsample, one convolution to the level's width, concatenate its skip, two convolutions.
        # Width and skip of the five stages, coarsest first: 8b|8b, 4b|8b, 2b|4b, b|2b, b|b.
        stage_widths = [widths[4], widths[2], widths[1], widths[0], widths[0]]
        self.up_convs = nn.ModuleList()
        self.decoder_blocks = nn.ModuleList()
        channels_in = widths[-1]
        for channels, skip in zip(stage_widths, reversed(widths[:-1])):
            self.up_convs.append(nn.Sequential(*conv(channels_in, channels)))
            self.decoder_blocks.append(nn.Sequential(*conv(channels + skip, channels), *conv(channels, channels)))
            channels_in = channels
        self.conv_out = nn.Conv2d(widths[0], out_channels, 3, padding=1)
        self.gradient_checkpointing = False

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any):
        """Load the network as diffusers does, but with `dtype` leave the first convolution in float32, see [`cast`]."""
        dtype = kwargs.pop("dtype", kwargs.pop("torch_dtype", None))
        if kwargs.get("low_cpu_mem_usage") is False:  # which diffusers refuses where something stays in float32
            del kwargs["low_cpu_mem_usage"]
        placed = any(kwargs.get(name) is not None for name in ("device_map", "quantization_config"))
        if not isinstance(dtype, torch.dtype) or placed:
            return super().from_pretrained(pretrained_model_name_or_path, torch_dtype=dtype, **kwargs)
        loaded = super().from_pretrained(pretrained_model_name_or_path, torch_dtype=torch.float32, **kwargs)
        (loaded[0] if isinstance(loaded, tuple) else loaded).cast(dtype)  # a tuple with output_loading_info=True
        return loaded

    def cast(self, dtype: torch.dtype) -> "SegmentationUNet2DModel":
        """Convert the network in place, but keep the first convolution in float32: on pictures in [0, 1] that makes
        the maps of a bfloat16 network twice as close to those of float32, for 1 % of its operations. `to` converts all.

        Args:
            dtype: of all other layers.

        Returns:
            The network itself.
        """
        for name, tensor in (*self.named_parameters(), *self.named_buffers()):
            if tensor.is_floating_point():
                kept = name.startswith(self._keep_in_fp32_modules[0] + ".")
                tensor.data = tensor.data.to(torch.promote_types(dtype, torch.float32) if kept else dtype)
        return self

    @property
    def input_dtype(self) -> torch.dtype:
        """What the network takes: the dtype of its first convolution."""
        return next(self.encoder_blocks[0].parameters()).dtype

    @property
    def size_divisor(self) -> int:
        """Heights and widths must be multiples of this many pixels."""
        return 2 ** (len(ENCODER_MULTIPLIERS) - 1)

    def fold_batch_norm(self) -> "SegmentationUNet2DModel":
        """The same function for inference without batch normalisation, which each convolution before it takes over.

        Returns:
            A new network in eval mode with `norm_type="none"`, [`cast`] to the same dtype, on the same device.

        Raises:
            ValueError: for another `norm_type`.
        """
        if self.config.norm_type != "batch":
            raise ValueError(f"norm_type={self.config.norm_type!r} cannot be folded: only batch normalisation can")
        folded = copy.deepcopy(self).eval().float()  # in bfloat16 the products would be rounded twice
        for block in (module for module in folded.modules() if isinstance(module, nn.Sequential)):
            for index, layer in enumerate(block):
                convolution = block[index - 1]
                if isinstance(layer, nn.BatchNorm2d) and isinstance(convolution, nn.Conv2d):
                    block[index - 1] = fuse_conv_bn_eval(convolution, layer)
                    block[index] = nn.Identity()
        folded.register_to_config(norm_type="none")
        return folded.cast(self.dtype)

    def forward(self, sample: torch.Tensor, return_dict: bool = True) -> SegmentationUNet2DOutput | tuple[torch.Tensor]:
        """Mark the anomalous pixels.

        Args:
            sample: picture and reconstruction concatenated on channels, `[B, 6, H, W]`, each in [0, 1].
            return_dict: False returns a tuple.

        Returns:
            [`SegmentationUNet2DOutput`] with logits `[B, out_channels, H, W]`.
        """
        narrower = self.dtype if self.dtype != self.input_dtype else None
        skips = [self._run(self.encoder_blocks[0], sample.to(self.input_dtype), narrower)]
        for block in self.encoder_blocks[1:]:
            skips.append(self._run(block, self.pool(skips[-1])))  # [B, width, H / 2**level, W / 2**level]
        sample = skips.pop()
        for up_conv, block in zip(self.up_convs, self.decoder_blocks):
            sample = up_conv(self.upsample(sample))
            sample = self._run(block, torch.cat([sample, skips.pop()], dim=1))
        logits = self.conv_out(sample)  # [B, 1, H, W]

        if not return_dict:
            return (logits,)
        return SegmentationUNet2DOutput(logits=logits)

    def _run(self, block: nn.Module, *inputs: Any) -> torch.Tensor:
        # With batch norm never: computing a block again would count its batch twice in the running statistics.
        if torch.is_grad_enabled() and self.gradient_checkpointing and self.config.norm_type == "group":
            return self._gradient_checkpointing_func(block, *inputs)
        return block(*inputs)
