"""Training data in files: numbered rows in a shuffled order per epoch; rows that cannot be used are replaced by others."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from diffprune.data.order import Order, split
from diffprune.data.sources import TRAIN, BrokenRows, Check, DrawIndex, Example, TrainingSource
from diffprune.io.image import open_image
from diffprune.io.qa_rows import QAColumns, Row

SPREAD_BLOCKS = 8  # blocks that a look at the data reads


@dataclass(frozen=True)
class RowTable:
    """Random access to the rows of files that are about a picture.

    name:     what messages call it.
    contents: (file name, bytes, rows) of every file, in order: changes when the data do.
    columns:  by which the rows are read.
    images:   [n] uint64, the fingerprint of each row's picture, of several that of all that rows tie together (`picture_groups`).
    row:      gives row `number`, or raises ValueError: it cannot be read; says where it stands.
    where:    the file and line, or row, for messages.
    blocks:   [n] the block each row is read with, or None (see `Order`).
    """

    name: str
    contents: list[tuple[str, int, int]]
    columns: QAColumns
    images: np.ndarray
    row: Callable[[int], Row]
    where: Callable[[int], str]
    blocks: np.ndarray | None = None


class TableSource(TrainingSource):
    """A table read as training data; opened at the first draw, so that a recipe can be written where the data are not.

    folder: of pictures that are paths; None where files hold them all.
    """

    fetched = False

    def __init__(self, open_table: Callable[[], RowTable], folder: Path | None, options: str) -> None:
        self._open, self.folder, self._options = open_table, folder, options

    @cached_property
    def table(self) -> RowTable:
        """Its rows. Raises ValueError: it cannot be read, or there is no folder of its pictures."""
        opened = self._open()
        if self.folder is not None and not self.folder.is_dir():
            raise ValueError(f"{opened.name}: there is no folder of pictures {self.folder}; name the right one with images=")
        return opened

    @property
    def size(self) -> int:
        """Rows that are about a picture."""
        return len(self.table.images)

    def spread(self, most: int) -> Iterator[Any]:
        """Up to `most` pictures, of rows that lie evenly over the data; where rows are read in blocks, of a few blocks."""
        numbers, blocks = np.arange(self.size), self.table.blocks
        if blocks is not None and self.size > most:
            parts = np.split(numbers, np.flatnonzero(np.diff(blocks)) + 1)
            parts = [parts[i] for i in _evenly(len(parts), SPREAD_BLOCKS)]
            numbers = np.concatenate([part[_evenly(len(part), -(-most // len(parts)))] for part in parts])
        for number in numbers[_evenly(len(numbers), most)]:
            try:
                found = self.table.columns.pictures(self.table.row(int(number)), self.folder)
                yield from [open_image(picture) for picture in found]
            except (ValueError, OSError):  # such a row is counted when it is drawn
                continue

    @cached_property
    def orders(self) -> dict[int, Order]:
        """The rows of each stream."""
        try:
            stream = split(self.table.images)
        except ValueError as error:
            raise ValueError(f"{self.table.name}: {error}") from None
        blocks, found = self.table.blocks, {}
        for number in np.unique(stream):
            rows = np.flatnonzero(stream == number)
            found[int(number)] = Order(rows, None if blocks is None else blocks[rows])
        return found

    @cached_property
    def identity(self) -> str:
        """The options, and a hash of the files' names, sizes and numbers of rows; not where they lie."""
        return f"{self._options} {hashlib.sha256(repr(self.table.contents).encode()).hexdigest()[:16]}"

    def draw(self, index: DrawIndex, questions: int, tally: BrokenRows, check: Check | None = None) -> Example:
        """The row of a draw; where it is broken, another that is shuffled together with it."""
        order = self.orders[index.stream]
        if index.stream == TRAIN:
            number = order.at(index.seed, index.position)
        else:  # spread evenly, so that files sorted by class do not give one class
            number = int(order.rows[index.image * len(order.rows) // index.images])
        attempt = 0
        while True:
            tally.drawn += 1
            try:
                return self._read(number, index, questions, check)
            except ValueError as error:
                reason = str(error)
            tally.skip(reason, len(self.table.images))
            attempt += 1
            number = order.near(index.seed, index.position, index.random(attempt))

    def _read(self, number: int, index: DrawIndex, questions: int, check: Check | None) -> Example:
        row, columns = self.table.row(number), self.table.columns
        try:
            found = columns.pictures(row, self.folder)
            if not found:
                raise ValueError(f"column {columns.image!r} has no picture")
            if self.folder is None and any(isinstance(picture, Path) for picture in found):
                raise ValueError("the picture is a path, but only pictures inside the Parquet files of the Hub can be read")
            pairs = [(question, _usual(answers)) for question, answers in columns.pairs(row, lambda: len(found))]
            images = [open_image(picture) for picture in found]
            if len(pairs) > questions:
                picked = index.random(0).choice(len(pairs), questions, replace=False)
                pairs = [pairs[i] for i in sorted(picked)]
            if check:
                check(Example(images, pairs))
        except ValueError as error:
            raise ValueError(f"{self.table.where(number)}: {error}") from None
        return Example(images, pairs)


def _evenly(num: int, most: int) -> np.ndarray:
    """Up to `most` different numbers below `num`, evenly spread, the first among them."""
    return np.arange(min(num, most)) * num // max(1, min(num, most))


def _usual(answers: Sequence[str]) -> str:
    """The answer that most annotators gave, of equals the first: what VQA models are trained on."""
    return Counter(answers).most_common(1)[0][0]
