"""What the commands of the command line share: how they print, and how they end."""

import io
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, NoReturn

import typer
from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError
from rich.console import Console as RichConsole

from .printable import printable

# What a user can mend: bad files and settings, a full disk, the Hub, too large a batch. A RuntimeError is a fault of
# ours, and shows where it comes from.
USER_ERRORS = (ValueError, OSError, MemoryError)


class Console:
    """Prints lines as they are, so that paths stay whole and can be copied.

    Args:
        error: on the standard error, not on the standard output.

    Attributes:
        quiet: whether nothing is printed.
    """

    def __init__(self, error: bool = False) -> None:
        keep_writable()
        self.quiet = False
        self.rich = RichConsole(stderr=error, highlight=False, markup=False, emoji=False, soft_wrap=True)

    def print(self, line: object, style: str | None = None) -> None:
        """One line, whatever is in it; `style` is rich's."""
        if not self.quiet:
            self.rich.print(printable(line), style=style)


def output_console() -> Console:
    """For what a command answers."""
    return Console()


def fail(error: object, code: int = 2) -> NoReturn:
    """End with one sentence on the standard error; 2 is wrong usage, 1 what went wrong later."""
    if isinstance(error, RepositoryNotFoundError):
        error = "the Hub has no such model, or it is private: check the id, or log in with hf auth login"
    elif isinstance(error, LocalEntryNotFoundError):
        error = "no folder has the name of the model, and the Hub cannot be reached: check the name, or the connection"
    for line in f"Error: {error}".split("\n"):  # some list what is missing
        Console(error=True).print(line)
    raise typer.Exit(code) from None


@contextmanager
def needed_packages(extra: str = "train") -> Iterator[None]:
    """Say which extra of this package to install where an import fails."""
    try:
        yield
    except ModuleNotFoundError as error:
        fail(f'{error.name} is not installed, which this command needs: pip install "diffusionad_pipe[{extra}]"')


class _Lossy(io.RawIOBase):
    """A stream that takes everything: what a closed pipe or a full disk refuses is lost, and ends nothing."""

    def __init__(self, raw: Any) -> None:
        self.raw = raw

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self.raw.fileno()

    def isatty(self) -> bool:
        return self.raw.isatty()

    def write(self, data: Any) -> int:
        try:
            while (count := self.raw.write(data)) is None:  # a full pipe that does not wait for its reader
                time.sleep(0.01)
            return count
        except OSError:
            return len(data)


def keep_writable() -> None:
    """From now on this process can print anything, whatever its standard output and standard error are: closed, a pipe
    without a reader, a full disk, of an encoding without the letters of a name. The results are in files."""
    for number, name in ((1, "stdout"), (2, "stderr")):
        stream, original = getattr(sys, name), getattr(sys, f"__{name}__")
        if original is None:  # closed from the start: the next file that is opened would get its number
            try:
                os.fstat(number)
            except OSError:
                os.dup2(os.open(os.devnull, os.O_WRONLY), number)
        elif stream is original and isinstance(raw := getattr(stream.buffer, "raw", stream.buffer), io.RawIOBase):
            with suppress(OSError):
                stream.flush()
            kept = {option: getattr(stream, option) for option in ("encoding", "line_buffering", "write_through")}
            setattr(sys, name, io.TextIOWrapper(io.BufferedWriter(_Lossy(raw)), errors="backslashreplace", **kept))
