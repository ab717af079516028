"""Parts: the bytes of one Parquet file, from records and back to Arrow, refused where they are not what this program writes."""

from __future__ import annotations

import hashlib
import json
import numbers
from collections.abc import Mapping, Sequence
from functools import cache
from itertools import islice
from operator import attrgetter
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from diffprune.core.cell import CellColumns
from diffprune.core.errors import first_line
from diffprune.core.records import Provenance
from diffprune.store.columns import VERSION, Column, columns
from diffprune.store.manifest import Damaged

TYPES = {str: pa.string(), int: pa.int64(), float: pa.float64(), bool: pa.bool_()}
TAKES: dict[type, Any] = {str: str, int: numbers.Integral, float: numbers.Real, bool: (bool, np.bool_)}  # of Python and numpy alike
LONG = ("versions", "hardware")  # the same long text in all rows
Columns = list[list[Any]]  # values of records, column by column
SMALL = 1_000_000  # bytes of a part that one thread reads sooner than several


@cache
def schema(table: str) -> pa.Schema:
    """Arrow schema with the table's name and the columns' version in its metadata."""
    listed = [pa.field(c.name, TYPES[c.type], nullable=c.optional) for c in columns(table)]
    return pa.schema(listed, metadata={"diffprune.schema": f"{table} {VERSION}"})


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


def record_columns(table: str, rows: Sequence[Any]) -> Columns:
    """The values of the records themselves, column by column."""
    names = [column.name for column in columns(table) if column.owner == "record"]
    values = map(attrgetter(*names), rows)
    found = zip(*values, strict=True) if len(names) > 1 else [values]
    return list(map(list, found)) if rows else [[] for _ in names]


def record_batch(table: str, values: Columns) -> pa.RecordBatch:
    """Records from their columns.

    Raises:
        ValueError: a wrong value; names the column.
    """
    mine = [column for column in columns(table) if column.owner == "record"]
    arrays = [_array(table, column, one) for column, one in zip(mine, values, strict=True)]
    return pa.RecordBatch.from_arrays(arrays, names=[str(i) for i in range(len(mine))])


def encode(
    table: str, records: Sequence[pa.RecordBatch], cells: Sequence[tuple[str, CellColumns]], provenance: Provenance
) -> bytes:
    """One part: Parquet with dictionaries, zstd and a checksum per page.

    records: of each cell; cells: the key of each, and what else the store keeps of it.
    """
    owner = pa.array(np.repeat(np.arange(len(cells)), [mine.num_rows for mine in records]))
    whole = [column.combine_chunks() for column in pa.Table.from_batches(records).columns]
    for column in columns(table)[len(whole) :]:
        if column.owner == "provenance":
            values = [getattr(provenance, column.name)] * len(cells)
        else:
            values = [key if column.owner == "key" else getattr(about, column.name) for key, about in cells]
        whole.append(_repeated(_array(table, column, values), owner))
    listed = [field.with_type(column.type) for field, column in zip(schema(table), whole, strict=True)]
    return _written(pa.Table.from_arrays(whole, schema=pa.schema(listed, metadata=schema(table).metadata)))


def _repeated(values: pa.Array, owner: pa.Array) -> pa.Array:
    """Each row's own of the values; texts as codes, as pages of the file have them: the same long text a thousand times costs a
    hundredth of the time then."""
    if not pa.types.is_string(values.type):
        return values.take(owner)
    coded = values.dictionary_encode()
    return pa.DictionaryArray.from_arrays(coded.indices.take(owner), coded.dictionary)


def _written(whole: pa.Table, level: int | None = None) -> bytes:
    sink, options = pa.BufferOutputStream(), {"compression": "zstd", "compression_level": level, "write_page_checksum": True}
    with pq.ParquetWriter(sink, whole.schema, use_dictionary=True, store_schema=False, **options) as writer:
        writer.write_table(whole)  # without Arrow's own schema, by which a reader would tell codes from texts
        writer.add_key_value_metadata(whole.schema.metadata)
    data: bytes = sink.getvalue().to_pybytes()
    return data


def compacted(table: str, parts: Sequence[pa.Table], level: int | None = 15) -> bytes:
    """One part of the rows of many, as `decode` gives them: pressed harder, where it is written once and kept."""
    return _written(pa.concat_tables(parts).cast(schema(table)), level)


def digest(records: Mapping[str, Columns], salt: str) -> str:
    """16 hexadecimal digits of what was found, whoever wrote it: the same work done twice gets the same manifest."""
    found = json.dumps([(table, records[table]) for table in sorted(records)], default=np.generic.item, separators=(",", ":"))
    return hashlib.sha256(f"{salt}{found}".encode()).hexdigest()[:16]


def check(table: str, data: bytes) -> int:
    """Look at a part's footer; returns its rows.

    Raises:
        Damaged: foreign, another table, or other columns than its version has; names the column.
    """
    rows: int = _opened(table, data, coded=False).metadata.num_rows
    return rows


def _opened(table: str, data: bytes, coded: bool) -> pq.ParquetFile:
    """A part whose columns this program can read."""
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
    if int(written) != VERSION:
        raise Damaged(f"has version {written} of table {table!r}, this program reads {VERSION}")
    _compare(table, found, expected)
    return file


def _compare(table: str, found: pa.Schema, expected: pa.Schema) -> None:
    if found.equals(expected):
        return
    where = f"(table {table!r}, version {VERSION})"
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
    file = _opened(table, data, coded)
    listed, many = list(names), len(data) > SMALL
    wanted = pa.schema([read_schema(table, coded).field(name) for name in names])
    try:
        if first and file.metadata.num_rows > 1:
            rows = pa.Table.from_batches(islice(file.iter_batches(1, columns=listed, use_threads=False), 1))
        else:
            rows = file.read(columns=listed, use_threads=many)
    except (pa.ArrowException, OSError) as error:
        raise Damaged(f"cannot be read: {first_line(error)}") from None
    rows = pa.Table.from_arrays(rows.select(listed).columns, schema=wanted)
    return rows.slice(0, 1) if first else rows
