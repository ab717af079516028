"""Rows of published data sets in Parquet or TSV: the selected columns in memory, images read by row group on demand."""

from __future__ import annotations

import base64
import hashlib
import json
import math
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from diffprune.core.errors import first_line
from diffprune.io.sized_cache import sized_cache

CACHE_BYTES = 256 * 2**20  # of undecoded pictures; a row group of the hub holds about a hundred
CHUNK = 4096  # rows that are Python objects before they are tidied
Record = dict[str, Any]


class Pictures(Protocol):
    """Undecoded pictures by the number of their row."""

    def __getitem__(self, row: int) -> Any: ...


@dataclass(frozen=True)
class DatasetFiles:
    """Files of one split and which of their columns to read: required ones, optional ones, and that of the images ("": none).

    na_words: whether a word that pandas takes for nothing (`NA`, `null`, `None` ...) is nothing in a TSV; else only an empty
    cell is."""

    files: tuple[Path, ...]
    columns: tuple[str, ...]
    optional: tuple[str, ...] = ()
    image: str = "image"
    na_words: bool = False


@dataclass(frozen=True)
class DatasetRows:
    """The rows of one split.

    records: the columns of every row; hash: sha256 of all of them and of the sizes of the files; bytes: of the files;
    pictures: undecoded, by row (bytes, a mapping with bytes and path, or a list of such); files: what was read, in order, and
    starts: the number of the first row of each."""

    records: list[Record]
    hash: str
    bytes: int
    pictures: Pictures
    starts: tuple[int, ...]
    files: tuple[Path, ...]

    def name(self, row: int) -> str:
        """How messages call a row: its file, and its number in it counted from 0."""
        file = bisect_right(self.starts, row) - 1
        return f"{self.files[file]}, row {row - self.starts[file]}"


def missing(value: Any) -> bool:
    """Whether a cell holds nothing: null or NaN. The text `nan` is a text."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def read(source: DatasetFiles, tidy: Callable[[Record], Record] | None = None) -> DatasetRows:
    """All rows. tidy: what to keep of a row, called once for each; its ValueError is told with the row's name.

    Raises:
        ValueError: a file that is no Parquet or TSV, a column that is missing (named), text that is not UTF-8, or a row that
            `tidy` refuses (named).
    """
    digest, records, starts = hashlib.sha256(), list[Record](), list[int]()
    tsv = source.files[0].suffix == ".tsv"
    texts = _TextPictures(source.image)
    for path in source.files:
        starts.append(len(records))
        for record in _tsv(path, source, texts) if tsv else _parquet(path, source):
            digest.update(json.dumps(record, sort_keys=True, ensure_ascii=False, default=str).encode("utf-8", "surrogatepass"))
            try:
                records.append(tidy(record) if tidy else record)
            except ValueError as error:
                raise ValueError(f"{path}, row {len(records) - starts[-1]}: {error}") from None
    sizes = [path.stat().st_size for path in source.files]
    digest.update(json.dumps(sizes).encode())
    pictures: Pictures = texts if tsv else _StoredPictures(source.files, source.image)
    return DatasetRows(records, digest.hexdigest(), sum(sizes), pictures, tuple(starts), source.files)


def write_parquet(path: Path, records: Sequence[Mapping[str, Any]], row_group: int = 100) -> None:
    """Write rows as the hub has them, pictures as mappings with bytes and path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist([dict(record) for record in records]), path, row_group_size=row_group)


# --- Parquet ---------------------------------------------------------------------------------------------------------


