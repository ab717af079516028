"""Parts: the bytes of one Parquet file, from records and back to Arrow, refused where they are not what this program writes."""

from __future__ import annotations

import hashlib
import numbers
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from diffprune.core.errors import first_line
from diffprune.core.records import TABLES, Cell, Provenance
from diffprune.store.columns import Column, columns, version
from diffprune.store.manifest import Damaged

TYPES = {str: pa.string(), int: pa.int64(), float: pa.float64(), bool: pa.bool_()}
TAKES: dict[type, Any] = {str: str, int: numbers.Integral, float: numbers.Real, bool: (bool, np.bool_)}  # of Python and numpy alike
LONG = ("versions", "hardware")  # the same long text in all rows
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
def read_schema(table: str, coded: bool) -> pa.Schema:
    """`schema` as it is read: `LONG` texts, or all of them if `coded`, as dictionaries."""
    code = pa.dictionary(pa.int32(), pa.string())
    return pa.schema([f.with_type(code) if f.name in LONG or (coded and f.type == pa.string()) else f for f in schema(table)])


@cache
def dictionaries(table: str, coded: bool) -> tuple[str, ...]:
    """The columns that are dictionaries in `read_schema`."""
    return tuple(field.name for field in read_schema(table, coded) if pa.types.is_dictionary(field.type))


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


def record_arrays(table: str, rows: Sequence[Any]) -> list[pa.Array]:
    """The columns of the records themselves.

    Raises:
        ValueError: a wrong record or value; names the column.
    """
    mine = [column for column in columns(table) if column.owner == "record"]
    for row in rows:
        if type(row) is not TABLES[table]:
            raise ValueError(f"table {table!r} takes {TABLES[table].__name__} records, got {type(row).__name__}")
    return [_array(table, column, [getattr(row, column.field) for row in rows]) for column in mine]


def encode(table: str, records: list[pa.Array], cell: Cell | None, provenance: Provenance) -> bytes:
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


def digest(arrays: Mapping[str, list[pa.Array]], salt: str) -> str:
    """16 hexadecimal digits of what was found, whoever wrote it: the same work done twice gets the same manifest."""
    digest = hashlib.sha256(salt.encode())
    for table in sorted(arrays):
        batch = pa.RecordBatch.from_arrays(arrays[table], names=[str(i) for i in range(len(arrays[table]))])
        digest.update(table.encode() + batch.serialize().to_pybytes())
    return digest.hexdigest()[:16]


def check(table: str, data: bytes) -> None:
    """Look at a part's footer.

    Raises:
        Damaged: foreign, another table, or other columns than its version has; names the column.
    """
    _opened(table, data, coded=False)


def _opened(table: str, data: bytes, coded: bool) -> tuple[pq.ParquetFile, int]:
    """A part whose columns this program can read or migrate, and the version of them."""
    expected = read_schema(table, coded)
    try:
        file = pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=True, read_dictionary=dictionaries(table, coded))
        found = file.schema_arrow
    except (pa.ArrowException, OSError) as error:
        raise Damaged(f"is not a Parquet file: {first_line(error)}") from None
    label = (found.metadata or {}).get(b"diffprune.schema", b"").decode("utf-8", "replace")
    name, _, written = label.partition(" ")
    if name != table or not written.isdecimal():
        raise Damaged(f"is not a part of table {table!r}, its schema is {label!r:.60}")
    if int(written) < version(table) and all((table, step) in MIGRATIONS for step in range(int(written), version(table))):
        return file, int(written)
    _compare(table, found, expected, int(written))
    if int(written) != version(table):
        raise Damaged(f"has version {written} of table {table!r}, this program reads {version(table)} and has no migration")
    return file, int(written)


def _compare(table: str, found: pa.Schema, expected: pa.Schema, written: int) -> None:
    if found.equals(expected):
        return
    where = f"(table {table!r}, version {written})"
    for field in schema(table):
        place = found.get_field_index(field.name)
        if place < 0:
            raise Damaged(f"has no column {field.name!r} {where}")
        kind = found.field(place).type
        if (kind.value_type if pa.types.is_dictionary(kind) else kind) != field.type:
            raise Damaged(f"has column {field.name!r} as {kind}, not {field.type} {where}")
    for name in found.names:
        if name not in expected.names:
            raise Damaged(f"has an unknown column {name!r:.100} {where}")


def decode(table: str, data: bytes, names: Sequence[str], coded: bool = False, first: bool = False) -> pa.Table:
    """The columns `names` of a part as `read_schema` has them, every page of them checked.

    first: only the first row, and only as much of the file as that takes.

    Raises:
        Damaged: the part cannot be used.
    """
    file, written = _opened(table, data, coded)
    listed, many = list(names), len(data) > SMALL
    wanted = pa.schema([read_schema(table, coded).field(name) for name in names])
    try:
        if written < version(table):
            rows = _migrated(table, data, written).select(listed).cast(wanted)
        elif first and file.metadata.num_rows > 1:
            rows = pa.Table.from_batches(islice(file.iter_batches(1, columns=listed, use_threads=False), 1))
        else:
            rows = file.read(columns=listed, use_threads=many)
    except (pa.ArrowException, OSError) as error:
        raise Damaged(f"cannot be read: {first_line(error)}") from None
    rows = pa.Table.from_arrays(rows.select(listed).columns, schema=wanted)
    return rows.slice(0, 1) if first else rows


def _migrated(table: str, data: bytes, written: int) -> pa.Table:
    """All rows of a part of an older version in the columns of this one. Migrations see plain text, no dictionaries."""
    rows = pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=True).read()
    for step in range(written, version(table)):
        rows = MIGRATIONS[table, step](rows)
    _compare(table, rows.schema, schema(table), version(table))
    return rows
