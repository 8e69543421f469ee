"""What counts as a number in a config: JSON may hold anything in its place, even NaN, and True passes for 1."""

import math
from numbers import Integral, Real
from typing import Any


def is_whole(value: Any) -> bool:
    """Whether this is a whole number, of Python or NumPy."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def is_finite(value: Any) -> bool:
    """Whether this is a number, of Python or NumPy, and neither NaN nor infinite."""
    is_number = isinstance(value, Real) and not isinstance(value, bool)
    return is_number and abs(value) < math.inf  # which NaN is not
