"""Cells of an evaluation: every pruner at every budget on every benchmark."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache

from pydantic import BaseModel, ConfigDict, Field

from diffprune.config.fields import BenchmarkSpec, Count
from diffprune.core import registry
from diffprune.core.benchmark import Benchmark, check_samples
from diffprune.core.budget import Budget, Share
from diffprune.core.cell import Cell, EvaluateSpec, Method, Questions, describe
from diffprune.core.pruner import BLIND as NO_IMAGE
from diffprune.core.pruner import Pruner
from diffprune.core.spec import Spec
from diffprune.core.vlm import VLM
from diffprune.pruning.pretrained import check_model

TEN = ("gqa", "mmbench", "mmbench_cn", "mme", "pope", "scienceqa", "vqav2", "textvqa", "seed", "vizwiz")
UNPRUNED = Spec("unpruned")
FULL = Share(1)  # the budget of what prunes nothing
BLIND = Method(label=NO_IMAGE, base=NO_IMAGE, kind="bound")  # not a method: the question without its image


class Evaluation(BaseModel):
    """What to ask.

    benchmarks: spellings, as in "pope" or "custom('questions.jsonl')".
    split: of every benchmark; test is its main one.
    limit: questions per benchmark, whole groups; none given, all of them.
    batch: rows per generation.
    protocol: whose prompts and rules, for all benchmarks that know it.
    blind: also ask every question without its image, which is what blind-corrected retention is measured from.
    answer_tokens: the most an answer may have where the benchmark allows more; such answers are no full run.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

    benchmarks: tuple[BenchmarkSpec, ...] = Field(tuple(Spec("world").with_options(like=name) for name in TEN), min_length=1)
    split: str = "test"
    limit: Count | None = None
    batch: Count = 64
    protocol: str = "llava"
    blind: bool = False
    answer_tokens: Count | None = None


def cells(vlm: VLM, pruners: Sequence[Spec], budgets: Sequence[Budget], options: Evaluation) -> list[Cell]:
    """Every pruner at every budget on every benchmark, each once; a bound (`unpruned`) once per benchmark, as `Share(1)`; every
    question without its image, if asked for, once per benchmark.

    Raises:
        ValueError: unknown pruner, benchmark, split, protocol or option, two data sets under one name, or a scorer that was trained
            on another model.
    """
    methods: list[Pruner] = [registry.make("pruners", one) for one in pruners]
    for method in methods:
        check_model(method, vlm)
    if any(method.kind != "bound" for method in methods) and not budgets:
        raise ValueError("no budget given: a method needs at least one, as in Keep(64) or 22%")
    sources: list[Benchmark] = [registry.make("benchmarks", one) for one in options.benchmarks]
    _check_names(sources)
    for source in {source.revision: source for source in sources}.values():
        source.check_asked(options.protocol, options.limit)
        _check_split(source.spec, source.revision, options.split, options.protocol)
    found: dict[Cell, None] = {}
    for benchmark in sources:
        for method in methods:
            for budget in (FULL,) if method.kind == "bound" else budgets:
                found[_cell(vlm, method, budget, benchmark, options)] = None
        if options.blind:
            full = _cell(vlm, registry.make("pruners", UNPRUNED), FULL, benchmark, options)
            assert isinstance(full.subject, EvaluateSpec)
            found[replace(full, subject=replace(full.subject, blind=True), method=BLIND)] = None
    return list(found)


def _check_names(sources: Sequence[Benchmark]) -> None:
    """Raises ValueError: two data sets have one spelling, as that has no path, so that tables would take them for one."""
    known: dict[Spec, Benchmark] = {}
    for source in sources:
        other = known.setdefault(source.spec, source)
        if other.revision != source.revision:
            places = " and ".join(str(place) for one in (other, source) for _, place in one.spec.places)
            raise ValueError(
                f"{places} are two data sets of one name, {str(source.spec)!r}, which tables would take for one: ask them in two "
                "jobs, or give each its title, as in custom('rows.jsonl', title='shelves')"
            )


@lru_cache(maxsize=64)
def _check_split(benchmark: Spec, revision: str, split: str, protocol: str) -> None:
    """Refuse an unknown split; once per data set and process, as it takes time, and a plan asks for every method that is not
    trained yet."""
    check_samples(registry.make("benchmarks", benchmark), split, 1, protocol)


def _cell(vlm: VLM, method: Pruner, budget: Budget, benchmark: Benchmark, options: Evaluation) -> Cell:
    questions = Questions(benchmark.spec, benchmark.revision, options.protocol, options.split, options.limit)
    subject = EvaluateSpec(method.spec, budget, questions, options.batch, answer_tokens=options.answer_tokens)
    return Cell(vlm.spec, vlm.dtype, subject, describe(method), benchmark.label)


def answer_tokens(asked: EvaluateSpec, benchmark: Benchmark) -> int:
    """The most tokens an answer may have: as the benchmark says, or as the cell does, if that is fewer."""
    limit = benchmark.new_tokens(asked.questions.protocol)
    return limit if asked.answer_tokens is None else min(limit, asked.answer_tokens)
