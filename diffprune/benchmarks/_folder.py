"""Rows of a user's own data: one Parquet, TSV, CSV, JSONL or JSON file, or a folder of them, with pictures inside or beside.

A folder may follow the image-folder convention (`metadata.jsonl` or `metadata.csv` with `file_name` beside the pictures) and may
have splits: sub-folders `train/`, `test/` ... or files whose names start with the split's (`test-00000-of-00001.parquet`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from hashlib import blake2b, file_digest, sha256
from os.path import isfile
from pathlib import Path

from diffprune.io.image import shortened
from diffprune.io.qa_rows import QAColumns, Row
from diffprune.io.row_files import row_files
from diffprune.io.row_groups import RowGroups
from diffprune.io.stored_picture import Picture
from diffprune.io.text_rows import TextRows

SUFFIXES = (".parquet", ".tsv", ".jsonl", ".csv", ".json")
SPLITS = ("test", "validation", "val", "dev", "train", "calibration")  # the first that is there is the main one
NAMED = ("id", "group", "category")
KEPT_ROWS = 256  # of the row groups that hold the pictures


@dataclass(frozen=True)
class StoredRow:
    """columns: names of this row's columns; record: those that are read, without the picture; place: what messages call it."""

    columns: QAColumns
    record: Row
    place: str
    folder: Path
    _read: Callable[[], Row]  # the picture's column again

    def pictures(self) -> list[Picture]:
        """The pictures, at least one: paths or the bytes of files.

        Raises:
            ValueError: there is none; the row is named.
        """
        try:
            found = self.columns.pictures(self._read(), self.folder)
        except ValueError as error:
            raise ValueError(f"{self.place}: {error}") from None
        if not found:
            raise ValueError(f"{self.place} has no picture")
        for picture in found:
            if isinstance(picture, Path) and not isfile(picture):  # which says no to a name that is too long, too
                raise ValueError(f"{self.place}: there is no picture {shortened(str(picture))}")
        return found


def splits(path: Path) -> dict[str, list[Path]]:
    """Files with rows by split, the main split first. Where no name tells a split, all are `test`.

    Raises:
        ValueError: no such path, no file with rows, or files of which only some tell their split.
    """
    found = row_files(path, SUFFIXES)
    if path.is_file() and path.suffix.lower() not in SUFFIXES:
        raise ValueError(f"{path} is none of {', '.join(SUFFIXES)}")
    named = {file: "test" if path.is_file() else _split_of(file.relative_to(path)) for file in found}
    if not any(named.values()):
        return {"test": found}
    if loose := [file for file, split in named.items() if not split]:
        raise ValueError(f"{path}: other files tell their split, {loose[0].relative_to(path)} does not; rename or move it")
    return {split: files for split in SPLITS if (files := [file for file in found if named[file] == split])}


def _split_of(file: Path) -> str:
    """The split that a folder's name or the start of the file's name tells; else empty."""
    starts = [*file.parts[:-1], file.stem.replace("_", "-").replace(".", "-").partition("-")[0]]
    return next((part for part in starts if part in SPLITS), "")


def read(files: Sequence[Path], columns: QAColumns) -> list[StoredRow]:
    """All rows of `files`, in order.

    Raises:
        ValueError: a missing column, or what cannot be read; file and row are named.
    """
    return [row for path in files for row in (_parquet if path.suffix.lower() == ".parquet" else _text)(path, columns)]


def _text(path: Path, columns: QAColumns) -> Iterator[StoredRow]:
    rows = TextRows(path, columns.image)
    found = columns.found_in(rows.columns, f"{path} line 1") if rows.columns else columns
    for number, row in enumerate(rows.scan()):
        if isinstance(row, ValueError):
            raise row
        place = rows.where(number)
        here = found if rows.columns else columns.found_in(row.keys(), place, columns.has_turns(row))
        record = {name: row[name] for name in here.read(row.keys(), NAMED) if name != here.image}
        yield StoredRow(here, record, place, path.parent, partial(rows.row, number))


def _parquet(path: Path, columns: QAColumns) -> Iterator[StoredRow]:
    groups = RowGroups([path], keep=KEPT_ROWS)
    found = columns.found_in(groups.names[0], str(path), columns.answer in groups.conversations)
    wanted = [name for name in found.read(groups.names[0], NAMED) if name != found.image]
    number = 0
    for group in range(len(groups.groups)):
        for record in groups.scan(group, wanted):
            yield StoredRow(found, record, groups.where(number), path.parent, partial(groups.row, number, [found.image]))
            number += 1


class PictureHashes:
    """Hashes of pictures by content; each file is read once."""

    def __init__(self) -> None:
        self._of_file: dict[Path, bytes] = {}

    def of_file(self, path: Path) -> bytes:
        """sha256 of its bytes."""
        if path not in self._of_file:
            with path.open("rb") as file:
                self._of_file[path] = file_digest(file, "sha256").digest()
        return self._of_file[path]

    def name(self, picture: Picture) -> str:
        """Equal for pictures of equal bytes, wherever they are stored."""
        held = self.of_file(picture) if isinstance(picture, Path) else sha256(picture).digest()
        return blake2b(held, digest_size=10).hexdigest()

    def revision(self, files: Sequence[Path], pictures: Iterator[Picture]) -> str:
        """sha256 (20 digits) over the bytes of the files and of every picture that is a file of its own."""
        digest, paths = sha256(), (picture for picture in pictures if isinstance(picture, Path))
        for path in dict.fromkeys((*files, *paths)):
            digest.update(self.of_file(path))
        return digest.hexdigest()[:20]
