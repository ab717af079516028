"""The Parquet store: records are published whole, found through manifests, and checked bit by bit when read.

Layout: `parts/<table>/<cell>-<sha256>.parquet`, `manifests/<cell>-<content>.json`, `quarantine/` for what cannot be used,
`tmp/<run>/` for files being written, `locks/<run>/`. Parts are written first, the manifest last, each by temporary file,
fsync and rename; what has no manifest does not exist. Columns: `columns.py`.
"""

from __future__ import annotations

import hashlib
import numbers
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from diffprune.core.record import TABLES, Cell, Provenance
from diffprune.store.columns import Column, columns, row_key, version
from diffprune.store.commits import Commits, chosen
from diffprune.store.fence import check_fence
from diffprune.store.manifest import Commit, Damaged, Part, sha256

TYPES = {str: pa.string(), int: pa.int64(), float: pa.float64(), bool: pa.bool_()}
TAKES: dict[type, Any] = {str: str, int: numbers.Integral, float: numbers.Real, bool: (bool, np.bool_)}  # of Python and numpy alike
LONG = ["versions", "hardware"]  # long texts, the same in all rows: read as categories, or a million rows take a gigabyte
SMALL = 1_000_000  # bytes of a part that one thread reads sooner than several
MIGRATIONS: dict[tuple[str, int], Callable[[pa.Table], pa.Table]] = {}  # (table, version) -> rows of the next version


def schema(table: str) -> pa.Schema:
    """Arrow schema with the table's name and version in its metadata. Cell columns may be null: not every row has a cell."""
    return _schema(table, version(table))


@cache
def _schema(table: str, number: int) -> pa.Schema:
    listed = [pa.field(c.name, TYPES[c.type], nullable=c.optional or c.owner == "cell") for c in columns(table)]
    return pa.schema(listed, metadata={"diffprune.schema": f"{table} {number}"})


@cache
def _read_schema(table: str) -> pa.Schema:
    """`schema` with the long texts as dictionaries."""
    return pa.schema([f.with_type(pa.dictionary(pa.int32(), f.type)) if f.name in LONG else f for f in schema(table)])


def _array(table: str, column: Column, values: list[Any]) -> pa.Array:
    wanted = TYPES[column.type]
    for kind in set(map(type, values)):  # Arrow would cut 16.5 to 16 without a word
        fits = issubclass(kind, TAKES[column.type]) and (column.type is bool or kind is not bool)
        if not fits and not (kind is type(None) and column.optional):
            raise ValueError(f"table {table!r}, column {column.name!r}: {kind.__name__} is not {column.type.__name__}")
    try:
        return pa.array(values, type=wanted, from_pandas=False)
    except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError, UnicodeError) as error:
        raise ValueError(f"table {table!r}, column {column.name!r}: {error}, expected {wanted}") from None


def _record_arrays(table: str, rows: Sequence[Any]) -> list[pa.Array]:
    mine = [column for column in columns(table) if column.owner == "record"]
    for row in rows:
        if type(row) is not TABLES[table]:
            raise ValueError(f"table {table!r} takes {TABLES[table].__name__} records, got {type(row).__name__}")
    return [_array(table, column, [getattr(row, column.field) for row in rows]) for column in mine]


def _encode(table: str, records: list[pa.Array], cell: Cell | None, provenance: Provenance) -> bytes:
    """One part: Parquet with dictionaries, zstd and a checksum per page."""
    count = len(records[0])
    constant: list[pa.Array] = []
    for column in columns(table)[len(records) :]:
        if column.owner == "key":
            value: Any = cell.key if cell else ""
        elif column.owner == "cell":
            value = getattr(cell, column.field) if cell else ("" if column.type is str else None)
        else:
            value = getattr(provenance, column.field)
        one = pa.scalar(None, TYPES[column.type]) if value is None else _array(table, column, [value])[0]
        constant.append(pa.repeat(one, count))
    sink = pa.BufferOutputStream()
    whole = pa.Table.from_arrays([*records, *constant], schema=schema(table))
    pq.write_table(whole, sink, compression="zstd", use_dictionary=True, write_page_checksum=True)
    return sink.getvalue().to_pybytes()


def _digest(arrays: Mapping[str, list[pa.Array]], salt: str) -> str:
    """16 hexadecimal digits of what was found, whoever wrote it: the same work done twice gets the same manifest."""
    digest = hashlib.sha256(salt.encode())
    for table in sorted(arrays):
        batch = pa.RecordBatch.from_arrays(arrays[table], names=[str(i) for i in range(len(arrays[table]))])
        digest.update(table.encode() + batch.serialize().to_pybytes())
    return digest.hexdigest()[:16]


def _check(table: str, data: bytes) -> int:
    """Look at a part's footer; returns the version of its columns, which this program can read or migrate.

    Raises:
        Damaged: foreign, another table, or other columns than its version has; names the column.
    """
    try:
        found = pq.read_schema(pa.BufferReader(data))
    except (pa.ArrowException, OSError) as error:
        raise Damaged(f"is not a Parquet file: {str(error).splitlines()[0]}") from None
    label = (found.metadata or {}).get(b"diffprune.schema", b"").decode("utf-8", "replace")
    name, _, written = label.partition(" ")
    if name != table or not written.isdecimal():
        raise Damaged(f"is not a part of table {table!r}, its schema is {label!r:.60}")
    if int(written) < version(table) and all((table, step) in MIGRATIONS for step in range(int(written), version(table))):
        return int(written)
    _compare(table, found, int(written))
    if int(written) != version(table):
        raise Damaged(f"has version {written} of table {table!r}, this program reads {version(table)} and has no migration")
    return int(written)


