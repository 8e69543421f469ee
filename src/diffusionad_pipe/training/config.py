"""The settings of a training run: one dataclass, filled from defaults, a preset, a YAML file and flags."""

import argparse
import dataclasses
import difflib
import types
import typing
from dataclasses import dataclass
from pathlib import Path

import yaml

from ..synthesis.foregrounds import FOREGROUND_PROVIDERS

PRESETS_FOLDER = Path(__file__).parent / "presets"
PRESETS = ("tiny", "small", "base", "paper")


@dataclass
class TrainingConfig:
    """Every setting; each is a key of the YAML file and a flag, and the flag wins."""

    # Data
    train_data_dir: str | None = None  # folder of good pictures, or of one category (train/good)
    dataset_name: str | None = None  # instead: a dataset on the Hub, or a folder of Parquet files; split train
    category: str | None = None  # sub-folder where the folder holds several; configuration of the dataset
    image_column: str = "image"  # of the dataset
    streaming: bool = False  # read the dataset without downloading it first
    output_dir: str = "runs/diffusionad"  # where the pipeline, checkpoints and logs go
    resolution: int = 256  # side in pixels that the networks train on
    resize_to: int | None = None  # side that pictures are resized to; random crops of --resolution; default: no crops
    max_unreadable: float = 0.1  # share of unreadable pictures that is put up with
    max_pixels: int = 100_000_000  # larger pictures, textures and mattes are not read
    horizontal_flip: bool = False  # flip half of the pictures left to right
    vertical_flip: bool = False  # flip half of the pictures upside down
    rotation: float = 0.0  # turn pictures by up to so many degrees to either side
    validation_fraction: float = 0.15  # share of the good pictures held out
    validation_repeats: int = 4  # anomalous validation samples made of each
    false_positive_rate: float = 0.01  # of good pictures and of their pixels, that the thresholds aim at

    # Synthetic anomalies
    texture_dir: str | None = None  # textures, flat or like DTD; default: the shipped CC0 ones; "none": none
    foreground: str = "threshold"  # where anomalies may be: none, random, threshold, folder or transformers
    foreground_dir: str | None = None  # mattes for "folder"; default: DISthresh or thresh beside the folder train
    foreground_model: str | None = None  # segmentation model for "transformers": Hub id or folder
    anomaly_probability: float = 0.5  # share of anomalous draws
    texture_probability: float = 0.5  # share of anomalies that are textures: 0.5 for objects, 1 for textures
    procedural_probability: float = 0.0  # share of textures that are drawn: clouds and plain colours
    grayscale_anomalies: bool = True  # anomalies on grey pictures are grey; the paper: no
    thin_line_probability: float = 0.0  # share of anomalies that are thin lines: scratches, cracks; the paper: 0
    soft_edge_probability: float = 0.0  # share of anomalies with blurred edges: stains, shades; the paper: 0

    # Networks and noise
    pretrained_model_name_or_path: str | None = None  # a pipeline to start from, Hub id or folder: its weights that fit
    prediction_type: str = "sample"  # what the UNet predicts: epsilon (the paper), sample or v_prediction
    patch_size: int = 4  # side of the patches that become channels; the paper: 1
    block_out_channels: tuple[int, ...] = (64, 128, 192)  # width of each level of the UNet
    attention_size: int = 16  # self-attention where features are 8 to so many pixels wide; the paper: 32
    num_attention_heads: int = 4
    segmentation_channels: int = 32  # width of the segmentation network; the paper: 64
    segmentation_norm: str = "group"  # batch (the paper) or group
    small_timestep: int = 200  # noise scales at inference
    large_timestep: int = 400
    guidance_scale: float = 1.0
    distill: str | None = None  # teacher, Hub id or folder: its scales and guidance, in one UNet call a picture
    restore_anomalies: bool = False  # the UNet also learns what was below a synthetic anomaly; the paper: no
    timestep_boundary: int = 300  # training: small scale below, large scale from here on
    timestep_maximum: int = 1000  # training: end of the large scale

    # Optimisation
    train_batch_size: int = 8  # pictures a pass and process
    gradient_accumulation_steps: int = 1
    max_train_steps: int = 1000  # optimizer steps
    learning_rate: float = 4e-4  # of the UNet
    segmentation_learning_rate: float = 4e-4
    lr_scheduler: str = "cosine"  # of diffusers.optimization: cosine, constant_with_warmup, linear, ...
    seg_schedule: str = "same"  # of the segmentation network: same, or reference: a cosine of period 10 steps
    lr_warmup_steps: int = 50
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0  # 0: no clipping
    max_skipped_steps: int = 20  # stop after so many steps in a row with a loss or gradient that is not finite
    ema_decay: float = 0.995  # of the averaged weights that are saved; 0: no average
    mixed_precision: str = "auto"  # no, fp16, bf16, or auto: bf16 where the hardware multiplies in it, else no
    channels_last: bool = False  # memory layout: quicker for wide networks on a CPU with AMX
    gradient_checkpointing: bool = False  # less memory, more time
    torch_compile: bool = False
    cpu_threads: int = 0  # on a CPU; 0: every core, shared among the processes

    # Bookkeeping
    seed: int = 0
    logging_steps: int = 10
    validation_steps: int = 100  # also a picture grid in samples/
    checkpointing_steps: int = 100
    checkpoints_total_limit: int = 2
    resume_from_checkpoint: str | None = None  # a checkpoint folder, or "latest"
    allow_config_changes: bool = False  # resume although settings differ that change the result
    overwrite: bool = False  # throw away what output_dir holds
    dataloader_num_workers: int = 0  # 0: synthesis in the training process, on its device
    save_dtype: str = "fp16"  # of the saved weights: fp32, fp16 or bf16
    report_to: str | None = None  # tensorboard, wandb or trackio, beside log.jsonl

    # For the model card and the Hub
    dataset_title: str | None = None  # what the pictures are; default: the name of their folder
    license: str | None = None  # of the weights, as the Hub names it: apache-2.0, cc-by-4.0, ...
    license_note: str | None = None  # a sentence on it, with the attribution that the pictures ask for
    push_to_hub: bool = False  # upload the pipeline at the end; log in with `hf auth login` first
    hub_model_id: str | None = None  # default: the name of output_dir


