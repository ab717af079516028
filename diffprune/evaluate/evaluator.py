"""One cell -> one graded answer per question.

An image is encoded once per process, whatever the number of budgets, methods and benchmarks that ask about it; questions are
tokenised batch by batch, because those of a large benchmark take gigabytes at once. What goes wrong with one sample is written in
its row and is no wrong answer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from diffprune import pruning
from diffprune.core import budget as budgets_
from diffprune.core import registry
from diffprune.core.benchmark import Benchmark, Sample
from diffprune.core.budget import Budget
from diffprune.core.errors import with_class
from diffprune.core.pruner import Pruner
from diffprune.core.records import Cell, Prediction
from diffprune.core.tokens import VisualTokens
from diffprune.core.vlm import VLM, Prompts
from diffprune.evaluate.cache import TOKENISED_MIB, Encodings, Tokenised
from diffprune.evaluate.cells import BLIND, UNPRUNED, answer_tokens


@dataclass(frozen=True)
class _Asked:
    """One benchmark made ready. name: tells it from all others of a process."""

    name: tuple[str, str, int | None, str]
    benchmark: Benchmark
    samples: list[Sample]


class Refused(ValueError):
    """The method cannot run like this at all: no row is to blame."""


class Evaluator:
    """A resident model that answers cells. cache_mib: host memory for encoder output, in MiB."""

    def __init__(self, vlm: VLM, cache_mib: float = 2048) -> None:
        self.vlm, self.encodings, self.tokenised = vlm, Encodings(vlm, cache_mib), Tokenised(TOKENISED_MIB)
        self._asked: dict[tuple[str, str, int | None, str], _Asked] = {}
        self._pruners: dict[str, Pruner] = {}

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
        """Numbers of the questions that are answered together, similar lengths; all of them, each once.

        The smallest piece of work there is: any process that holds the model can answer any batch, with the same rows.
        """
        samples = self._ask(cell).samples
        order = sorted(range(len(samples)), key=lambda i: (len(samples[i].question), i))
        return [order[start : start + cell.batch] for start in range(0, len(order), cell.batch)]

    @torch.inference_mode()
    def answer(self, cell: Cell, index: Sequence[int]) -> dict[int, Prediction]:
        """The rows of one batch by number of the question; what fails is asked again alone, and then is a row with an error.

        Raises:
            ValueError: the weights or data are not those the cell names, or the method refuses the budget.
        """
        budget = budgets_.parse(cell.budget if cell.pruner != BLIND else "Share(1)")
        pruner, asked = self._pruner(cell), self._ask(cell)
        budget.check(self.vlm.num_visual_tokens)
        return _isolating(partial(self._answers, cell, asked, pruner, budget), index, partial(_failed, asked))

    def _pruner(self, cell: Cell) -> Pruner:
        if cell.model_hash != self.vlm.weights_hash:
            raise ValueError(
                f"the weights of {cell.model} have changed: the cell asks for {cell.model_hash}, {self.vlm.weights_hash} is loaded"
            )
        if cell.pruner not in self._pruners:
            self._pruners[cell.pruner] = registry.load("pruners", UNPRUNED if cell.pruner == BLIND else cell.pruner)
        pruner = self._pruners[cell.pruner]
        if pruner.weights_hash != cell.pruner_hash:
            raise ValueError(
                f"the weights of {cell.pruner} have changed: the cell asks for {cell.pruner_hash}, found {pruner.weights_hash}"
            )
        return pruner

    def _ask(self, cell: Cell) -> _Asked:
        name = (cell.benchmark, cell.split, cell.limit, cell.protocol)
        if name not in self._asked:
            benchmark: Benchmark = registry.load("benchmarks", cell.benchmark)
            if benchmark.revision != cell.revision:
                found = f"the cell asks for {cell.revision!r}, found {benchmark.revision!r}"
                raise ValueError(f"the data of {cell.benchmark} have changed: {found}")
            samples = benchmark.samples(cell.split, cell.limit, cell.protocol)
            if not samples:
                raise ValueError(f"{cell.benchmark} has no question in split {cell.split!r}")
            self._asked[name] = _Asked(name, benchmark, samples)
        return self._asked[name]

    def _prompts(self, asked: _Asked, index: Sequence[int], tokens: VisualTokens | None) -> Prompts:
        """Rows with places for the tokens of their images; without tokens, for those of an image of the default size."""
        questions = [asked.samples[i].question for i in index]
        if tokens is None:
            default = [self.vlm.num_visual_tokens] * len(questions)
            return self.tokenised.get((asked.name, "blind", *index), lambda: self.vlm.prompts(questions, default))
        places, layout = tokens.present.sum(1).tolist(), tokens.layout
        return self.tokenised.get((asked.name, *index), lambda: self.vlm.prompts(questions, places, layout))

    def _shrunk(
        self, cell: Cell, asked: _Asked, pruner: Pruner, budget: Budget, index: Sequence[int]
    ) -> tuple[Prompts, pruning.Packed]:
        """The rows' prompts, and what is left of them."""
        samples = [asked.samples[i] for i in index]
        names = [(cell.revision, cell.split, s.image_id) for s in samples]
        tokens = self.encodings.get(names, [partial(asked.benchmark.image, s) for s in samples], pruner.needs)
        prompts = self._prompts(asked, index, tokens)
        try:
            return prompts, pruning.shrink(self.vlm, prompts, tokens, pruner, budget)
        except ValueError as error:
            raise Refused(str(error)) from error

    def _answers(self, cell: Cell, asked: _Asked, pruner: Pruner, budget: Budget, index: Sequence[int]) -> dict[int, Prediction]:
        samples = [asked.samples[i] for i in index]
        if cell.pruner == BLIND:
            prompts = self._prompts(asked, index, None)
            packed = pruning.blind(prompts)
        else:
            prompts, packed = self._shrunk(cell, asked, pruner, budget, index)
        texts, lengths = pruning.answer(self.vlm, packed, answer_tokens(cell, asked.benchmark))
        grades = [asked.benchmark.grade(s, t, cell.protocol) for s, t in zip(samples, texts, strict=True)]
        words = (prompts.attention_mask.sum(1) - prompts.slots.sum(1)).tolist()
        return {
            i: Prediction(
                sample=s.id, group=s.group, category=s.category, kind=s.kind, question=s.question, answer=texts[row],
                parsed=grades[row].parsed, target=grades[row].target, credit=grades[row].credit,
                visual_total=int(packed.total[row]), visual_kept=int(packed.kept[row]), text_tokens=words[row],
                generated_tokens=lengths[row], error="",
            )
            for row, (i, s) in enumerate(zip(index, samples, strict=True))
        }  # fmt: skip


def gathered(cell: Cell, found: Mapping[int, Prediction]) -> list[Prediction]:
    """All rows of a cell in the benchmark's order, from those of its batches.

    Raises:
        RuntimeError: not one question could be answered; such a cell is no result.
    """
    if found and all(row.error for row in found.values()):
        raise RuntimeError(f"all {len(found)} questions of {cell.benchmark} failed, the first with {found[min(found)].error}")
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


def _failed(asked: _Asked, i: int, error: Exception) -> Prediction:
    """The row of a question without an answer: no grade, the reason instead."""
    sample = asked.samples[i]
    return Prediction(
        sample=sample.id, group=sample.group, category=sample.category, kind=sample.kind, question=sample.question, answer="",
        parsed="", target="", credit=0.0, visual_total=0, visual_kept=0, text_tokens=0, generated_tokens=0,
        error=with_class(error),
    )  # fmt: skip
