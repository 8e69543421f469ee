"""matplotlib for figures in files, which need no display."""

import os


def import_matplotlib() -> None:
    """Import matplotlib for the first time, also where MPLBACKEND names a backend that is not installed here: it then
    refuses to be imported at all, and a figure that is only saved needs none. The variable stays what it is."""
    try:
        import matplotlib  # noqa: F401
    except ValueError:
        backend = os.environ.pop("MPLBACKEND", None)
        if backend is None:
            raise
        try:
            import matplotlib  # noqa: F401
        finally:
            os.environ["MPLBACKEND"] = backend
