"""The settings of a training run, filled from defaults, a preset, a YAML file and flags.

A setting is a field: its type, default and help make the flag, its name the key of the YAML file.
"""

import argparse
import dataclasses
import difflib
import types
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import yaml
from transformers.hf_argparser import HfArg, HfArgumentParser

from ..synthesis.config import SynthesisConfig, choices_of

PRESETS_FOLDER = Path(__file__).parent / "presets"
PRESETS = ("tiny", "small", "base", "paper")


@dataclass(frozen=True)
class DataConfig:
    """The good pictures, and what may be done to one that stays good."""

    train_data_dir: str | None = HfArg(default=None, help="folder of good pictures, or of one category (train/good)")
    dataset_name: str | None = HfArg(
        default=None, help="instead: a dataset on the Hub, or a folder of Parquet files; split train"
    )
    category: str | None = HfArg(
        default=None, help="sub-folder where the folder holds several; configuration of the dataset"
    )
    image_column: str = HfArg(default="image", help="column of the dataset that holds the pictures")
    streaming: bool = HfArg(default=False, help="read the dataset without downloading it first")
    resolution: int = HfArg(default=256, help="side in pixels that the networks train on")
    resize_to: int | None = HfArg(
        default=None, help="side that pictures are resized to; random crops of --resolution; default: no crops"
    )
    max_unreadable: float = HfArg(default=0.1, help="share of unreadable pictures that is tolerated")
    max_pixels: int = HfArg(default=100_000_000, help="larger pictures, textures and mattes are not read")
    horizontal_flip: bool = HfArg(default=False, help="flip half of the pictures left to right")
    vertical_flip: bool = HfArg(default=False, help="flip half of the pictures upside down")
    rotation: float = HfArg(default=0.0, help="turn pictures by up to so many degrees to either side")
    validation_fraction: float = HfArg(default=0.15, help="share of the good pictures held out")


@dataclass(frozen=True)
class SampleConfig(SynthesisConfig, DataConfig):
    """All that a training sample depends on."""

    seed: int = HfArg(default=0, help="of everything random")


