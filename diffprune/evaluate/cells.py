"""Which questions a run asks: every pruner at every budget on every benchmark, each a cell."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

from pydantic import BaseModel, ConfigDict, Field

from diffprune.core import budget as budgets_
from diffprune.core import registry
from diffprune.core.benchmark import Benchmark
from diffprune.core.budget import Budget
from diffprune.core.pruner import Pruner
from diffprune.core.records import Cell
from diffprune.core.vlm import VLM

TEN = ("gqa", "mmbench", "mmbench_cn", "mme", "pope", "scienceqa", "vqav2", "textvqa", "seed", "vizwiz")
UNPRUNED = "none"
BLIND, NOTHING = "blind", "Keep(0)"  # not a method: the question without its image, asked once per benchmark
MODE, CUT = "eager", "answers cut at {} tokens"


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
    found: Benchmark = registry.load("benchmarks", text)
    if options.protocol not in found.protocols:
        raise ValueError(f"{text} has no protocol {options.protocol!r}: {registry.nearest(options.protocol, found.protocols)}")
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
    methods = [registry.load("pruners", text) for text in pruners]
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
            full = _cell(vlm, registry.load("pruners", UNPRUNED), budgets_.Share(1), benchmark, options)
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
