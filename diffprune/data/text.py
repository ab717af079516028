"""Training rows of a text file: those that are about a picture, told apart by its name, or by its bytes where it has none."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import numpy as np

from diffprune.data.groups import RowPictures, groups, row_pictures
from diffprune.data.table import RowTable
from diffprune.io.qa_rows import QAColumns
from diffprune.io.text_rows import TextRows


def text_table(path: Path, columns: QAColumns, folder: Path) -> RowTable:
    """JSON lines, one JSON array, CSV or TSV. folder: of the pictures.

    Rows of text alone, as LLaVA-665K has 40,000, are left out; broken rows stay, to be counted when they are drawn.

    Raises:
        ValueError: it cannot be read, lacks a column, or has no row with a picture.
    """
    try:
        facts = path.stat()
    except OSError as error:
        raise ValueError(f"{path} cannot be read as training data ({error.strerror})") from None
    rows, names, turns, numbers, images, unread = _index(path, facts.st_size, facts.st_mtime_ns, columns, folder)
    if unread and not names:
        raise ValueError(f"no row can be read: {unread}")
    found = columns.found_in(names, str(path), turns) if names else columns
    if not len(numbers):
        raise ValueError(f"{path} has no row with an image in field {columns.image!r}; say which with image=")
    return RowTable(
        str(path), [(path.name, facts.st_size, len(numbers))], found, images,
        lambda number: rows.row(int(numbers[number])), lambda number: rows.where(int(numbers[number])),
    )  # fmt: skip


@lru_cache(maxsize=8)
def _index(
    path: Path, size: int, changed: int, columns: QAColumns, folder: Path
) -> tuple[TextRows, tuple[str, ...], bool, np.ndarray, np.ndarray, str]:
    """A file as it was at a time: (rows, names of all columns, whether answers are conversations, numbers of the rows with a
    picture, fingerprints of the pictures, why the first row that cannot be read cannot)."""
    rows = TextRows(path, columns.image)
    names: dict[str, None] = dict.fromkeys(rows.columns)
    numbers: list[int] = []
    images: list[RowPictures] = []
    turns, unread = False, ""
    for number, row in enumerate(rows.scan()):
        try:
            if isinstance(row, ValueError):
                unread = unread or str(row)
                raise row
            names |= dict.fromkeys(row)
            turns = turns or columns.has_turns(row)
            if (found := row_pictures(row, columns, folder)) is None:
                continue
        except ValueError:
            found = RowPictures()
        images.append(found)
        numbers.append(number)
    return rows, tuple(names), turns, np.array(numbers, np.int64), groups(images, folder), unread
