"""Answers of cells that are not finished: kept as they come, so that the death of their driver costs seconds and not the cell.

Blobs `unfinished/<run>/<sha256>.parquet`, each with answers of several cells by the numbers of their questions. They are no
records: no reader of the store sees them, and a cell is published whole as ever. What is kept twice is the same; a blob goes when
all of its cells are published; what is damaged, or of other columns or another grader, counts as never asked.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields
from itertools import chain, repeat
from operator import attrgetter

import pyarrow as pa
import pyarrow.parquet as pq

from diffprune.core.cell import Cell, Questions
from diffprune.core.records import Prediction
from diffprune.io.blob_store import Blobs
from diffprune.io.names import checked_name
from diffprune.store.columns import VERSION
from diffprune.store.manifest import sha256
from diffprune.store.parts import TYPES
from diffprune.store.predictions import VIEW, grader

PREFIX = "unfinished"
MOST_BLOBS = 64  # from which on they are made one
FIELDS = tuple(field.name for field in fields(Prediction))
KINDS = {"str": str, "int": int, "float": float}
SCHEMA = pa.schema(
    [
        pa.field("cell", pa.string(), nullable=False),
        pa.field("grader", pa.string(), nullable=False),
        pa.field("number", pa.int64(), nullable=False),
        pa.field("seconds", pa.float64(), nullable=False),
        *(pa.field(one.name, TYPES[KINDS[str(one.type)]], nullable=False) for one in fields(Prediction)),
    ],
    metadata={"diffprune.schema": f"{VIEW} unfinished {VERSION}"},
)


@dataclass
class Kept:
    """Answers of one cell by the numbers of their questions, and the seconds that they took."""

    rows: dict[int, Prediction] = field(default_factory=dict)
    seconds: float = 0.0


class Unfinished:
    """What one run keeps. It knows the blobs there are, so that nothing is listed again.

    Raises:
        ValueError: a run name outside the allow-list. OSError: as `Blobs`.
    """

    def __init__(self, blobs: Blobs, run: str) -> None:
        self.blobs, self.place = blobs, f"{PREFIX}/{checked_name(run, 'run name')}"
        self._cells: dict[str, set[str]] = {}  # of each blob, those that are not published
        self._graders: dict[Questions, str] = {}

    def load(self, cells: Iterable[Cell], done: Collection[str]) -> dict[str, Kept]:
        """What is kept of these cells, by their keys. Removes blobs that are damaged, and those of cells that are done."""
        listed = self.blobs.list(self.place)
        wanted = {cell.key: self._grader(cell) for cell in cells} if listed else {}
        found: dict[str, Kept] = defaultdict(Kept)
        for key in listed:
            mine = self._read(key)
            self._cells[key] = set(mine["cell"].to_pylist()).difference(done)
            for row in mine.to_pylist():
                if row["grader"] == wanted.get(row["cell"]) and row["number"] not in found[row["cell"]].rows:
                    found[row["cell"]].seconds += row["seconds"]
                    found[row["cell"]].rows[row["number"]] = Prediction(*map(row.__getitem__, FIELDS))
        self.forget(())
        return {key: kept for key, kept in found.items() if kept.rows}

    def keep(self, found: Sequence[tuple[Cell, Kept]]) -> None:
        """Add answers, durably."""
        rows = [row for _, kept in found for row in kept.rows.values()]
        if not rows:
            return

        def each(values: Iterable[object]) -> list[object]:
            """One value of a cell for each of its rows."""
            return list(chain.from_iterable(repeat(one, len(kept.rows)) for one, (_, kept) in zip(values, found, strict=True)))

        columns = [
            each(cell.key for cell, _ in found), each(self._grader(cell) for cell, _ in found),
            [number for _, kept in found for number in kept.rows],
            each(kept.seconds / max(1, len(kept.rows)) for _, kept in found),
            *map(list, zip(*map(attrgetter(*FIELDS), rows), strict=True)),
        ]  # fmt: skip
        self._write(pa.Table.from_arrays([pa.array(c, f.type) for c, f in zip(columns, SCHEMA, strict=True)], schema=SCHEMA))
        if len(self._cells) > MOST_BLOBS:
            self._merge()

    def forget(self, cells: Iterable[str]) -> None:
        """These cells are published, or given up."""
        gone = set(cells)
        for key in list(self._cells):
            self._cells[key] -= gone
            if not self._cells[key]:
                self.blobs.delete(key)
                del self._cells[key]

    def _grader(self, cell: Cell) -> str:
        (asked,) = cell.questions
        if asked not in self._graders:
            self._graders[asked] = grader(cell)
        return self._graders[asked]

    def _write(self, table: pa.Table) -> str:
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink, compression="zstd", use_dictionary=True, write_page_checksum=True)
        data = sink.getvalue().to_pybytes()
        key = f"{self.place}/{sha256(data)}.parquet"
        self.blobs.replace(key, data)
        self._cells[key] = set(table["cell"].unique().to_pylist())
        return key

    def _read(self, key: str) -> pa.Table:
        """Rows of a blob; none of one that is damaged or of another version."""
        with suppress(FileNotFoundError, pa.ArrowException):
            data = self.blobs.read(key)
            if key.endswith(f"/{sha256(data)}.parquet"):
                table = pq.read_table(pa.BufferReader(data), use_threads=False)
                if table.schema.equals(SCHEMA, check_metadata=True):
                    return table
        return SCHEMA.empty_table()

    def _merge(self) -> None:
        """Make one blob of all: the new one first, then those that it stands for go."""
        old, live = set(self._cells), set[str]().union(*self._cells.values())
        whole = pa.concat_tables(map(self._read, old))
        new = self._write(whole.filter(pa.array([cell in live for cell in whole["cell"].to_pylist()], pa.bool_())))
        for key in old - {new}:
            self.blobs.delete(key)
            del self._cells[key]
