"""What a training run is asked for: presets, YAML files and flags, before anything is read or trained."""

from pathlib import Path

import pytest
import torch

from diffusionad_pipe.training.config import PRESETS, TrainingConfig, parse_arguments
from diffusionad_pipe.training.setup import build_networks
from tests.helpers.training_runs import ROOT


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as stopped:
        parse_arguments(list(arguments), None)
    assert stopped.value.code == 2
    return capsys.readouterr().err


def test_unusable_configurations(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def written(text: str) -> str:
        path = tmp_path / "config.yaml"
        path.write_text(text)
        return str(path)

    assert "did you mean 'train_data_dir'" in refusal(capsys, "--config", written("trian_data_dir: x"))
    assert "cannot be read" in refusal(capsys, "--config", "no/such.yaml")
    assert "cannot be read" in refusal(capsys, "--config", written("a: [1"))
    assert "name: value" in refusal(capsys, "--config", written("- 1"))
    for resolution in ("wide", "255.5", "true"):
        assert "kind int" in refusal(capsys, "--config", written(f"resolution: {resolution}"))
    assert "kind float" in refusal(capsys, "--config", written("rotation: true"))
    assert "share from 0 to 1" in refusal(capsys, "--thin_line_probability", "30")
    for share in ("-0.1", "null"):
        assert "share from 0 to 1" in refusal(capsys, "--config", written(f"validation_fraction: {share}"))
    assert "kind bool" in refusal(capsys, "--config", written("vertical_flip: 'no'"))
    assert "kind list" in refusal(capsys, "--config", written("block_out_channels: 64"))
    assert "none, random, threshold" in refusal(capsys, "--config", written("foreground: salient"))
    assert "'none', 'random', 'threshold'" in refusal(capsys, "--foreground", "salient")
    assert "tiny, small, base, paper" in refusal(capsys, "--config", written("preset: huge"))
    assert "--train_data_dir" in refusal(capsys)
    message = refusal(capsys, "--train_data_dir", "x", "--wandb_token=hf_secret")
    assert "secrets do not belong" in message and "hf_secret" not in message


def test_the_flag_wins_over_the_file_and_the_file_over_the_preset(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("preset: paper\nlearning_rate: 3e-4\ntrain_data_dir: x\nmixed_precision: no\n")
    config = parse_arguments(["--config", str(path), "--train_batch_size", "2"], None)
    assert (config.prediction_type, config.patch_size, config.seg_schedule) == ("epsilon", 1, "reference")
    assert (config.learning_rate, config.train_batch_size, config.mixed_precision) == (3e-4, 2, "no")
    config = parse_arguments(["--config", str(path), "--preset", "tiny"], None)
    assert (config.resolution, config.prediction_type) == (128, "sample")


def test_flags_of_yes_and_no() -> None:
    def parsed(*flags: str) -> TrainingConfig:
        return parse_arguments(["--train_data_dir", "x", *flags], None)

    assert parsed("--horizontal_flip").horizontal_flip and parsed("--horizontal-flip", "true").horizontal_flip
    for no in ("--no-grayscale_anomalies", "--no-grayscale-anomalies", "--grayscale_anomalies=false"):
        assert not parsed(no).grayscale_anomalies
    assert not parsed("--horizontal_flip", "--no-horizontal_flip").horizontal_flip


def test_the_former_spelling_of_license(tmp_path: Path) -> None:
    """In the file of an older run, and as a flag."""
    path = tmp_path / "training_config.yaml"
    path.write_text("licence: cc0-1.0\nlicence_note: a sentence\ntrain_data_dir: x\n")
    config = parse_arguments(["--config", str(path)], None)
    assert (config.license, config.license_note) == ("cc0-1.0", "a sentence")
    assert parse_arguments(["--config", str(path), "--licence", "mit"], None).license == "mit"


def test_the_default_is_the_preset_small() -> None:
    default, small = (
        parse_arguments([*preset, "--train_data_dir", "x"], None) for preset in ((), ("--preset", "small"))
    )
    assert default == small


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_build_their_networks(preset: str) -> None:
    config = parse_arguments(["--preset", preset, "--train_data_dir", "x"], None)
    with torch.device("meta"):
        unet, segmentation, _ = build_networks(config)
    count = sum(p.numel() for p in unet.parameters()), sum(p.numel() for p in segmentation.parameters())
    if preset == "paper":
        assert count == (131_654_403, 28_373_569)
    else:
        assert count[0] < 131_654_403 and config.prediction_type == "sample"


def test_shipped_configurations_can_be_read() -> None:
    for path in sorted((ROOT / "training" / "configs").rglob("*.yaml")):
        parse_arguments(["--config", str(path), "--train_data_dir", "x"], None)
