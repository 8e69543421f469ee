"""A folder that a command writes into: what there is its own, one run at a time, and no half files.

Every file is recorded, by name and content, in the hidden folder `.diffusionad` beside it before it appears. So what
this package may replace, delete, or leave out as no picture is known by that record, not by a pattern or a place.
Nothing else in this package deletes or replaces a file, but for `single_files`.
"""

import json
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path, PurePosixPath
from types import TracebackType

from filelock import FileLock, Timeout

from .names import is_inside
from .output_error import OutputError, explained
from .record import PRIVATE, RECORD, Content, append_whole, read_record, sha256_of

RUN_SECONDS = 3.0  # a killed run's workers may live on for a moment, and hold its lock
RECORD_SECONDS = 60.0  # for which a line is written to the record
DAYS_IN_THE_MAKING = 2  # after which a single file's temporary folder is one that a kill left
SUPERSEDED = 1000  # lines of contents that are no more, from which on the record is written anew


class OutputFolder:
    """The folder that a command writes its results into.

    Inside `with` no other run can have it. Without, single files can be written beside a run, as the processes that
    share its work do.

    Args:
        path: is made when something is written.
        writer: the command. What other commands of this package wrote into the folder is not its own.
        option: by which the user chose the folder, for messages.

    Example:
        >>> import tempfile
        >>> place = tempfile.mkdtemp()
        >>> with OutputFolder(place, "predict") as folder:
        ...     file = folder.write_text("scores/table.csv", "path,score")
        >>> file.read_text(), OutputFolder(place, "predict").owns("scores/table.csv")
        ('path,score', True)
    """

    def __init__(self, path: str | os.PathLike[str], writer: str = "", option: str = "--output") -> None:
        self.path = Path(path)
        self.writer = writer
        self.option = option
        self._command = f"diffusionad {writer}".rstrip()
        self._private = self.path / PRIVATE
        self._unfinished = self._private / "unfinished"
        self._record: dict[str, list[Content]] | None = None
        self._run_lock = FileLock(self._private / "run.lock", timeout=RUN_SECONDS)
        self._record_lock = FileLock(self._private / "record.lock", timeout=RECORD_SECONDS)

    def __enter__(self) -> "OutputFolder":
        with self._explained(self.path):
            self._private.mkdir(parents=True, exist_ok=True)
            try:
                self._run_lock.acquire()
            except Timeout:
                raise OutputError(
                    f"{self.path}: another run of diffusionad is writing into this folder; wait for its end, or choose "
                    f"another {self.option}"
                ) from None
        try:
            self._clear_unfinished()
            with self._explained(self.path):
                self._shorten_record()
        except BaseException:
            self._run_lock.release()
            raise
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._run_lock.release()

    @property
    def record(self) -> dict[str, list[Content]]:
        """Relative names, with slashes, of all that this command wrote -> its contents; the last should be there."""
        if self._record is None:
            self.read_record()
            assert self._record is not None
        return self._record

    def read_record(self) -> None:
        """See what other processes have written meanwhile."""
        own = {
            name: [content for content in contents if content.writer == self.writer]
            for name, contents in read_record(self.path).items()
        }
        self._record = {name: contents for name, contents in own.items() if contents}

    def owns(self, name: str) -> bool:
        """Whether there is a file of this name that this command wrote, as it wrote it."""
        file = self._place(name)
        return any(content.is_in(file) for content in reversed(self.record.get(name, ())))

    def is_free(self, name: str) -> bool:
        """Whether nothing has this name, or an own file that may be replaced."""
        return not os.path.lexists(self._place(name)) or self.owns(name)

    def require_free(self, *names: str) -> None:
        """Fail before the work rather than after it, where one of these could not be written.

        Raises:
            OutputError: names the file.
        """
        for name in names:
            if not self.is_free(name):
                cause = "is no longer" if name in self.record else "is not"
                raise OutputError(
                    f"{self._place(name)} {cause} what {self._command} wrote here, so it is not overwritten; "
                    f"move it away, or choose another {self.option}"
                )

    def write(self, name: str, write: Callable[[Path], object]) -> Path:
        """Write a file so that it appears as a whole, and an older one survives a failure.

        Args:
            name: relative to the folder, with slashes; sub-folders are made.
            write: writes a temporary file at the path that it is called with, which has the same suffix.

        Returns:
            The file.

        Raises:
            OutputError: when it cannot be written, or would replace something that is not ours.
        """
        place = self._place(name)
        self.require_free(name)
        with self._explained(place), self.temporary() as folder:
            temporary = folder / f"file{place.suffix}"
            write(temporary)
            self._move(temporary, name)
        return place

    def write_text(self, name: str, text: str) -> Path:
        """[`write`] for a text in UTF-8; what is no Unicode in it is escaped, as in JSON."""
        return self.write(
            name, lambda path: path.write_text(text, encoding="utf-8", errors="backslashreplace", newline="\n")
        )

    def write_together(self, writers: Mapping[str, Callable[[Path], object]]) -> None:
        """[`write`] for files that belong together: where one of them cannot be written, none is replaced.

        Args:
            writers: name -> what writes it, for each file.

        Raises:
            OutputError: as of [`write`].
        """
        self.require_free(*writers)
        with self._explained(self.path), self.temporary() as folder:
            for name, write in writers.items():
                temporary = folder / PurePosixPath(name)
                temporary.parent.mkdir(parents=True, exist_ok=True)
                write(temporary)
            self.move_in(folder)

    def write_tree(
        self, name: str, write: Callable[[Path], object], checksums: Mapping[str, str] | None = None
    ) -> Path:
        """Write a folder with all that is in it, which appears as a whole. One of that name must not be there.

        Args:
            name: as in [`write`].
            write: fills the folder, made and empty, that it is called with.
            checksums: sha256 of those files in it, by relative name, for which `write` has found it out already.

        Raises:
            OutputError: when it cannot be written, or is there.
        """
        place = self._place(name)
        with self._explained(place), self.temporary() as folder:
            write(folder)
            if os.path.lexists(place):
                raise OutputError(f"{place} is there already; remove it, or choose another {self.option}")
            files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
            known = checksums or {}
            self._add({f"{name}/{inner}": self._content(path, known.get(inner)) for inner, path in files.items()})
            place.parent.mkdir(parents=True, exist_ok=True)
            os.replace(folder, place)
        return place

    def move_in(self, folder: Path, name: str = "", last: str | None = None) -> None:
        """Put the files of a temporary folder into their places, in place of older ones of ours.

        Args:
            folder: of [`temporary`].
            name: of the sub-folder that they come into; the folder itself by default.
            last: the file of them that says that all are there. The older one goes first and the new one comes last, so
                that a mixture of both never passes as whole.

        Raises:
            OutputError: when one of them would replace something that is not ours, or the disk is full, before any is
                moved.
        """
        files = {
            str(PurePosixPath(name, file.relative_to(folder).as_posix())): file
            for file in sorted(folder.rglob("*"))
            if file.is_file()
        }
        marker = str(PurePosixPath(name, last)) if last is not None else None
        files = dict(sorted(files.items(), key=lambda entry: entry[0] == marker))
        self.require_free(*files)
        with self._explained(self.path):
            self._add({own: self._content(file) for own, file in files.items()})
            for own in files:
                self._place(own).parent.mkdir(parents=True, exist_ok=True)
            if marker is not None:
                self._place(marker).unlink(missing_ok=True)
            for own, file in files.items():
                os.replace(file, self._place(own))

    def move_aside(self, name: str) -> Path:
        """Give what is left of an own sub-folder, and is not as we wrote it, a name that is free.

        Returns:
            Where it is now.
        """
        place, number = self._place(name), 1
        while os.path.lexists(aside := place.with_name(f"{place.name}-set-aside-{number}")):
            number += 1
        with self._explained(place):
            os.rename(place, aside)
        return aside

    def open_growing(self, name: str) -> Path:
        """The path of a file that is appended to, such as a log: recorded as ours, whatever its content will be."""
        place, growing = self._place(name), Content(-1, 0, "", self.writer)
        if growing not in self.record.get(name, ()):
            if os.path.lexists(place) and not self.owns(name):
                self.require_free(name)
            with self._explained(place):
                self._add({name: growing})
                place.parent.mkdir(parents=True, exist_ok=True)
        return place

    def append(self, name: str, text: str) -> None:
        """Append lines to a growing file; of what cannot be written whole, nothing stays.

        Raises:
            OutputError: when they cannot be written.
        """
        place = self.open_growing(name)
        with self._explained(place):
            append_whole(place, text)

    def adopt(self, *files: Path, growing: bool = False) -> None:
        """Record files below this folder that others have written for us: a tracker's, say.

        Args:
            files: that are there.
            growing: whether they are ours whatever their content will be; else as they are now.
        """
        names = {file.relative_to(self.path).as_posix(): file for file in files}
        self._add(
            {
                name: Content(-1, 0, "", self.writer) if growing else self._content(file)
                for name, file in names.items()
                if is_inside(name)
            }
        )

    def remove(self, name: str) -> bool:
        """Delete an own file; one that is not ours, or was changed, stays.

        Returns:
            Whether it is gone.
        """
        if not self.owns(name):
            return not os.path.lexists(self._place(name))
        with self._explained(self._place(name)):
            self._place(name).unlink()
        return True

    def remove_tree(self, name: str = "") -> bool:
        """Delete the own files of a sub-folder, or of all the folder, and the folders that are empty then.

        Returns:
            Whether nothing is left: files that are not ours stay.
        """
        start = f"{name}/" if name else ""
        removed = [own for own in self.record if own.startswith(start) and self.remove(own)]
        folders = {parent for own in removed for parent in PurePosixPath(own).parents} - {PurePosixPath(".")}
        for folder in sorted(folders, key=lambda folder: -len(folder.parts)):
            with suppress(OSError):  # where something else lies, it stays
                (self.path / folder).rmdir()
        top = self.path / name
        return not os.path.lexists(top) or {entry.name for entry in os.scandir(top)} <= {PRIVATE}

    @contextmanager
    def temporary(self) -> Iterator[Path]:
        """A folder on the same file system that is deleted at the end, with what is left in it."""
        folder = self._unfinished / ("run" if self._run_lock.is_locked else "files") / uuid.uuid4().hex
        with self._explained(self.path):
            folder.mkdir(parents=True)
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _clear_unfinished(self) -> None:
        """Delete what a run that was killed left; single files may be in the making beside it, but not for days."""
        shutil.rmtree(self._unfinished / "run", ignore_errors=True)
        for folder in (self._unfinished / "files").glob("*"):
            with suppress(OSError):
                if time.time() - folder.stat().st_mtime > DAYS_IN_THE_MAKING * 86400:
                    shutil.rmtree(folder, ignore_errors=True)

    def _place(self, name: str) -> Path:
        if not is_inside(name):
            raise ValueError(f"{name!r} is no name for a file in an output folder")  # a fault of ours
        return self.path.joinpath(*PurePosixPath(name).parts)

    def _content(self, file: Path, sha256: str | None = None) -> Content:
        status = os.stat(file)
        return Content(status.st_size, status.st_mtime_ns, sha256 or sha256_of(file), self.writer)

    def _move(self, temporary: Path, name: str) -> None:
        """The record comes first: a kill in between leaves a line too many, and no file without a record."""
        place = self._place(name)
        self._add({name: self._content(temporary)})
        place.parent.mkdir(parents=True, exist_ok=True)
        os.replace(temporary, place)

    def _add(self, contents: dict[str, Content]) -> None:
        self._private.mkdir(parents=True, exist_ok=True)
        for name, content in contents.items():
            self.record.setdefault(name, []).append(content)
        lines = "".join(json.dumps([name, *content]) + "\n" for name, content in contents.items())
        with self._record_lock:
            append_whole(self._private / RECORD, lines)

    def _shorten_record(self) -> None:
        """Forget contents that are no more."""
        with self._record_lock:
            record = read_record(self.path)
            self.read_record()
            if sum(max(len(contents) - 2, 0) for contents in record.values()) < SUPERSEDED:
                return
            temporary = self._private / f"{uuid.uuid4().hex}.jsonl"
            try:
                with open(temporary, "w", encoding="ascii") as file:
                    for name, contents in record.items():
                        # The last but one may be there: who wrote the last was killed before it was in its place.
                        growing = [content for content in contents if content.size < 0]
                        kept = dict.fromkeys([*growing, *contents[-2:]])
                        file.writelines(json.dumps([name, *content]) + "\n" for content in kept)
                os.replace(temporary, self._private / RECORD)
            finally:
                temporary.unlink(missing_ok=True)

    def _explained(self, place: Path) -> AbstractContextManager[None]:
        return explained(place, f"choose another {self.option}")
