"""Cells of a tuning: one per method, kind of budget and target speedup."""

from __future__ import annotations

from collections.abc import Sequence

from diffprune.core import registry
from diffprune.core.benchmark import Benchmark
from diffprune.core.cell import Cell, Questions, TuneSettings, TuneSpec, describe
from diffprune.core.pruner import Kind, Pruner
from diffprune.core.spec import Spec
from diffprune.core.vlm import VLM
from diffprune.tune.options import Tuning


def cells(vlm: VLM, methods: Sequence[Spec], options: Tuning) -> list[Cell]:
    """One cell per method that prunes, kind and target.

    Raises:
        ValueError: unknown method or benchmark, or guards the model cannot meet.
    """
    if options.least > vlm.num_visual_tokens:
        raise ValueError(
            f"least={options.least}: an image of the default size has {vlm.num_visual_tokens} visual tokens; give fewer"
        )
    pruners: list[Pruner] = [p for p in (registry.make("pruners", one) for one in methods) if p.kind is not Kind.BOUND]
    asked = settings(options)
    label = " ".join(dict.fromkeys(benchmark.label for benchmark in _benchmarks(options)))
    return [
        Cell(vlm.spec, vlm.dtype, TuneSpec(p.spec, kind, target, asked), describe(p), label)
        for p in pruners for kind in options.kinds for target in options.targets
    ]  # fmt: skip


def settings(options: Tuning) -> TuneSettings:
    """What of the options changes an answer."""
    questions = tuple(
        Questions(b.spec, b.revision, options.protocol, options.split, options.calibration) for b in _benchmarks(options)
    )
    return TuneSettings(
        questions=questions, batch=options.batch, calibration=options.calibration, held_out=options.held_out,
        margin=options.margin, candidates=options.candidates, least=options.least, most=options.most,
        corrections=options.corrections, repeats=options.repeats, curve_repeats=options.curve_repeats, warmup=options.warmup,
        seed=options.seed,
    )  # fmt: skip


def _benchmarks(options: Tuning) -> list[Benchmark]:
    return [registry.make("benchmarks", one) for one in options.benchmarks]
