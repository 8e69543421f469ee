"""What a command prints arrives, or is lost, whatever its standard output is; no name moves a cursor."""

import os
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from diffusionad_pipe.cli import app
from diffusionad_pipe.cli.printable import printable

NAMES = ["检测.png", "cam:x:01.png", "[red]a[/red].png", "a\nb\x1b[2J.png", "caf\udce9.png", "a" * 300 + ".png"]
# Prints as a command does, does its work after that, and says on the other stream that it got so far.
SCRIPT = """
import contextlib, os, sys
from diffusionad_pipe.cli.console import output_console, fail
console = output_console()
for name in sys.argv[2:]:
    console.print(f"0.5000  good  {name}", style="green")
with open(sys.argv[1], "w") as file:  # never takes the place of a closed stream
    for number in (1, 2):
        with contextlib.suppress(OSError):
            os.write(number, b"stray")
    file.write("done")
fail("the end", 3)
"""


def start(tmp_path, arguments=NAMES, shell="", **variables):
    """Run it in a shell, which closes and redirects as a user does."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONIOENCODING", "PYTHONUTF8")}
    done = subprocess.run(
        ["bash", "-c", f'"$0" "$@" {shell}', sys.executable, script, tmp_path / "done", *map(os.fsencode, arguments)],
        env=kept | variables,
        capture_output=True,
    )
    assert (tmp_path / "done").read_text() == "done", done.stderr
    return done


def test_names_are_printed_as_they_are(tmp_path):
    done = start(tmp_path)
    lines = done.stdout.decode().removesuffix("stray").splitlines()
    shown = [*NAMES[:3], r"a\nb\x1b[2J.png", r"caf\udce9.png", NAMES[-1]]
    assert lines == [f"0.5000  good  {name}" for name in shown]
    assert done.returncode == 1 and done.stderr.startswith(
        b"strayError: the end"
    )  # the Exit of a script is no command's


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variables", "shown"),
    [
        ({"PYTHONIOENCODING": "cp1252"}, rb"\u68c0\u6d4b.png"),
        ({"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}, rb"\udce6\udca3\udc80\udce6\udcb5\udc8b.png"),
    ],
)
def test_letters_that_an_encoding_lacks_are_escaped(tmp_path, variables, shown):
    done = start(tmp_path, **variables)
    assert shown in done.stdout and b"the end" in done.stderr


@pytest.mark.parametrize(
    ("shell", "unbuffered"),
    [
        ("| true", ""),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (("<&- >&-", ""), (">/dev/full", ""), (">/dev/full", "1"), ("| true", "1"), (">&- 2>&-", ""))
        ),
    ],
)
def test_an_output_that_cannot_be_used_ends_nothing(tmp_path, shell, unbuffered):
    many = NAMES * 200 if "true" not in shell else NAMES * 20  # more than a pipe holds
    done = start(tmp_path, many, f"{shell}; exit ${{PIPESTATUS[0]}}", PYTHONUNBUFFERED=unbuffered)
    assert done.returncode == 1  # and not 120, which is Python's when it cannot write what is left
    if "2>" not in shell:
        assert b"Error: the end" in done.stderr and b"Broken" not in done.stderr


@pytest.mark.slow
def test_help_without_a_reader():
    script = "from diffusionad_pipe.cli import app; app()"
    done = subprocess.run(
        ["bash", "-c", '"$0" -c "$1" --help | true; exit ${PIPESTATUS[0]}', sys.executable, script], capture_output=True
    )
    assert (done.returncode, done.stderr) == (0, b"")


def test_unseen_characters():
    assert printable("a\tb\u2028c\u202ed\x9b2J") == r"a\tb\u2028c\u202ed\x9b2J"
    assert printable("Ä 検査 \U0001f44d\u200d \xa0") == "Ä 検査 \U0001f44d\u200d \xa0"


def test_an_error_is_one_line(tmp_path):
    result = CliRunner().invoke(app, ["info", str(tmp_path / "no\nfolder/at/all")])
    assert result.exit_code == 2
    assert result.stderr.count("\n") == 1 and r"no\nfolder" in result.stderr
