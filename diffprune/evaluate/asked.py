"""Benchmarks made ready to be asked, and the grade of one answer. Needs no store, so that a worker starts without it."""

from __future__ import annotations

from dataclasses import dataclass

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


def graded(benchmark: Benchmark, sample: Sample, answer: str, protocol: str) -> tuple[Grade, str]:
    """(the grade, "" or why there is none). A grader that fails costs no answer: once it is mended, it grades again."""
    try:
        return benchmark.grade(sample, answer, protocol), ""
    except Exception as error:  # whatever a user's function raises belongs in the row
        return Grade(0.0, "", ""), with_class(error)
