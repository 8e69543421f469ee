"""Where the libraries of Hugging Face keep what they download and prepare, which may be no place to write to."""

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub import constants

from .output_error import OutputError

# What keeps a file from being written, also where the error does not say which.
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
NOT_ALLOWED = (errno.EACCES, errno.EPERM, errno.ENOTDIR, *NO_ROOM)


@contextmanager
def explained_caches() -> Iterator[None]:
    """Where something is downloaded, or a dataset is prepared: what keeps the libraries from writing to their caches is
    the fault of no model and no dataset. A context manager, and a decorator.

    Raises:
        OutputError: in place of such errors; names the folder and the variables that choose it.
    """
    try:
        yield
    except Exception as error:
        cause: BaseException | None = error
        while cause is not None:  # datasets wraps them
            if isinstance(cause, OSError) and (found := _unwritable(cause)):
                # HF_HOME holds every cache that has no variable of its own.
                variables = sorted({name if os.environ.get(name) else "HF_HOME" for name in found})
                raise OutputError(
                    f"{os.path.commonpath(found.values())}: downloads and prepared datasets are kept here, and nothing "
                    f"can be written ({cause.strerror}): make room, or set the variable {' and '.join(variables)} to "
                    "another folder"
                ) from error
            cause = cause.__cause__ or cause.__context__
        raise


def _unwritable(error: OSError) -> dict[str, str]:
    """The caches that an error is about, by the variables that set them."""
    folders = {"HF_HUB_CACHE": constants.HF_HUB_CACHE}
    if "datasets" in sys.modules:  # else nothing writes to its cache
        folders["HF_DATASETS_CACHE"] = str(sys.modules["datasets"].config.HF_DATASETS_CACHE)
    return {name: folder for name, folder in folders.items() if _is_about(error, os.path.abspath(folder))}


def _is_about(error: OSError, folder: str) -> bool:
    """Whether an error is about writing below a folder, or about making it."""
    if error.errno is None or not isinstance(error.filename, str | bytes | os.PathLike):
        return error.errno in NO_ROOM
    place = os.path.abspath(os.fsdecode(error.filename))
    if os.path.commonpath([place, folder]) == folder:
        return error.errno in NOT_ALLOWED or not os.path.isdir(folder)
    return os.path.commonpath([place, folder]) == place and not os.path.isdir(folder)
