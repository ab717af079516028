"""One cell -> one graded answer per question.

An image is encoded once per process, whatever the number of budgets, methods and benchmarks that ask about it; questions are
tokenised batch by batch, because those of a large benchmark take gigabytes at once. What goes wrong with one sample is written in
its row and is no wrong answer.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from diffprune import prune
from diffprune.core import budget as budgets_
from diffprune.core import plugins
from diffprune.core.benchmark import Benchmark, Sample
from diffprune.core.budget import Budget
from diffprune.core.pruner import Need, Pruner
from diffprune.core.record import Cell, Prediction
from diffprune.core.said import with_class
from diffprune.core.tokens import VisualTokens
from diffprune.core.vlm import VLM, Prompts

TEN = ("gqa", "mmbench", "mmbench_cn", "mme", "pope", "scienceqa", "vqav2", "textvqa", "seed", "vizwiz")
UNPRUNED = "none"
BLIND, NOTHING = "blind", "Keep(0)"  # not a method: the question without its image, asked once per benchmark
MODE, CUT = "eager", "answers cut at {} tokens"
TOKENISED_MIB = 64  # of prompts that are kept: all of a small run, a few batches of a large one
CHUNK = 8  # images per encoder call, always: the same shape gives the same bits, so an answer cannot depend on what ran before


class Evaluation(BaseModel):
    """What to ask. benchmarks: spellings; limit: questions per benchmark, whole groups; batch: rows per generation.

    protocol: whose prompts and rules, for all benchmarks that know it.
    blind: also ask every question without its image, which is what blind-corrected retention is measured from.
    answer_tokens: the most an answer may have where the benchmark allows more; such answers are marked in the cell's mode, as they
        are no full run.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    benchmarks: tuple[str, ...] = Field(tuple(f"world('{name}')" for name in TEN), min_length=1)
    split: str = "test"
    limit: int | None = Field(None, ge=1)
    batch: int = Field(64, ge=1)
    protocol: str = "llava"
    blind: bool = False
    answer_tokens: int | None = Field(None, ge=1)


def _benchmark(text: str, options: Evaluation) -> Benchmark:
    found: Benchmark = plugins.load("benchmarks", text)
    if options.protocol not in found.protocols:
        raise ValueError(f"{text} has no protocol {options.protocol!r}: {plugins.nearest(options.protocol, found.protocols)}")
    return found


def cells(vlm: VLM, pruners: Sequence[str], budgets: Sequence[str], options: Evaluation) -> list[Cell]:
    """Every pruner at every budget on every benchmark, each once; `none` once per benchmark, as `Share(1)`;
    `blind`, if asked for, once per benchmark, as `Keep(0)`.

    Raises:
        ValueError: unknown pruner, benchmark, split, protocol or option, or a budget above what the model has.
    """
    parsed = [budgets_.parse(text) for text in budgets]
    for budget in parsed:
        budget.check(vlm.num_visual_tokens)
    methods = [plugins.load("pruners", text) for text in pruners]
    if any(method.spelling != UNPRUNED for method in methods) and not parsed:
        raise ValueError("no budget given: a method needs at least one, as in Keep(64) or 22%")
    sources = [_benchmark(text, options) for text in options.benchmarks]
    for source in {source.revision: source for source in sources}.values():
        source.samples(options.split, 1, options.protocol)  # refuses an unknown split; once per data set, as it takes time
    found: dict[Cell, None] = {}
    for benchmark in sources:
        for method in methods:
            for budget in [budgets_.Share(1)] if method.spelling == UNPRUNED else parsed:
                found[_cell(vlm, method, budget, benchmark, options)] = None
        if options.blind:
            full = _cell(vlm, plugins.load("pruners", UNPRUNED), budgets_.Share(1), benchmark, options)
            found[replace(full, pruner=BLIND, budget=NOTHING)] = None
    return list(found)


def _cell(vlm: VLM, method: Pruner, budget: Budget, benchmark: Benchmark, options: Evaluation) -> Cell:
    return Cell(
        verb="evaluate",
        model=vlm.name,
        model_hash=vlm.weights_hash,
        pruner=method.spelling,
        pruner_hash=method.weights_hash,
        budget=str(budget),
        benchmark=benchmark.spelling,
        revision=benchmark.revision,
        protocol=options.protocol,
        split=options.split,
        limit=options.limit,
        batch=options.batch,
        dtype=str(vlm.model.dtype).removeprefix("torch."),
        mode=MODE if options.answer_tokens is None else f"{MODE}, {CUT.format(options.answer_tokens)}",
    )


def answer_tokens(cell: Cell, benchmark: Benchmark) -> int:
    """The most tokens an answer of the cell may have: as the benchmark says, or as the cell's mode says, if that is fewer."""
    limit, said = benchmark.new_tokens(cell.protocol), re.search(CUT.format(r"(\d+)"), cell.mode)
    return min(limit, int(said[1])) if said else limit


