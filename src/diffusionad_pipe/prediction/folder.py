"""A folder of predictions: a table with a row for each picture, its files beside it, and enough to go on later."""

import csv
import io
import json
import os
import re
from collections.abc import Collection, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

from ..files.names import folded, unique_names
from ..files.output_folder import OutputFolder
from ..images.files import shown
from ..images.sources import ImageSource, output_names

Row: TypeAlias = dict[str, Any]

COLUMNS = ("path", "score", "decision", "threshold", "seconds", "output", "sha256", "error")
ENDINGS = (".png", "_map.png", "_map.npy", "_mask.png")  # of a picture's files, after the name of its row
SETTINGS, JOURNAL, TABLE = "settings.json", "results.jsonl", "results.csv"
SHARE = "results.process-{:05d}.jsonl"  # the journal of a process that is not the main one
SHARES = re.compile(r"results\.process-\d+\.jsonl")
PARQUET = re.compile(r"results(-\d+-of-\d+)?\.parquet")


class PredictionFolder:
    """The results of one model under one choice of settings.

    Rows are appended to `results.jsonl` as soon as their pictures are done, so that whatever ends the process loses the
    batch in hand only. Where several processes share the work, all but the main one append to a journal of their own,
    [`append_share`], and the main one takes those in. `results.csv`, and Parquet where it is wanted, are written at the
    end.

    Args:
        folder: locked for this run.
        settings: all that the results depend on, besides the pictures; plain JSON.
        wanted: those of `ENDINGS` that each picture shall have.
        overwrite: forget, and delete, what other settings left here.

    Attributes:
        rows: name of the picture → its row with `COLUMNS`, in the order in which they came.

    Raises:
        ValueError: when the folder holds results of other settings.
        OutputError: when it cannot be written to, or files that are not ours have the names of the tables.
    """

    def __init__(
        self, folder: OutputFolder, settings: dict[str, Any], wanted: Collection[str], overwrite: bool = False
    ) -> None:
        self.folder = folder
        self.wanted = wanted
        self.rows: dict[str, Row] = {}
        folder.require_free(SETTINGS, JOURNAL, TABLE)
        stored = folder.path / SETTINGS
        shares = self._shares()  # a run that was killed left them
        rows = _read_rows(*(folder.path / name for name in (JOURNAL, *shares)))
        if rows:
            kept = json.loads(stored.read_text(encoding="utf-8")) if stored.is_file() else {}
            others = [name for name, value in settings.items() if name not in kept or kept[name] != value]
            if not others:
                self.rows = rows
            elif overwrite:
                for row in rows.values():
                    for ending in ENDINGS:
                        folder.remove(f"{row['output']}{ending}")
            else:
                raise ValueError(
                    f"{folder.path} holds results with another {', '.join(others)}: "
                    "choose another --output, or --overwrite them"
                )
        self._by_content = {(row["sha256"], Path(name).name): name for name, row in self.rows.items()}
        folder.write_text(SETTINGS, json.dumps(settings, indent=1))
        self.write_tables()  # without half a line that a killed run may have left
        for name in shares:
            folder.remove(name)

    def is_done(self, source: ImageSource) -> bool:
        """Whether the row of this very content is there, with all its files; its name, place and date do not count."""
        if not self.rows:
            return False
        try:
            sha256 = source.sha256()
        except OSError:  # said when it is to be judged
            return False
        row = self.rows.get(source.name)
        if row is None or row["sha256"] != sha256:
            row = self._moved(source, sha256)
        return row is not None and not row["error"] and all(self.folder.owns(row["output"] + e) for e in self.wanted)

    def _moved(self, source: ImageSource, sha256: str) -> Row | None:
        """The row of a picture that lay elsewhere under the same name, now this source's."""
        before = self._by_content.get((sha256, source.place.name))
        if before is None or before not in self.rows or os.path.lexists(before):
            return None
        self.add([self.rows.pop(before) | {"path": source.name}])
        return self.rows[source.name]

    def name_outputs(self, sources: Sequence[ImageSource]) -> dict[str, str]:
        """Name of a picture → the name that its files begin with, which it keeps for ever.

        No file of a picture has the name of another's, of a table, or of something that is not ours.
        """
        given = {
            name: row["output"]
            for name, row in self.rows.items()
            if all(self.folder.is_free(row["output"] + ending) for ending in ENDINGS)
        }
        taken = {folded(output + ending) for output in given.values() for ending in ENDINGS}
        new = [source for source in sources if source.name not in given]
        names = unique_names(
            output_names([source.place for source in new]),
            ENDINGS,
            lambda name: folded(name) in taken or not self.folder.is_free(name),
        )
        return given | {source.name: name for source, name in zip(new, names)}

    def add(self, rows: Sequence[Row]) -> None:
        """Store the rows of pictures that are done."""
        self.rows |= {row["path"]: row for row in rows}
        self.folder.append(JOURNAL, _lines(rows))

    def take_shares(self) -> None:
        """Take in the rows of all other processes, when these are done."""
        shares = self._shares()
        self.rows |= _read_rows(*(self.folder.path / name for name in shares))
        self.write_tables()
        for name in shares:
            self.folder.remove(name)

    def order(self, names: Iterable[str]) -> None:
        """Put the rows of pictures into this order, after those of all others: the table then depends on the pictures,
        not on who judged them when."""
        asked_for = {name: self.rows[name] for name in names if name in self.rows}
        self.rows = {name: row for name, row in self.rows.items() if name not in asked_for} | asked_for

    def write_tables(self, parquet_shards: int = 0) -> None:
        """Write the table as JSON Lines and CSV, and as so many Parquet files, if any: a row each picture, the latest
        one. Files that are named `results-00000-of-00002.parquet` are the table one after the other."""
        rows = list(self.rows.values())
        table = io.StringIO()
        writer = csv.DictWriter(table, COLUMNS)
        writer.writeheader()
        writer.writerows(map(_in_unicode, rows))
        self.folder.write_text(JOURNAL, _lines(rows))
        self.folder.write_text(TABLE, table.getvalue())
        if parquet_shards:
            self._write_parquet(rows, parquet_shards)

    def _write_parquet(self, rows: Sequence[Row], shards: int) -> None:
        import pyarrow
        import pyarrow.parquet

        numbers = ("score", "threshold", "seconds")
        kinds = [(name, pyarrow.float64() if name in numbers else pyarrow.string()) for name in COLUMNS]
        table = pyarrow.Table.from_pylist([_in_unicode(row) for row in rows], pyarrow.schema(kinds))
        names = [f"results-{index:05d}-of-{shards:05d}.parquet" for index in range(shards)]
        names = ["results.parquet"] if shards == 1 else names
        for name, share in zip(names, even_shares(len(rows), shards)):
            part = table.slice(share.start, len(share))
            self.folder.write(name, partial(pyarrow.parquet.write_table, part))
        for old in [name for name in self.folder.record if PARQUET.fullmatch(name) and name not in names]:
            self.folder.remove(old)  # of another number of processes

    def _shares(self) -> list[str]:
        self.folder.read_record()
        return sorted(name for name in self.folder.record if SHARES.fullmatch(name) and self.folder.owns(name))


