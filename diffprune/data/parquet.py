"""Training rows of Parquet files, read by row group, told apart by the name of their picture, or by its bytes where it has none."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np

from diffprune.data.groups import RowPictures, row_pictures
from diffprune.data.groups import groups as fingerprints
from diffprune.data.order import WINDOW
from diffprune.data.table import RowTable
from diffprune.io.qa_rows import QAColumns, Row
from diffprune.io.row_groups import RowGroups
from diffprune.io.stored_picture import pictures

Facts = tuple[tuple[Path, int, int], ...]  # file, size, time of change


def parquet_table(name: str, paths: Sequence[Path], columns: QAColumns, folder: Path | None) -> RowTable:
    """The rows of Parquet files with the same columns. folder: of pictures that are paths.

    Raises:
        ValueError: a file cannot be read or lacks a column.
    """
    groups = RowGroups(paths, keep=2 * WINDOW)
    found = columns
    for path, names in zip(groups.paths, groups.names, strict=True):
        found = columns.found_in(names, str(path), columns.answer in groups.conversations)
    facts = [(path, path.stat()) for path in paths]
    contents = [(path.name, fact.st_size, rows) for (path, fact), rows in zip(facts, groups.rows, strict=True)]
    images = _images(tuple((path, fact.st_size, fact.st_mtime_ns) for path, fact in facts), found, folder)
    wanted = found.read(groups.names[0])
    return RowTable(name, contents, found, images, lambda number: groups.row(number, wanted), groups.where, groups.blocks())


@lru_cache(maxsize=8)
def _images(facts: Facts, columns: QAColumns, folder: Path | None) -> np.ndarray:
    """[n] fingerprints of the rows' pictures, in files as they were at a time.

    A row is named by its `id`, else by the paths inside its pictures; where some row has none, or all rows have the same, the bytes
    of all pictures are read and hashed. A row that cannot be read is broken.
    """
    groups = RowGroups([path for path, _, _ in facts])
    named = _named(groups, columns, folder)
    return fingerprints(named if named and len(set(named)) > 1 else _read(groups, columns, folder), folder)


def _named(groups: RowGroups, columns: QAColumns, folder: Path | None) -> list[RowPictures]:
    """What names tell, nothing of the pictures themselves being read; nothing where some row has no name."""
    leaves = [columns.id] if columns.id else groups.leaves(columns.image, "path")
    found: list[RowPictures] = []
    for group in range(len(groups.counts) if leaves else 0):
        for row in groups.scan(group, leaves):
            stored = row.get(columns.image)
            try:
                name = columns.name(row, "id") if columns.id else ""
                paths = () if columns.id else columns.pictures(row, folder)
            except ValueError:  # such a row is never trained on
                name, paths = "", ()
            each = stored if isinstance(stored, list) else [stored]
            if (columns.id and not name) or any(one is not None and not pictures(one) for one in each):
                return []
            found.append(RowPictures(name, tuple(paths)))  # type: ignore[arg-type]
    return found


def _read(groups: RowGroups, columns: QAColumns, folder: Path | None) -> list[RowPictures]:
    """The same of the pictures themselves."""
    found: list[RowPictures] = []
    for group, count in enumerate(groups.counts):
        try:
            rows = list(groups.scan(group, [*filter(None, (columns.id, columns.image))]))
        except ValueError:  # counted when its rows are drawn
            rows = [{}] * int(count)
        found += [_row(row, columns, folder) for row in rows]
    return found


def _row(row: Row, columns: QAColumns, folder: Path | None) -> RowPictures:
    try:
        return row_pictures(row, columns, folder) or RowPictures()
    except ValueError:  # such a row is never trained on
        return RowPictures()
