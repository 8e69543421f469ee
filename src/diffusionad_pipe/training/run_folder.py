"""The folder of a run: begun or resumed, with checkpoints that are whole or are not there, and published at the end.

Only what the folder's own record lists is ever replaced or deleted.
"""

import json
import logging
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError

from .. import DiffusionADPipeline
from ..files.output_error import OutputError
from ..files.output_folder import OutputFolder
from ..files.record import PRIVATE, sha256_of
from .config import TrainingConfig, changed_settings
from .images import FOREGROUNDS
from .run_images import STORED as IMAGES
from .run_images import as_text, changed_images
from .run_log import LOG

logger = logging.getLogger("train")

MANIFEST = "checksums.json"
SETTINGS, CARD, LOSSES, INDEX = "training_config.yaml", "README.md", "losses.png", "model_index.json"
PIPELINE = [
    INDEX, "scheduler/scheduler_config.json",
    *(f"{network}/{file}" for network in ("unet", "segmentation")
      for file in ("config.json", "diffusion_pytorch_model.safetensors")),
]  # fmt: skip
SAMPLE = r"step-\d+\.png"
PRODUCTS = [SETTINGS, IMAGES, LOG, CARD, LOSSES, *PIPELINE, *(f"last/{name}" for name in PIPELINE)]


def require_run_folder(folder: OutputFolder) -> None:
    """Refuse a folder that holds something else, before anything is written there.

    Raises:
        ValueError: names the folder and the cure.
    """
    if SETTINGS in folder.record or not _entries(folder):
        return
    if (folder.path / SETTINGS).is_file():
        go_on = (
            f", with --resume_from_checkpoint {newest[0]} to go on" if (newest := checkpoints(folder.path)[-1:]) else ""
        )
        raise ValueError(
            f"{folder.path} holds a run without a record of its files ({PRIVATE}), as older versions wrote it: use "
            f"another --output_dir{go_on}"
        )
    raise ValueError(f"{folder.path} is not empty and is no folder of a run: use another --output_dir")


def start_run(config: TrainingConfig, accelerator: Accelerator, folder: OutputFolder) -> Path | None:
    """Find what to resume from, or refuse an output folder with a run in it that the user may want to keep.

    Raises:
        ValueError: names the folder and the cure.
        OutputError: when something lies where this run would write.
    """
    wanted = config.resume_from_checkpoint
    resume_from = find_checkpoint(folder.path, wanted) if wanted else None
    if resume_from is not None:
        _require_same_settings(config, resume_from.parent)
    if accelerator.is_main_process:
        saved = any(name.startswith("checkpoint-") for name in folder.record)
        if wanted == "latest" and resume_from is None:
            if saved:
                raise ValueError(
                    f"{folder.path} has no checkpoint any more to resume from: give --overwrite instead of "
                    "--resume_from_checkpoint to begin anew, or use another --output_dir"
                )
            logger.info("no checkpoint in %s yet: the run begins at its first step", folder.path)
        elif wanted and not saved:
            pass  # what a run that was killed before its first checkpoint left is made again
        elif not is_resumed(folder, resume_from) and not config.overwrite and _entries(folder):
            raise ValueError(
                f"{folder.path} is not empty: use --resume_from_checkpoint latest, --overwrite, or another --output_dir"
            )
        samples = [path.name for path in folder.path.glob("samples/step-*.png") if re.fullmatch(SAMPLE, path.name)]
        folder.require_free(*PRODUCTS, *(f"samples/{name}" for name in samples))
        for checkpoint in checkpoints(folder.path):
            if not any(name.startswith(f"{checkpoint.name}/") for name in folder.record):
                raise ValueError(
                    f"{checkpoint} is no checkpoint of this run: move it away, or use another --output_dir"
                )
    accelerator.wait_for_everyone()
    return resume_from


def is_resumed(folder: OutputFolder, resume_from: Path | None) -> bool:
    """Whether a run goes on in its own folder; else it begins there, from another folder's checkpoint perhaps."""
    return resume_from is not None and resume_from.resolve().parent == folder.path.resolve()


def empty_run(folder: OutputFolder) -> None:
    """Throw a former run away, now that its successor has its pictures, and the mattes that it has just stored."""
    for name in {name.split("/")[0] for name in folder.record} - {FOREGROUNDS}:
        if (folder.path / name).is_dir():
            folder.remove_tree(name)
        else:
            folder.remove(name)
    if left := _entries(folder):
        logger.warning("what training did not write stays in %s: %s", folder.path, ", ".join(sorted(left)))


def store_run(config: TrainingConfig, folder: OutputFolder, images: dict[str, Any], first_step: int) -> None:
    """Store the settings and what is trained on, and forget what the log says of steps that a resumed run takes again.

    Args:
        config: the settings.
        folder: of the run.
        images: of [`run_images.describe_images`].
        first_step: steps that were taken before.
    """
    folder.write_text(SETTINGS, yaml.safe_dump(asdict(config), sort_keys=False))
    folder.write_text(IMAGES, as_text(images))
    log = folder.open_growing(LOG)
    if log.is_file():
        lines = [
            line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.endswith("}")
        ]  # whole ones
        folder.write_text(LOG, "".join(f"{line}\n" for line in lines if json.loads(line)["step"] <= first_step))


