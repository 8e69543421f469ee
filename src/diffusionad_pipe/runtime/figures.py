"""matplotlib for figures in files, which need no display."""

import os
import sys
from contextlib import suppress


def import_matplotlib() -> None:
    """Import matplotlib, also where MPLBACKEND names a backend that is not installed here: it then refuses to be
    imported at all, and a figure that is only saved needs none. A backend that is here stays chosen."""
    if "matplotlib" in sys.modules:
        return
    backend = os.environ.pop("MPLBACKEND", None)
    try:
        import matplotlib
    finally:
        if backend is not None:
            os.environ["MPLBACKEND"] = backend
    if backend:
        with suppress(ValueError):
            matplotlib.rcParams["backend"] = backend  # as matplotlib does itself
