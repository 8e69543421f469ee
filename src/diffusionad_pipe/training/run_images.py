"""What a run was trained on, and by which teacher, stored in its folder: a resumed run can tell whether it still is."""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch

from .. import DiffusionADPipeline
from ..images.files import shown
from ..runtime.weights_digest import weights_digest
from .config import TrainingConfig
from .images import ImageInputs, mattes_digest, textures_digest

STORED = "pictures.json"
OTHERS = {  # what is compared as a whole -> what is said where it differs
    "textures": "the textures have changed",
    "foregrounds": "the mattes, or the model that makes them, have changed",
    "teacher": "the teacher has changed",
}
TEACHERS_SCALES = "small_timestep", "large_timestep", "guidance_scale"
LISTED = 20  # differences that a message names


def describe_images(
    config: TrainingConfig,
    images: ImageInputs,
    is_held_out: torch.Tensor,
    teacher: DiffusionADPipeline | None = None,
) -> dict[str, Any]:
    """The pictures of a run in their order, and digests of its textures, mattes and teacher, as JSON stores them.

    Args:
        config: the settings of the run.
        images: that were read by them.
        is_held_out: bool `[N]`.
        teacher: of a student.
    """
    rows = zip(images.names, images.digests, is_held_out.tolist(), strict=True)
    return {
        "pictures": [
            {"name": _short_name(name, config), "sha256": digest, "held_out": held_out}
            for name, digest, held_out in rows
        ],
        "textures": textures_digest(config.texture_dir),
        "foregrounds": mattes_digest(
            config.foreground, images.names, folder=config.foreground_dir, model=config.foreground_model
        ),
        "teacher": _teacher_digest(teacher) if teacher is not None else None,
    }


def as_text(described: dict[str, Any]) -> str:
    """JSON with a picture a line; names that are no Unicode are escaped."""
    rows = ",\n".join(json.dumps(row) for row in described["pictures"])
    others = "".join(f',\n"{name}": {json.dumps(described[name])}' for name in OTHERS)
    return f'{{"pictures": [\n{rows}\n]{others}}}\n'


def changed_images(folder: Path, now: dict[str, Any]) -> list[str]:
    """What differs from what a run was trained on; nothing where that is not known.

    A picture is known by its content: renamed ones are the same as long as their order is, on which all samples depend.

    Args:
        folder: the run's, with its file `STORED`.
        now: of [`describe_images`].

    Returns:
        Sentences, of which those on single pictures are `LISTED` at most.

    Raises:
        ValueError: when the file is damaged.
    """
    try:
        stored = json.loads((folder / STORED).read_text(encoding="utf-8"))
        before = [(row["name"], row["sha256"], row["held_out"]) for row in stored["pictures"]]
        others = [sentence for name, sentence in OTHERS.items() if stored[name] != now[name]]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"{folder / STORED} cannot be read ({error!r}): give --allow_config_changes to go on without comparing "
            "the pictures"
        ) from error
    after = [(row["name"], row["sha256"], row["held_out"]) for row in now["pictures"]]
    changes = _changed_rows(before, after)
    if len(changes) > LISTED:
        changes = [*changes[:LISTED], f"and {len(changes) - LISTED} more"]
    return [*changes, *others]


def _teacher_digest(teacher: DiffusionADPipeline) -> str:
    guidance = [teacher.scheduler.config[name] for name in TEACHERS_SCALES]
    return hashlib.sha256(repr((weights_digest(teacher.unet), guidance)).encode()).hexdigest()


def _changed_rows(before: Sequence[tuple[str, str, bool]], after: Sequence[tuple[str, str, bool]]) -> list[str]:
    if [row[1:] for row in before] == [row[1:] for row in after]:
        return []
    contents_before, contents_after = (Counter(digest for _, digest, _ in rows) for rows in (before, after))
    gone = [name for name, digest, _ in before if _take(contents_after, digest)]
    new = [name for name, digest, _ in after if _take(contents_before, digest)]
    changes = [f"{name} has another content" for name in new if name in gone]
    changes += [f"{name} is new" for name in new if name not in gone]
    changes += [f"{name} is missing" for name in gone if name not in new]
    if changes:
        return changes
    # The same pictures, otherwise arranged.
    return [
        f"{place}: {_described(was)} then, {_described(now)} now"
        for place, (was, now) in enumerate(zip_longest(before, after), start=1)
        if was[1:] != now[1:]
    ]


def _take(contents: Counter[str], digest: str) -> bool:
    """Take one picture of this content; whether there is none left."""
    contents[digest] -= 1
    return contents[digest] < 0


def _described(row: tuple[str, str, bool]) -> str:
    return f"{row[0]} ({'held out' if row[2] else 'trained on'})"


def _short_name(name: str, config: TrainingConfig) -> str:
    """Relative to the folder of the pictures; where that lies may change."""
    if config.dataset_name is not None:
        return name.removeprefix(config.dataset_name)
    return Path(os.path.relpath(name, shown(config.train_data_dir or "."))).as_posix()
