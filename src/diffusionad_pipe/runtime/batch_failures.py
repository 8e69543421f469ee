"""What becomes of a batch in which one picture fails: the others are done all the same."""

from collections.abc import Callable, Sequence
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


class TooFewPredictedError(ValueError):
    """So many pictures failed that the rest says nothing.

    Args:
        message: one sentence.
        failures: a sentence on each picture that failed.
    """

    def __init__(self, message: str, failures: Sequence[str]) -> None:
        super().__init__(f"{message}; the first: {failures[0]}" if failures else message)
        self.failures = list(failures)


def run_batch(run: Callable[[Sequence[Item]], Sequence[Result]], items: Sequence[Item]) -> list[Result | ValueError]:
    """The results of a batch, or, where it fails, of each of its items by itself.

    Args:
        run: gives a result for each item, or raises ValueError, as the pipeline does where its networks give NaN for
            one of the pictures.
        items: at least one.

    Returns:
        For each item its result, or the error that it causes.
    """
    try:
        return list(run(items))
    except ValueError as error:
        if len(items) == 1:
            return [error]
    return [result for item in items for result in run_batch(run, [item])]
