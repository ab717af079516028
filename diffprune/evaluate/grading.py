"""Grading stored answers again where the grader's code has changed, without the model."""

from __future__ import annotations

from collections.abc import Sequence

from diffprune.core import registry
from diffprune.core.benchmark import Grade, Graded
from diffprune.core.cell import Cell, Questions
from diffprune.core.records import Credited, Provenance
from diffprune.evaluate.asked import Asked, graded, made_ready
from diffprune.evaluate.main_figure import main_figure
from diffprune.store import Store


def stale(cells: Sequence[Cell], store: Store) -> list[Cell]:
    """Those whose answers are in the store, graded by other code than is here.

    Raises:
        ValueError: a grader's code cannot be found or read.
    """
    done, graders = store.done(), store.graders()
    return [cell for cell in cells if cell.key in done and graders.get(cell.key) not in (None, _grader(cell))]


def grade_again(cells: Sequence[Cell], store: Store, provenance: Provenance) -> None:
    """Grade the stored answers of cells anew, each cell at once; no model is asked.

    Raises:
        ValueError: the data are missing, or not those that were asked about.
    """
    ready: dict[Questions, Asked] = {}
    for cell in cells:
        (questions,) = cell.questions
        if questions not in ready:
            ready[questions] = made_ready(questions)
        grades, seen = _credited(cell, ready[questions], store)
        store.grade_again({"grades": grades, "figures": [main_figure(questions, seen)]}, cell=cell, provenance=provenance)


def _credited(cell: Cell, asked: Asked, store: Store) -> tuple[list[Credited], list[Graded]]:
    """One grade per stored answer, in their order, of one without an answer an empty one; and what aggregates see of them."""
    samples, grader = {sample.id: sample for sample in asked.samples}, _grader(cell)
    found, seen = [], []
    for row in store.read("answers", ["sample", "answer", "error", "group", "category"], cells={cell.key}).itertuples():
        grade, error = Grade(0.0, "", ""), ""
        if not row.error:
            grade, error = graded(asked.benchmark, samples[row.sample], row.answer, cell.questions[0].protocol)
        found.append(Credited(row.sample, grade.parsed, grade.target, grade.credit, error, grader))
        if not row.error and not error:
            seen.append(Graded(row.group, row.category, grade.credit, grade.parsed, grade.target))
    return found, seen


def _grader(cell: Cell) -> str:
    return registry.grader(cell.questions[0].benchmark)
