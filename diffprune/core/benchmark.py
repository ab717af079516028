"""The contract of a benchmark: a source, samples with their prompts, a grade, an aggregate."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from pathlib import Path
from typing import Any, ClassVar, Literal

from diffprune.core.errors import with_class
from diffprune.core.registry import nearest
from diffprune.core.spec import Spec

MAIN_SPLIT = "test"  # the word a job uses for the main split of any benchmark


@dataclass(frozen=True)
class HubDataset:
    """Where the rows of a benchmark are published.

    name:     of the repository, the same in every home; `homes`: namespaces, the one to try first first.
    config:   of the repository, as the hub names it.
    commit:   of the repository; "main" is unpinned: what it was when fetched is recorded and becomes part of the revision.
    columns:  that must be there; `optional`: read where they are there; `image`: the column of the picture, read late.
    rows, groups: how many a split must have, where that is known for certain; more than one number where editions differ.
    """

    name: str
    columns: tuple[str, ...]
    homes: tuple[str, ...] = ("lmms-lab-encoder", "lmms-lab")
    config: str = "default"
    commit: str = "main"
    optional: tuple[str, ...] = ()
    image: str = "image"
    rows: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    groups: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    @property
    def repositories(self) -> tuple[str, ...]:
        """Full names, in the order in which they are tried."""
        return tuple(f"{home}/{self.name}" for home in self.homes)

    @property
    def pinned(self) -> bool:
        """Whether a commit is given; "main" may change under us."""
        return self.commit != "main"


@dataclass(frozen=True)
class Sample:
    """One question about one image.

    id:       unique in its benchmark and split.
    group:    what may never be split and is resampled as one (MME pair, MMBench rotations, else the image).
    image_id: equal for questions about the same image, so that it is encoded once.
    further_images: the same of every further image that the question shows after it, in order.
    question: the text of the user turn (options and format instruction included, model frame excluded).
    row:      the benchmark's own columns, for grading.
    category: as the benchmark reports it; `question_type`: for tables per type.
    """

    id: str
    group: str
    image_id: str
    question: str
    row: dict[str, Any]
    category: str = ""
    question_type: str = ""
    further_images: tuple[str, ...] = ()

    @property
    def image_ids(self) -> tuple[str, ...]:
        """Of all its images, in order."""
        return (self.image_id, *self.further_images)


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


@dataclass(frozen=True)
class Formula:
    """How a figure follows from sums over groups of rows, so that a bootstrap can compute it anew in every draw of groups.

    kind:       mean        100 x mean credit
                f1_mean     mean over categories of 100 x F1, positive = `yes`, read from `parsed` and `target` (POPE);
                            a `yes` that was read as `no` or `unknown` was missed
                circular    100 x share of groups all of whose rows have credit 1 (MMBench)
                paired_sum  sum over categories of 100 x mean credit + 100 x share of groups all of whose rows have credit 1 (MME)
    categories: of the rows that count; () is all.
    """

    kind: Literal["mean", "f1_mean", "circular", "paired_sum"] = "mean"
    categories: tuple[str, ...] = ()

    @property
    def whole_groups(self) -> bool:
        """Whether what counts is that all rows of a group are right."""
        return self.kind in ("circular", "paired_sum")


class Benchmark(ABC):
    """A source of samples with its published rules. Plug-in: one file under `benchmarks/`. Making one never touches data.

    revision:  of the data (hub commit, content hash, the world's version), unique to the data set; part of every cell. May be a
               property that looks at the data when asked.
    protocols: whose prompts and rules it knows. splits: with the answers to grade by, the main one first.
    formulas:  of the figures of `aggregate` that are no mean credit, by name; they are what gives a figure its interval.
    ASKING, GRADING: the members whose code shapes what a model is asked, and the grade of its answer. The digest of the first is
               part of the key of answers, that of the second of the key of their grades (`core.source`), so that a changed grader
               grades again what was answered. `aggregate` is in neither: figures are computed whenever they are shown.
    """

    ASKING: ClassVar[tuple[str, ...]] = ("samples", "image", "new_tokens", "splits")
    GRADING: ClassVar[tuple[str, ...]] = ("grade",)

    spec: Spec = Spec("")  # what the registry was asked for
    label: str = ""  # column heading; of a plug-in that says none, its name
    revision: str = ""
    protocols: ClassVar[tuple[str, ...]] = ("llava",)
    splits: ClassVar[tuple[str, ...]] = (MAIN_SPLIT,)
    formulas: ClassVar[Mapping[str, Formula]] = {}

    @abstractmethod
    def samples(self, split: str, limit: int | None = None, protocol: str = "llava") -> list[Sample]:
        """Whole groups, in a fixed order, with the protocol's prompts; `limit` rounds up to whole groups drawn by hash.

        Raises:
            ValueError: no such split or protocol, a limit below 1, or data that are missing or wrong.
        """

    @abstractmethod
    def image(self, sample: Sample) -> Any:
        """The PIL image (RGB) of a sample, decoded on demand."""

    def nth_image(self, sample: Sample, number: int) -> Any:
        """Image `number`, from 0, of a sample that may show several (`Sample.image_ids`)."""
        assert number == 0, "a benchmark whose questions show several images says how they are opened"
        return self.image(sample)

    def images(self, sample: Sample) -> list[Any]:
        """All images of a sample in order."""
        return [self.nth_image(sample, number) for number in range(len(sample.image_ids))]

    def new_tokens(self, protocol: str = "llava") -> int:
        """The most tokens an answer may have under this protocol."""
        return 16

    @abstractmethod
    def grade(self, sample: Sample, answer: str, protocol: str = "llava") -> Grade:
        """Grade one decoded answer by the benchmark's published rule."""

    @classmethod
    def foreign_grader(cls, asked: Spec) -> Callable[..., Any] | None:
        """The function outside the plug-in's own files by which `asked` grades, if there is one: its code is part of the grader's.

        Raises:
            ValueError: it cannot be imported.
        """
        return None

    @abstractmethod
    def aggregate(self, rows: Sequence[Graded]) -> dict[str, float]:
        """The benchmark's figures; the first key is the main one. Native units (percent, MME points). Needs no data."""

    def figures(self, rows: Sequence[Graded]) -> dict[str, float]:
        """What `aggregate` gives, looked at: {"incomplete": nan} where it refuses, as it does an incomplete group; {"failed": nan}
        where a user's own fails, or gives something else."""
        try:
            return named_figures(self.aggregate(rows))
        except ValueError:
            return {"incomplete": math.nan}
        except Exception:  # whatever a user's function raises costs its figure alone
            if not users_own(self):
                raise
            return {"failed": math.nan}

    def formula(self, figure: str) -> Formula:
        """How a figure of `aggregate` follows from sums; the mean credit where nothing else is declared."""
        return self.formulas.get(figure, Formula())

    def fetch(self, folder: Path | None = None) -> str:
        """Make ready to run without a network (into `folder`, if there is a choice) and check; one line on what is there.

        Raises:
            ValueError: the data cannot be had, or are not what they should be.
        """
        return f"{self.spec}: nothing to download, revision {self.revision}"

    def flags(self, protocol: str = "llava") -> tuple[str, ...]:
        """What a reader must know beside the number, e.g. `substitute`: not the data the protocol's published numbers are on."""
        return ()

    def named_split(self, name: str) -> str:
        """The split a job means: `test` is the main one of any benchmark, other names are literal.

        Raises:
            ValueError: no such split; the nearest is named.
        """
        if name == MAIN_SPLIT:
            return self.splits[0]
        if name not in self.splits:
            raise ValueError(
                f"{self.spec.name or type(self).__name__} has no split {name!r}: {nearest(name, (MAIN_SPLIT, *self.splits))}"
            )
        return name

    def check_asked(self, protocol: str, limit: int | None) -> None:
        """Refuse what no run can mean.

        Raises:
            ValueError: no such protocol (the nearest is named), or a limit below 1.
        """
        if protocol not in self.protocols:
            raise ValueError(f"{self.spec} has no protocol {protocol!r}: {nearest(protocol, self.protocols)}")
        if limit is not None and limit < 1:
            raise ValueError(f"limit is {limit}, it must be at least 1 question (or none for a full run)")


def check_samples(benchmark: Benchmark, split: str, limit: int | None, protocol: str) -> None:
    """Refuse a split that a benchmark does not have, and what a user's own benchmark gives instead of samples.

    Raises:
        ValueError: says what is wrong.
    """
    try:
        found: Any = benchmark.samples(split, None if users_own(benchmark) else limit, protocol)
    except Exception as error:
        if isinstance(error, ValueError) or not users_own(benchmark):
            raise
        raise ValueError(f"{benchmark.spec}: samples() fails for split {split!r} ({with_class(error)})") from error
    if not users_own(benchmark):
        return
    if not isinstance(found, list) or not found or not all(isinstance(one, Sample) for one in found):
        told = repr(found) if not isinstance(found, list) else "a list of other things" if found else "an empty list"
        raise ValueError(f"{benchmark.spec}: samples() gives {told:.80} for split {split!r}, but must give a list of Sample")
    wrong = [name for name in (one.id for one in found) if not isinstance(name, str)]
    if wrong:
        raise ValueError(f"{benchmark.spec}: a sample's id is {wrong[0]!r:.80}, but must be text")
    name, times = Counter(one.id for one in found).most_common(1)[0]
    if times > 1:
        raise ValueError(f"{benchmark.spec}: {times} samples of split {split!r} have the id {name!r:.80}, but each has its own")


def named_figures(found: object) -> dict[str, float]:
    """Figures by name, as `Benchmark.aggregate` has to give them.

    Raises:
        TypeError: something else.
    """
    named = dict(found) if isinstance(found, Mapping) else {}
    if not named or not all(isinstance(name, str) and isinstance(value, Real) for name, value in named.items()):
        raise TypeError(f"aggregate gives {found!r:.60}, but must give figures by name, as in {{'accuracy': 71.0}}")
    return {name: float(value) for name, value in named.items()}


def users_own(benchmark: Benchmark) -> bool:
    """Whether a benchmark is a user's own plug-in."""
    return not type(benchmark).__module__.startswith("diffprune.")
