"""A folder of predictions: a table with a row for each picture, its files beside it, and enough to go on later."""

import csv
import json
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

from .image_files import write_atomically
from .picture_sources import PictureSource, output_names

Row: TypeAlias = dict[str, Any]

COLUMNS = ("path", "score", "decision", "threshold", "seconds", "output", "error")
SHARES = "results.process-*.jsonl"  # journals of the processes that are not the main one


class PredictionFolder:
    """The results of one model under one choice of settings.

    Rows are appended to `results.jsonl` as soon as their pictures are done, so that whatever ends the process loses the
    batch in hand only. Where several processes share the work, all but the main one append to a journal of their own,
    [`append_share`], and the main one takes those in. `results.csv`, and Parquet where it is wanted, are written at the
    end.

    Args:
        folder: is made if need be.
        settings: all that the results depend on, besides the pictures; plain JSON.
        overwrite: forget, and delete, what other settings left here.

    Attributes:
        rows: name of the picture → its row with `COLUMNS`, in the order in which they came.

    Raises:
        ValueError: when the folder holds results of other settings.
    """

    def __init__(self, folder: Path, settings: dict[str, Any], overwrite: bool = False) -> None:
        self.folder = folder
        self.rows: dict[str, Row] = {}
        folder.mkdir(parents=True, exist_ok=True)
        stored, self.journal = folder / "settings.json", folder / "results.jsonl"
        shares = self._shares()  # a run that was killed left them
        rows = _read_rows(self.journal) | _read_rows(*shares)
        if rows:
            kept = json.loads(stored.read_text(encoding="utf-8")) if stored.is_file() else {}
            others = [name for name, value in settings.items() if name not in kept or kept[name] != value]
            if not others:
                self.rows = rows
            elif overwrite:
                for row in rows.values():
                    self._remove_files(row)
            else:
                raise ValueError(
                    f"{folder} holds results with another {', '.join(others)}: "
                    "choose another --output, or --overwrite them"
                )
        text = json.dumps(settings, indent=1)
        write_atomically(stored, lambda path: path.write_text(text, encoding="utf-8"))
        self.write_tables()  # without half a line that a killed run may have left
        for share in shares:
            share.unlink()

    def is_judged(self, source: PictureSource) -> bool:
        """Whether a picture's row and files are there and not older than the picture."""
        row = self.rows.get(source.name)
        if row is None or row["error"]:
            return False
        try:
            written = (self.folder / f"{row['output']}.png").stat().st_mtime_ns
            return source.file is None or source.file.stat().st_mtime_ns <= written
        except OSError:
            return False

    def name_outputs(self, sources: Sequence[PictureSource]) -> dict[str, str]:
        """Name of a picture → the name that its files begin with, which it keeps for ever."""
        known = {name: row["output"] for name, row in self.rows.items()}
        new = [source for source in sources if source.name not in known]
        given = output_names([source.place for source in new], known.values())
        return known | {source.name: name for source, name in zip(new, given)}

    def add(self, rows: Sequence[Row]) -> None:
        """Store the rows of pictures that are done."""
        self.rows |= {row["path"]: row for row in rows}
        _append(self.journal, rows)

    def take_shares(self) -> None:
        """Take in the rows of all other processes, when these are done."""
        shares = self._shares()
        self.rows |= _read_rows(*shares)
        self.write_tables()
        for share in shares:
            share.unlink()

    def order(self, names: Iterable[str]) -> None:
        """Put the rows of pictures into this order, after those of all others: the table then depends on the pictures,
        not on who judged them when."""
        asked_for = {name: self.rows[name] for name in names if name in self.rows}
        self.rows = {name: row for name, row in self.rows.items() if name not in asked_for} | asked_for

    def write_tables(self, parquet_shards: int = 0) -> None:
        """Write the table as JSON Lines and CSV, and as so many Parquet files, if any: a row each picture, the latest
        one. Files that are named `results-00000-of-00002.parquet` are the table one after the other."""
        rows = list(self.rows.values())

        def write_csv(path: Path) -> None:
            with open(path, "w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, COLUMNS)
                writer.writeheader()
                writer.writerows(rows)

        write_atomically(self.journal, lambda path: path.write_text(_lines(rows), encoding="utf-8"))
        write_atomically(self.folder / "results.csv", write_csv)
        if parquet_shards:
            self._write_parquet(rows, parquet_shards)

    def _write_parquet(self, rows: Sequence[Row], shards: int) -> None:
        import pyarrow
        import pyarrow.parquet

        numbers = ("score", "threshold", "seconds")
        kinds = [(name, pyarrow.float64() if name in numbers else pyarrow.string()) for name in COLUMNS]
        table = pyarrow.Table.from_pylist(rows, pyarrow.schema(kinds))
        names = [f"results-{index:05d}-of-{shards:05d}.parquet" for index in range(shards)]
        names = ["results.parquet"] if shards == 1 else names
        for name, share in zip(names, even_shares(len(rows), shards)):
            part = table.slice(share.start, len(share))
            write_atomically(self.folder / name, partial(pyarrow.parquet.write_table, part))
        for old in {*self.folder.glob("results.parquet"), *self.folder.glob("results-*-of-*.parquet")}:
            if old.name not in names:  # of another number of processes
                old.unlink()

    def _shares(self) -> list[Path]:
        return sorted(self.folder.glob(SHARES))

    def _remove_files(self, row: Row) -> None:
        for ending in (".png", "_map.png", "_map.npy", "_mask.png"):
            (self.folder / f"{row['output']}{ending}").unlink(missing_ok=True)


def append_share(folder: Path, process_index: int, rows: Sequence[Row]) -> None:
    """Store the rows of pictures that a process other than the main one has done: two must not append to one file,
    least of all on different machines."""
    _append(folder / SHARES.replace("*", f"{process_index:05d}"), rows)


def even_shares(count: int, shares: int) -> list[range]:
    """Cut `count` items into contiguous ranges whose lengths differ by one at most."""
    ends = [count * index // shares for index in range(shares + 1)]
    return [range(start, end) for start, end in zip(ends, ends[1:])]


def _append(journal: Path, rows: Sequence[Row]) -> None:
    with open(journal, "a", encoding="utf-8") as file:
        file.write(_lines(rows))


def _lines(rows: Sequence[Row]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _read_rows(*journals: Path) -> dict[str, Row]:
    """Of several rows of one picture the latest; a line that a killed run did not end is left out."""
    rows: dict[str, Row] = {}
    for journal in journals:
        for line in journal.read_text(encoding="utf-8").split("\n")[:-1] if journal.is_file() else ():
            try:
                row = json.loads(line)
                rows[row["path"]] = {name: row[name] for name in COLUMNS}
            except (ValueError, LookupError, TypeError) as error:
                raise ValueError(
                    f"{journal} was not written by this version of diffusionad predict: choose another --output"
                ) from error
    return rows