def _open(path: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(f"{path} is not a complete Parquet file ({first_line(error)})") from None


def _wanted(path: Path, names: Sequence[str], source: DatasetFiles) -> list[str]:
    for column in (*source.columns, *([source.image] if source.image else [])):
        if column not in names:
            raise ValueError(f"{path}: column {column!r} is missing; it has {', '.join(names)}")
    return [*source.columns, *(column for column in source.optional if column in names)]


def _parquet(path: Path, source: DatasetFiles) -> Iterator[Record]:
    with _open(path) as file:
        wanted = _wanted(path, file.schema_arrow.names, source)
        try:
            for batch in file.iter_batches(CHUNK, columns=wanted):
                yield from zip_rows(wanted, [_column(path, name, batch.column(name)) for name in wanted])
        except (pa.ArrowInvalid, OSError) as error:
            raise ValueError(f"{path} is damaged ({first_line(error)})") from None


def zip_rows(names: Sequence[str], columns: Sequence[Sequence[Any]]) -> Iterator[Record]:
    """Columns -> rows."""
    for values in zip(*columns, strict=True):
        yield dict(zip(names, values, strict=True))


def _column(path: Path, name: str, values: pa.Array) -> list[Any]:
    try:
        return values.to_pylist()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: column {name!r} holds text that is not UTF-8 ({error.reason})") from None


class _StoredPictures:
    """One column of Parquet files, read by row group; the last groups that fit into CACHE_BYTES are kept."""

    def __init__(self, files: Sequence[Path], column: str) -> None:
        self.files, self.column = files, column
        self._kept = sized_cache(CACHE_BYTES, lambda kept: kept[1])  # (values, bytes) by number of the row group
        self._groups: list[tuple[Path, int]] = []
        self._starts: list[int] = []

    def _index(self) -> None:
        total = 0
        for path in self.files:
            metadata = pq.read_metadata(path)
            for group in range(metadata.num_row_groups):
                self._groups.append((path, group))
                self._starts.append(total)
                total += metadata.row_group(group).num_rows

    def __getitem__(self, row: int) -> Any:
        if not self._groups:
            self._index()
        number = bisect_right(self._starts, row) - 1
        if (kept := self._kept.get(number)) is None:
            kept = self._kept[number] = self._read(number)
        return _placed(kept[0][row - self._starts[number]], self._groups[number][0].parent)

    def _read(self, number: int) -> tuple[list[Any], int]:
        path, group = self._groups[number]
        with _open(path) as file:
            column = file.read_row_group(group, columns=[self.column]).column(self.column)
        return column.to_pylist(), column.nbytes

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.files, self.column)


def _placed(picture: Any, folder: Path) -> Any:
    """A picture stored beside the file is named relative to it."""
    if isinstance(picture, list):
        return [_placed(part, folder) for part in picture]
    if isinstance(picture, dict) and picture.get("bytes") is None and picture.get("path"):
        return folder / picture["path"]
    return picture


# --- TSV -------------------------------------------------------------------------------------------------------------


class _TextPictures:
    """The base64 column of a TSV. A short number in place of a picture means: the picture of the row with that `index`."""

    def __init__(self, column: str) -> None:
        self.column = column
        self.texts: list[str] = []
        self.row_of: dict[str, int] = {}

    def __getitem__(self, row: int) -> bytes:
        text = self.texts[row]
        if len(text) <= 64 and text.isdigit():
            if text not in self.row_of or self.texts[self.row_of[text]].isdigit():
                raise ValueError(f"column {self.column!r} points to the picture of index {text}, which is not there")
            text = self.texts[self.row_of[text]]
        try:
            return base64.b64decode(text, validate=True)
        except ValueError as error:
            raise ValueError(f"column {self.column!r} is no base64 ({error})") from None


def _tsv(path: Path, source: DatasetFiles, pictures: _TextPictures) -> Iterator[Record]:
    try:
        frame = pd.read_csv(path, sep="\t", dtype=str, keep_default_na=source.na_words, encoding="utf-8").fillna("")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 ({error.reason})") from None
    except (pd.errors.ParserError, pd.errors.EmptyDataError) as error:
        raise ValueError(f"{path} is no table of tab-separated values ({error})") from None
    wanted = _wanted(path, list(frame.columns), source)
    if source.image:
        if "index" in frame.columns:
            pictures.row_of |= {index: len(pictures.texts) + i for i, index in enumerate(frame["index"].str.removesuffix(".0"))}
        pictures.texts += frame[source.image].tolist()
    for record in zip_rows(wanted, [frame[name].tolist() for name in wanted]):
        yield {name: value if value != "" else None for name, value in record.items()}