class Encodings:
    """Encoder output per image, in host memory, least recently used first to go.

    mebibytes: upper bound of what is kept. encoded: images the encoder has run on, for tests and logs.
    """

    def __init__(self, vlm: VLM, mebibytes: float) -> None:
        self.vlm, self.limit_bytes, self.held_bytes, self.encoded = vlm, mebibytes * 2**20, 0, 0
        self.needs: frozenset[Need] = frozenset()
        self._kept: OrderedDict[tuple[str, ...], tuple[frozenset[Need], VisualTokens]] = OrderedDict()

    def get(self, names: Sequence[tuple[str, ...]], images: Sequence[Callable[[], Any]], needs: frozenset[Need]) -> VisualTokens:
        """The images called `names`, one row each, on the model's device; `images` are opened only where needed.

        An image is encoded with everything any method has needed so far, so that methods with different needs share it.
        """
        needs -= {Need.TEXT}  # of the question, not of the image
        self.needs |= needs
        found = {name: self._kept[name][1] for name in names if name in self._kept and needs <= self._kept[name][0]}
        missing = {name: image for name, image in zip(names, images, strict=True) if name not in found}
        if missing:
            tokens = self._encode([image() for image in missing.values()])
            for row, name in enumerate(missing):
                found[name] = tokens[torch.tensor([row])]  # a copy, so that a row forgotten is memory freed
                self._keep(name, found[name])
        for name in names:
            if name in self._kept:
                self._kept.move_to_end(name)
        device = self.vlm.device
        return _only(needs, VisualTokens.cat([_only(needs, found[name]) for name in names]).map(lambda tensor: tensor.to(device)))

    @torch.inference_mode()
    def _encode(self, images: list[Any]) -> VisualTokens:
        self.encoded += len(images)
        filled = images + images[-1:] * (-len(images) % CHUNK)
        parts = [self.vlm.encode(self.vlm.pixels(filled[i : i + CHUNK]), self.needs) for i in range(0, len(filled), CHUNK)]
        return VisualTokens.cat(parts).map(lambda tensor: tensor[: len(images)].cpu())

    def _keep(self, name: tuple[str, ...], tokens: VisualTokens) -> None:
        self.held_bytes += _size(tokens)
        if name in self._kept:
            self.held_bytes -= _size(self._kept.pop(name)[1])
        self._kept[name] = self.needs, tokens
        while self.held_bytes > self.limit_bytes and self._kept:
            self.held_bytes -= _size(self._kept.popitem(last=False)[1][1])


def _only(needs: frozenset[Need], tokens: VisualTokens) -> VisualTokens:
    """Without what was not asked for: a pruner sees the same, whoever shared the encoding."""
    attention = tokens.attention if Need.ENCODER_ATTENTION in needs else None
    return replace(tokens, attention=attention, identity=tokens.identity if Need.IDENTITY in needs else None)


def _size(held: VisualTokens | Prompts) -> int:
    return sum(value.nbytes for f in fields(held) if isinstance(value := getattr(held, f.name), Tensor))


class Tokenised:
    """Prompts of batches, in memory, least recently used first to go: the same batch is asked again for every method and budget.

    mebibytes: upper bound of what is kept.
    """

    def __init__(self, mebibytes: float) -> None:
        self.limit_bytes, self.held_bytes = mebibytes * 2**20, 0
        self._kept: OrderedDict[tuple[Any, ...], Prompts] = OrderedDict()

    def get(self, name: tuple[Any, ...], make: Callable[[], Prompts]) -> Prompts:
        """The prompts called `name`, made where they are not kept. The name tells all that they depend on."""
        if name not in self._kept:
            made = make()
            if _size(made) > self.limit_bytes:
                return made
            self._kept[name], self.held_bytes = made, self.held_bytes + _size(made)
        self._kept.move_to_end(name)
        while self.held_bytes > self.limit_bytes:
            self.held_bytes -= _size(self._kept.popitem(last=False)[1])
        return self._kept[name]


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
            self._pruners[cell.pruner] = plugins.load("pruners", UNPRUNED if cell.pruner == BLIND else cell.pruner)
        pruner = self._pruners[cell.pruner]
        if pruner.weights_hash != cell.pruner_hash:
            raise ValueError(
                f"the weights of {cell.pruner} have changed: the cell asks for {cell.pruner_hash}, found {pruner.weights_hash}"
            )
        return pruner

    def _ask(self, cell: Cell) -> _Asked:
        name = (cell.benchmark, cell.split, cell.limit, cell.protocol)
        if name not in self._asked:
            benchmark: Benchmark = plugins.load("benchmarks", cell.benchmark)
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
    ) -> tuple[Prompts, prune.Packed]:
        """The rows' prompts, and what is left of them."""
        samples = [asked.samples[i] for i in index]
        names = [(cell.revision, cell.split, s.image_id) for s in samples]
        tokens = self.encodings.get(names, [partial(asked.benchmark.image, s) for s in samples], pruner.needs)
        prompts = self._prompts(asked, index, tokens)
        try:
            return prompts, prune.shrink(self.vlm, prompts, tokens, pruner, budget)
        except ValueError as error:
            raise Refused(str(error)) from error

    def _answers(self, cell: Cell, asked: _Asked, pruner: Pruner, budget: Budget, index: Sequence[int]) -> dict[int, Prediction]:
        samples = [asked.samples[i] for i in index]
        if cell.pruner == BLIND:
            prompts = self._prompts(asked, index, None)
            packed = prune.blind(prompts)
        else:
            prompts, packed = self._shrunk(cell, asked, pruner, budget, index)
        texts, lengths = prune.answer(self.vlm, packed, answer_tokens(cell, asked.benchmark))
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