@dataclass(frozen=True)
class TrainingConfig(SampleConfig):
    """Every setting of a run.

    Example:
        >>> from diffusionad_pipe.training.config import TrainingConfig
        >>> config = TrainingConfig(train_data_dir="my_good_pictures", max_train_steps=3000, rotation=30.0)
    """

    # Output and validation
    output_dir: str = HfArg(default="runs/diffusionad", help="where the pipeline, checkpoints and logs go")
    validation_repeats: int = HfArg(default=4, help="anomalous validation samples made of each")
    false_positive_rate: float = HfArg(
        default=0.01, help="of good pictures and of their pixels, that the thresholds aim at"
    )

    # Networks and noise
    pretrained_model_name_or_path: str | None = HfArg(
        default=None, help="a pipeline to start from, Hub id or folder: its weights that fit"
    )
    prediction_type: Literal["epsilon", "sample", "v_prediction"] = HfArg(
        default="sample", help="what the UNet predicts; the paper: epsilon"
    )
    patch_size: int = HfArg(default=4, help="side of the patches that become channels; the paper: 1")
    block_out_channels: list[int] = HfArg(
        default_factory=lambda: [64, 128, 192], help="width of each level of the UNet"
    )
    attention_size: int = HfArg(
        default=16, help="self-attention where features are 8 to so many pixels wide; the paper: 32"
    )
    num_attention_heads: int = HfArg(default=4, help="of self-attention")
    segmentation_channels: int = HfArg(default=32, help="width of the segmentation network; the paper: 64")
    segmentation_norm: Literal["batch", "group"] = HfArg(
        default="group", help="normalization of the segmentation network; the paper: batch"
    )
    small_timestep: int = HfArg(default=200, help="small noise scale at inference")
    large_timestep: int = HfArg(default=400, help="large noise scale at inference")
    guidance_scale: float = HfArg(default=1.0, help="of the norm-guided prediction at inference")
    distill: str | None = HfArg(
        default=None, help="teacher, Hub id or folder: its scales and guidance, in one UNet call a picture"
    )
    restore_anomalies: bool = HfArg(
        default=False, help="the UNet also learns what was below a synthetic anomaly; the paper: no"
    )
    timestep_boundary: int = HfArg(default=300, help="training: small scale below, large scale from here on")
    timestep_maximum: int = HfArg(default=1000, help="training: end of the large scale")

    # Optimization
    train_batch_size: int = HfArg(default=8, help="pictures a pass and process")
    gradient_accumulation_steps: int = HfArg(default=1, help="passes that are added up in a step")
    max_train_steps: int = HfArg(default=1000, help="optimizer steps")
    learning_rate: float = HfArg(default=4e-4, help="of the UNet")
    segmentation_learning_rate: float = HfArg(default=4e-4, help="of the segmentation network")
    lr_scheduler: str = HfArg(
        default="cosine", help="of diffusers.optimization: cosine, constant_with_warmup, linear, ..."
    )
    seg_schedule: Literal["same", "reference"] = HfArg(
        default="same", help="of the segmentation network: same, or reference: a cosine of period 10 steps"
    )
    lr_warmup_steps: int = HfArg(default=50, help="steps in which the learning rate rises")
    weight_decay: float = HfArg(default=0.0, help="of AdamW")
    max_grad_norm: float = HfArg(default=1.0, help="largest norm of the gradient; 0: no clipping")
    max_skipped_steps: int = HfArg(
        default=20, help="stop after so many steps in a row with a loss or gradient that is not finite"
    )
    ema_decay: float = HfArg(default=0.995, help="of the averaged weights that are saved; 0: no average")
    mixed_precision: Literal["auto", "no", "fp16", "bf16"] = HfArg(
        default="auto", help="auto: bf16 where the hardware multiplies in it, else no"
    )
    channels_last: bool = HfArg(default=False, help="memory layout: quicker for wide networks on a CPU with AMX")
    gradient_checkpointing: bool = HfArg(default=False, help="less memory, more time")
    torch_compile: bool = HfArg(default=False, help="compile the networks")
    cpu_threads: int = HfArg(default=0, help="on a CPU; 0: every core, shared among the processes")

    # Bookkeeping
    logging_steps: int = HfArg(default=10, help="steps between lines of log.jsonl")
    validation_steps: int = HfArg(default=100, help="steps between validations, with a grid of pictures in samples/")
    checkpointing_steps: int = HfArg(default=100, help="steps between checkpoints")
    checkpoints_total_limit: int = HfArg(default=2, help="checkpoints that are kept")
    resume_from_checkpoint: str | None = HfArg(default=None, help='a checkpoint folder, or "latest"')
    allow_config_changes: bool = HfArg(default=False, help="resume although settings differ that change the result")
    overwrite: bool = HfArg(default=False, help="replace the run that output_dir holds")
    dataloader_num_workers: int = HfArg(
        default=0, help="processes that make samples; 0: the training process, on its device"
    )
    save_dtype: Literal["fp32", "fp16", "bf16"] = HfArg(default="fp16", help="of the saved weights")
    report_to: str | None = HfArg(default=None, help="tensorboard, wandb or trackio, beside log.jsonl")

    # For the model card and the Hub
    dataset_title: str | None = HfArg(default=None, help="what the pictures are; default: the name of their folder")
    license: str | None = HfArg(
        default=None, help="of the weights, as the Hub names it: apache-2.0, cc-by-4.0, ...", aliases="--licence"
    )
    license_note: str | None = HfArg(
        default=None, help="a sentence on it, with the attribution that the pictures ask for", aliases="--licence_note"
    )
    push_to_hub: bool = HfArg(default=False, help="upload the pipeline at the end; log in with `hf auth login` first")
    hub_model_id: str | None = HfArg(default=None, help="default: the name of output_dir")


