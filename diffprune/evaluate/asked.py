"""Benchmarks made ready to be asked, and the grade of one answer. Needs no store, so that a worker starts without it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from diffprune.core import registry
from diffprune.core.benchmark import Benchmark, Grade, Sample
from diffprune.core.cell import Questions
from diffprune.core.errors import with_class


@dataclass(frozen=True)
class Asked:
    """One benchmark made ready."""

    benchmark: Benchmark
    samples: list[Sample]


def made_ready(questions: Questions) -> Asked:
    """The benchmark and the samples that are asked.

    Raises:
        ValueError: the data are missing, or not those that are named, or there is no question.
    """
    benchmark: Benchmark = registry.make("benchmarks", questions.benchmark)
    if benchmark.revision != questions.revision:
        found = f"the cell asks for {questions.revision!r}, found {benchmark.revision!r}"
        raise ValueError(f"the data of {questions.benchmark} have changed: {found}")
    samples = benchmark.samples(questions.split, questions.limit, questions.protocol)
    if not samples:
        raise ValueError(f"{questions.benchmark} has no question in split {questions.split!r}")
    return Asked(benchmark, samples)


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


def users_own(benchmark: Benchmark) -> bool:
    """Whether a benchmark is a user's own plug-in."""
    return not type(benchmark).__module__.startswith("diffprune.")


def graded(benchmark: Benchmark, sample: Sample, answer: str, protocol: str) -> tuple[Grade, str]:
    """(the grade, "" or why there is none). A grader that fails costs no answer: once it is mended, it grades again."""
    try:
        return benchmark.grade(sample, answer, protocol), ""
    except Exception as error:  # whatever a user's function raises belongs in the row
        return Grade(0.0, "", ""), with_class(error)
