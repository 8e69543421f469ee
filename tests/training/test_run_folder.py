"""The folder of a training run: killed at any moment, shared, moved, changed by hand, of an older version."""

import hashlib
import json
import random
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image

from diffusionad_pipe.files.output_folder import OutputFolder
from diffusionad_pipe.files.record import PRIVATE
from diffusionad_pipe.training import run_folder, run_images
from diffusionad_pipe.training.config import TrainingConfig
from diffusionad_pipe.training.images import ImageInputs, read_good_images
from tests.helpers.script_processes import ScriptProcess
from tests.helpers.training_runs import ENVIRONMENT, HAZELNUT, TINY, assert_same_weights, command, run

LATEST = ["--resume_from_checkpoint", "latest"]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of eight small good pictures."""
    folder = tmp_path_factory.mktemp("pictures")
    for index, file in enumerate(sorted((HAZELNUT / "train" / "good").iterdir())[:8]):
        Image.open(file).resize((48, 48)).save(folder / f"{index}.png")
    return folder


@pytest.fixture(scope="module")
def config(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    settings = {"train_data_dir": str(images), "max_train_steps": 6, "checkpointing_steps": 1, "validation_steps": 2}
    path = tmp_path_factory.mktemp("config") / "tiny.yaml"
    path.write_text(yaml.safe_dump(TINY | settings | {"validation_repeats": 1, "train_batch_size": 2}))
    return path


@pytest.fixture(scope="module")
def whole(config: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """An undisturbed run, and the seconds that it took."""
    output, started = tmp_path_factory.mktemp("runs") / "whole", time.monotonic()
    result = run(command(config, output))
    assert result.returncode == 0, result.stderr
    return output, time.monotonic() - started


def contents(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_a_run_that_is_killed_at_any_moment_goes_on(
    whole: tuple[Path, float], config: Path, images: Path, tmp_path: Path, kills: int
) -> None:
    """By the same command, to the same weights; what is not the run's stays as it is."""
    undisturbed, seconds = whole
    moments, finished = random.Random(kills), 0
    before, output, mine = contents(images), tmp_path / "0", dict[str, str]()

    def check() -> None:
        folder = OutputFolder(output, "train")
        found = {name: digest for name, digest in contents(output).items() if not name.startswith(PRIVATE)}
        assert {name: found.pop(name) for name in mine} == mine
        assert all(folder.owns(name) for name in found), "half a file, or one without a record"
        for manifest in output.glob(f"*/{run_folder.MANIFEST}"):
            assert run_folder.find_damage(manifest.parent) is None
        assert contents(images) == before

    def finish(result: Any) -> None:
        assert result.returncode == 0, result.stderr
        check()
        assert_same_weights(undisturbed, output)
        assert_same_weights(undisturbed / "last", output / "last")

    while kills:
        started = time.monotonic()
        with ScriptProcess(command(config, output, *LATEST), ENVIRONMENT) as process:
            process.process.join(moments.uniform(0, seconds))
            if process.process.exitcode is None:
                process.send_signal(signal.SIGKILL)
            result = process.finish()
        if result.returncode != -signal.SIGKILL:
            finish(result)
            seconds = min(seconds, time.monotonic() - started)
            finished += 1
            output, mine = tmp_path / str(finished), {}
            continue
        kills -= 1
        if output.is_dir():
            check()
        if not mine and (output / "checkpoint-0000001").exists():
            for name in ("notes.txt", "samples/step-0000001-mine.png", "checkpoint-0000001/notes.txt"):
                (output / name).parent.mkdir(exist_ok=True)
                (output / name).write_text("mine")
                mine[name] = hashlib.sha256(b"mine").hexdigest()
    finish(run(command(config, output, *LATEST)))


