"""Random access to rows of text files by byte offset: JSON lines, one JSON array of objects, CSV, TSV.

The file is UTF-8, with or without its mark; only offsets are held in memory. CSV and TSV have the rows that `csv.reader` gives
over `newline=""`; a record that it refuses is one broken row, and reading goes on at the next line. A column of a CSV or TSV all
of whose values are whole numbers with `.0`, or empty, holds integers: pandas writes them so where one is missing.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

TABLES = {".csv": ",", ".tsv": "\t"}
CHUNK = 1 << 24
WHOLE = re.compile(r"-?\d+\.0")
POINTER = re.compile(r"\d{1,64}")

csv.field_size_limit(2**31 - 1)  # a picture in base64 is longer than the 131,072 letters that are allowed by default

Row = Mapping[str, Any]


class Span(NamedTuple):
    """A row's place: its first byte, its number of bytes, its line counted from 1."""

    start: int
    size: int
    line: int


class TextRows:
    """The rows of one text file.

    columns: of a CSV or TSV; none of JSON, whose rows tell their own.
    image:   column of the pictures; in a TSV a number in it means the picture of the row with that `index`.

    Raises:
        ValueError: the file cannot be read, is no UTF-8, or is no table or array at all.
    """

    def __init__(self, path: Path, image: str = "") -> None:
        self.path, self.image = path, image
        self.columns: list[str] = []
        self._delimiter, self._whole = TABLES.get(path.suffix.lower(), ""), set[str]()
        self._row_of: dict[str, int] = {}  # by the value of `index`
        try:
            with path.open("rb") as stream:
                self.spans = np.array(list(self._index(stream)), np.int64).reshape(-1, 3)
        except OSError as error:
            raise ValueError(f"{path} cannot be read ({error.strerror})") from None

    def __len__(self) -> int:
        return len(self.spans)

    def scan(self) -> Iterator[Row | ValueError]:
        """Every row in order; in place of one that cannot be read the error that says why."""
        with self.path.open("rb") as stream:
            for number in range(len(self)):
                try:
                    yield self._read(stream, number)
                except ValueError as error:
                    yield error

    def row(self, number: int) -> Row:
        """Row `number`. Raises ValueError: it cannot be read; names the line."""
        try:
            with self.path.open("rb") as stream:
                return self._read(stream, number)
        except OSError as error:
            raise ValueError(f"{self.where(number)} cannot be read ({error.strerror})") from None

    def where(self, number: int) -> str:
        """The file and the line."""
        return f"{self.path} line {self.spans[number][2]}"

    # --- the index

    def _index(self, stream: BinaryIO) -> Iterator[Span]:
        first = _first_byte(stream, self.path)
        if self._delimiter:
            return self._table(stream, first)
        head = stream.read(CHUNK).lstrip()[:1]
        stream.seek(first)
        return _array(stream, self.path) if head == b"[" else _lines(stream)

    def _table(self, stream: BinaryIO, first: int) -> Iterator[Span]:
        records = _records(stream, first, self._delimiter)
        span, names = next(records, (Span(first, 0, 1), []))
        if isinstance(names, csv.Error):
            raise ValueError(f"{self.path} line {span.line} names no columns ({names})")
        if twice := {name for name in names if names.count(name) > 1}:
            raise ValueError(f"{self.path} has two columns {min(twice)!r}; give each a name of its own")
        if any(map(_undecoded, names)):
            raise ValueError(f"{self.path} line {span.line} is not UTF-8")
        self.columns = list(names)
        whole, seen = set(names), set[str]()
        for number, (span, values) in enumerate(records):
            yield span
            if isinstance(values, csv.Error) or len(values) != len(names):
                continue
            whole -= {name for name, value in zip(names, values, strict=True) if value and not WHOLE.fullmatch(value)}
            seen |= {name for name in whole - seen if values[names.index(name)]}
            if self._delimiter == "\t" and "index" in names:
                self._row_of[values[names.index("index")]] = number
        self._whole = whole & seen

    # --- a row

    def _read(self, stream: BinaryIO, number: int) -> Row:
        row = self._stored(stream, number)
        if self._row_of and POINTER.fullmatch(pointer := row.get(self.image, "")):
            there = self._row_of.get(pointer)
            shown = "" if there is None else self._stored(stream, there).get(self.image, "")
            if not shown or POINTER.fullmatch(shown):
                raise ValueError(f"{self.where(number)}: {self.image!r} is {pointer}, but no row of this index has a picture")
            return {**row, self.image: shown}
        return row

    def _stored(self, stream: BinaryIO, number: int) -> Row:
        start, size, _ = map(int, self.spans[number])
        stream.seek(start)
        try:
            return self._record(stream.read(size)) if self._delimiter else _object(stream.read(size))
        except ValueError as error:
            raise ValueError(f"{self.where(number)} {error}") from None

    def _record(self, data: bytes) -> dict[str, str]:
        text = data.decode("utf-8", "surrogateescape")
        try:
            values = next(csv.reader(io.StringIO(text, newline=""), delimiter=self._delimiter, strict=True))
        except csv.Error as error:
            raise ValueError(f"is no record of separated values ({error})") from None
        if any(map(_undecoded, values)):
            raise ValueError("is not UTF-8")
        if len(values) != len(self.columns):
            raise ValueError(f"has another number of values ({len(values)}) than the first line has names ({len(self.columns)})")
        row = dict(zip(self.columns, values, strict=True))
        return row | {name: row[name].removesuffix(".0") for name in self._whole}


