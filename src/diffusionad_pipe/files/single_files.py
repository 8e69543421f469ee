"""Single files that are written or edited where the user wants them, among others that are not ours."""

import os
import tempfile
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from .output_error import explained
from .output_folder import OutputFolder
from .record import read_record

CURE = "change the permissions of its folder"


def write_file(
    path: str | os.PathLike[str], write: Callable[[Path], object], writer: str = "", option: str = "--output"
) -> None:
    """Write one file into a folder whose other files are not ours; arguments and errors as of [`OutputFolder`]."""
    path = Path(os.path.abspath(path))
    OutputFolder(path.parent, writer, option).write(path.name, write)


def edit_file(path: str | os.PathLike[str], text: str) -> None:
    """Write a text file anew that the user has asked to change, such as a model's card; who wrote it does not matter.

    It is ours afterwards only if it was before. In the text, what is no Unicode is escaped.

    Raises:
        OutputError: when it cannot be written; it is as it was.
    """
    path = Path(os.path.abspath(path))
    for parent in path.parents:
        name = path.relative_to(parent).as_posix()
        for writer in {content.writer for content in read_record(parent).get(name, ())}:
            folder = OutputFolder(parent, writer, "folder")
            if folder.owns(name):
                folder.write_text(name, text)
                return
    temporary = path.with_name(f".{uuid.uuid4().hex}{path.suffix}")
    try:
        with explained(path, CURE):
            temporary.write_text(text, encoding="utf-8", errors="backslashreplace", newline="\n")
            os.replace(temporary, path)
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def require_editable(path: str | os.PathLike[str]) -> None:
    """Fail before the work rather than after it, where [`edit_file`] would.

    Raises:
        OutputError: names the file.
    """
    path = Path(os.path.abspath(path))
    with explained(path, CURE):
        tempfile.TemporaryFile(dir=path.parent).close()