def test_the_second_of_two_runs_in_one_folder_is_refused(config: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    with ScriptProcess(command(config, output, "--max_train_steps", "100000"), ENVIRONMENT) as process:
        process.wait_for((output / "log.jsonl").exists)
        for flags in ([], LATEST, ["--overwrite"]):
            result = run(command(config, output, *flags))
            assert result.returncode == 1 and "Traceback" not in result.stderr, result.stderr
            assert "another run of diffusionad is writing into this folder" in result.stderr
        process.send_signal(signal.SIGTERM)
        assert process.finish().returncode == 128 + signal.SIGTERM
    assert run_folder.find_checkpoint(output, "latest")


def test_a_resume_with_other_images_is_refused(
    whole: tuple[Path, float], config: Path, images: Path, tmp_path: Path
) -> None:
    output, data = tmp_path / "run", tmp_path / "data"
    shutil.copytree(whole[0], output)
    shutil.rmtree(output / "checkpoint-0000006")
    shutil.copytree(images, data)
    flags = [*LATEST, "--train_data_dir", str(data)]
    Image.new("RGB", (48, 48)).save(data / "3.png")
    Image.new("RGB", (48, 48), "red").save(data / "new.png")
    (data / "5.png").unlink()
    result = run(command(config, output, *flags))
    assert result.returncode == 1 and "was trained on something else" in result.stderr, result.stderr
    for change in ("3.png has another content", "new.png is new", "5.png is missing", "--allow_config_changes"):
        assert change in result.stderr
    # Others by their names, the same by their contents, in their order: they are the same.
    (data / "new.png").unlink()
    for file in images.iterdir():
        shutil.copy(file, data / f"part_{file.name}")
        (data / file.name).unlink(missing_ok=True)
    result = run(command(config, output, *flags))
    assert result.returncode == 0 and "at step 5" in result.stderr, result.stderr
    assert_same_weights(whole[0] / "last", output / "last")
    assert json.loads((output / "pictures.json").read_text())["pictures"][0]["name"] == "part_0.png"
    shutil.copy(data / "part_0.png", data / "part_8.png")
    assert run(command(config, output, *flags, "--allow_config_changes")).returncode == 0


def described(names: list[str], digests: list[str], held_out: list[bool] | None = None, **other: Any) -> dict[str, Any]:
    count = len(names)
    found = ImageInputs([f"data/{name}" for name in names], torch.zeros(count, 3, 1, 1), digests)
    chosen = torch.tensor(held_out or [False] * count)
    config = TrainingConfig(train_data_dir="data", texture_dir="none", foreground="none")
    return run_images.describe_images(config, found, chosen) | other


def test_what_differs_between_images_is_said(tmp_path: Path) -> None:
    def changes(*now: Any, **other: Any) -> list[str]:
        return run_images.changed_images(tmp_path, described(*now, **other))

    names, digests = ["a.png", "b\udcff.png", "sub/c.png"], ["1", "2", "3"]
    assert changes(names, digests) == []  # nothing is known
    text = run_images.as_text(described(names, digests))
    (tmp_path / run_images.STORED).write_text(text, encoding="utf-8")
    assert changes(names, digests) == [] and changes(["x.png", "y.png", "z.png"], digests) == []
    assert changes(names, ["1", "2", "4"]) == ["sub/c.png has another content"]
    assert changes([*names, "d.png"], [*digests, "1"]) == ["d.png is new"]  # twice is once more
    assert changes(names[:1], digests[:1]) == ["b\udcff.png is missing", "sub/c.png is missing"]
    assert changes(names[::-1], digests[::-1])[0] == "1: a.png (trained on) then, sub/c.png (trained on) now"
    assert changes(names, digests, [True, False, False]) == ["1: a.png (trained on) then, a.png (held out) now"]
    assert changes(names, digests, textures="9") == ["the textures have changed"]
    assert "mattes" in changes(names, digests, foregrounds="9")[0]
    assert changes(names, digests, teacher="9") == ["the teacher has changed"]
    many = changes([f"{index}.png" for index in range(30)], [f"new {index}" for index in range(30)])
    assert len(many) == 21 and many[-1] == "and 13 more"
    (tmp_path / run_images.STORED).write_text("[1]")
    with pytest.raises(ValueError, match=r"pictures\.json cannot be read .*--allow_config_changes"):
        changes(names, digests)


def test_an_image_of_a_dataset_without_files_is_known_by_its_pixels(images: Path, tmp_path: Path) -> None:
    import datasets

    def digests(folder: str, files: list[Path]) -> list[str]:
        features = datasets.Features({"image": datasets.Image()})
        table = datasets.Dataset.from_dict({"image": [str(file) for file in files]}, features=features)
        (tmp_path / folder).mkdir()
        table.to_parquet(tmp_path / folder / "train.parquet")
        return read_good_images(None, 32, dataset_name=str(tmp_path / folder)).digests

    files = sorted(images.iterdir())
    first, other = digests("first", files[:3]), digests("other", [files[2], files[0]])
    assert len(set(first)) == 3 and other == [first[2], first[0]]


def test_an_older_versions_run_is_left_alone(whole: tuple[Path, float], config: Path, tmp_path: Path) -> None:
    old = tmp_path / "old"
    shutil.copytree(whole[0], old, ignore=shutil.ignore_patterns(PRIVATE))
    before = contents(old)
    for flags in ([], LATEST, ["--overwrite"]):
        result = run(command(config, old, *flags))
        assert result.returncode == 1 and "holds a run without a record" in result.stderr, result.stderr
        cure = f"another --output_dir, with --resume_from_checkpoint {old / 'checkpoint-0000006'} to go on"
        assert cure in result.stderr and contents(old) == before
    checkpoint = old / "checkpoint-0000005"
    result = run(command(config, tmp_path / "new", "--resume_from_checkpoint", str(checkpoint)))
    assert result.returncode == 0, result.stderr
    assert_same_weights(whole[0] / "last", tmp_path / "new" / "last")


def test_overwriting_deletes_what_the_run_wrote_alone(whole: tuple[Path, float], config: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    shutil.copytree(whole[0], output)
    mine = [output / name for name in ("notes.txt", "samples/mine.png", "unet/mine.txt", "checkpoint-0000006/mine.txt")]
    for path in mine:
        path.write_text("mine")
    with OutputFolder(output, "evaluate") as other:
        other.write_text("results.json", "{}")
    (output / "samples" / "step-0000002.png").write_bytes(b"mine now")
    result = run(command(config, output, "--overwrite", "--max_train_steps", "1"))
    assert result.returncode == 1 and "step-0000002.png is no longer what diffusionad train wrote" in result.stderr
    (output / "samples" / "step-0000002.png").unlink()
    result = run(command(config, output, "--overwrite", "--max_train_steps", "1"))
    assert result.returncode == 0, result.stderr
    for name in ("notes.txt", "samples", "unet", "results.json"):
        assert name in result.stderr.split("what training did not write stays in")[1]
    assert [path.read_text() for path in mine] == ["mine"] * 4 and (output / "results.json").read_text() == "{}"
    assert [path.name for path in (output / "samples").iterdir() if path.name != "mine.png"] == ["step-0000001.png"]


def test_what_lies_where_a_run_writes_is_found_before_it_begins(
    whole: tuple[Path, float], config: Path, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    shutil.copytree(whole[0], output)
    (output / "README.md").write_text("# My model\n")
    result = run(command(config, output, *LATEST, "--max_train_steps", "8", "--allow_config_changes"))
    assert result.returncode == 1 and "README.md is no longer what diffusionad train wrote here" in result.stderr
    assert (output / "README.md").read_text() == "# My model\n" and "resumed from" not in result.stderr
    for checkpoint in run_folder.checkpoints(output):
        shutil.rmtree(checkpoint)
    result = run(command(config, output, *LATEST))
    assert result.returncode == 1 and "has no checkpoint any more to resume from" in result.stderr, result.stderr
    assert (output / "model_index.json").is_file()