def _first_byte(stream: BinaryIO, path: Path) -> int:
    """Where the text starts, after the mark of UTF-8. Raises ValueError: the file is something else."""
    head = stream.read(256)
    if head.startswith(b"PAR1"):
        raise ValueError(f"{path} is a Parquet file, no text")
    if head.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\0" in head:
        raise ValueError(f"{path} is not UTF-8 but, it seems, UTF-16 or binary; save it as UTF-8")
    first = 3 if head.startswith(b"\xef\xbb\xbf") else 0
    stream.seek(first)
    return first


def _undecoded(text: str) -> bool:
    return not text.isascii() and any("\udc80" <= mark <= "\udcff" for mark in text)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A mapping of JSON. Raises ValueError: a name stands twice in it, of which Python would take the last without a word."""
    row = dict(pairs)
    if len(row) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"has {next(name for name in row if names.count(name) > 1)!r} twice; which of the two is meant?")
    return row


DECODER = json.JSONDecoder(object_pairs_hook=_once)


def _object(data: bytes) -> Row:
    """One JSON object. Raises ValueError: it is none; goes on a sentence that names the place."""
    try:
        row = DECODER.decode(data.decode())
    except UnicodeDecodeError as error:
        raise ValueError(f"is not UTF-8 ({error.reason} at byte {error.start} of the row)") from None
    except RecursionError:
        raise ValueError("is nested too deeply") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"is not JSON ({error})") from None
    if not isinstance(row, dict):
        raise ValueError(f"is {type(row).__name__}, not a mapping of columns to values")
    return row


def _lines(stream: BinaryIO) -> Iterator[Span]:
    """Lines that are not blank."""
    start = stream.tell()
    for number, line in enumerate(stream, 1):
        if line.strip():
            yield Span(start, len(line), number)
        start += len(line)


def _records(stream: BinaryIO, start: int, delimiter: str) -> Iterator[tuple[Span, list[str] | csv.Error]]:
    """Records that are not blank; of one that is refused, its first line and why."""
    line = 1
    while True:  # once, and once more after each record that is refused
        stream.seek(start)
        fed: list[int] = []  # bytes of each line of the record that is being read
        reader = csv.reader(_fed(stream, fed.append), delimiter=delimiter, strict=True)
        while True:
            fed.clear()
            try:
                values: list[str] | csv.Error = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                values, fed = error, fed[:1]
            if values:
                yield Span(start, sum(fed), line), values
            start, line = start + sum(fed), line + len(fed)
            if isinstance(values, csv.Error):
                break


def _fed(stream: BinaryIO, tell: Callable[[int], None]) -> Iterator[str]:
    """Lines of a stream as `newline=""` has them, each told with its number of bytes."""
    for line in stream:
        for piece in line.splitlines(keepends=True):
            tell(len(piece))
            yield piece.decode("utf-8", "surrogateescape")


def _array(stream: BinaryIO, path: Path) -> Iterator[Span]:
    """Elements of one JSON array. Read as Latin-1, in which a character is a byte and JSON's own signs are themselves."""
    decoder, done, line = json.JSONDecoder(strict=False), stream.tell(), 1
    text = stream.read(CHUNK).decode("latin-1")
    place = text.index("[") + 1
    line += text.count("\n", 0, place)
    while True:
        while place < len(text) and text[place] in " \t\r\n,":
            line += text[place] == "\n"
            place += 1
        if text[place : place + 1] == "]":
            if (text[place + 1 :] + stream.read(CHUNK).decode("latin-1")).strip():
                raise ValueError(
                    f"{path} goes on after its array, which ends at byte {done + place}: an array, or one object per line?"
                )
            return
        try:
            _, stop = decoder.raw_decode(text, place)
        except (ValueError, RecursionError) as error:
            more = stream.read(CHUNK).decode("latin-1")
            if not more:
                raise ValueError(f"{path}: the array breaks off or is no JSON at byte {done + place} ({error})") from None
            text, done, place = text[place:] + more, done + place, 0
            continue
        yield Span(done + place, stop - place, line)
        line += text.count("\n", place, stop)
        place = stop
