"""Rows of a user's own data: one Parquet, TSV, JSONL or CSV file, or a folder of them, with pictures inside or beside.

A folder may follow the image-folder convention (`metadata.jsonl` or `metadata.csv` with `file_name` beside the pictures) and may
have splits: sub-folders `train/`, `test/` ... or files whose names start with the split's (`test-00000-of-00001.parquet`).
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import file_digest, sha256
from pathlib import Path
from typing import Any

from diffprune.io import dataset_rows

SUFFIXES = (".parquet", ".tsv", ".jsonl", ".csv")
SPLITS = ("test", "validation", "val", "dev", "train", "calibration")  # the first that is there is the main one
IMAGE, FILE_NAME = "image", "file_name"  # the image-folder convention names files in the second

Record = dict[str, Any]


@dataclass
class Rows:
    """records: the columns asked for; places: what messages call each row; pictures: undecoded, by row."""

    records: list[Record] = field(default_factory=list)
    places: list[str] = field(default_factory=list)
    _pictures: list[tuple[Any, Any, Path]] = field(default_factory=list)

    def add(self, record: Record, place: str, pictures: Any, key: Any, folder: Path) -> None:
        """One row, whose picture is `pictures[key]`; one that is a path is relative to `folder`."""
        self.records.append(record)
        self.places.append(place)
        self._pictures.append((pictures, key, folder))

    def picture(self, row: int) -> Any:
        """The picture of a row: a path, or what a Parquet file or a TSV holds.

        Raises:
            ValueError: there is none; the row is named.
        """
        pictures, key, folder = self._pictures[row]
        found = pictures[key]
        if isinstance(found, str) and found:
            found = folder / found
        if not found:
            raise ValueError(f"{self.places[row]} has no picture")
        if isinstance(found, Path) and not found.is_file():
            raise ValueError(f"{self.places[row]}: there is no picture {found}")
        return found


def splits(path: Path) -> dict[str, list[Path]]:
    """Files with rows by split, the main split first. Where no name tells a split, all are `test`.

    Raises:
        ValueError: no such path, no file with rows, or files of which only some tell their split.
    """
    if not path.exists():
        raise ValueError(f"there is no file or folder {path}")
    found = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.suffix in SUFFIXES and p.is_file())
    if path.is_file() and path.suffix not in SUFFIXES:
        raise ValueError(f"{path} is none of {', '.join(SUFFIXES)}")
    if not found:
        raise ValueError(f"{path} holds no file with rows: one of {', '.join(SUFFIXES)} is needed, e.g. metadata.jsonl")
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


def read(files: Sequence[Path], columns: Sequence[str], optional: Sequence[str], image: str) -> Rows:
    """All rows of `files`, in order.

    Raises:
        ValueError: a missing column, damaged or other than UTF-8 text; file and, where known, line or row are named.
    """
    rows = Rows()
    for path in files:
        if path.suffix in (".parquet", ".tsv"):
            found = dataset_rows.read(dataset_rows.DatasetFiles((path,), tuple(columns), tuple(optional), image))
            for i, record in enumerate(found.records):
                rows.add(record, f"{path} row {i}", found.pictures, i, path.parent)
            continue
        for place, record in _lines(path) if path.suffix == ".jsonl" else _csv(path):
            column = FILE_NAME if image == IMAGE and image not in record and FILE_NAME in record else image
            for name in (*columns, column):
                if name not in record:
                    raise ValueError(f"{place}: column {name!r} is missing; it has {', '.join(record) or 'none'}")
            kept = {name: record[name] for name in (*columns, *optional) if name in record}
            rows.add(kept, place, record, column, path.parent)
    return rows


def _lines(path: Path) -> Iterator[tuple[str, Record]]:
    """JSON lines: one mapping a line; blank lines do not count."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
            except UnicodeDecodeError as error:
                raise ValueError(f"{path} line {number} is not UTF-8 ({error.reason} at byte {error.start} of the line)") from None
            except ValueError as error:
                raise ValueError(f"{path} line {number} is not JSON ({error})") from None
            if not isinstance(record, dict):
                raise ValueError(f"{path} line {number} is {type(record).__name__}, not a mapping of columns to values")
            yield f"{path} line {number}", record


def _csv(path: Path) -> Iterator[tuple[str, Record]]:
    """Comma-separated values under a line of names. A value that starts with `[` is a JSON list."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            for record in reader:
                place = f"{path} line {reader.line_num}"
                if None in record or None in record.values():
                    raise ValueError(f"{place} has another number of values than the first line has names")
                yield place, {name: _listed(value) for name, value in record.items()}
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 ({error.reason} at byte {error.start})") from None
    except csv.Error as error:
        raise ValueError(f"{path} is no table of comma-separated values ({error})") from None


def _listed(value: str) -> Any:
    if not value.startswith("["):
        return value
    try:
        return json.loads(value)
    except ValueError:
        return value


def content_hash(files: Sequence[Path], pictures: Iterator[Any]) -> str:
    """sha256 (20 digits) over the bytes of the files and of every picture that is a file of its own."""
    digest, seen = sha256(), set[Path]()
    for path in (*files, *(p for p in pictures if isinstance(p, Path))):
        if path not in seen:
            seen.add(path)
            with path.open("rb") as file:
                digest.update(file_digest(file, "sha256").digest())
    return digest.hexdigest()[:20]
