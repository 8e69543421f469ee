"""What keeps a file from being written, said with a cure."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

CURES = {
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "free some space",
    errno.EFBIG: "free some space, or raise the limit of file sizes",
    errno.ENAMETOOLONG: "choose an output folder with a shorter path",
    errno.ENOTDIR: "a file stands where a folder is needed; choose another output folder",
    errno.EEXIST: "a file stands where a folder is needed; choose another output folder",
}


class OutputError(OSError):
    """Something cannot be written, or must not be; the message names it, the cause and the cure."""


@contextmanager
def explained(place: Path, cure: str) -> Iterator[None]:
    """Raise what keeps a file from being written as an [`OutputError`].

    Args:
        place: the file, or its folder.
        cure: of all errors that have none in `CURES`.
    """
    try:
        yield
    except OutputError:
        raise
    except OSError as error:
        # NumPy, which has written less than it wanted, gives no number.
        cause = str(error) if error.errno is None else os.strerror(error.errno)
        cure = CURES.get(error.errno or errno.ENOSPC, cure)
        raise OutputError(f"{place} cannot be written ({cause}): {cure}") from error
