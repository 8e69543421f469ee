"""A folder that a command writes into: what it may replace and delete, and what it must leave alone."""

import os
import re
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from diffusionad_pipe.files.names import LONGEST_TEXT, folded, safe_name, unique_names
from diffusionad_pipe.files.output_error import OutputError
from diffusionad_pipe.files.output_folder import OutputFolder
from diffusionad_pipe.files.record import OwnProducts
from diffusionad_pipe.files.single_files import edit_file, write_file
from diffusionad_pipe.images.files import ImageFileError, find_images
from tests.helpers.script_processes import ScriptProcess, run_script


def test_only_own_files_are_replaced_or_deleted(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with OutputFolder(tmp_path, "predict") as folder:
        folder.write_text("a/b.txt", "1")
        folder.write_text("a/b.txt", "2")
        folder.write_text("changed.txt", "1")
        (tmp_path / "changed.txt").write_text("by somebody")
        for name, cause in (("mine.txt", "is not what"), ("changed.txt", "is no longer what"), ("a", "is not what")):
            with pytest.raises(OutputError, match=f"{name} {cause} diffusionad predict wrote.*choose another --output"):
                folder.write_text(name, "3")
            assert not folder.remove(name)
        assert not folder.remove_tree() and not (tmp_path / "a").exists()
        assert folder.remove("gone.txt")
    assert (tmp_path / "mine.txt").read_text() == "mine" and (tmp_path / "changed.txt").read_text() == "by somebody"


def test_what_another_command_wrote_is_not_ours(tmp_path: Path) -> None:
    write_file(tmp_path / "x.png", lambda path: path.write_text("1"), "export")
    with pytest.raises(OutputError):
        write_file(tmp_path / "x.png", lambda path: path.write_text("2"), "preview-synthesis")
    write_file(tmp_path / "x.png", lambda path: path.write_text("3"), "export")
    assert (tmp_path / "x.png").read_text() == "3"


def test_a_failure_leaves_the_older_file(tmp_path: Path) -> None:
    def fail(path: Path) -> None:
        path.write_text("half")
        raise OSError(28, "No space left on device")

    with OutputFolder(tmp_path) as folder:
        folder.write_text("table.csv", "whole")
        with pytest.raises(OutputError, match=r"table.csv cannot be written \(No space left on device\): free some"):
            folder.write("table.csv", fail)
        folder.append("log.jsonl", "one\n")
        assert [file.read_text() for file in sorted(tmp_path.glob("*.[cj]*"))] == ["one\n", "whole"]
        assert not list((tmp_path / ".diffusionad" / "unfinished").glob("*/*"))


def test_a_line_after_half_a_line_stays_whole(tmp_path: Path) -> None:
    folder = OutputFolder(tmp_path)
    folder.append("log.jsonl", "one\n")
    with open(tmp_path / "log.jsonl", "a") as file:  # a killed run
        file.write("ha")
    folder.append("log.jsonl", "two\n")
    assert (tmp_path / "log.jsonl").read_text() == "one\nha\ntwo\n"


def test_folders_appear_as_a_whole_and_are_deleted_but_for_what_was_added(tmp_path: Path) -> None:
    def fill(folder: Path) -> None:
        (folder / "unet").mkdir()
        (folder / "unet" / "weights").write_text("1")
        (folder / "index").write_text("2")

    folder = OutputFolder(tmp_path, "convert")
    folder.write_tree("model", fill)
    with pytest.raises(OutputError, match="model is there already"):
        folder.write_tree("model", fill)
    (tmp_path / "model" / "notes.txt").write_text("mine")
    assert not OutputFolder(tmp_path, "convert").remove_tree("model")
    assert [file.name for file in tmp_path.glob("model/**/*")] == ["notes.txt"]
    (tmp_path / "model" / "notes.txt").unlink()
    (tmp_path / "model").rmdir()
    folder.write_tree("model", fill)
    edit_file(tmp_path / "model" / "index", "edited")
    assert OutputFolder(tmp_path, "convert").remove_tree("model") and not (tmp_path / "model").exists()


def test_own_images_are_known_wherever_their_folder_is_moved_to(tmp_path: Path, caplog) -> None:
    image = Image.new("RGB", (8, 8))
    image.save(tmp_path / "photo.png")
    with OutputFolder(tmp_path / "out", "predict") as folder:
        folder.write("sub/a.png", image.save)
    shutil.copytree(tmp_path / "out", tmp_path / "copied")  # with other times of change
    (tmp_path / "link.png").symlink_to(tmp_path / "out" / "sub" / "a.png")
    assert tmp_path / "copied" / "sub" / "a.png" in OwnProducts()
    assert find_images(tmp_path) == [tmp_path / "photo.png"]
    assert "3 pictures are left out" in caplog.text
    for path in (tmp_path / "out", tmp_path / "out" / "sub" / "a.png"):
        with pytest.raises(ImageFileError, match="diffusionad wrote it itself"):
            find_images(path)
    Image.new("RGB", (9, 9)).save(tmp_path / "out" / "sub" / "a.png")  # somebody's picture of that name
    assert tmp_path / "out" / "sub" / "a.png" in find_images(tmp_path)


LOCKED = """
import sys, time
from diffusionad_pipe.files.output_folder import OutputFolder
with OutputFolder(sys.argv[1], "predict") as folder:
    folder.write_text("started", "")
    time.sleep(600)
"""


def test_one_run_at_a_time_and_none_after_a_kill(tmp_path: Path) -> None:
    script, out = tmp_path / "locked.py", tmp_path / "out"
    script.write_text(LOCKED)
    with ScriptProcess([script, out]) as first:
        while not (out / "started").exists():
            assert first.process.exitcode is None
        unfinished = out / ".diffusionad" / "unfinished"
        for place in ("run/half", "files/old", "files/now"):
            (unfinished / place).mkdir(parents=True)
        os.utime(unfinished / "files" / "old", (0, 0))
        second = run_script([script, out])
        assert second.returncode == 1 and "another run of diffusionad is writing into this folder" in second.stderr
    with OutputFolder(out, "predict") as folder:  # the first was killed
        # What a single file that is being made beside it needs, stays.
        assert [path.name for path in unfinished.glob("*/*")] == ["now"]
        assert folder.remove_tree()


def test_a_damaged_record_harms_nothing(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with OutputFolder(tmp_path / "out") as folder:
        folder.write_text("a.txt", "1")
    with open(tmp_path / "out" / ".diffusionad" / "written.jsonl", "a") as record:
        record.write(
            '["../mine.txt", -1, 0, "", ""]\n["/etc/hosts", -1, 0, "", ""]\n[1]\n{}\n["b", "x", 0, "", ""]\n["ha'
        )
    assert OutputFolder(tmp_path / "out").record.keys() == {"a.txt"}
    assert OutputFolder(tmp_path / "out").remove_tree() and (tmp_path / "mine.txt").exists()


def test_a_long_record_is_shortened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diffusionad_pipe.files.output_folder.SUPERSEDED", 10)
    with OutputFolder(tmp_path) as folder:
        folder.append("log", "x\n")
        for index in range(20):
            folder.write_text("table", str(index))
            folder.write_text("log", f"{index}\n")
    record = tmp_path / ".diffusionad" / "written.jsonl"
    before = record.stat().st_size
    with OutputFolder(tmp_path) as folder:
        assert record.stat().st_size < before / 4
        assert folder.owns("table") and folder.owns("log")
        (tmp_path / "log").write_text("anything")
        assert folder.owns("log")  # it grows


@pytest.mark.parametrize(
    "text", ["", ".", "..", "../x", "a/b", "/etc", "C:\\x", "con", "Nul.txt", "a\nb", " a", "a.", ".h"]
)
def test_no_text_becomes_a_path(text: str, tmp_path: Path) -> None:
    name = safe_name(text)
    (tmp_path / name).write_text("x")
    assert [path.name for path in tmp_path.iterdir()] == [name] and not name.startswith(".")


@given(st.lists(st.text(st.characters(exclude_categories=[])), unique=True, max_size=5))
def test_different_texts_have_different_short_names(texts: list[str]) -> None:
    names = [safe_name(text) for text in texts]
    assert len(set(names)) == len(texts)
    assert all(0 < len(os.fsencode(name)) <= LONGEST_TEXT and "/" not in name for name in names)
    assert [safe_name(name) for name in names] == names


@given(st.lists(st.sampled_from(["a", "a_map", "A", "a_mask", "a-2", "ä", "a\u0308", "b"]), max_size=12))
def test_no_two_files_share_a_name(names: list[str]) -> None:
    endings = (".png", "_map.png", "_mask.png")
    unique = unique_names(names, endings, lambda name: folded(name) in {"b.png", "a-3_map.png"})
    files = [folded(name + ending) for name in unique for ending in endings]
    assert len(set(files)) == len(files) and not {"b.png", "a-3_map.png"} & set(files)


@pytest.mark.skipif(os.geteuid() == 0 and not Path("/proc").is_dir(), reason="needs a place that no user can write to")
def test_a_place_that_cannot_be_written_to_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for place in (tmp_path / "file" / "out", Path("/proc/out")):
        with pytest.raises(OutputError, match=f"{place} cannot be written .*choose another"), OutputFolder(place):
            pass


def test_a_file_is_written_beside_and_then_renamed(tmp_path: Path) -> None:
    path = tmp_path / "map.png"
    seen = []

    def write(temporary: Path) -> None:
        seen.append(temporary)
        assert not path.exists()
        Image.new("L", (8, 8)).save(temporary)

    write_file(str(path), write)
    assert tmp_path in seen[0].parents and seen[0].suffix == ".png"
    assert {file.name for file in tmp_path.iterdir()} == {"map.png", ".diffusionad"}
    assert Image.open(path).size == (8, 8)


@pytest.mark.parametrize("failure", [RuntimeError, KeyboardInterrupt])
def test_a_failed_write_leaves_the_old_file_alone(tmp_path: Path, failure: type[BaseException]) -> None:
    path = tmp_path / "map.png"
    write_file(path, lambda temporary: temporary.write_bytes(b"old"))

    def write(temporary: Path) -> None:
        temporary.write_bytes(b"half")
        raise failure

    with pytest.raises(failure):
        write_file(path, write)
    assert path.read_bytes() == b"old" and not any((tmp_path / ".diffusionad" / "unfinished").glob("*/*"))


def test_written_files_have_the_usual_permissions(tmp_path: Path) -> None:
    write_file(tmp_path / "a.txt", lambda path: path.write_text("a"))
    (tmp_path / "b.txt").touch()
    assert (tmp_path / "a.txt").stat().st_mode == (tmp_path / "b.txt").stat().st_mode


def test_nothing_else_deletes_or_replaces_files() -> None:
    """But for the Space, which deletes what visitors have uploaded."""
    root = Path(__file__).parents[2]
    deleting = re.compile(r"os\.(remove|unlink|rename|replace|rmdir)|rmtree|shutil\.move|\.(unlink|rmdir)\(")
    found = [
        f"{file.relative_to(root)}: {line.strip()}"
        for folder in ("src", "training")
        for file in (root / folder).rglob("*.py")
        if file.name not in ("output_folder.py", "single_files.py")
        for line in file.read_text(encoding="utf-8").splitlines()
        if deleting.search(line)
    ]
    assert not found
