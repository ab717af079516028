"""Random access to rows of Parquet files by row group, reading only the selected columns and never a whole file."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from diffprune.core.errors import first_line
from diffprune.io.sized_cache import sized_cache


class RowGroups:
    """The rows of some files with the same columns, numbered on from file to file.

    counts: [g] rows of each row group; starts: [g + 1] its first row; rows, names: [files] rows and columns of each file.
    keep:   rows to hold in memory, by whole row groups, the last one whatever its size; the least recently used go first.

    Raises:
        ValueError: a file cannot be read; names it.
    """

    def __init__(self, paths: Sequence[Path], keep: int = 0) -> None:
        self.paths = list(paths)
        self.groups: list[tuple[int, int]] = []  # (file, row group in it)
        counts: list[int] = []
        self.rows: list[int] = []
        self.names: list[list[str]] = []
        for number, path in enumerate(self.paths):
            with _opened(path) as file:
                facts, names = file.metadata, list(file.schema_arrow.names)
                if twice := {name for name in names if names.count(name) > 1}:
                    raise ValueError(f"{path} has two columns {min(twice)!r}; give each a name of its own")
                self.names.append(names)
                self.rows.append(facts.num_rows)
                self.groups += [(number, group) for group in range(facts.num_row_groups)]
                counts += [facts.row_group(group).num_rows for group in range(facts.num_row_groups)]
        self.counts = np.array(counts, np.int64)
        self.starts = np.concatenate([[0], np.cumsum(self.counts)])
        self._held = sized_cache(keep, len)  # of tables by (row group, columns)

    def blocks(self) -> np.ndarray:
        """[n] the row group of every row."""
        return np.repeat(np.arange(len(self.counts)), self.counts)

    @property
    def conversations(self) -> set[str]:
        """The columns that hold lists of structs."""
        with _opened(self.paths[0]) as file:
            kinds = {field.name: field.type for field in file.schema_arrow}
        return {name for name, kind in kinds.items() if _is_list(kind) and pa.types.is_struct(kind.value_type)}

    def leaves(self, column: str, name: str) -> list[str]:
        """The parts of a column that are called so, such as `image.path`."""
        with _opened(self.paths[0]) as file:
            parts = [file.schema.column(i) for i in range(len(file.schema))]
        return [part.path for part in parts if part.path.startswith(f"{column}.") and part.name == name]

    def scan(self, group: int, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
        """The rows of a row group. Raises ValueError: it cannot be read; names the file."""
        yield from self._rows(self._read(group, columns), group)

    def row(self, number: int, columns: Sequence[str]) -> dict[str, Any]:
        """Row `number`. Raises ValueError: its row group cannot be read; names the file."""
        group = int(np.searchsorted(self.starts, number, "right")) - 1
        key = (group, tuple(columns))
        if (rows := self._held.get(key)) is None:
            rows = self._held[key] = self._read(group, columns)
        return self._rows(rows.slice(number - int(self.starts[group]), 1), group)[0]

    def where(self, number: int) -> str:
        """The file and the row in it, from 0."""
        file, group = self.groups[int(np.searchsorted(self.starts, number, "right")) - 1]
        before = sum(self.rows[:file])
        return f"{self.paths[file]}, row {number - before} (row group {group})"

    def _rows(self, table: pa.Table, group: int) -> list[dict[str, Any]]:
        path = self.paths[self.groups[group][0]]
        try:
            found: list[dict[str, Any]] = table.to_pylist()
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} holds text that is not UTF-8 ({error.reason})") from None
        except OverflowError as error:
            raise ValueError(f"{path} holds a time that is none ({error})") from None
        return found

    def _read(self, group: int, columns: Sequence[str]) -> pa.Table:
        number, inner = self.groups[group]
        try:
            with _opened(self.paths[number]) as file:
                return _as_written(file.read_row_group(inner, columns=list(columns), use_threads=False))
        except (pa.ArrowException, OSError) as error:
            raise ValueError(f"{self.paths[number]}, row group {inner}, cannot be read ({first_line(error)})") from None


def _as_written(table: pa.Table) -> pa.Table:
    """Numbers of 32 bits by their shortest digits, as whoever wrote them had them: 0.1, and not 0.10000000149011612."""
    for place, field in enumerate(table.schema):
        kind = field.type.value_type if _is_list(field.type) else field.type
        if pa.types.is_float32(kind):
            column = table.column(place)
            for read in (pa.string(), pa.float64()):
                column = column.cast(pa.list_(read) if _is_list(field.type) else read)
            table = table.set_column(place, field.name, column)
    return table


def _is_list(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def _opened(path: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path} is no Parquet file that can be read ({first_line(error)})") from None