def _compare(table: str, found: pa.Schema, written: int) -> None:
    expected = schema(table)
    if found.equals(expected) or found.equals(_read_schema(table)):
        return
    where = f"(table {table!r}, version {written})"
    for field in expected:
        place = found.get_field_index(field.name)
        if place < 0:
            raise Damaged(f"has no column {field.name!r} {where}")
        kind = found.field(place).type
        if (kind.value_type if pa.types.is_dictionary(kind) else kind) != field.type:
            raise Damaged(f"has column {field.name!r} as {kind}, not {field.type} {where}")
    for name in found.names:
        if name not in expected.names:
            raise Damaged(f"has an unknown column {name!r:.100} {where}")


def _decode(table: str, data: bytes) -> pa.Table:
    """A part's rows in the current columns, every page checked.

    Raises:
        Damaged: the part cannot be used.
    """
    written, many = _check(table, data), len(data) > SMALL
    try:
        rows = pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=True, read_dictionary=LONG).read(use_threads=many)
    except (pa.ArrowException, OSError) as error:
        raise Damaged(f"cannot be read: {str(error).splitlines()[0]}") from None
    for step in range(written, version(table)):
        rows = MIGRATIONS[table, step](rows)
    _compare(table, rows.schema, version(table))
    return pa.Table.from_arrays(rows.select(schema(table).names).columns, schema=_read_schema(table))


def _frame(table: str, parts: list[pa.Table]) -> pd.DataFrame:
    """Pandas: float NaN stays NaN; whole numbers stay whole, as `Int64` only where a value may be missing."""
    whole = pa.concat_tables(parts) if parts else _read_schema(table).empty_table()
    frame = whole.unify_dictionaries().to_pandas(types_mapper={pa.int64(): pd.Int64Dtype()}.get, ignore_metadata=True)
    sure = [c.name for c in columns(table) if c.type is int and not c.optional and not whole[c.name].null_count]
    frame = frame.astype({name: "int64" for name in sure} | {name: "category" for name in LONG})
    # A run that resumes rewrites rows that have no cell; what its latest attempt wrote is what its results came from.
    free = frame[frame["cell"] == ""]
    return frame.drop(free.index[free.duplicated(row_key(table), keep="last")]).reset_index(drop=True)


class Store:
    """Records under a folder, which is created by the first write.

    Raises:
        ValueError: `root` is a file.
    """

    def __init__(self, root: Path | str) -> None:
        self.root = Path(root).resolve()
        if self.root.exists() and not self.root.is_dir():
            raise ValueError(f"{self.root} is a file, but a store is a folder")
        self._commits = Commits(self.root, _check)

    @property
    def problems(self) -> list[str]:
        """The files put aside while reading, one sentence each: which, why, where it is now, what counts as not done."""
        return self._commits.problems

    def append(self, table: str, rows: Sequence[Any], *, cell: Cell | None, provenance: Provenance) -> None:
        """Publish the rows of one table; see `publish`."""
        self.publish({table: rows}, cell=cell, provenance=provenance)

    def publish(self, records: Mapping[str, Sequence[Any]], *, cell: Cell | None, provenance: Provenance) -> None:
        """Make rows of several tables visible together or not at all. Publishing the same again changes nothing.

        A cell is published whole: of several commits of one cell only the first counts per table (an `ok` one before a failed one).

        Raises:
            ValueError: unknown table, wrong record or value, run name outside the allow-list.
            Fenced: a newer attempt of the run has taken over.
            OSError: names the path that could not be written; nothing new is visible.
        """
        fence = partial(check_fence, self.root, provenance.run, provenance.attempt)
        fence()
        arrays = {table: _record_arrays(table, rows) for table, rows in records.items()}
        salt = cell.key if cell else f"{provenance.run} {provenance.attempt}"
        owner = cell.key if cell else "rows"
        name = f"{owner}-{_digest(arrays, salt)}"
        if not arrays or self._commits.holds(name):
            return
        data = {table: _encode(table, arrays[table], cell, provenance) for table in arrays}
        sums = {table: sha256(raw) for table, raw in data.items()}
        parts = tuple(
            Part(table, f"{owner}-{sums[table][:16]}.parquet", len(records[table]), len(data[table]), sums[table]) for table in data
        )
        outcomes = {row.status for row in records.get("outcomes", ())}
        status = "" if not outcomes else "ok" if outcomes == {"ok"} else "failed"
        commit = Commit(name, cell.key if cell else "", provenance.run, provenance.attempt, status, time.time_ns(), parts)
        self._commits.add(commit, data, fence)

    def read(self, table: str) -> pd.DataFrame:
        """All rows of a table, each once, ordered by cell and then as written; `versions` and `hardware` are categories.

        Of a cell that was published twice the first commit counts, of a row without a cell the latest. A table nobody wrote is
        an empty frame with its columns.

        Raises:
            ValueError: no such table.
        """
        columns(table)
        while True:
            parts: list[pa.Table] = []
            picked = chosen(self._commits.all(), table)
            for commit in picked:
                part = commit.part(table)
                assert part is not None
                try:
                    parts.append(_decode(table, self._commits.data(part)))
                except Damaged as damage:
                    self._commits.quarantine(commit, part, damage)
                    break  # another attempt's commit of that cell may count now
            else:
                return _frame(table, parts)

    def done(self, table: str = "outcomes") -> set[str]:
        """Keys of the cells that need no more work: with an outcome `ok`, or, for another table, with rows that did not fail.

        Every file of a commit is checked, so a cell that lost any part is not done.
        """
        columns(table)
        wanted = {"ok"} if table == "outcomes" else {"ok", ""}
        return {commit.cell for commit in chosen(self._commits.all(), table) if commit.cell and commit.status in wanted}