def require_same_images(config: TrainingConfig, run: Path, images: dict[str, Any]) -> None:
    """Refuse to resume with other pictures, textures, mattes or teacher than a run had.

    Args:
        config: the settings.
        run: its folder.
        images: of [`run_images.describe_images`].

    Raises:
        ValueError: says what differs.
    """
    if config.allow_config_changes:
        return
    if changes := changed_images(run, images):
        listed = "\n  ".join(changes)
        raise ValueError(
            f"{run} was trained on something else:\n  {listed}\n"
            "Resume with those, or give --allow_config_changes to go on with these"
        )
    if not (run / IMAGES).is_file():
        logger.warning("what %s was trained on is not known, it has no %s: nothing is compared", run, IMAGES)


def checkpoints(output_dir: Path) -> list[Path]:
    """All checkpoints of a run, oldest first."""
    return sorted(path for path in output_dir.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name))


def save_checkpoint(accelerator: Accelerator, folder: OutputFolder, step: int, total_limit: int) -> None:
    """Write the whole state, put it in its place, and remove the oldest beyond the limit. A kill leaves no half one.

    Raises:
        OutputError: when it cannot be written, on a full disk, say; what was written is removed, older checkpoints
            stay.
    """
    name, checksums = f"checkpoint-{step:07d}", dict[str, str]()

    def write(temporary: Path | None) -> None:
        """On every process, of which the first alone knows where."""
        try:
            (place,) = broadcast_object_list([str(temporary)])
            accelerator.save_state(place)
            accelerator.wait_for_everyone()
            if temporary is not None:
                checksums.update(_checksums(temporary))
                (temporary / MANIFEST).write_text(json.dumps(checksums, indent=1), encoding="utf-8")
                clear_place()
        except (
            OSError,
            RuntimeError,
            SafetensorError,
        ) as error:  # torch and safetensors have their own for a full disk
            raise OutputError(
                f"{folder.path / name} could not be written ({error}): free some space and "
                "--resume_from_checkpoint latest; older checkpoints are kept"
            ) from error

    def clear_place() -> None:
        """One of this name is damaged, or the run has gone on from one before."""
        if (folder.path / name).exists() and not folder.remove_tree(name):
            logger.warning("%s, which is damaged, is now %s", folder.path / name, folder.move_aside(name))

    if accelerator.is_main_process:
        folder.write_tree(name, write, checksums)
    else:
        write(None)
    accelerator.wait_for_everyone()  # those that were stopped leave now, and torchrun then ends who is left
    if accelerator.is_main_process:
        for old in checkpoints(folder.path)[: -max(total_limit, 1)]:
            folder.remove_tree(old.name)


def save_pipeline(pipeline: DiffusionADPipeline, folder: OutputFolder, name: str = "") -> None:
    """Write a pipeline, and put its files in the places of an older one's when all are there: a full disk leaves that
    as it was.

    Args:
        pipeline: to save.
        folder: of the run.
        name: of the sub-folder; the folder itself by default.
    """
    with folder.temporary() as temporary:
        pipeline.save_pretrained(temporary)
        folder.move_in(temporary, name, last=INDEX)


def find_checkpoint(output_dir: Path, wanted: str) -> Path | None:
    """The checkpoint to resume from.

    Args:
        output_dir: the run's folder.
        wanted: a checkpoint's folder, or `"latest"`: the newest that is whole; damaged ones are named.

    Returns:
        Its folder; None where the latest is wanted and there is none yet.

    Raises:
        ValueError: when the one that is wanted is not there, or all are damaged.
    """
    if wanted != "latest":
        if not Path(wanted).is_dir():
            raise ValueError(f"there is no checkpoint to resume from: {wanted}")
        if damage := find_damage(Path(wanted)):
            raise ValueError(f"{wanted} is damaged ({damage}): resume from another one, or from latest")
        return Path(wanted)
    found = checkpoints(output_dir)
    for candidate in reversed(found):
        damage = find_damage(candidate)
        if not damage:
            return candidate
        logger.error("%s is DAMAGED (%s): falling back to the one before", candidate, damage)
    if found:
        raise ValueError(
            f"{output_dir} has no whole checkpoint to resume from: give --overwrite instead of "
            "--resume_from_checkpoint to begin anew, or use another --output_dir"
        )
    return None


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
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != MANIFEST)
    return {path.relative_to(folder).as_posix(): sha256_of(path) for path in files}


def _entries(folder: OutputFolder) -> set[str]:
    """What lies in a run's folder, but for what a killed or refused run may leave before its first step."""
    names = {path.name for path in folder.path.iterdir()} if folder.path.is_dir() else set()
    return names - {PRIVATE, FOREGROUNDS}


def _require_same_settings(config: TrainingConfig, run: Path) -> None:
    stored = run / SETTINGS
    if config.allow_config_changes or not stored.is_file():
        return
    try:
        settings = yaml.safe_load(stored.read_text(encoding="utf-8"))
        changes = changed_settings(config, settings, images_known=(run / IMAGES).is_file())
    except (OSError, ValueError, TypeError, AttributeError, yaml.YAMLError) as error:
        raise ValueError(
            f"{stored} cannot be read ({error}): give --allow_config_changes to go on without comparing the settings"
        ) from error
    if changes:
        listed = "\n  ".join(changes)
        raise ValueError(
            f"{run} was begun with other settings:\n  {listed}\n"
            "Resume with those, or give --allow_config_changes to go on with these"
        )
