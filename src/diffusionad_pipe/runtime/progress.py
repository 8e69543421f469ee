"""How far something is: a bar on a terminal, and in a log one plain line every half minute."""

import os
import sys
import time
from collections.abc import Iterable, Iterator, Sized
from contextlib import ExitStack, contextmanager, redirect_stdout, suppress
from typing import TypeVar

from diffusers.utils import logging as diffusers_logging
from huggingface_hub.utils import disable_progress_bars
from tqdm import tqdm
from transformers.utils import logging as transformers_logging

Item = TypeVar("Item")
SECONDS_BETWEEN_LINES = 30.0


def is_terminal() -> bool:
    """Whether a person looks at the standard error, which may be closed or missing."""
    with suppress(ValueError, OSError):
        return sys.stderr is not None and sys.stderr.isatty()
    return False


class ProgressBar:
    """Counts what is done, and shows it on the standard error; a context manager.

    Args:
        total: how many there are; None if nobody knows.
        description: what is being done, such as "reading masks".
        unit: what is counted, in the singular.
        initial: how many were done before.
        shown: False for nothing at all, as in all processes but the first.
        kept: whether a bar stays on the terminal when it is full.
    """

    def __init__(
        self,
        total: int | None,
        description: str,
        unit: str = "it",
        initial: int = 0,
        shown: bool = True,
        kept: bool = False,
    ) -> None:
        self.total, self.description, self.count = total, description, initial
        self.shown = shown
        self.values = ""
        self.last_line = time.monotonic()
        self.bar = None
        if shown and is_terminal():
            self.bar = tqdm(total=total, desc=description, unit=unit, initial=initial, leave=kept, dynamic_ncols=True)

    def update(self, count: int = 1, **values: str) -> None:
        """So many more are done.

        Args:
            count: how many.
            values: numbers to show beside it from now on.
        """
        self.count += count
        if values:
            self.values = ", ".join(f"{name} {value}" for name, value in values.items())
        if self.bar is not None:
            if values:
                self.bar.set_postfix_str(self.values, refresh=False)
            self.bar.update(count)
        elif self.shown and time.monotonic() - self.last_line >= SECONDS_BETWEEN_LINES:
            self.last_line = time.monotonic()
            reached = str(self.count) if self.total is None else f"{self.count} of {self.total}"
            with suppress(OSError, ValueError, AttributeError):  # it is closed, or there is no standard error
                print(": ".join(filter(None, (self.description, reached, self.values))), file=sys.stderr, flush=True)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()

    def __enter__(self) -> "ProgressBar":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def tracked(
    items: Iterable[Item], description: str, unit: str = "it", total: int | None = None, shown: bool = True
) -> Iterator[Item]:
    """The items, while a `ProgressBar` shows how many were taken.

    Args:
        items: what to go through.
        description: what is done with them.
        unit: what they are, in the singular.
        total: how many there are. Default: the items' own length, if they have one.
        shown: as in `ProgressBar`.
    """
    if total is None and isinstance(items, Sized):
        total = len(items)
    with ProgressBar(total, description, unit, shown=shown) as bar:
        for item in items:
            yield item
            bar.update()


@contextmanager
def libraries_bars() -> Iterator[None]:
    """Where a library draws bars on the standard output, among what a command answers: a person sees them on the
    standard error, and a log nothing of them."""
    with ExitStack() as stack:
        shown = sys.stderr if is_terminal() else stack.enter_context(open(os.devnull, "w", encoding="utf-8"))
        stack.enter_context(redirect_stdout(shown))
        yield


def silence_libraries() -> None:
    """Let the bars of the libraries that load and download be seen by a person alone: in a log they are thousands of
    lines. For a process of our own, such as a command's; variables that the user has set are kept."""
    if is_terminal():
        return
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")  # read when datasets is first imported
    if "HF_HUB_DISABLE_PROGRESS_BARS" not in os.environ:
        disable_progress_bars()
        diffusers_logging.disable_progress_bar()
        transformers_logging.disable_progress_bar()