CHOICES = {
    "foreground": FOREGROUND_PROVIDERS,
    "prediction_type": ("epsilon", "sample", "v_prediction"),
    "segmentation_norm": ("batch", "group"),
    "seg_schedule": ("same", "reference"),
    "mixed_precision": ("auto", "no", "fp16", "bf16"),
    "save_dtype": ("fp32", "fp16", "bf16"),
}

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


def parse_arguments(arguments: list[str], description: str | None) -> TrainingConfig:
    """Defaults, then the preset, then the YAML file of --config, then flags."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, help="start from configs/<preset>.yaml; default: small")
    parser.add_argument("--config", type=Path, help="YAML file with any of the settings below, and `preset`")
    comments = {
        line.split(":")[0].strip(): line.partition("#")[2].strip()
        for line in Path(__file__).read_text(encoding="utf-8").splitlines()
        if ":" in line and "=" in line
    }
    kinds = {name: _plain_kind(kind) for name, kind in typing.get_type_hints(TrainingConfig).items()}
    for field in dataclasses.fields(TrainingConfig):
        kind = kinds[field.name]
        options: dict[str, typing.Any] = {"help": f"{comments.get(field.name, '')} (default: {field.default})".strip()}
        if kind is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif kind is tuple:
            options |= {"type": int, "nargs": "+"}
        else:
            options |= {"type": kind, "choices": CHOICES.get(field.name)}
        flags_of_it = [f"--{field.name}"]
        if field.name == "max_pixels":  # messages on pictures call it so
            flags_of_it.append("--max-pixels")
        parser.add_argument(*flags_of_it, default=None, **options)
    for argument in arguments:
        name = argument.partition("=")[0]
        if name.startswith("--") and name.endswith(("token", "api_key")):
            parser.error(f"{name}: secrets do not belong in arguments; use `wandb login` or `hf auth login`")
    flags = vars(parser.parse_args(arguments))

    preset, config_file = flags.pop("preset"), flags.pop("config")
    settings = _read_yaml(config_file, parser) if config_file else {}
    preset = preset or settings.pop("preset", None)
    if preset is not None:
        if preset not in PRESETS:
            parser.error(f"{config_file}: preset must be one of {', '.join(PRESETS)}, not {preset!r}")
        settings = _read_yaml(PRESETS_FOLDER / f"{preset}.yaml", parser) | settings
    settings.pop("preset", None)
    for name in settings:
        if name not in kinds:
            near = difflib.get_close_matches(name, kinds, n=1)
            parser.error(f"{config_file}: unknown setting {name!r}" + (f", did you mean {near[0]!r}?" if near else ""))
    settings |= {name: value for name, value in flags.items() if value is not None}
    for name, value in settings.items():
        if value is False and "no" in CHOICES.get(name, ()):
            value = "no"  # without quotes it is YAML's false
        try:
            settings[name] = _convert(value, kinds[name])
        except (TypeError, ValueError):
            parser.error(f"{config_file}: {name} must be of the kind {kinds[name].__name__}, not {value!r}")
        is_share = name.endswith(("_probability", "_fraction"))
        if is_share and (settings[name] is None or not 0 <= settings[name] <= 1):
            parser.error(f"{config_file or '--' + name}: {name} must be a share from 0 to 1, not {value!r}")
        if name in CHOICES and settings[name] not in CHOICES[name]:
            parser.error(f"{config_file}: {name} must be one of {', '.join(CHOICES[name])}, not {value!r}")
    config = TrainingConfig(**settings)
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


def changed_settings(config: TrainingConfig, stored: dict[str, typing.Any], images_known: bool = False) -> list[str]:
    """Sentences on the settings of a stored run that differ and change what comes out.

    Args:
        config: the settings now.
        stored: those of the run, as YAML gives them.
        images_known: whether the pictures themselves are compared, wherever they are.
    """
    ignored = BOOKKEEPING | SOURCES if images_known else BOOKKEEPING
    defaults = {field.name: field.default for field in dataclasses.fields(TrainingConfig)}
    stored = to_plain(TrainingConfig(**{name: stored.get(name, default) for name, default in defaults.items()}))
    now = to_plain(config)
    return [
        f"{name}: {stored[name]!r} then, {now[name]!r} now"
        for name in now
        if name not in ignored and stored[name] != now[name]
    ]


def to_plain(config: TrainingConfig) -> dict[str, typing.Any]:
    """As YAML stores it: lists for tuples."""
    return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(config).items()}


def _plain_kind(kind: typing.Any) -> typing.Any:
    """The type behind `X | None` and `tuple[X, ...]`."""
    kind = typing.get_args(kind)[0] if isinstance(kind, types.UnionType) else kind
    return typing.get_origin(kind) or kind


def _convert(value: typing.Any, kind: typing.Any) -> typing.Any:
    if value is None:
        return None
    if kind is tuple:
        return tuple(_convert(element, int) for element in value)
    if kind is bool or (kind is str and not isinstance(value, str)):
        if not isinstance(value, bool) or kind is str:
            raise TypeError
        return value
    if isinstance(value, bool) or (kind is int and float(value) != int(value)):  # true would be 1, and 1.9 too
        raise TypeError
    return kind(value)  # YAML reads 1e-4 as a string


def _read_yaml(path: Path, parser: argparse.ArgumentParser) -> dict[str, typing.Any]:
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        parser.error(f"--config {path} cannot be read: {error}")
    if not isinstance(settings, dict):
        parser.error(f"--config {path} must hold settings as `name: value` lines")
    return settings
