"""The folder of a run: begun or resumed, with checkpoints that are whole or are not there, and published at the end."""

import hashlib
import json
import logging
import os
import shutil
from pathlib import Path

import yaml
from accelerate import Accelerator
from safetensors import SafetensorError
from torch.distributed.checkpoint.api import CheckpointException
from training_config import TrainingConfig, changed_settings, to_plain

from diffusionad_pipe import DiffusionADPipeline
from diffusionad_pipe.image_files import write_atomically

logger = logging.getLogger("train")

MANIFEST = "checksums.json"
FOREGROUNDS = "foregrounds"  # where mattes are cached


def start_run(config: TrainingConfig, accelerator: Accelerator) -> Path | None:
    """Find what to resume from, or refuse an output folder that holds something else."""
    output_dir, stored = Path(config.output_dir), Path(config.output_dir) / "training_config.yaml"
    resume_from = find_checkpoint(output_dir, config.resume_from_checkpoint) if config.resume_from_checkpoint else None
    if resume_from is not None and stored.is_file():
        changes = changed_settings(config, yaml.safe_load(stored.read_text(encoding="utf-8")))
        if changes and not config.allow_config_changes:
            listed = "\n  ".join(changes)
            raise ValueError(
                f"{output_dir} was begun with other settings:\n  {listed}\n"
                "Resume with those, or give --allow_config_changes to go on with these"
            )
    if resume_from is None and accelerator.is_main_process and output_dir.is_dir() and any(output_dir.iterdir()):
        if not config.overwrite:
            raise ValueError(
                f"{output_dir} is not empty: use --resume_from_checkpoint latest, --overwrite, or another folder"
            )
        if {path.name for path in output_dir.iterdir()} != {FOREGROUNDS} and not stored.is_file():
            raise ValueError(f"{output_dir} is no folder of a run, and --overwrite would empty it: use another folder")
        shutil.rmtree(output_dir / FOREGROUNDS, ignore_errors=True)  # they may be another model's
    accelerator.wait_for_everyone()
    return resume_from


def empty_run(output_dir: Path) -> None:
    """Throw a former run away, now that its successor has its pictures, and the mattes that it has just stored."""
    for path in output_dir.iterdir() if output_dir.is_dir() else ():
        if path.is_dir() and not path.is_symlink():
            if path.name != FOREGROUNDS:
                shutil.rmtree(path)
        else:
            path.unlink()


def store_run(config: TrainingConfig, first_step: int) -> None:
    """Store the configuration, and forget what the log says of steps that a resumed run takes again."""
    output_dir = Path(config.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    text = yaml.safe_dump(to_plain(config), sort_keys=False)
    write_atomically(output_dir / "training_config.yaml", lambda path: path.write_text(text, encoding="utf-8"))
    log = output_dir / "log.jsonl"
    if log.is_file():
        lines = [line for line in log.read_text(encoding="utf-8").splitlines() if line.endswith("}")]  # whole ones
        kept = "".join(f"{line}\n" for line in lines if json.loads(line)["step"] <= first_step)
        write_atomically(log, lambda path: path.write_text(kept, encoding="utf-8"))


def checkpoints(output_dir: Path) -> list[Path]:
    """All checkpoints of a run, oldest first."""
    return sorted(output_dir.glob("checkpoint-*"))


def save_checkpoint(accelerator: Accelerator, output_dir: Path, step: int, total_limit: int) -> None:
    """Write the whole state, rename it, and remove the oldest beyond the limit. A kill leaves no half checkpoint.

    Raises:
        OSError: when it cannot be written, on a full disk, say; what was written is removed, older checkpoints stay.
    """
    temporary, final = output_dir / ".checkpoint-writing", output_dir / f"checkpoint-{step:07d}"
    if accelerator.is_main_process:
        shutil.rmtree(temporary, ignore_errors=True)
    accelerator.wait_for_everyone()
    try:
        accelerator.save_state(str(temporary))
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            (temporary / MANIFEST).write_text(json.dumps(_checksums(temporary), indent=1), encoding="utf-8")
            if final.exists():  # damaged, or this run would not have come here again
                shutil.rmtree(final)
            os.replace(temporary, final)
        accelerator.wait_for_everyone()  # those that were stopped leave now, and torchrun then ends who is left
    # torch, FSDP's writer and safetensors have errors of their own for a full disk.
    except (OSError, RuntimeError, CheckpointException, SafetensorError) as error:
        # FSDP's holds (error, trace) of each process.
        cause = next(iter(error.failures.values()))[0] if isinstance(error, CheckpointException) else error
        raise OSError(
            f"{final} could not be written ({cause}): free some space and --resume_from_checkpoint latest; "
            "older checkpoints are kept"
        ) from error
    finally:
        if accelerator.is_main_process:
            shutil.rmtree(temporary, ignore_errors=True)
    if accelerator.is_main_process:
        for old in checkpoints(output_dir)[: -max(total_limit, 1)]:
            shutil.rmtree(old)


def save_pipeline(pipeline: DiffusionADPipeline, folder: Path) -> None:
    """Write a pipeline, and put its files in the places of an older one's when all are there: a full disk leaves that
    as it was."""
    temporary = folder / ".pipeline-writing"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        pipeline.save_pretrained(temporary)
        for path in [path for path in temporary.rglob("*") if path.is_file()]:
            place = folder / path.relative_to(temporary)
            place.parent.mkdir(parents=True, exist_ok=True)
            os.replace(path, place)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def find_checkpoint(output_dir: Path, wanted: str) -> Path:
    """The checkpoint to resume from.

    Args:
        output_dir: the run's folder.
        wanted: a checkpoint's folder, or `"latest"`: the newest that is whole; damaged ones are named.

    Raises:
        ValueError: when there is none.
    """
    if wanted != "latest":
        if not Path(wanted).is_dir():
            raise ValueError(f"there is no checkpoint to resume from: {wanted}")
        if damage := find_damage(Path(wanted)):
            raise ValueError(f"{wanted} is damaged ({damage}): resume from another one, or from latest")
        return Path(wanted)
    for candidate in reversed(checkpoints(output_dir)):
        damage = find_damage(candidate)
        if not damage:
            return candidate
        logger.error("%s is DAMAGED (%s): falling back to the one before", candidate, damage)
    raise ValueError(f"there is no checkpoint to resume from: {output_dir}")


def find_damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint, or None."""
    try:
        expected = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return f"{MANIFEST} is missing or broken"
    found = _checksums(folder)
    for name, checksum in expected.items():
        if name not in found:
            return f"{name} is missing"
        if found[name] != checksum:
            return f"{name} has changed"
    return None


def _checksums(folder: Path) -> dict[str, str]:
    sums = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST):
        with open(path, "rb") as file:
            sums[str(path.relative_to(folder))] = hashlib.file_digest(file, "sha256").hexdigest()
    return sums
