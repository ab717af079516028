"""Training source: random access to (image, question-answer pairs) by draw index, and the count of rows that cannot be used."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

TRAIN, CALIBRATION, VALIDATION = 0, 1, 2  # disjoint parts of the data, and the ids of their random streams
JUDGED_OVER = 1000  # rows: one broken image among the first few says nothing about a share

QAPairs = list[tuple[str, str]]  # (question, answer) pairs about the same images


class Example(NamedTuple):
    """PIL images (RGB), mostly one, and pairs about all of them together."""

    images: Sequence[Any]
    pairs: QAPairs


Check = Callable[[Example], None]  # raises ValueError for an example that the model cannot take


class TooManyBroken(ValueError):
    """More of the training data cannot be used than the recipe allows."""


@dataclass(frozen=True)
class DrawIndex:
    """Which example of a run: number `image` of the `images` of a step. Calibration and validation have one step."""

    stream: int
    image: int
    images: int
    seed: int = 0
    step: int = 0

    @property
    def position(self) -> int:
        """How many images all workers together drew before it."""
        return self.step * self.images + self.image

    def random(self, *more: int) -> np.random.Generator:
        """A generator of this image's own; the same for every number of workers and after every restart."""
        run = [self.seed, self.stream, self.step] if self.stream == TRAIN else [self.stream]
        return np.random.default_rng([*run, self.image, *more])


@dataclass
class BrokenRows:
    """Count of one worker's draws: `drawn` rows, of which `broken` could not be used, the first for the reason `first`.

    limit: the share of broken rows from which on the run stops. It is judged over at least 1000 rows, or all rows of smaller data.
    """

    limit: float = 0.01
    drawn: int = 0
    broken: int = 0
    first: str = ""

    def reset(self, before: BrokenRows) -> None:
        """Count as it was then."""
        self.drawn, self.broken, self.first = before.drawn, before.broken, before.first

    def skip(self, reason: str, rows: int) -> None:
        """Count a row that cannot be used; `rows` is the size of the data.

        Raises:
            TooManyBroken: it is one too many.
        """
        self.broken += 1
        self.first = self.first or reason
        if self.broken > self.limit * max(self.drawn, min(JUDGED_OVER, rows)):
            raise TooManyBroken(
                f"{self.broken} of the {self.drawn} training rows drawn so far cannot be used, more than "
                f"max_broken_share={self.limit:g} allows; the first: {self.first}"
            )


class TrainingSource(ABC):
    """Images with question-answer pairs."""

    @property
    @abstractmethod
    def identity(self) -> str:
        """The data's content and options, wherever it lies: part of a recipe's key. Empty where its name says it all."""

    def calibrates_apart(self, revision: str, split: str) -> bool:
        """Whether a benchmark's split shows none of its calibration pictures, as its name alone says. revision: of its data."""
        return False

    def trains_apart(self, revision: str, split: str) -> bool:
        """The same of all its pictures."""
        return False

    @property
    def fetched(self) -> bool:
        """Whether the data are downloaded at the first draw, unless they are there already."""
        return False

    @property
    def size(self) -> int | None:
        """Rows; None of what is endless.

        Raises:
            ValueError: the data cannot be read.
        """
        return None

    def spread(self, most: int) -> Iterator[Any]:
        """Up to `most` PIL images from all over the data, for a look at what is there; nothing of what is endless. Rows that cannot
        be used are passed over.

        Raises:
            ValueError: the data cannot be read.
        """
        return iter(())

    @abstractmethod
    def draw(self, index: DrawIndex, questions: int, tally: BrokenRows, check: Check | None = None) -> Example:
        """The images of a draw and up to `questions` pairs about them; at least one. check: what it must pass.

        Raises:
            ValueError: the data cannot be read. TooManyBroken: too much of it.
        """
