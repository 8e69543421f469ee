"""Scripts in processes of their own, as `subprocess` runs them, but forked from one that has imported torch before.

A new Python takes several seconds for that, most of what a test of a command would take. What must begin with nothing
imported (a command as a user starts it, settings that an import reads) or end as Python does (`atexit`, the exit code
of a Ctrl-C that nobody caught) is for `subprocess`.
"""

import multiprocessing
import os
import resource
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from multiprocessing.connection import wait
from pathlib import Path
from types import TracebackType

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # gradio reads it when it is imported

DIFFUSIONAD = Path(sys.executable).with_name("diffusionad")  # the installed command, which is a script too

context = multiprocessing.get_context("forkserver")
# What is not installed is left out.
context.set_forkserver_preload(["pytest", "diffusionad_pipe.cli", "diffusionad_pipe.training.images", "gradio"])


class ScriptProcess:
    """A running Python script; at the end of a `with` block it is killed, unless it has ended.

    Args:
        arguments: the script's path, and its own arguments.
        environment: all its variables. Default: those of this process.
        limits: of `resource.setrlimit`, which -> how much.
        own_session: as `start_new_session` of `subprocess.Popen`.
    """

    def __init__(
        self,
        arguments: Sequence[object],
        environment: Mapping[str, str] | None = None,
        limits: Mapping[int, int] | None = None,
        own_session: bool = False,
    ) -> None:
        self.arguments = [str(argument) for argument in arguments]
        self.outputs = [tempfile.NamedTemporaryFile("r", encoding="utf-8") for _ in range(2)]  # noqa: SIM115
        settings = (dict(os.environ if environment is None else environment), os.getcwd(), dict(limits or {}))
        names = [file.name for file in self.outputs]
        self.process = context.Process(target=_run, args=(self.arguments, names, *settings, own_session))
        self.process.start()
        self.pid: int = self.process.pid

    def wait_for(self, condition: Callable[[], bool], seconds: float = 240) -> None:
        """Until a condition holds; a script that ends before, or takes longer, fails with what it has written."""
        deadline = time.monotonic() + seconds
        while not condition():
            if self.process.exitcode is not None or time.monotonic() > deadline:
                assert condition(), [file.read()[-2000:] for file in self.outputs]
                break
            time.sleep(0.002)

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def finish(self, timeout: float = 300) -> subprocess.CompletedProcess[str]:
        """Wait for its end; then what it returned, and what it has written."""
        self.process.join(timeout)
        written = [file.read() for file in self.outputs]
        if self.process.exitcode is None:
            raise subprocess.TimeoutExpired([*self.arguments, written[1][-2000:]], timeout, *written)
        return subprocess.CompletedProcess(self.arguments, self.process.exitcode, *written)

    def __enter__(self) -> "ScriptProcess":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.process.kill()
        self.process.join()
        for file in self.outputs:
            file.close()


def run_script(
    arguments: Sequence[object],
    environment: Mapping[str, str] | None = None,
    limits: Mapping[int, int] | None = None,
) -> subprocess.CompletedProcess[str]:
    """As `subprocess.run(..., capture_output=True, text=True)`."""
    with ScriptProcess(arguments, environment, limits) as process:
        return process.finish()


def run_ranks(
    arguments: Sequence[object], count: int, environment: Mapping[str, str]
) -> list[subprocess.CompletedProcess[str]]:
    """The script in several processes that know each other, as `accelerate launch` starts them on one machine.

    When one fails, the others, who may wait for it, get a minute more.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        together = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    with ExitStack() as stack:
        ranks = []
        for rank in range(count):
            own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
            variables = dict(environment) | together | {name: str(number) for name, number in own.items()}
            ranks.append(stack.enter_context(ScriptProcess(arguments, variables)))
        running = {process.process.sentinel: process for process in ranks}
        while running and not any(process.process.exitcode for process in ranks):
            for sentinel in wait(list(running), timeout=300) or list(running):
                running.pop(sentinel).process.join(0)
        return [process.finish(60) for process in ranks]


def _run(
    arguments: list[str],
    outputs: list[str],
    environment: dict[str, str],
    folder: str,
    limits: dict[int, int],
    own_session: bool,
) -> None:
    """What comes before a script in a process of its own."""
    if own_session:
        os.setsid()
    for number, name in enumerate(outputs, start=1):
        os.dup2(os.open(name, os.O_WRONLY | os.O_APPEND), number)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # it is ignored where the tests run in the background
    for what, amount in limits.items():
        resource.setrlimit(what, (amount, amount))
    sys.argv = arguments
    sys.path.insert(0, str(Path(arguments[0]).parent))
    runpy.run_path(arguments[0], run_name="__main__")
