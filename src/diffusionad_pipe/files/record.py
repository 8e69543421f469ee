"""The record, in the hidden folder beside our files, of what this package wrote: names and contents."""

import hashlib
import json
import os
from pathlib import Path
from typing import NamedTuple

from .names import is_inside

PRIVATE = ".diffusionad"  # beside what it is about, so that both move together
RECORD = "written.jsonl"


class Content(NamedTuple):
    """What was written under a name.

    Args:
        size: in bytes; -1 for a file that grows, whose content is ours whatever it is.
        modified: time of change in nanoseconds: the same one, and the size, spare reading the file again.
        sha256: of the content.
        writer: the command that wrote it.
    """

    size: int
    modified: int
    sha256: str
    writer: str

    def is_in(self, file: Path) -> bool:
        """Whether a file has this content still."""
        if self.size < 0:
            return file.is_file()
        try:
            status = os.stat(file)
            if status.st_size != self.size:
                return False
            return status.st_mtime_ns == self.modified or sha256_of(file) == self.sha256
        except OSError:
            return False


def read_record(folder: Path) -> dict[str, list[Content]]:
    """What [`OutputFolder.record`] says of a folder; of a line that a killed run did not end, nothing."""
    try:
        text = (folder / PRIVATE / RECORD).read_text(encoding="ascii")
    except (OSError, ValueError):  # there is none, or it is not ours
        return {}
    record: dict[str, list[Content]] = {}
    for line in text.splitlines():
        try:
            name, size, modified, sha256, writer = json.loads(line)
            content = Content(int(size), int(modified), str(sha256), str(writer))
        except (ValueError, TypeError):
            continue
        if is_inside(str(name)):
            record.setdefault(str(name), []).append(content)
    return record


class OwnProducts:
    """The records of all folders above some files, each read once: which of them this package wrote."""

    def __init__(self) -> None:
        self._records: dict[Path, dict[str, list[Content]]] = {}

    def __contains__(self, file: str | os.PathLike[str]) -> bool:
        return any(self._is_recorded(Path(path)) for path in {os.path.abspath(file), os.path.realpath(file)})

    def _is_recorded(self, file: Path) -> bool:
        for folder in file.parents:
            if folder not in self._records:
                self._records[folder] = read_record(folder)
            record = self._records[folder]
            contents = record.get(file.relative_to(folder).as_posix(), ()) if record else ()
            if any(content.is_in(file) for content in reversed(contents)):
                return True
        return False


def sha256_of(file: str | os.PathLike[str]) -> str:
    """Of a file's content, as hexadecimal digits; raises OSError."""
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def append_whole(file: Path, text: str) -> None:
    """Append to a file, or leave it as it was: half a line would hide the next one."""
    with open(file, "ab") as opened:
        end = opened.seek(0, os.SEEK_END)
        try:
            if end and not _ends_a_line(file):  # a killed run left half of one
                opened.write(b"\n")
            opened.write(text.encode("utf-8", "backslashreplace"))
            opened.flush()
        except OSError:
            os.truncate(file, end)
            raise


def _ends_a_line(file: Path) -> bool:
    with open(file, "rb") as opened:
        opened.seek(-1, os.SEEK_END)
        return opened.read(1) == b"\n"
