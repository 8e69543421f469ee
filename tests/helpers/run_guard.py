"""A test run ends, always, says which test ended it, and leaves no process behind.

pytest itself ends a test that stands still, also in C code (`faulthandler_timeout` in pyproject.toml). Here is what
that leaves out: collecting, what follows a failure, the end of the run, the process that hands tests to workers, a
worker that dies, and all that a run has started, which would keep its output open.
"""

import faulthandler
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from uuid import uuid4

import psutil
import pytest

MARK = "DIFFUSIONAD_TEST_RUN"  # in the environment of all that a run starts


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "minutes(count): the test may take so many, not just `faulthandler_timeout`")
    config.pluginmanager.register(RunGuard(config))


class RunGuard:
    def __init__(self, config: pytest.Config):
        self.stderr = os.dup(2)  # which is captured later
        self.limit = float(config.getini("faulthandler_timeout"))
        self.is_worker = hasattr(config, "workerinput")
        self.has_workers = bool(config.getoption("numprocesses", None))
        self.debugging = config.getoption("usepdb")
        self.crashed = ""
        self.running: Path | None = None  # holds the name of the test that runs
        self.end_after(self.limit + 300)  # to collect; several processes import torch meanwhile
        if not self.is_worker:
            os.environ[MARK] = uuid4().hex
            self.running = Path(tempfile.gettempdir()) / f"diffusionad-tests-{os.environ[MARK]}"
            command = [sys.executable, __file__, os.environ[MARK], str(self.running), str(os.getpid())]
            subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True)

    def end_after(self, seconds: float) -> None:
        """End this process, with the stacks of its threads, unless this is called again or a test ends before."""
        if not self.debugging:
            faulthandler.dump_traceback_later(seconds, file=self.stderr, exit=True)

    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        if self.running:
            self.running.write_text(item.nodeid)
        if minutes := item.get_closest_marker("minutes"):
            self.end_after(60 * minutes.args[0])

    @pytest.hookimpl(trylast=True)
    def pytest_exception_interact(self) -> None:
        self.end_after(self.limit)  # pytest has stopped its own clock, but fixtures have still to end

    @pytest.hookimpl(optionalhook=True)
    def pytest_handlecrashitem(self, crashitem: str) -> None:
        self.crashed = crashitem

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_logreport(self) -> None:
        if self.crashed:  # the other worker may hold a hundred tests more, and who takes the place of this one can hang
            pytest.exit(f"a worker died in {self.crashed}", returncode=1)
        if self.has_workers and not self.is_worker:
            self.end_after(self.limit + 900)

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self) -> None:
        self.end_after(120)
        if self.running:
            self.running.unlink(missing_ok=True)


def is_of_run(process: psutil.Process, mark: str) -> bool:
    try:
        return process.environ().get(MARK) == mark and process.pid != os.getpid()
    except (psutil.Error, OSError):  # another user's, or it has just ended
        return False


def end_what_is_left(mark: str, running: Path, parent: int) -> None:
    """Wait for a run's first process to end, however it does, and end the others."""
    while os.getppid() == parent:
        time.sleep(0.2)
    if running.exists():
        print(f"the test run died in {running.read_text()}", file=sys.stderr)
        running.unlink()
    for _ in range(10):  # what is ended may just have started another
        left = [process for process in psutil.process_iter() if is_of_run(process, mark)]
        for process in left:
            process.kill()
        psutil.wait_procs(left, timeout=1)


if __name__ == "__main__":
    end_what_is_left(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
