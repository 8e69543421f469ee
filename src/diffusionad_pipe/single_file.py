"""The checkpoint format of the authors' code (github.com/HuiZhang0812/DiffusionAD), both ways, bit-exact.

An original file is `torch.save({"n_epoch", "unet_model_state_dict", "seg_model_state_dict", "args"})`. It is read
with `weights_only=True` and a two-name allow-list, so a pickle that would run code is refused, never run.
"""

import json
import os
from collections import defaultdict
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline

from .files.single_files import write_file
from .scheduling_norm_guided_one_step import NormGuidedOneStepScheduler
from .unet_2d_diffusionad import DiffusionADUNet2DModel, paper_unet_config
from .unet_2d_segmentation import SegmentationUNet2DModel

StateDict = dict[str, torch.Tensor]

RESNET_LAYERS = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "embed_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}


class SingleFileMixin(DiffusionPipeline):
    """How [`DiffusionADPipeline`] reads and writes the authors' checkpoints."""

    @classmethod
    def from_single_file(cls, path: str | os.PathLike[str], **kwargs: Any):
        """Load a checkpoint of the authors' code. Nothing in it is run: only tensors and plain settings are read.

        Args:
            path: the `.pt` / `.pth` file.
            kwargs: values for the pipeline's config, such as `score_top_k`, `image_threshold`.

        Raises:
            ValueError: names the file, the cause and the cure.
        """
        checkpoint = read_checkpoint(path)
        unet, segmentation = build_networks(checkpoint, path)
        scheduler = build_scheduler(checkpoint, path)
        return cls(unet, segmentation, scheduler, **{"image_size": unet.config.sample_size, **kwargs})

    def save_single_file(self, path: str | os.PathLike[str]) -> None:
        """Write the authors' checkpoint format, which their code and [`from_single_file`] read.

        Args:
            path: the file to write.

        Raises:
            ValueError: for networks or a prediction type that their code does not have.
        """
        write_checkpoint(path, self.unet, self.segmentation, self.scheduler)


