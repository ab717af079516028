"""Cells of a tuning: one per method, kind of budget and target speedup."""

from __future__ import annotations

from collections.abc import Sequence

from diffprune.core import registry
from diffprune.core.benchmark import Benchmark, check_samples
from diffprune.core.cell import Cell, Questions, TuneSettings, TuneSpec, describe
from diffprune.core.pruner import Kind, Pruner
from diffprune.core.spec import Spec
from diffprune.core.vlm import VLM
from diffprune.pruning.pretrained import check_model
from diffprune.timing.eager import check_timed
from diffprune.tune.options import Tuning

SPLITS = ("calibration", "validation", "val", "dev", "train")  # the best first
EMBEDDED = tuple(Spec("world").with_options(like=name) for name in ("gqa", "textvqa", "pope"))


def cells(vlm: VLM, methods: Sequence[Spec], options: Tuning) -> list[Cell]:
    """One cell per method that prunes, kind and target.

    Raises:
        ValueError: unknown method or benchmark, questions about several images, guards the model cannot meet, or a scorer that was
            trained on another model.
    """
    if options.least > vlm.num_visual_tokens:
        raise ValueError(
            f"least={options.least}: an image of the default size has {vlm.num_visual_tokens} visual tokens; give fewer"
        )
    pruners: list[Pruner] = [p for p in (registry.make("pruners", one) for one in methods) if p.kind is not Kind.BOUND]
    for pruner in pruners:
        check_model(pruner, vlm)
    for benchmark in benchmarks(options):
        check_samples(benchmark, calibration_split(benchmark, options), options.calibration, options.protocol)
        check_timed(benchmark, benchmark.samples(calibration_split(benchmark, options), options.calibration, options.protocol))
    asked = settings(options)
    label = " ".join(dict.fromkeys(benchmark.label for benchmark in benchmarks(options)))
    return [
        Cell(vlm.spec, vlm.dtype, TuneSpec(p.spec, kind, target, asked), describe(p), label)
        for p in pruners for kind in options.kinds for target in options.targets
    ]  # fmt: skip


def settings(options: Tuning) -> TuneSettings:
    """What of the options changes an answer."""
    questions = tuple(
        Questions(b.spec, b.revision, options.protocol, calibration_split(b, options), options.calibration)
        for b in benchmarks(options)
    )
    return TuneSettings(
        questions=questions, graders=tuple(registry.grader(asked.benchmark) for asked in questions),
        batch=options.batch, calibration=options.calibration, held_out=options.held_out,
        margin=options.margin, candidates=options.candidates, least=options.least, most=options.most,
        corrections=options.corrections, repeats=options.repeats, curve_repeats=options.curve_repeats, warmup=options.warmup,
        seed=options.seed,
    )  # fmt: skip


def benchmarks(options: Tuning) -> list[Benchmark]:
    """Whose questions are asked; where nobody names any, the embedded world's."""
    return [registry.make("benchmarks", one) for one in options.benchmarks or EMBEDDED]


def calibration_split(benchmark: Benchmark, options: Tuning) -> str:
    """The split of a benchmark that a tuning asks: as the options say, or the first of `SPLITS` that it has.

    Raises:
        ValueError: no such split, or it is the one that is tested: what is tuned on it would be judged by its own questions.
    """
    tested = benchmark.named_split(options.tested)
    if options.split:
        found = benchmark.named_split(options.split)
        hint = "name another one, as in --set tune.split=validation"
    else:
        found = next((name for name in SPLITS if name in benchmark.splits and name != tested), tested)
        hint = "tune on another benchmark, as in --set 'tune.benchmarks=[...]', or give this one a split `calibration`"
    if found == tested:
        raise ValueError(f"{benchmark.spec} would be tuned on its test split {tested!r}: {hint}")
    return found
