"""The progress bars: one on a terminal, plain lines in a log, and nothing of the libraries' there."""

import io
import os
import pty
import subprocess
import sys
import termios

import pytest

from diffusionad_pipe.runtime import progress
from diffusionad_pipe.runtime.progress import ProgressBar, tracked


class Clock:
    """time.monotonic, by hand."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.now = 100.0
        monkeypatch.setattr(progress.time, "monotonic", lambda: self.now)


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


def test_a_log_gets_one_plain_line_every_half_minute(clock, capsys):
    for _ in tracked(range(100), "reading masks", unit="mask"):
        clock.now += 1
    written = capsys.readouterr()
    assert written.out == ""
    # Counted when they are done: after half a minute, a minute, and one and a half.
    assert written.err == "reading masks: 30 of 100\nreading masks: 60 of 100\nreading masks: 90 of 100\n"


def test_what_is_quick_or_not_shown_writes_nothing(clock, capsys):
    assert list(tracked(iter("abc"), "reading")) == ["a", "b", "c"]
    for _ in tracked(range(5), "reading", shown=False):
        clock.now += 60
    assert capsys.readouterr() == ("", "")


def test_a_line_says_what_is_known(clock, capsys):
    with ProgressBar(None, "training", initial=7) as bar:
        clock.now += 31
        bar.update(3, noise="0.01", mask="0.2")
        clock.now += 31
        bar.update()
    assert capsys.readouterr().err == "training: 10: noise 0.01, mask 0.2\ntraining: 11: noise 0.01, mask 0.2\n"


class Broken(io.StringIO):
    def write(self, text: str) -> int:
        raise BrokenPipeError(32, "Broken pipe")


@pytest.mark.parametrize("stream", [None, Broken()])
def test_a_closed_standard_error_ends_nothing(clock, monkeypatch, stream):
    monkeypatch.setattr(sys, "stderr", stream)
    for _ in tracked(range(3), "reading"):
        clock.now += 60


SCRIPT = """
from diffusionad_pipe.runtime.progress import silence_libraries, tracked
silence_libraries()
for _ in tracked(range(3), "reading masks", unit="mask"): pass
import datasets, diffusers.utils.logging, huggingface_hub.utils, transformers.utils.logging
for library in (diffusers.utils.logging, transformers.utils.logging, huggingface_hub.utils):
    for _ in library.tqdm(range(3), desc=library.__name__): pass
datasets.Dataset.from_dict({"a": [1, 2]}).map(lambda row: row)
"""


def test_bars_are_for_a_terminal():
    command = [sys.executable, "-c", SCRIPT]
    environment = {name: value for name, value in os.environ.items() if "PROGRESS_BARS" not in name}
    silent = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert "it/s" not in silent.stderr and "\r" not in silent.stderr and "reading" not in silent.stderr

    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 100))
    with subprocess.Popen(command, stderr=theirs, env=environment) as process:
        os.close(theirs)
        shown = b""
        try:
            while chunk := os.read(ours, 65536):
                shown += chunk
        except OSError:  # Linux says so when the other end is closed
            pass
    os.close(ours)
    assert process.returncode == 0
    for name in (b"reading masks", b"diffusers", b"transformers", b"huggingface_hub", b"Map"):
        assert name in shown