def read_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read an original checkpoint without running anything in it.

    Args:
        path: the `.pt` / `.pth` file.

    Returns:
        Its dictionary: `unet_model_state_dict`, `seg_model_state_dict`, `args` and maybe more.

    Raises:
        ValueError: names the file, the cause and the cure: not a torch file, truncated, a pickle with other objects
            in it, or the wrong keys.
    """
    # Their settings are a defaultdict(str), which torch's safe unpickler does not fill; a plain dict serves as well.
    allowed: Any = [(lambda default_factory: {}, "collections.defaultdict"), (str, "builtins.str")]
    try:
        with torch.serialization.safe_globals(allowed):
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ValueError(f"there is no file {path}") from None
    except Exception as error:  # damage comes out of an unpickler as any kind of error
        # torch's own message recommends weights_only=False, which is just what must not be done.
        lines = str(error).rpartition("WeightsUnpickler error: ")[2].splitlines()
        cause = next((line for line in lines if line.strip() and "weights_only" not in line), type(error).__name__)
        raise ValueError(
            f"{path} cannot be read as a checkpoint of the authors' code. It is damaged, or a pickle that holds more "
            f"than tensors and plain settings; nothing in it was run. Copy it again from its source. "
            f"({cause.partition('. ')[0].strip()})"
        ) from None
    keys = ("unet_model_state_dict", "seg_model_state_dict")
    if not isinstance(checkpoint, dict) or not all(isinstance(checkpoint.get(key), dict) for key in keys):
        found = sorted(map(str, checkpoint))[:5] if isinstance(checkpoint, dict) else type(checkpoint).__name__
        raise ValueError(f"{path} needs the entries {keys[0]} and {keys[1]}; it holds {found}")
    return checkpoint


def build_networks(
    checkpoint: dict[str, Any], path: str | os.PathLike[str]
) -> tuple[DiffusionADUNet2DModel, SegmentationUNet2DModel]:
    """Build both networks, in eval mode, from a checkpoint that [`read_checkpoint`] returned.

    Args:
        checkpoint: the dictionary.
        path: its file, to be named in errors.

    Raises:
        ValueError: when keys or shapes are not those of the network that the checkpoint's `args` describe.
    """
    args = checkpoint.get("args") or {}
    unet_state, segmentation_state = checkpoint["unet_model_state_dict"], checkpoint["seg_model_state_dict"]
    try:
        image_size = int((args.get("img_size") or [256, 256])[0])
        config = paper_unet_config(image_size, int(unet_state["down.0.0.weight"].shape[0]))
        attention_sizes = [int(s) for s in str(args.get("attention_resolutions") or "32,16,8").split(",")]
        levels = range(len(config["attention"]))
        config["attention"] = tuple(image_size // 2**level in attention_sizes for level in levels)
        config["num_attention_heads"] = int(args.get("num_heads") or 4)
        config["dropout"] = float(args.get("dropout") or 0)
        with torch.device("meta"):  # nothing large before the shapes are known to fit
            unet = DiffusionADUNet2DModel(**config)
            segmentation = SegmentationUNet2DModel(
                base_channels=int(segmentation_state["encoder_segment.block1.0.weight"].shape[0])
            )
        for names, theirs, state in (
            ("unet_model_state_dict", unet_to_reference(unet), unet_state),
            ("seg_model_state_dict", segmentation_to_reference(segmentation.state_dict()), segmentation_state),
        ):
            expected = {key: tuple(value.shape) for key, value in theirs.items()}
            found = {key: tuple(value.shape) for key, value in state.items()}
            if expected != found:
                wrong = [key for key in expected | found if expected.get(key) != found.get(key)]
                raise ValueError(f"{names}: {len(wrong)} entries do not fit, such as {wrong[0]}")
        unet.load_state_dict(unet_from_reference(unet, unet_state), assign=True)
        segmentation.load_state_dict(segmentation_from_reference(segmentation_state), assign=True)
    except (LookupError, TypeError, AttributeError, RuntimeError, ValueError, ArithmeticError) as error:
        cause = f"the entry {error} is missing" if isinstance(error, KeyError) else error
        raise ValueError(
            f"{path} does not hold the authors' networks as its args describe them: {cause}. "
            "Check that the file and its settings are from the same run of the authors' code."
        ) from error
    # The sinusoidal embedding is no parameter, so leaving the meta device is done.
    return unet.eval(), segmentation.eval()


def build_scheduler(checkpoint: dict[str, Any], path: str | os.PathLike[str]) -> NormGuidedOneStepScheduler:
    """Build the scheduler that a checkpoint's `args` describe; what they leave out is the paper's.

    Args:
        checkpoint: the dictionary.
        path: its file, to be named in errors.

    Raises:
        ValueError: for settings that are none.
    """
    defaults = {"T": 1000, "beta_schedule": "linear", "condition_w": 1, "eval_normal_t": 200, "eval_noisier_t": 400}
    args = checkpoint.get("args") or {}
    settings: dict[str, Any] = {k: default if args.get(k) in (None, "") else args[k] for k, default in defaults.items()}
    try:
        steps = int(settings["T"])
        schedule = {"linear": "linear", "cosine": "squaredcos_cap_v2"}[settings["beta_schedule"]]
        # Their linear schedule scales with the number of steps; the cosine has no such bounds.
        scale = 1000 / steps if schedule == "linear" else 1
        return NormGuidedOneStepScheduler(
            num_train_timesteps=steps,
            beta_start=scale * 1e-4,
            beta_end=scale * 0.02,
            beta_schedule=schedule,
            small_timestep=int(settings["eval_normal_t"]),
            large_timestep=int(settings["eval_noisier_t"]),
            guidance_scale=float(settings["condition_w"]),
        )
    except (LookupError, TypeError, ValueError, ArithmeticError) as error:
        raise ValueError(f"{path} has args that are no settings of the authors' code ({error}): {settings}") from error


def write_checkpoint(
    path: str | os.PathLike[str],
    unet: DiffusionADUNet2DModel,
    segmentation: SegmentationUNet2DModel,
    scheduler: NormGuidedOneStepScheduler,
) -> None:
    """Write the authors' format, which their code reads.

    Args:
        path: the file to write.
        unet: the paper's network.
        segmentation: the paper's network.
        scheduler: its settings are stored beside what the networks themselves tell.

    Raises:
        ValueError: when a network is not one that the authors' code has, or the scheduler is not.
    """
    args = _scheduler_args(scheduler, path)
    config = unet.config
    paper = {"in_channels": 3, "out_channels": 3, "patch_size": 1, "layers_per_block": 2, "norm_eps": 1e-5}
    try:
        paper |= paper_unet_config(config.sample_size, unet.time_proj.num_channels)
        del paper["time_embedding_channels"]  # None means the same
        others = [key for key, value in paper.items() if json.dumps(config[key]) != json.dumps(value)]  # tuple or list
    except ValueError as error:
        others = [str(error)]
    if not isinstance(config.num_attention_heads, int):
        others.append("num_attention_heads")
    theirs = ("in_channels", 6), ("out_channels", 1), ("norm_type", "batch")
    if not isinstance(segmentation, SegmentationUNet2DModel) or any(segmentation.config[k] != v for k, v in theirs):
        others.append("segmentation")
    if others:
        raise ValueError(
            "the authors' format holds the paper's networks only, with patch_size 1 and batch norm; "
            f"here differ: {', '.join(others)}"
        )
    attention = [config.sample_size // 2**i for i, used in enumerate(config.attention) if used]
    checkpoint = {
        "n_epoch": 0,
        "unet_model_state_dict": unet_to_reference(unet),
        "seg_model_state_dict": segmentation_to_reference(segmentation.state_dict()),
        "args": defaultdict(
            str,
            {
                "img_size": [config.sample_size, config.sample_size],
                "base_channels": unet.time_proj.num_channels,
                "attention_resolutions": ",".join(map(str, attention)),
                "num_heads": config.num_attention_heads,
                "num_head_channels": -1,
                "channels": config.in_channels,
                "dropout": config.dropout,
                **args,
            },
        ),
    }
    write_file(path, lambda temporary: torch.save(checkpoint, temporary), "convert", "name")


def _scheduler_args(scheduler: NormGuidedOneStepScheduler, path: str | os.PathLike[str]) -> dict[str, Any]:
    """The `args` from which `build_scheduler` makes this scheduler again."""
    config = scheduler.config
    args = {
        "T": config.num_train_timesteps,
        "beta_schedule": "cosine" if config.beta_schedule == "squaredcos_cap_v2" else "linear",
        "condition_w": config.guidance_scale,
        "eval_normal_t": config.small_timestep,
        "eval_noisier_t": config.large_timestep,
    }
    theirs = build_scheduler({"args": args}, path).config
    others = {k: v for k, v in config.items() if not k.startswith("_") and np.any(theirs[k] != v)}
    if others:
        raise ValueError(f"the authors' code has no scheduler with {others}: it predicts noise, on its schedules")
    return args


def unet_module_names(unet: DiffusionADUNet2DModel) -> dict[str, str]:
    """Our module names → the authors', for every residual block, attention and single layer."""
    config = unet.config
    levels, layers = len(config.block_out_channels), config.layers_per_block
    names = {
        "time_embedding.linear_1": "time_embedding.1",
        "time_embedding.linear_2": "time_embedding.3",
        "conv_in": "down.0.0",
        "mid_block.resnets.0": "middle.0",
        "mid_block.attentions.0": "middle.1",
        "mid_block.resnets.1": "middle.2",
        "conv_norm_out": "out.0",
        "conv_out": "out.2",
    }
    # On the way down every block has a number of its own; on the way up an upsampler shares its predecessor's.
    number = 1
    for level in range(levels):
        for layer in range(layers):
            names[f"down_blocks.{level}.resnets.{layer}"] = f"down.{number}.0"
            if config.attention[level]:
                names[f"down_blocks.{level}.attentions.{layer}"] = f"down.{number}.1"
            number += 1
        if level < levels - 1:
            names[f"down_blocks.{level}.downsamplers.0"] = f"down.{number}.0"
            number += 1
    number = 0
    for block in range(levels):
        has_attention = config.attention[levels - 1 - block]
        for layer in range(layers + 1):
            names[f"up_blocks.{block}.resnets.{layer}"] = f"up.{number}.0"
            if has_attention:
                names[f"up_blocks.{block}.attentions.{layer}"] = f"up.{number}.1"
            if layer == layers and block < levels - 1:
                names[f"up_blocks.{block}.upsamplers.0"] = f"up.{number}.{2 if has_attention else 1}"
            number += 1
    return names


