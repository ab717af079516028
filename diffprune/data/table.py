"""A source of files: numbered rows, drawn in the order of their epoch, broken ones replaced by others."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from diffprune.data.order import Order, split
from diffprune.data.qa_fields import Fields
from diffprune.data.sources import TRAIN, Asked, BrokenRows, DrawIndex, Source
from diffprune.io.image import open_image


class Table(ABC):
    """Numbered rows in files, read one by one.

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


class TableSource(Source):
    """A table read as training data; opened at the first draw, so that a recipe can be written where the data are not."""

    def __init__(self, open_table: Callable[[], Table], fields: Fields, pictures: Callable[[], Path], options: str) -> None:
        self._open, self.fields, self._pictures, self._options = open_table, fields, pictures, options

    @cached_property
    def table(self) -> Table:
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

    def draw(self, place: DrawIndex, questions: int, tally: BrokenRows) -> tuple[Any, Asked]:
        """The row at a place; where it is broken, another that is shuffled together with it."""
        order = self.orders[place.stream]
        if place.stream == TRAIN:
            number = order.at(place.seed, place.position)
        else:  # spread evenly, so that files sorted by class do not give one class
            number = int(order.rows[place.index * len(order.rows) // place.images])
        attempt = 0
        while True:
            tally.drawn += 1
            try:
                return self._read(number, place, questions)
            except ValueError as error:
                reason = str(error)
            tally.skip(reason, len(self.table.images))
            attempt += 1
            number = order.near(place.seed, place.position, place.random(attempt))

    def _read(self, number: int, place: DrawIndex, questions: int) -> tuple[Any, Asked]:
        row = self.table.row(number)
        try:
            pairs, found = self.fields.pairs(row), self.fields.picture(row)
            if isinstance(found, Mapping) and found.get("bytes") is None:
                found = found.get("path")
            image = open_image(self._pictures() / found if isinstance(found, str) else found)
        except ValueError as error:
            raise ValueError(f"{self.table.where(number)}: {error}") from None
        if len(pairs) > questions:
            picked = place.random(0).choice(len(pairs), questions, replace=False)
            pairs = [pairs[i] for i in sorted(picked)]
        return image, pairs
