"""Many pictures, also from zip archives: unpacked one by one under names of our own, within limits, and examined."""

import csv
import io
import lzma
import stat
import tempfile
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from server_disk import written_for_visitor

MAX_IMAGES = 200
MAX_MEMBER_BYTES = 20 * 2**20  # of one picture, unpacked
MAX_UNPACKED_BYTES = 500 * 2**20  # of one batch
MAX_MEMBERS = 2000  # of an archive, pictures or not
MAX_BATCH_SECONDS = 900
ARCHIVES = (".zip", ".7z", ".rar", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".zst")

COLUMNS = ("name", "verdict", "score", "threshold", "regions", "marked_percent", "error")


class BatchItem(NamedTuple):
    """A picture to be examined, or the reason why it is not.

    Args:
        name: what the visitor calls it, with the archive's name before it.
        path: the uploaded file.
        member: the picture in it, for an archive.
        problem: why it is refused; empty if it is not.
    """

    name: str
    path: str
    member: zipfile.ZipInfo | None = None
    problem: str = ""


class BatchRow(NamedTuple):
    """The result for one picture.

    Args:
        name: see [`BatchItem`].
        verdict: see `detection.decide`.
        score: in [0, 1].
        threshold: in [0, 1], or None where nothing was decided.
        regions: number of defect regions.
        marked_percent: of the picture's pixels, 0 to 100.
        thumbnail: path of a small picture with the heatmap.
    """

    name: str
    verdict: str
    score: float
    threshold: float | None
    regions: int
    marked_percent: float
    thumbnail: str


@dataclass
class Batch:
    """What is known of a batch so far.

    Args:
        total: number of pictures, refused ones included.
        rows: the results.
        problems: (name, reason) of what could not be examined.
        stopped: why the batch ended early; empty if it did not.
    """

    total: int = 0
    rows: list[BatchRow] = field(default_factory=list)
    problems: list[tuple[str, str]] = field(default_factory=list)
    stopped: str = ""


def list_items(uploads: Sequence[tuple[str, str]]) -> list[BatchItem]:
    """The pictures in uploaded files and zip archives, none of them opened yet.

    Args:
        uploads: (path, name at the visitor's) of each file.

    Returns:
        One item for each picture and for each thing that is refused. Hidden files of an archive are left out.
    """
    items: list[BatchItem] = []
    for path, name in uploads:
        if PurePosixPath(name).suffix.lower() == ".zip" or zipfile.is_zipfile(path):
            items += _list_archive(path, name)
        else:
            items.append(BatchItem(name, path))
    return items


def _list_archive(path: str, name: str) -> list[BatchItem]:
    # Each entry of the directory starts with this signature, and the reader takes half a kilobyte for each.
    if Path(path).read_bytes().count(b"PK\1\2") > MAX_MEMBERS:
        return [BatchItem(name, path, problem=f"the archive has more than {MAX_MEMBERS} entries; split it")]
    try:
        with zipfile.ZipFile(path) as archive:
            members = [member for member in archive.infolist() if not member.filename.endswith("/")]
    except (zipfile.BadZipFile, NotImplementedError, ValueError, OSError):
        return [BatchItem(name, path, problem="the archive is damaged or no zip; pack it again")]
    items = []
    for member in members:
        parts = PurePosixPath(member.filename.replace("\\", "/")).parts
        if not parts or any(part.startswith((".", "__MACOSX")) and part != ".." for part in parts):
            continue
        problem = ""
        if ".." in parts or parts[0] == "/" or parts[0][1:2] == ":":  # a drive
            problem = "its name leads out of the archive; pack it again from its folder"
        elif parts[-1].lower().endswith(ARCHIVES):
            problem = "an archive in an archive is not opened; upload it by itself"
        elif stat.S_ISLNK(member.external_attr >> 16):
            problem = "this is a link, not a picture; pack the picture itself"
        elif member.flag_bits & 1:
            problem = "the archive is encrypted; pack it without a password"
        elif member.file_size > MAX_MEMBER_BYTES:
            problem = f"it has more than {MAX_MEMBER_BYTES >> 20} MB; make the picture smaller"
        items.append(BatchItem(f"{name}/{member.filename}", path, member, problem))
    return items or [BatchItem(name, path, problem="the archive holds no picture")]


def unpack(item: BatchItem, target: Path, limit: int) -> int:
    """Write a member of an archive to a file of our own naming.

    Args:
        item: with a member.
        target: the file to write.
        limit: bytes that may be written. What the archive says of itself is not relied on.

    Returns:
        The number of bytes.

    Raises:
        ValueError: for a damaged archive, too many bytes, or no room for them.
    """
    assert item.member is not None
    try:
        with zipfile.ZipFile(item.path) as archive, archive.open(item.member) as source:
            content = source.read(min(limit, MAX_MEMBER_BYTES) + 1)
    except (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, RuntimeError, ValueError, OSError) as error:
        raise ValueError("it cannot be unpacked, the archive is damaged or unusual; pack it again") from error
    if len(content) > limit:
        raise ValueError(f"the batch has more than {MAX_UNPACKED_BYTES >> 20} MB unpacked; split it")
    if len(content) > MAX_MEMBER_BYTES:
        raise ValueError(f"it has more than {MAX_MEMBER_BYTES >> 20} MB; make the picture smaller")
    with written_for_visitor():
        target.write_bytes(content)
    return len(content)


def examine_batch(
    uploads: Sequence[tuple[str, str]], examine: Callable[[str, str], BatchRow], seconds: float = MAX_BATCH_SECONDS
) -> Iterator[Batch]:
    """Examine pictures one after another; the same [`Batch`] is given out after each.

    Args:
        uploads: see [`list_items`].
        examine: takes path and name of a picture; its ValueErrors are noted beside the name.
        seconds: after so many the batch is stopped.
    """
    end = time.monotonic() + seconds
    items = list_items(uploads)
    batch = Batch(total=len(items))
    if len(items) > MAX_IMAGES:
        batch.stopped = f"{len(items)} pictures are more than {MAX_IMAGES}; split them into several batches"
        yield batch
        return
    yield batch
    left = MAX_UNPACKED_BYTES
    for item in items:
        path = Path(item.path)
        try:
            if item.problem:
                raise ValueError(item.problem)
            with ExitStack() as unpacked:
                if item.member is not None:
                    with written_for_visitor():
                        path = Path(unpacked.enter_context(tempfile.TemporaryDirectory()), "picture")
                    left -= unpack(item, path, left)
                batch.rows.append(examine(str(path), item.name))
        except ValueError as error:
            batch.problems.append((item.name, str(error)))
        if time.monotonic() > end and len(batch.rows) + len(batch.problems) < len(items):
            batch.stopped = f"stopped after {seconds / 60:.0f} minutes; send the rest as another batch"
        yield batch
        if batch.stopped:
            return


def to_csv(batch: Batch) -> str:
    """The results as a table with the columns of `COLUMNS`, refused pictures with their error."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(row._asdict() for row in batch.rows)
    writer.writerows({"name": name, "error": reason} for name, reason in batch.problems)
    return text.getvalue()
