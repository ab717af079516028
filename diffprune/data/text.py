"""Training rows of text files by byte offset: JSON lines, one JSON array of objects, CSV. Only the offsets are held in memory."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from diffprune.data.order import fingerprint
from diffprune.data.qa_fields import QAFields
from diffprune.data.table import RowTable

CHUNK = 1 << 24
Span = tuple[int, int]  # first byte and number of bytes


class TextTable(RowTable):
    """The rows of one text file that are about an image; rows of text alone, as LLaVA-665K has 40,000, are left out."""

    def __init__(self, path: Path, fields: QAFields) -> None:
        try:
            facts = path.stat()
            self.header, spans, images = _index(path, facts.st_size, facts.st_mtime_ns, fields)
        except OSError as error:
            raise ValueError(f"{path} cannot be read as training data ({error.strerror})") from None
        self.path, self.name, self.spans, self.images = path, str(path), spans, images
        self.contents = [(path.name, facts.st_size, len(images))]
        if not len(images):
            raise ValueError(f"{path} has no row with an image in field {fields.image!r}; say which with image=")

    def row(self, number: int) -> Mapping[str, Any]:
        start, size = map(int, self.spans[number])
        try:
            with self.path.open("rb") as stream:
                stream.seek(start)
                return parsed(stream.read(size), self.header)
        except (OSError, ValueError, csv.Error) as error:
            raise ValueError(f"{self.where(number)} cannot be read ({error})") from None

    def where(self, number: int) -> str:
        return f"{self.path}, row at byte {self.spans[number][0]}"


def parsed(data: bytes, header: list[str]) -> Mapping[str, Any]:
    """One row. header: the columns of a CSV file, empty for JSON. Raises ValueError or csv.Error: it is none."""
    if header:
        values = next(csv.reader(data.decode().splitlines(keepends=True), strict=True))
        if len(values) != len(header):
            raise ValueError(f"{len(values)} values, but {len(header)} columns")
        return dict(zip(header, values, strict=True))
    row = json.loads(data)
    if not isinstance(row, dict):
        raise ValueError(f"a row is {type(row).__name__}, not an object with fields")
    return row


@lru_cache(maxsize=8)
def _index(path: Path, size: int, changed: int, fields: QAFields) -> tuple[list[str], np.ndarray, np.ndarray]:
    """(columns of CSV, spans [n 2], fingerprints [n]) of a file as it was at a time; broken rows stay, to be counted later."""
    spans: list[Span] = []
    images: list[int] = []
    with path.open("rb") as stream:
        header, scan = _format(stream, path)
        if header:
            fields.check(header, str(path))
        for start, length in scan(stream):
            data = _at(stream, start, length)
            try:
                found = fields.picture(parsed(data, header))
                if found is None:
                    continue
                name = found if isinstance(found, str) else json.dumps(found, sort_keys=True)
            except (ValueError, csv.Error):
                name = f"broken {start}"
            spans.append((start, length))
            images.append(fingerprint(name))
    return header, np.array(spans, np.int64).reshape(-1, 2), np.array(images, np.uint64)


def _at(stream: BinaryIO, start: int, length: int) -> bytes:
    """Bytes of a stream, which then stands where it stood."""
    here = stream.tell()
    stream.seek(start)
    data = stream.read(length)
    stream.seek(here)
    return data


def _format(stream: BinaryIO, path: Path) -> tuple[list[str], Callable[[BinaryIO], Iterator[Span]]]:
    if path.suffix.lower() == ".csv":
        start, length = next(_records(stream), (0, 0))
        try:
            header = next(csv.reader(_at(stream, start, length).decode("utf-8-sig").splitlines(keepends=True)), [])
        except UnicodeDecodeError:
            raise ValueError(f"{path} is not UTF-8 text") from None
        stream.seek(start + length)
        return header or [""], _records
    first = stream.read(CHUNK).lstrip()[:1]
    stream.seek(0)
    return [], _array if first == b"[" else _lines


def _lines(stream: BinaryIO) -> Iterator[Span]:
    """Lines that are not blank."""
    start = 0
    for line in stream:
        if line.strip():
            yield start, len(line)
        start += len(line)


def _records(stream: BinaryIO) -> Iterator[Span]:
    """Records of CSV: lines, put together while a quotation is open."""
    start = end = stream.tell()
    quotes = 0
    for line in iter(stream.readline, b""):
        end += len(line)
        quotes += line.count(b'"')
        if quotes % 2 == 0:
            if line.strip():
                yield start, end - start
            start, quotes = end, 0
    if end > start:
        yield start, end - start


def _array(stream: BinaryIO) -> Iterator[Span]:
    """Elements of one JSON array. Read as Latin-1, in which a character is a byte and JSON's own signs are themselves."""
    decoder, text, done = json.JSONDecoder(strict=False), stream.read(CHUNK).decode("latin-1"), 0
    place = text.index("[") + 1
    while True:
        while place < len(text) and text[place] in " \t\r\n,":
            place += 1
        if text[place : place + 1] == "]":
            return
        try:
            _, stop = decoder.raw_decode(text, place)
        except ValueError as error:
            more = stream.read(CHUNK).decode("latin-1")
            if not more:
                raise ValueError(f"the array breaks off or is no JSON at byte {done + place} ({error})") from None
            text, done, place = text[place:] + more, done + place, 0
            continue
        yield done + place, stop - place
        place = stop
