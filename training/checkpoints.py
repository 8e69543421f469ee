"""Checkpoints that are whole or are not there: written beside their final name, listed by checksum, then renamed."""

import hashlib
import json
import logging
import os
import shutil
from pathlib import Path

from accelerate import Accelerator

logger = logging.getLogger("train")

MANIFEST = "checksums.json"


def checkpoints(output_dir: Path) -> list[Path]:
    """All checkpoints of a run, oldest first."""
    return sorted(output_dir.glob("checkpoint-*"))


def save_checkpoint(accelerator: Accelerator, output_dir: Path, step: int, total_limit: int) -> None:
    """Write the whole state, rename it, and remove the oldest beyond the limit. A kill leaves no half checkpoint.

    Raises:
        OSError: when the disk is full, say; what was written is removed and older checkpoints stay.
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
    finally:
        if accelerator.is_main_process:
            shutil.rmtree(temporary, ignore_errors=True)
    if accelerator.is_main_process:
        for old in checkpoints(output_dir)[: -max(total_limit, 1)]:
            shutil.rmtree(old)


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
