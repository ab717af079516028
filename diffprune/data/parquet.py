"""Training rows of Parquet files, read by row group, told apart by the name of their picture, or by its bytes where it has none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import numpy as np

from diffprune.data.order import BROKEN, WINDOW, fingerprint
from diffprune.data.table import RowTable
from diffprune.io.qa_rows import QAColumns, Row
from diffprune.io.row_groups import RowGroups
from diffprune.io.stored_picture import picture_id

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

    A row is named by its `id`, else by the path inside its picture; where there is none, or all rows have the same, the bytes of
    the picture are read and hashed. A row that cannot be read is broken.
    """
    groups = RowGroups([path for path, _, _ in facts])
    names = _named(groups, columns, folder)
    if len(set(names)) < 2:
        names = [""] * len(names)
    for group in sorted({int(groups.blocks()[i]) for i, name in enumerate(names) if not name}):
        start = int(groups.starts[group])
        for i, name in enumerate(_hashed(groups, group, columns, folder), start):
            names[i] = names[i] or name
    return np.array([fingerprint(name) if name else BROKEN for name in names], np.uint64)


def _named(groups: RowGroups, columns: QAColumns, folder: Path | None) -> list[str]:
    """The name of every row's picture, empty where there is none; nothing of the pictures themselves is read."""
    leaves = [columns.id] if columns.id else groups.leaves(columns.image, "path")
    found: list[str] = []
    for group, count in enumerate(groups.counts):
        found += [_name(row, columns, folder) for row in groups.scan(group, leaves)] if leaves else [""] * int(count)
    return found


def _hashed(groups: RowGroups, group: int, columns: QAColumns, folder: Path | None) -> list[str]:
    """The same for one row group, of the pictures themselves."""
    try:
        return [_name(row, replace(columns, id=""), folder) for row in groups.scan(group, [columns.image])]
    except ValueError:  # counted when its rows are drawn
        return [""] * int(groups.counts[group])


def _name(row: Row, columns: QAColumns, folder: Path | None) -> str:
    try:
        if columns.id:
            return f"id {name}" if (name := columns.name(row, "id")) else ""
        picture = columns.picture(row, folder)
        return "" if picture is None else picture_id(picture, folder)
    except ValueError:  # such a row is never trained on
        return ""
