"""The main figure of a benchmark for the answers of one cell, with its formula, as a record."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from diffprune.core import registry
from diffprune.core.benchmark import Benchmark, Graded
from diffprune.core.cell import Questions
from diffprune.core.records import Figure, Prediction


def answered(rows: Sequence[Prediction]) -> list[Graded]:
    """Those that did not fail: a prediction has all that a benchmark's aggregate sees of a row; no copies, which take time."""
    return cast("list[Graded]", [row for row in rows if not row.error])


def main_figure(questions: Questions, graded: Sequence[Graded], made: Benchmark | None = None) -> Figure:
    """What the benchmark's own code makes of the answers that did not fail. made: the benchmark, where it is there already."""
    benchmark: Benchmark = made or registry.make("benchmarks", questions.benchmark)
    name, value = next(iter(benchmark.figures(graded).items()))
    formula = benchmark.formula(name)
    return Figure(name, value, formula.kind, ",".join(formula.categories))
