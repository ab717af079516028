"""Which rows of training data show the same picture: what may not be both trained on and held out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from diffprune.data.order import BROKEN, fingerprint
from diffprune.io.picture_groups import linked
from diffprune.io.qa_rows import QAColumns, Row
from diffprune.io.stored_picture import picture_id


class RowPictures(NamedTuple):
    """What tells a row's pictures from others. id: of the row, if a column is named; pictures: paths, or hashes of bytes.

    A row with neither cannot be read.
    """

    id: str = ""
    pictures: tuple[Path | str, ...] = ()


def row_pictures(row: Row, columns: QAColumns, folder: Path | None) -> RowPictures | None:
    """What a row says; None of one without a picture. Raises ValueError: it cannot be read."""
    if not (found := columns.pictures(row, folder)):
        return None
    name = columns.name(row, "id") if columns.id else ""
    return RowPictures(name, tuple(one if isinstance(one, Path) else picture_id(one) for one in found))


def groups(rows: Sequence[RowPictures], folder: Path | None) -> np.ndarray:
    """[n] uint64: equal for rows with the same id, or where some row has none, with the same id or picture, and for all rows that
    these tie together.

    A picture is told by its name. Where some rows hold paths and others bytes, the files are read, too.
    """
    if all(row.id or not row.pictures for row in rows):
        return np.array(linked([[fingerprint(f"id {row.id}")] if row.id else [BROKEN] for row in rows]), np.uint64)
    kinds = {isinstance(picture, Path) for row in rows for picture in row.pictures}
    names = [
        [*([f"id {row.id}"] if row.id else ()), *(_name(picture, folder, len(kinds) > 1) for picture in row.pictures)]
        for row in rows
    ]
    return np.array(linked([list(map(fingerprint, row)) or [BROKEN] for row in names]), np.uint64)


def _name(picture: Path | str, folder: Path | None, by_content: bool) -> str:
    if isinstance(picture, str):
        return picture
    try:
        return picture_id(picture.read_bytes() if by_content else picture, folder)
    except OSError:  # counted when its row is drawn
        return picture_id(picture, folder)