# What a student takes from its teacher.
TEACHERS_SETTINGS = "small_timestep", "large_timestep", "guidance_scale", "timestep_boundary", "timestep_maximum"

# Settings that may differ between a run and its resumption: they do not change what comes out. (Synthesis on a GPU or
# in workers on the CPU may round a mask's pixel otherwise.)
BOOKKEEPING = {
    "output_dir", "max_unreadable", "max_pixels", "max_skipped_steps", "cpu_threads", "logging_steps",
    "checkpointing_steps", "checkpoints_total_limit", "resume_from_checkpoint", "allow_config_changes", "overwrite",
    "dataloader_num_workers", "streaming", "report_to", "dataset_title", "license", "license_note", "push_to_hub",
    "hub_model_id",
}  # fmt: skip

# Where pictures, textures and mattes come from; what they are is compared by their contents.
SOURCES = {
    "train_data_dir", "dataset_name", "category", "image_column", "texture_dir", "foreground_dir", "foreground_model",
}  # fmt: skip


FORMER_NAMES = {"licence": "license", "licence_note": "license_note"}  # in the files of older runs


class SettingsHelp(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """The description as it is written, and every default."""


def parse_arguments(arguments: list[str], description: str | None) -> TrainingConfig:
    """The settings of a run: defaults, then the preset, then the YAML file of --config, then flags.

    Ends the process with one sentence and exit code 2 where they cannot be used.
    """
    parser = settings_parser(TrainingConfig, description)
    config, _ = parse_settings(parser, arguments)
    if config.restore_anomalies and config.prediction_type != "sample":
        parser.error(
            "--restore_anomalies needs --prediction_type sample: noise is no part of what was below an anomaly"
        )
    if config.distill and (config.prediction_type != "sample" or config.restore_anomalies):
        parser.error(
            "--distill needs --prediction_type sample and no --restore_anomalies: its UNet learns to predict what the "
            "teacher rebuilds"
        )
    built_in = [name for name in TEACHERS_SETTINGS if getattr(config, name) != getattr(TrainingConfig, name)]
    if config.distill and built_in:
        parser.error(f"--distill takes these from the teacher: {', '.join(built_in)}; leave them out")
    if not config.train_data_dir and not config.dataset_name:
        parser.error("--train_data_dir (or --dataset_name) is needed: the folder with pictures of good parts")
    return config


def settings_parser(settings: type[SampleConfig], description: str | None, prog: str | None = None) -> HfArgumentParser:
    """A parser with a flag for each of some settings, and --preset and --config for all; more may be added.

    Args:
        settings: the class whose fields become flags.
        description: what --help begins with.
        prog: name of the command.
    """
    parser = HfArgumentParser(
        settings, prog=prog, description=description, usage="%(prog)s [options]", formatter_class=SettingsHelp
    )
    parser.add_argument("--preset", choices=PRESETS, help="start from these settings; without one they are small's")
    parser.add_argument("--config", type=Path, help="YAML file with any settings of training, and `preset`")
    for field in dataclasses.fields(settings):
        if field.type is bool:  # transformers has --no_x for those alone that are true by default
            names = [f"no-{field.name}", *([] if field.default else [f"no-{field.name.replace('_', '-')}"])]
            flags = dict.fromkeys(f"--{name}" for name in names)
            parser.add_argument(*flags, dest=field.name, action="store_false", help=argparse.SUPPRESS)
    return parser


def parse_settings(parser: HfArgumentParser, arguments: list[str]) -> tuple[TrainingConfig, argparse.Namespace]:
    """All settings of a run by a parser that has flags for some or all of them.

    Args:
        parser: of [`settings_parser`].
        arguments: of the command line.

    Returns:
        The settings, and what else was parsed.
    """
    for argument in arguments:
        name = argument.partition("=")[0]
        if name.startswith("--") and name.endswith(("token", "api_key")):
            parser.error(f"{name}: secrets do not belong in arguments; use `wandb login` or `hf auth login`")
    given = parser.parse_args(arguments)

    settings = _read_settings(given.config, parser) if given.config else {}
    preset = given.preset or settings.get("preset")
    if preset is not None:
        if preset not in PRESETS:
            parser.error(f"{given.config}: preset must be one of {', '.join(PRESETS)}, not {preset!r}")
        settings = _read_settings(PRESETS_FOLDER / f"{preset}.yaml", parser) | settings
    settings.pop("preset", None)
    parser.set_defaults(**settings)
    found = vars(parser.parse_args(arguments))
    names = [field.name for field in dataclasses.fields(TrainingConfig)]
    try:
        config = TrainingConfig(**{name: found.pop(name) for name in names if name in found})
    except ValueError as error:
        parser.error(str(error))
    return config, argparse.Namespace(**found)


def changed_settings(config: TrainingConfig, stored: dict[str, typing.Any], images_known: bool = False) -> list[str]:
    """Sentences on the settings of a stored run that differ and change what comes out.

    Args:
        config: the settings now.
        stored: those of the run, as YAML gives them.
        images_known: whether the pictures themselves are compared, wherever they are.
    """
    ignored = BOOKKEEPING | SOURCES if images_known else BOOKKEEPING
    now, defaults = dataclasses.asdict(config), dataclasses.asdict(TrainingConfig())
    before = dataclasses.asdict(TrainingConfig(**{name: stored.get(name, defaults[name]) for name in defaults}))
    return [
        f"{name}: {before[name]!r} then, {now[name]!r} now"
        for name in now
        if name not in ignored and before[name] != now[name]
    ]


def _read_settings(path: Path, parser: HfArgumentParser) -> dict[str, typing.Any]:
    """The settings of a YAML file, each of its kind, and perhaps `preset`."""
    try:
        read = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        parser.error(f"--config {path} cannot be read: {error}")
    if not isinstance(read, dict):
        parser.error(f"--config {path} must hold settings as `name: value` lines")
    settings = {FORMER_NAMES.get(name, name): value for name, value in read.items()}
    kinds = {name: _plain_kind(kind) for name, kind in typing.get_type_hints(TrainingConfig).items()}
    for name, value in settings.items():
        if name == "preset":
            continue
        if name not in kinds:
            near = difflib.get_close_matches(str(name), kinds, n=1)
            parser.error(f"{path}: unknown setting {name!r}" + (f", did you mean {near[0]!r}?" if near else ""))
        if value is False and "no" in choices_of(TrainingConfig, name):
            value = "no"  # without quotes it is YAML's false
        try:
            settings[name] = _convert(value, kinds[name])
        except (TypeError, ValueError):
            parser.error(f"{path}: {name} must be of the kind {kinds[name].__name__}, not {value!r}")
    try:
        TrainingConfig(**{name: value for name, value in settings.items() if name != "preset"})
    except ValueError as error:
        parser.error(f"{path}: {error}")
    return settings


def _plain_kind(kind: typing.Any) -> type:
    """The type behind `X | None`, `list[X]` and a choice."""
    kind = typing.get_args(kind)[0] if isinstance(kind, types.UnionType) else kind
    origin = typing.get_origin(kind)
    return str if origin is Literal else origin or kind


def _convert(value: typing.Any, kind: type) -> typing.Any:
    if value is None:
        return None
    if kind is list:
        return [_convert(element, int) for element in value]
    if kind is bool or (kind is str and not isinstance(value, str)):
        if not isinstance(value, bool) or kind is str:
            raise TypeError
        return value
    if isinstance(value, bool) or (kind is int and float(value) != int(value)):  # true would be 1, and 1.9 too
        raise TypeError
    return kind(value)  # YAML reads 1e-4 as a string
