"""The parts of the Space that need no server: archives, the menu of models, the time limit."""

import io
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("gradio", reason="gradio is not installed: pip install diffusionad_pipe[demo]")

import batch as batch_module
import detection as detection_module
from batch import BatchRow, examine_batch, to_csv
from detection import Settings, apply_thresholds, resize_map, run_model
from model_menu import load_model, read_menu, read_model_card
from server_settings import read_server_settings

from tests.helpers.script_processes import run_script
from tests.helpers.space_server import APP

SETTINGS = Settings(200, 400, 1.0, 1)


def row(path: str, name: str) -> BatchRow:
    """Stands for a model: what it was given, as a row."""
    return BatchRow(name, "Looks good", len(Path(path).read_bytes()), 0.5, 0, 0.0, path)


def zip_of(path: Path, members: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def run(*paths: Path):
    *_, last = examine_batch([(str(path), path.name) for path in paths], row)
    return last


@pytest.mark.parametrize("compression", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_zip_bombs(tmp_path, monkeypatch, compression):
    monkeypatch.setattr(batch_module, "MAX_MEMBER_BYTES", 2**20)
    monkeypatch.setattr(batch_module, "MAX_UNPACKED_BYTES", 2**21)
    bomb = zip_of(tmp_path / "bomb.zip", {"a.png": b"\0" * (2**20 + 1), "b.png": b"ok"}, compression)
    result = run(bomb)
    assert [r.name for r in result.rows] == ["bomb.zip/b.png"]
    assert result.problems == [("bomb.zip/a.png", "it has more than 1 MB; make the picture smaller")]

    # Its directory says that it is small.
    content = bytearray(bomb.read_bytes())
    for signature, offset in ((b"PK\3\4", 22), (b"PK\1\2", 24)):
        start = content.index(signature) + offset
        content[start : start + 4] = (100).to_bytes(4, "little")
    bomb.write_bytes(content)
    assert [name for name, _ in run(bomb).problems] == ["bomb.zip/a.png"]

    many = zip_of(tmp_path / "many.zip", {f"{i}.png": b"\0" * 2**20 for i in range(3)}, compression)
    assert run(many).problems == [("many.zip/2.png", "the batch has more than 2 MB unpacked; split it")]


def test_too_many_entries(tmp_path, monkeypatch):
    monkeypatch.setattr(batch_module, "MAX_MEMBERS", 5)
    many = zip_of(tmp_path / "many.zip", {f"{i}.txt": b"" for i in range(6)})
    assert run(many).problems == [("many.zip", "the archive has more than 5 entries; split it")]
    monkeypatch.setattr(batch_module, "MAX_IMAGES", 1)
    few = zip_of(tmp_path / "few.zip", {"1.png": b"", "2.png": b""})
    assert run(few).stopped.startswith("2 pictures are more than 1") and not run(few).rows


def test_names_and_kinds_that_are_refused(tmp_path):
    link = zipfile.ZipInfo("link.png")
    link.external_attr = 0o120777 << 16
    path = tmp_path / "odd.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("../up.png", "a/../../up.png", "/etc/up.png", "C:/up.png", "..\\up.png"):
            archive.writestr(zipfile.ZipInfo(name), b"x")
        archive.writestr(link, "/etc/hostname")
        archive.writestr("inner.zip", b"PK")
        archive.writestr("folder/", b"")
        archive.writestr(".hidden.png", b"x")
        archive.writestr("fine/ünï <b>.png", b"x")
    before = sorted(tmp_path.rglob("*"))
    result = run(path)
    assert sorted(tmp_path.rglob("*")) == before
    assert [r.name for r in result.rows] == ["odd.zip/fine/ünï <b>.png"]
    assert not os.path.exists(result.rows[0].thumbnail)  # what was unpacked is gone
    reasons = [reason.partition(";")[0] for _, reason in result.problems]
    assert reasons == ["its name leads out of the archive"] * 5 + [
        "this is a link, not a picture",
        "an archive in an archive is not opened",
    ]


def test_damaged_and_encrypted_archives(tmp_path):
    whole = zip_of(tmp_path / "whole.zip", {"a.png": b"x" * 1000}).read_bytes()
    cases = {"cut.zip": whole[:500], "empty.zip": b"", "none.zip": zip_of(tmp_path / "n", {}).read_bytes()}
    flipped, locked = bytearray(whole), bytearray(whole)
    flipped[500] ^= 1
    locked[whole.index(b"PK\1\2") + 8] |= 1
    cases |= {"flipped.zip": bytes(flipped), "locked.zip": bytes(locked)}
    for name, content in cases.items():
        (tmp_path / name).write_bytes(content)
    reasons = {name: run(tmp_path / name).problems[0][1] for name in cases}
    assert "no zip" in reasons["cut.zip"] and "no zip" in reasons["empty.zip"]
    assert reasons["none.zip"] == "the archive holds no picture"
    assert "cannot be unpacked" in reasons["flipped.zip"] and "encrypted" in reasons["locked.zip"]
    for compression in (zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):
        damaged = zip_of(tmp_path / "damaged.zip", {"a.png": os.urandom(1000), "b.png": b"x"}, compression)
        content = bytearray(damaged.read_bytes())
        content[100:900] = bytes(800)
        damaged.write_bytes(content)
        result = run(damaged)
        assert "cannot be unpacked" in result.problems[0][1] and [r.name for r in result.rows] == ["damaged.zip/b.png"]
    (tmp_path / "page.png").write_text("<html>")
    assert [r.name for r in run(tmp_path / "page.png").rows] == ["page.png"]  # judged by who opens it


def test_a_batch_ends_in_time_or_when_it_is_left(tmp_path):
    archive = zip_of(tmp_path / "a.zip", {f"{i}.png": b"x" for i in range(3)})
    uploads = [(str(archive), "a.zip")]
    *_, last = examine_batch(uploads, row, seconds=0)
    assert len(last.rows) == 1 and last.stopped.startswith("stopped after")
    assert to_csv(last).splitlines()[1] == "a.zip/0.png,Looks good,1,0.5,0,0.0,"
    batches = examine_batch(uploads, row)
    next(batches)
    unpacked = Path(next(batches).rows[0].thumbnail)
    assert not unpacked.parent.exists()  # it was there while it was examined


def test_a_batch_while_the_disk_is_full(tmp_path, monkeypatch):
    archive, image = zip_of(tmp_path / "a.zip", {"a.png": b"1"}), tmp_path / "b.png"
    image.write_bytes(b"2")
    monkeypatch.setattr(tempfile, "tempdir", str(image))  # no folder, so that nothing can be made in it
    result = run(archive, image)
    assert [r.name for r in result.rows] == ["b.png"]
    [(name, reason)] = result.problems
    assert name == "a.zip/a.png" and "no room for files" in reason and str(tmp_path) not in reason

    [item] = batch_module.list_items([(str(archive), "a.zip")])
    with pytest.raises(ValueError, match="no room for files"):
        batch_module.unpack(item, Path("/dev/full"), 100)


def test_menu(tmp_path, saved):
    one = tmp_path / "pretrained" / "nut"
    saved.rename(one.parent.mkdir() or one)
    assert read_menu([tmp_path / "none", tmp_path], {}) == {"nut": str(one)}
    environment = {"DIFFUSIONAD_MODEL": "user/model", "DIFFUSIONAD_MODELS": f" {one} ,, user/other"}
    assert list(read_menu([tmp_path], environment).items()) == [
        ("user/model", "user/model"),
        ("nut", str(one)),
        ("user/other", "user/other"),
    ]
    with pytest.raises(ValueError, match="there is no model: set DIFFUSIONAD_MODEL"):
        read_menu([tmp_path / "none"], {})
    with pytest.raises(ValueError, match="two models are called nut"):
        read_menu([tmp_path], {"DIFFUSIONAD_MODELS": str(tmp_path / "other" / "nut")})
    for variable in ("DIFFUSIONAD_MODEL", "DIFFUSIONAD_MODELS"):
        with pytest.raises(ValueError, match=f"none is no folder of a model: set {variable} to"):
            read_menu([tmp_path], {variable: str(tmp_path / "none")})


@pytest.mark.parametrize(
    ("variable", "values"),
    [
        ("DIFFUSIONAD_KEEP_SECONDS", ["", "abc", "-1", "0", "1.5", "1e3", "\u0663", "9" * 5000]),
        ("GRADIO_SERVER_PORT", ["", "abc", "0", "-1", "99999", "7860 ", "+5"]),
        ("GRADIO_NUM_PORTS", ["", "many", "0"]),
        ("GRADIO_DEBUG", ["yes", ""]),
        ("GRADIO_SERVER_NAME", ["", "192.0.2.1", "no such name", "2001:db8::1", "a" * 300]),
        ("GRADIO_TEMP_DIR", ["", "/proc/x", "/dev/null", "a\0b"]),
    ],
)
def test_every_variable_of_the_server_is_checked(variable, values):
    for value in values:
        with pytest.raises(ValueError, match=f"{variable}={re.escape(value[:50])}") as caught:
            read_server_settings({variable: value})
        assert str(caught.value).count(": set it to") == 1


def test_variables_of_the_server(tmp_path):
    assert read_server_settings({}) == (1800, None)
    for name in ("127.0.0.1", "0.0.0.0", "localhost"):
        environment = {
            "GRADIO_SERVER_NAME": name,
            "GRADIO_TEMP_DIR": str(tmp_path / "new"),
            "GRADIO_SERVER_PORT": "7860",
        }
        assert read_server_settings({**environment, "DIFFUSIONAD_KEEP_SECONDS": "60"}) == (60, 7860)
    assert not any((tmp_path / "new").iterdir())


def test_a_variable_that_is_wrong_ends_the_app_at_once(tmp_path):
    for variables in ({"GRADIO_SERVER_PORT": "abc"}, {"DIFFUSIONAD_KEEP_SECONDS": ""}):
        done = run_script([APP], {**os.environ, **variables})
        ((name, value),) = variables.items()
        assert done.returncode == 1 and done.stderr.startswith(f"Error: {name}={value} is no whole number")
        assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("backend", ["module://matplotlib_inline.backend_inline", "nonsense", "svg"])
def test_a_backend_of_matplotlib_that_is_not_here(tmp_path, backend):
    """Figures are drawn in files; importing matplotlib alone fails."""
    script = tmp_path / "figure.py"
    script.write_text(
        "import os\n"
        "from diffusionad_pipe.runtime.figures import import_matplotlib\n"
        "import_matplotlib()\n"
        "from matplotlib.figure import Figure\n"
        "Figure().savefig('figure.png')\n"
        "from matplotlib import rcParams\n"
        "print(os.environ['MPLBACKEND'], dict.__getitem__(rcParams, 'backend') == 'svg')\n"
    )
    command = [sys.executable, script]
    variables = os.environ | {"MPLBACKEND": backend}
    done = subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True, text=True)
    assert done.stdout == f"{backend} {backend == 'svg'}\n", done.stderr
    assert (tmp_path / "figure.png").is_file()


def test_models_of_the_hub(hub_server, saved, assert_same, tiny_pipeline, monkeypatch):
    (saved / "README.md").write_text("---\nlicense: mit\n---\n# Nut <img src='http://x/y.png'>")
    hub_server.publish("user/nut", saved)
    assert_same(tiny_pipeline, load_model("user/nut", "user/nut"))
    assert read_model_card("user/nut") == "# Nut"
    assert read_model_card("user/missing") == read_model_card("/nowhere") == ""
    weights = saved / "unet" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    hub_server.publish("user/pickled", saved)
    for source, reason in (
        ("user/missing", "user/missing: the Hub has no such model, or it is private; check the id"),
        ("user/pickled", "user/pickled: .*is missing, and only safetensors are loaded"),
        ("no id", "no id: this is no Hub id"),
        ("/nowhere/nut", "there is no folder 'nut'"),
    ):
        name = Path(source).name if source.startswith("/") else source
        with pytest.raises(ValueError, match=reason) as error:
            load_model(name, source)
        assert "/nowhere" not in str(error.value) and "snapshots" not in str(error.value)


def test_a_run_that_takes_too_long_is_stopped(tiny_pipeline, tmp_path, monkeypatch):
    Image.new("RGB", (40, 40)).save(tmp_path / "grey.png")
    monkeypatch.setattr(detection_module, "MAX_SECONDS", -1)
    with pytest.raises(ValueError, match="was stopped; take fewer noise samples"):
        run_model(tiny_pipeline, "tiny", str(tmp_path / "grey.png"), "grey.png", SETTINGS)


def test_a_distilled_model_has_no_large_scale(tiny_pipeline):
    scheduler = type(tiny_pipeline.scheduler)(prediction_type="sample", distilled=True)
    tiny_pipeline.register_modules(scheduler=scheduler)
    example = next((Path(__file__).parents[2] / "training/data/hazelnut_toy/hazelnut/test/colour").iterdir())
    steps = run_model(tiny_pipeline, "tiny", str(example), "example", SETTINGS).steps
    assert [step is None for step in steps] == [False, True, False, True, False]
    with pytest.raises(ValueError, match="guidance_scale=2.0 cannot be had of a distilled model"):
        run_model(tiny_pipeline, "tiny", str(example), "example", SETTINGS._replace(guidance_scale=2.0))


def test_a_chosen_region_is_framed_and_small_ones_are_seen(tiny_pipeline, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 255, (1000, 1600, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "large.png")
    found = run_model(tiny_pipeline, "tiny", str(tmp_path / "large.png"), "large.png", SETTINGS)
    assert found.size == (1000, 1600) and found.shown.size == (768, 480)
    threshold = resize_map(tiny_pipeline, found, found.size).max().item() - 1e-4
    plain = apply_thresholds(tiny_pipeline, found, 0.5, threshold)
    framed = apply_thresholds(tiny_pipeline, found, 0.5, threshold, chosen=1)
    assert len(plain.regions) >= 1 and plain.regions == framed.regions
    left, top, right, bottom = (side * 0.48 for side in plain.regions[0].box)
    changed = np.argwhere(np.asarray(plain.image) != np.asarray(framed.image))[:, :2]
    assert len(changed)
    (low_y, low_x), (high_y, high_x) = changed.min(0), changed.max(0)
    assert low_x <= left and high_x >= min(right, 767) - 1 and low_y <= top and high_y >= min(bottom, 479) - 1
    buffer = io.BytesIO()
    plain.image.save(buffer, "PNG")
    assert np.any(np.asarray(plain.image) != np.asarray(found.shown))