def unet_from_reference(unet: DiffusionADUNet2DModel, state: StateDict) -> StateDict:
    """The authors' UNet state dict in our names and shapes. `unet` gives the architecture (meta device will do)."""
    converted: StateDict = {}
    heads = unet.config.num_attention_heads
    for ours, theirs in unet_module_names(unet).items():
        if ".attentions." in ours:
            converted |= {f"{ours}.group_norm.{kind}": state[f"{theirs}.norm.{kind}"] for kind in ("weight", "bias")}
            for kind in ("weight", "bias"):
                # [3C, ...] holds q, k, v of the first head, then of the second, ...
                packed = state[f"{theirs}.to_qkv.{kind}"]
                per_head = (packed.flatten(1) if kind == "weight" else packed).unflatten(0, (heads, 3, -1))
                for index, name in enumerate(("to_q", "to_k", "to_v")):
                    converted[f"{ours}.{name}.{kind}"] = per_head[:, index].flatten(0, 1).contiguous()
            converted[f"{ours}.to_out.0.weight"] = state[f"{theirs}.proj_out.weight"].squeeze(-1)
            converted[f"{ours}.to_out.0.bias"] = state[f"{theirs}.proj_out.bias"]
        elif ".resnets." in ours or "samplers." in ours:
            for our_layer, their_layer in RESNET_LAYERS.items():
                for kind in ("weight", "bias"):
                    if f"{theirs}.{their_layer}.{kind}" in state:  # not every block has a skip_connection
                        converted[f"{ours}.{our_layer}.{kind}"] = state[f"{theirs}.{their_layer}.{kind}"]
        else:
            converted |= {f"{ours}.{kind}": state[f"{theirs}.{kind}"] for kind in ("weight", "bias")}
    return converted


