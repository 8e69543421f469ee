"""What the commands of the command line share: how they print, and how they end."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

import typer
from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError
from rich.console import Console

# What a user can mend: bad files and settings, a full disk, the Hub, a device that is not there, too large a batch.
USER_ERRORS = (ValueError, OSError, RuntimeError, MemoryError)


def output_console() -> Console:
    """Prints lines as they are, so that paths stay whole and can be copied."""
    return Console(highlight=False, markup=False, soft_wrap=True)


def fail(error: object, code: int = 2) -> NoReturn:
    """End with one sentence on the standard error; 2 is wrong usage, 1 what went wrong later."""
    if isinstance(error, RepositoryNotFoundError):
        error = "the Hub has no such model, or it is private: check the id, or log in with hf auth login"
    elif isinstance(error, LocalEntryNotFoundError):
        error = "no folder has the name of the model, and the Hub cannot be reached: check the name, or the connection"
    Console(stderr=True).print(f"Error: {error}", highlight=False, markup=False, soft_wrap=True)
    raise typer.Exit(code) from None


@contextmanager
def needed_packages(extra: str = "train") -> Iterator[None]:
    """Say which extra of this package to install where an import fails."""
    try:
        yield
    except ModuleNotFoundError as error:
        fail(f'{error.name} is not installed, which this command needs: pip install "diffusionad_pipe[{extra}]"')
