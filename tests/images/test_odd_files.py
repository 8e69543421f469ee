"""Every way to read a picture accepts and refuses the same odd files, with the same sentence."""

import json
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from detection import Settings, run_model
from PIL import Image
from typer.testing import CliRunner

from diffusionad_pipe import DiffusionADImageProcessor, DiffusionADPipeline, open_image
from diffusionad_pipe.cli import app
from diffusionad_pipe.data.checks import check_data
from diffusionad_pipe.evaluation.calibration import calibrate
from diffusionad_pipe.evaluation.evaluate import evaluate
from diffusionad_pipe.export.detector import to_rgb_uint8
from diffusionad_pipe.images.files import OR_RAISE_MAX_PIXELS, ImageFileError, shown
from diffusionad_pipe.images.sources import from_file
from diffusionad_pipe.training.config import TrainingConfig
from diffusionad_pipe.training.images import read_good_images
from diffusionad_pipe.training.preview import preview_synthesis
from tests.helpers.odd_files import OddFile, write_odd_files
from tests.helpers.tiny_pipeline import build_tiny_pipeline


class OddFolder:
    """All odd files in one folder `test/good` of a dataset, and what [`open_image`] says of each.

    Args:
        root: of the dataset.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.folder = root / "test" / "good"
        self.files = write_odd_files(self.folder)
        self.paths = {shown(self.folder / name): self.folder / name for name in self.files}
        self.sentences: dict[str, str] = {}  # of those that are refused, by path
        for name, path in self.paths.items():
            try:
                open_image(path)
            except ImageFileError as error:
                self.sentences[name] = str(error)
        (root / "train" / "good").mkdir(parents=True)
        for index in range(3):
            pixels = np.random.default_rng(index).integers(0, 256, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / "train" / "good" / f"{index}.png")


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> OddFolder:
    return OddFolder(tmp_path_factory.mktemp("odd") / "part")


@pytest.fixture(scope="module")
def pipe() -> DiffusionADPipeline:
    pipe = build_tiny_pipeline()
    pipe.register_to_config(image_threshold=0.5, pixel_threshold=0.5)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_each_is_read_as_it_shows_or_refused_for_its_reason(odd: OddFolder) -> None:
    assert len(odd.files) >= 120
    wrong = []
    for (path, file), name in zip(odd.paths.items(), odd.files):
        expected: OddFile = odd.files[name]
        sentence = odd.sentences.get(path)
        if expected.refusal:
            if sentence is None or not sentence.startswith(f"{path}: ") or expected.refusal not in sentence:
                wrong.append(f"{name}: not refused for {expected.refusal}: {sentence}")
        elif sentence is not None:
            wrong.append(sentence)
        elif expected.shows is not None:
            pixels = to_rgb_uint8(open_image(file)).astype(float)
            shows = expected.shows if expected.shows.ndim == 3 else np.dstack([expected.shows] * 3)
            if pixels.shape != shows.shape or np.abs(pixels - shows).max() > expected.tolerance:
                wrong.append(f"{name}: {pixels.shape}, {shows.shape}, {np.abs(pixels - shows).max()}")
    assert wrong == []


def sentences_of(messages: Iterator[str], odd: OddFolder) -> dict[str, str]:
    """The sentences in messages by the path that each begins with."""
    found = {}
    for message in messages:
        for path in odd.paths:
            if message.startswith(f"{path}: "):
                found[path] = message
    return found


def test_check_data_finds_them_all_before(odd: OddFolder) -> None:
    problems = [problem.message for problem in check_data(odd.root) if problem.severity == "error"]
    twins = [message for message in problems if "the same picture as" in message]
    assert sentences_of(iter([message for message in problems if message not in twins]), odd) == odd.sentences
    assert len(problems) - len(twins) == len(odd.sentences)


def test_training_and_its_preview_leave_out_the_same(odd: OddFolder, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    images = read_good_images(str(odd.folder), 16, max_unreadable=1)
    assert set(images.names) == set(odd.paths) - set(odd.sentences)
    messages = [record.getMessage().removeprefix("left out: ") for record in caplog.records]
    assert sentences_of(iter(messages), odd) == odd.sentences
    caplog.clear()
    config = TrainingConfig(train_data_dir=str(odd.folder), resolution=16, max_unreadable=1, foreground="none")
    preview_synthesis(config, count=1, sample_count=1)
    messages = [record.getMessage().removeprefix("left out: ") for record in caplog.records]
    assert sentences_of(iter(messages), odd) == odd.sentences


def test_calibration_leaves_out_the_same(odd: OddFolder, pipe: DiffusionADPipeline) -> None:
    result = calibrate(pipe, [from_file(path) for path in odd.paths.values()], false_positive_rate=0.5)
    assert sentences_of(iter(result.failures), odd) == odd.sentences
    assert len(result.failures) == len(odd.sentences)


def test_evaluation_lists_the_same(odd: OddFolder, pipe: DiffusionADPipeline, tmp_path: Path) -> None:
    pipe.save_pretrained(tmp_path / "model")
    (result,) = evaluate(tmp_path / "model", odd.root, tmp_path / "out")
    assert sentences_of(iter(result.failures), odd) == odd.sentences
    assert {row["path"] for row in result.rows} == set(odd.paths) - set(odd.sentences)


def test_predict_lists_the_same(odd: OddFolder, pipe: DiffusionADPipeline, tmp_path: Path) -> None:
    pipe.save_pretrained(tmp_path / "model")
    arguments = ["predict", str(odd.folder), "--model", str(tmp_path / "model"), "--output", str(tmp_path / "out")]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 1, result.output
    lines = (tmp_path / "out" / "results.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    assert sentences_of(iter([row["error"] for row in rows if row["error"]]), odd) == odd.sentences
    assert len(rows) == len(odd.paths)


def test_the_page_says_the_same_without_the_path(odd: OddFolder, pipe: DiffusionADPipeline) -> None:
    settings = Settings(200, 400, 1.0, 1)
    found = {}
    for path, file in odd.paths.items():
        if not file.is_file():  # nothing that was uploaded
            continue
        try:
            run_model(pipe, "tiny", str(file), file.name, settings)
        except ValueError as error:
            found[path] = str(error)
    expected = {p: s.removeprefix(f"{p}: ") for p, s in odd.sentences.items() if odd.paths[p].is_file()}
    giant = shown(odd.folder / "giant.png")
    expected[giant] = expected[giant].replace("100000000", "24000000").replace(OR_RAISE_MAX_PIXELS, "")
    assert found == expected


def test_images_in_memory_are_refused_with_the_same_sentence(odd: OddFolder) -> None:
    for path, file in odd.paths.items():
        for read in (lambda one: DiffusionADImageProcessor().preprocess(one, 16, 16), to_rgb_uint8):
            try:
                image = Image.open(file)
            except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):  # Pillow's own refusals
                continue
            sentence = odd.sentences.get(path, "").removeprefix(f"{path}: ")
            if not sentence:
                read(image)
                continue
            with pytest.raises(ValueError) as caught:
                read(image)
            assert str(caught.value) == sentence


def test_the_host_programs_settings_of_pillow_do_not_matter(odd: OddFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("PIL.ImageFile.LOAD_TRUNCATED_IMAGES", True)
    monkeypatch.setattr("PIL.Image.MAX_IMAGE_PIXELS", 10)
    found = {}
    for path, file in odd.paths.items():
        try:
            open_image(file)
        except ImageFileError as error:
            found[path] = str(error)
    assert found == odd.sentences


def test_a_dataset_that_check_data_passes_trains_and_evaluates(
    odd: OddFolder, pipe: DiffusionADPipeline, tmp_path: Path
) -> None:
    root = tmp_path / "part"
    for split in ("train", "test"):
        (root / split / "good").mkdir(parents=True)
    readable = [path for name, path in odd.paths.items() if name not in odd.sentences]
    for index, path in enumerate(readable):
        split = "train" if index % 2 else "test"
        shutil.copy(path, root / split / "good" / path.name)
    errors = [problem for problem in check_data(root) if problem.severity == "error"]
    assert [problem.message for problem in errors if "the same picture as" not in problem.message] == []
    assert len(read_good_images(str(root), 16, max_unreadable=0).names) == len(readable) // 2
    pipe.save_pretrained(tmp_path / "model")
    (result,) = evaluate(tmp_path / "model", root, tmp_path / "out")
    assert result.failures == [] and len(result.rows) == len(readable) - len(readable) // 2
