"""Training rows of Parquet files, with images inside (bytes, or the struct of Hugging Face data sets) or as paths beside them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from diffprune.core.registry import nearest
from diffprune.data.order import WINDOW, fingerprint
from diffprune.data.qa_fields import QAFields
from diffprune.data.table import RowTable
from diffprune.io.row_groups import RowGroups


def parquet_files(place: Path) -> list[Path]:
    """The Parquet file `place`, or all below the folder `place`, by name.

    Raises:
        ValueError: there is none.
    """
    if place.is_file():
        return [place]
    found = sorted(place.rglob("*.parquet"), key=lambda p: p.relative_to(place).as_posix())
    if not found:
        raise ValueError(f"{place} {'holds no .parquet file' if place.is_dir() else 'is neither a file nor a folder'}")
    return found


class ParquetTable(RowTable):
    """The rows of Parquet files, read by row group.

    id: the column that says which rows are about the same image; by default the path inside the image column, where those of
        different rows differ, else every row has an image of its own.
    """

    def __init__(self, name: str, paths: Sequence[Path], fields: QAFields, id: str = "") -> None:
        facts = tuple((path, path.stat().st_size, path.stat().st_mtime_ns) for path in paths)
        self.name, self.groups = name, RowGroups(paths, keep=2 * WINDOW)
        for path, names in zip(self.groups.paths, self.groups.names, strict=True):
            self.columns = fields.check(names, str(path))
            if id and id not in names:
                raise ValueError(f"{path} has no column {id!r}: {nearest(id, names)}")
        sizes = zip(facts, self.groups.rows, strict=True)
        self.contents = [(path.name, size, rows) for (path, size, _), rows in sizes]
        self.images, self.blocks = _images(facts, id, fields.image), self.groups.blocks()

    def row(self, number: int) -> Mapping[str, Any]:
        return self.groups.row(number, self.columns)

    def where(self, number: int) -> str:
        return self.groups.where(number)


@lru_cache(maxsize=8)
def _images(facts: tuple[tuple[Path, int, int], ...], id: str, image: str) -> np.ndarray:
    """[n] fingerprints of the rows' images, in files as they were at a time."""
    groups = RowGroups([path for path, _, _ in facts])
    column = id or next((c for c in (f"{image}.path", image) if groups.is_text(c)), "")
    found = [None if value is None else str(value) for value in groups.values(column)] if column else []
    if len(set(found)) < 2 and not id:
        found = [None] * int(groups.counts.sum())
    return np.array([fingerprint(f"row {i}" if name is None else f"id {name}") for i, name in enumerate(found)], np.uint64)
