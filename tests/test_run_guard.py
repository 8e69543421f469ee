"""A test that kills its process, or stands still, ends the whole run soon, with its name, and nothing goes on."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
KILLED = "os.kill(os.getpid(), signal.SIGKILL)"
STANDS_STILL = "time.sleep(600)"
HOLDS_THE_INTERPRETER = "ctypes.PyDLL(None).sleep(600)"  # no other thread of Python can run meanwhile
FAILS_AND_HANGS = "request.addfinalizer(lambda: time.sleep(600)); assert False"


@pytest.mark.parametrize(
    "bad, workers",
    [
        (KILLED, 0),
        (STANDS_STILL, 0),
        (HOLDS_THE_INTERPRETER, 0),
        (FAILS_AND_HANGS, 0),
        (KILLED, 2),
        (HOLDS_THE_INTERPRETER, 2),
    ],
)
def test_a_bad_test_ends_the_run(tmp_path: Path, bad: str, workers: int) -> None:
    (tmp_path / "conftest.py").write_text('pytest_plugins = ["tests.helpers.run_guard"]\n')
    (tmp_path / "test_bad.py").write_text(
        "import ctypes, os, signal, subprocess, time\n"
        "def test_good(): pass\n"
        "def test_bad(request):\n"
        "    subprocess.Popen(['sleep', '600'], start_new_session=True)\n"
        f"    {bad}\n"
    )
    for index in range(2):
        (tmp_path / f"test_other_{index}.py").write_text("def test_other(): pass\n")
    settings = ["-c", ROOT / "pyproject.toml", "--rootdir", tmp_path, "-o", "faulthandler_timeout=3"]
    (options,) = re.findall("-m pytest (.*)", (ROOT / "Makefile").read_text())  # of `make test`
    command = [sys.executable, "-m", "pytest", "-p", "xdist.plugin", *settings, "-p", "no:cacheprovider", tmp_path]
    command = [*map(str, command), *(shlex.split(options) if workers else [])]
    # Not as a part of this run: without what xdist tells its workers; and soon, without plugins that it has no use for.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    # It returns once nobody holds the output open any more: what the test has started is ended too.
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode != 0
    named = "FAILED .*test_bad.py::test_bad" if workers else "died in test_bad.py::test_bad"
    assert re.search(named, done.stdout + done.stderr), done.stdout + done.stderr
    assert bad == KILLED or re.search(r'test_bad.py", line \d', done.stderr), done.stderr
