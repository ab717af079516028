"""The evaluator: one cell -> one graded answer per question. A sample that fails is a row with its error, not a wrong answer."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial

from diffprune.core import registry
from diffprune.core.benchmark import Benchmark, Sample
from diffprune.core.cell import Cell, EvaluateSpec, Questions
from diffprune.core.errors import with_class
from diffprune.core.evidence import Evidence
from diffprune.core.pruner import Pruner
from diffprune.core.records import Prediction
from diffprune.core.spec import Spec
from diffprune.evaluate.asked import Asked, graded, made_ready
from diffprune.evaluate.backend import Answer, Backend, Question, Refused, Shown
from diffprune.evaluate.cells import answer_tokens


class Evaluator:
    """Answers cells with a resident model, benchmarks and methods made once."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self._asked: dict[Questions, Asked] = {}
        self._pruners: dict[Spec, Pruner] = {}

    def run(self, cell: Cell) -> list[Prediction]:
        """One row per question, in the benchmark's order.

        Raises:
            ValueError: the weights or data are not those the cell names, or the method refuses the budget.
            RuntimeError: not one question could be answered.
        """
        found: dict[int, Prediction] = {}
        for index in self.batches(cell):
            found |= self.answer(cell, index)
        return gathered(cell, found)

    def batches(self, cell: Cell) -> list[list[int]]:
        """Numbers of the questions that are answered together: whole images where they fit, similar lengths; each once.

        The smallest piece of work there is: any process that holds the model can answer any batch, with the same rows.
        """
        asked = evaluated(cell)
        samples = self._ask(asked.questions).samples
        images: dict[tuple[str, ...], list[int]] = {}
        for i in sorted(range(len(samples)), key=lambda i: (len(samples[i].question), i)):
            images.setdefault(samples[i].image_ids, []).append(i)
        batches: list[list[int]] = [[]]
        for image in sorted(images.values(), key=lambda image: len(samples[image[-1]].question)):
            for start in range(0, len(image), asked.batch):
                part = image[start : start + asked.batch]
                if len(batches[-1]) + len(part) > asked.batch:
                    batches.append([])
                batches[-1] += part
        return batches

    def answer(self, cell: Cell, index: Sequence[int]) -> dict[int, Prediction]:
        """The rows of one batch by number of the question; what fails is asked again alone, and then is a row with an error.

        Raises:
            ValueError: the weights or data are not those the cell names, or the method refuses the budget.
        """
        spec, model = evaluated(cell), self.backend.model
        if cell.model.weights_sha256 != model.weights_sha256:
            wanted = f"the cell asks for {cell.model.weights_sha256}, {model.weights_sha256} is loaded"
            raise ValueError(f"the weights of {cell.model} have changed: {wanted}")
        if cell.model.source != model.source:
            raise ValueError(f"the code of {cell.model} has changed: {cell.model.source!r} was asked for, {model.source!r} is here")
        pruner, asked = self._pruner(spec.pruner), self._ask(spec.questions)
        return _isolating(partial(self._answers, spec, asked, pruner), index, partial(_failed, asked))

    def _pruner(self, spec: Spec) -> Pruner:
        """Raises ValueError: its weights are not those the cell names."""
        if spec not in self._pruners:
            self._pruners[spec] = registry.make("pruners", spec)
        return self._pruners[spec]

    def needs(self, methods: Sequence[Spec]) -> frozenset[Evidence]:
        """What these methods look at, all together; of those that cannot be made nothing, as their cells will say why."""
        found: set[Evidence] = set()
        for spec in methods:
            with contextlib.suppress(ValueError):
                found |= self._pruner(spec).needs
        return frozenset(found)

    def _ask(self, questions: Questions) -> Asked:
        if questions not in self._asked:
            self._asked[questions] = made_ready(questions)
        return self._asked[questions]

    def _answers(self, spec: EvaluateSpec, asked: Asked, pruner: Pruner, index: Sequence[int]) -> dict[int, Prediction]:
        benchmark, where = asked.benchmark, (spec.questions.revision, spec.questions.split)
        samples = [asked.samples[i] for i in index]
        questions = [
            Question(
                tuple(Shown((*where, name), partial(benchmark.nth_image, s, n)) for n, name in enumerate(s.image_ids)), s.question
            )
            for s in samples
        ]
        limit = answer_tokens(spec, benchmark)
        if spec.blind:
            answers = self.backend.answer_blind(questions, limit)
        else:
            answers = self.backend.answer(questions, pruner, spec.budget, limit)
        return {
            i: _graded(benchmark, sample, answer, spec.questions.protocol)
            for i, sample, answer in zip(index, samples, answers, strict=True)
        }


def evaluated(cell: Cell) -> EvaluateSpec:
    """What a cell to evaluate asks. Raises ValueError: it asks for something else."""
    if not isinstance(cell.subject, EvaluateSpec):
        raise ValueError(f"a cell to {cell.verb} was given where answers are evaluated")
    return cell.subject


def _graded(benchmark: Benchmark, sample: Sample, answer: Answer, protocol: str) -> Prediction:
    grade, error = graded(benchmark, sample, answer.text, protocol)
    return Prediction(
        sample=sample.id, group=sample.group, category=sample.category, question_type=sample.question_type,
        question=sample.question, answer=answer.text, parsed=grade.parsed, target=grade.target, credit=grade.credit,
        visual_total=answer.visual_total, visual_kept=answer.visual_kept, text_tokens=answer.text_tokens,
        generated_tokens=answer.generated_tokens, error=error,
    )  # fmt: skip


def gathered(cell: Cell, found: Mapping[int, Prediction]) -> list[Prediction]:
    """All rows of a cell in the benchmark's order, from those of its batches.

    Raises:
        RuntimeError: not one question could be answered; such a cell is no result.
    """
    if found and all(row.error for row in found.values()) and not any(row.generated_tokens for row in found.values()):
        name = evaluated(cell).questions.benchmark
        raise RuntimeError(f"all {len(found)} questions of {name} failed, the first with {found[min(found)].error}")
    return [found[i] for i in sorted(found)]


def _isolating(
    answer: Callable[[Sequence[int]], dict[int, Prediction]], index: Sequence[int], failed: Callable[[int, Exception], Prediction]
) -> dict[int, Prediction]:
    """`answer(index)`; where that fails, one by one, so that only the culprit's row carries the error."""
    try:
        return answer(index)
    except Refused:
        raise
    except Exception as error:  # whatever a foreign image or model raises belongs in the row
        if len(index) == 1:
            return {index[0]: failed(index[0], error)}
    found: dict[int, Prediction] = {}
    for i in index:
        found |= _isolating(answer, [i], failed)
    return found


def _failed(asked: Asked, i: int, error: Exception) -> Prediction:
    """The row of a question without an answer: no grade, the reason instead."""
    sample = asked.samples[i]
    return Prediction(
        sample=sample.id, group=sample.group, category=sample.category, question_type=sample.question_type,
        question=sample.question, answer="", parsed="", target="", credit=0.0, visual_total=0, visual_kept=0, text_tokens=0,
        generated_tokens=0, error=with_class(error),
    )  # fmt: skip