def append_share(folder: OutputFolder, process_index: int, rows: Sequence[Row]) -> None:
    """Store the rows of pictures that a process other than the main one has done: two must not append to one file,
    least of all on different machines."""
    folder.append(SHARE.format(process_index), _lines(rows))


def even_shares(count: int, shares: int) -> list[range]:
    """Cut `count` items into contiguous ranges whose lengths differ by one at most."""
    ends = [count * index // shares for index in range(shares + 1)]
    return [range(start, end) for start, end in zip(ends, ends[1:])]


def _lines(rows: Sequence[Row]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _in_unicode(row: Row) -> Row:
    """With the path as people read it: CSV and Arrow hold no others."""
    return row | {"path": shown(row["path"])}


def _read_rows(*journals: Path) -> dict[str, Row]:
    """Of several rows of one picture the latest; a line that a killed run did not end is left out."""
    rows: dict[str, Row] = {}
    for journal in journals:
        for line in journal.read_text(encoding="utf-8").split("\n") if journal.is_file() else ():
            try:
                row = json.loads(line)
            except ValueError:
                continue
            try:
                rows[row["path"]] = {name: row[name] for name in COLUMNS}
            except (LookupError, TypeError) as error:
                raise ValueError(
                    f"{journal} was not written by this version of diffusionad predict: choose another --output"
                ) from error
    return rows
