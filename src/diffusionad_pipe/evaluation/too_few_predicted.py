"""The error of an evaluation or a calibration that is left with too few pictures."""

from collections.abc import Sequence


class TooFewPredictedError(ValueError):
    """So many pictures failed that the rest says nothing.

    Args:
        message: one sentence.
        failures: a sentence on each picture that failed.
    """

    def __init__(self, message: str, failures: Sequence[str]) -> None:
        super().__init__(f"{message}; the first: {failures[0]}" if failures else message)
        self.failures = list(failures)