def unet_to_reference(unet: DiffusionADUNet2DModel) -> StateDict:
    """Our UNet's state dict in the authors' names and shapes."""
    state, converted = unet.state_dict(), {}
    heads = unet.config.num_attention_heads
    for ours, theirs in unet_module_names(unet).items():
        if ".attentions." in ours:
            for kind in ("weight", "bias"):
                converted[f"{theirs}.norm.{kind}"] = state[f"{ours}.group_norm.{kind}"]
                per_head = [state[f"{ours}.{n}.{kind}"].unflatten(0, (heads, -1)) for n in ("to_q", "to_k", "to_v")]
                packed = torch.stack(per_head, dim=1).flatten(0, 2)
                converted[f"{theirs}.to_qkv.{kind}"] = packed[..., None] if kind == "weight" else packed
            converted[f"{theirs}.proj_out.weight"] = state[f"{ours}.to_out.0.weight"][..., None]
            converted[f"{theirs}.proj_out.bias"] = state[f"{ours}.to_out.0.bias"]
        elif ".resnets." in ours or "samplers." in ours:
            for our_layer, their_layer in RESNET_LAYERS.items():
                for kind in ("weight", "bias"):
                    if f"{ours}.{our_layer}.{kind}" in state:
                        converted[f"{theirs}.{their_layer}.{kind}"] = state[f"{ours}.{our_layer}.{kind}"]
        else:
            converted |= {f"{theirs}.{kind}": state[f"{ours}.{kind}"] for kind in ("weight", "bias")}
    return {key: value.contiguous() for key, value in converted.items()}


def segmentation_prefixes() -> dict[str, str]:
    """Our prefix → the authors', for the segmentation network."""
    names = {f"encoder_blocks.{i}.": f"encoder_segment.block{i + 1}." for i in range(6)}
    for stage, suffix in enumerate(("_b", "1", "2", "3", "4")):
        # Their first entry of `up` is the upsampling layer, so its convolution is number 1; ours is number 0.
        names |= {f"up_convs.{stage}.{i}.": f"decoder_segment.up{suffix}.{i + 1}." for i in (0, 1)}
        names[f"decoder_blocks.{stage}."] = f"decoder_segment.db{suffix}."
    names["conv_out."] = "decoder_segment.fin_out.0."
    return names


def segmentation_from_reference(state: StateDict) -> StateDict:
    """The authors' segmentation state dict in our names."""
    return _rename_prefixes(state, {theirs: ours for ours, theirs in segmentation_prefixes().items()})


def segmentation_to_reference(state: StateDict) -> StateDict:
    """Our segmentation state dict in the authors' names."""
    return _rename_prefixes(state, segmentation_prefixes())


def _rename_prefixes(state: StateDict, names: dict[str, str]) -> StateDict:
    renamed = {}
    for key, value in state.items():
        prefix = next((p for p in names if key.startswith(p)), "")
        renamed[names.get(prefix, "") + key[len(prefix) :]] = value
    return renamed
