"""Training data in files: numbered rows in a shuffled order per epoch; rows that cannot be used are replaced by others."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from diffprune.data.order import Order, split
from diffprune.data.qa_fields import QAFields
from diffprune.data.sources import TRAIN, BrokenRows, DrawIndex, QAPairs, TrainingSource
from diffprune.io.image import open_image


class RowTable(ABC):
    """Random access to the rows of files.

    name:     what messages call it.
    contents: (file name, bytes, rows) of every file, in order: changes when the data do.
    images:   [n] uint64, the fingerprint of each row's image.
    blocks:   [n] the block each row is read with, or None (see `Order`).
    """

    name: str
    contents: list[tuple[str, int, int]]
    images: np.ndarray
    blocks: np.ndarray | None = None

    @abstractmethod
    def row(self, number: int) -> Mapping[str, Any]:
        """Row `number`. Raises ValueError: it cannot be read; says where it stands."""

    @abstractmethod
    def where(self, number: int) -> str:
        """The file and line, or row, for messages."""


class TableSource(TrainingSource):
    """A table read as training data; opened at the first draw, so that a recipe can be written where the data are not."""

    def __init__(self, open_table: Callable[[], RowTable], fields: QAFields, pictures: Callable[[], Path], options: str) -> None:
        self._open, self.fields, self._pictures, self._options = open_table, fields, pictures, options

    @cached_property
    def table(self) -> RowTable:
        """Its rows. Raises ValueError: it cannot be read."""
        return self._open()

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

    def draw(self, index: DrawIndex, questions: int, tally: BrokenRows) -> tuple[Any, QAPairs]:
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
                return self._read(number, index, questions)
            except ValueError as error:
                reason = str(error)
            tally.skip(reason, len(self.table.images))
            attempt += 1
            number = order.near(index.seed, index.position, index.random(attempt))

    def _read(self, number: int, index: DrawIndex, questions: int) -> tuple[Any, QAPairs]:
        row = self.table.row(number)
        try:
            pairs, found = self.fields.pairs(row), self.fields.picture(row)
            if isinstance(found, Mapping) and found.get("bytes") is None:
                found = found.get("path")
            image = open_image(self._pictures() / found if isinstance(found, str) else found)
        except ValueError as error:
            raise ValueError(f"{self.table.where(number)}: {error}") from None
        if len(pairs) > questions:
            picked = index.random(0).choice(len(pairs), questions, replace=False)
            pairs = [pairs[i] for i in sorted(picked)]
        return image, pairs
