"""The contract of a benchmark: samples, a prompt, a grade, an aggregate."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar


@dataclass(frozen=True)
class Sample:
    """One question about one image.

    id:       unique in its benchmark and split.
    group:    what may never be split and is resampled as one (MME pair, MMBench rotations, else the image).
    image_id: equal for questions about the same image, so that it is encoded once.
    question: the text of the user turn (options and format instruction included, model frame excluded).
    row:      the benchmark's own columns, for grading.
    category: as the benchmark reports it; `kind`: type of question, for tables per type.
    """

    id: str
    group: str
    image_id: str
    question: str
    row: dict[str, Any]
    category: str = ""
    kind: str = ""


@dataclass(frozen=True)
class Grade:
    """Credit of one answer: `credit` in [0, 1]; `parsed` what the rule read; `target` what it was compared with."""

    credit: float
    parsed: str
    target: str


@dataclass(frozen=True)
class Graded:
    """What aggregates see of one row."""

    group: str
    category: str
    credit: float
    parsed: str
    target: str


class Benchmark(ABC):
    """A source of samples with its published rules. Plug-in: one file under `benchmarks/`."""

    spelling: str = ""
    revision: ClassVar[str] = ""  # of the data: hub commit, or the world's version
    protocols: ClassVar[tuple[str, ...]] = ("llava",)
    max_new_tokens: int = 16

    @abstractmethod
    def samples(self, split: str, limit: int | None = None) -> list[Sample]:
        """Whole groups, in a fixed order; `limit` rounds up to whole groups.

        Raises:
            ValueError: no such split.
        """

    @abstractmethod
    def image(self, sample: Sample) -> Any:
        """The PIL image (RGB) of a sample, decoded on demand."""

    @abstractmethod
    def grade(self, sample: Sample, answer: str, protocol: str = "llava") -> Grade:
        """Grade one decoded answer by the benchmark's published rule."""

    @abstractmethod
    def aggregate(self, rows: Sequence[Graded]) -> dict[str, float]:
        """The benchmark's figures; the first key is the main one. Native units (percent, MME points)."""
