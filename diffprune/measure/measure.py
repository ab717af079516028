"""Cells -> timings and costs. Cells that share model, data and batch are timed together in one `session`."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any, NamedTuple

import torch

from diffprune.core import registry
from diffprune.core.benchmark import Benchmark, Sample
from diffprune.core.budget import Budget
from diffprune.core.cell import Cell, MeasureSpec, Questions, describe
from diffprune.core.errors import with_class
from diffprune.core.evidence import Evidence
from diffprune.core.pruner import Kind, Pruner
from diffprune.core.records import Cost, Outcome, Timing
from diffprune.core.spec import Spec
from diffprune.core.vlm import VLM
from diffprune.pruning.pretrained import check_model, make_ready
from diffprune.timing import cuda_graph, eager
from diffprune.timing.clock import Clock, clocks
from diffprune.timing.eager import Inputs, Mode
from diffprune.timing.machine import drifted, machine_flags, others, processor_seconds, steady
from diffprune.timing.options import Measurement
from diffprune.timing.session import Session, TimedVariant

EMBEDDED = Spec("world").with_options(like="gqa")  # what is asked where nobody names a benchmark


class Measured(NamedTuple):
    """What was found about one cell; `outcome` says why where that is nothing."""

    timings: list[Timing]
    costs: list[Cost]
    outcome: Outcome

    @property
    def tables(self) -> dict[str, Sequence[Any]]:
        """Rows by the store's table; tables without rows are left out."""
        found: dict[str, Sequence[Any]] = {"timings": self.timings, "costs": self.costs, "outcomes": [self.outcome]}
        return {table: rows for table, rows in found.items() if rows}


def cells(vlm: VLM, pruners: Sequence[Spec], budgets: Sequence[Budget], options: Measurement) -> list[Cell]:
    """Every pruner that prunes at every budget, batch size and mode. `unpruned` is no cell: it is the `full` arm of every other.

    Raises:
        ValueError: unknown pruner, benchmark or option, a mode it cannot run in, too few samples
            for a batch, or a scorer that was trained on another model.
    """
    if "graph" in options.modes:
        cuda_graph.refuse(vlm)
    benchmark: Benchmark = registry.make("benchmarks", options.benchmark or EMBEDDED)
    questions = Questions(benchmark.spec, benchmark.revision, options.protocol, options.split, options.limit)
    benchmark.check_asked(options.protocol, options.limit)
    _check(questions, max(options.batches))
    methods: list[Pruner] = [m for m in (registry.make("pruners", one) for one in pruners) if m.kind is not Kind.BOUND]
    for one in methods:
        check_model(one, vlm)
    made = [
        Cell(vlm.spec, vlm.dtype, MeasureSpec(m.spec, budget, questions, batch, mode, seed), describe(m), benchmark.label)
        for seed in range(options.seed, options.seed + options.sessions) for batch in options.batches for mode in options.modes
        for m in methods for budget in budgets
    ]  # fmt: skip
    return list(dict.fromkeys(made))


# --- cells in, rows out ----------------------------------------------------------------------------------------------


def measured(cell: Cell) -> MeasureSpec:
    """What a cell to measure asks. Raises ValueError: it asks for something else."""
    if not isinstance(cell.subject, MeasureSpec):
        raise ValueError(f"a cell to {cell.verb} was given where times are measured")
    return cell.subject


def together(asked: Sequence[Cell]) -> list[list[Cell]]:
    """Cells that may share a session: everything equal but method and budget."""
    groups: dict[tuple[Any, ...], list[Cell]] = {}
    for cell in asked:
        spec = measured(cell)
        groups.setdefault((cell.model, cell.dtype, spec.questions, spec.batch, spec.mode, spec.seed), []).append(cell)
    return list(groups.values())


def batches(vlm: VLM, cell: Cell, number: int, needs: frozenset[Evidence]) -> list[Inputs]:
    """Up to `number` batches of real images and questions of the cell's benchmark, in its own order.

    Raises:
        ValueError: the split has fewer samples than one batch.
    """
    spec, asked = measured(cell), measured(cell).questions
    benchmark: Benchmark = registry.make("benchmarks", asked.benchmark)
    samples = _enough(benchmark, asked, spec.batch)
    starts = range(0, len(samples) - spec.batch + 1, spec.batch)[:number]
    made = []
    for start in starts:
        chosen = samples[start : start + spec.batch]
        made.append(eager.prepare(vlm, [benchmark.image(s) for s in chosen], [s.question for s in chosen], needs))
    return made


@lru_cache(maxsize=64)
def _check(asked: Questions, batch: int) -> None:
    """`_enough` once in a process, as a plan asks for every method that is not trained yet."""
    _enough(registry.make("benchmarks", asked.benchmark), asked, batch)


def _enough(benchmark: Benchmark, asked: Questions, batch: int) -> list[Sample]:
    """The samples of a measurement. Raises ValueError: fewer than one batch, or one that shows several images."""
    samples = benchmark.samples(asked.split, asked.limit, asked.protocol)
    eager.check_timed(benchmark, samples)
    if len(samples) < batch:
        found = f"{asked.benchmark} gives {len(samples)} samples of split {asked.split!r}"
        raise ValueError(f"{found}; a batch takes {batch}: raise the limit or lower measure.batches")
    return samples


def method(vlm: VLM, cell: Cell) -> tuple[Pruner, Budget]:
    """Method and budget a cell asks for.

    Raises:
        ValueError: unknown or refused, or other weights than the cell names.
    """
    spec = measured(cell)
    if cell.model.weights_sha256 != vlm.spec.weights_sha256:
        wanted = f"the cell asks for {cell.model.weights_sha256}, {vlm.spec.weights_sha256} is loaded"
        raise ValueError(f"the weights of {cell.model} have changed: {wanted}")
    pruner: Pruner = registry.make("pruners", spec.pruner)
    make_ready(pruner, vlm)
    return pruner, spec.budget


def _failed(error: Exception | str) -> Measured:
    reason = error if isinstance(error, str) else with_class(error)
    return Measured([], [], Outcome("failed", reason, 0, 0.0))


@torch.inference_mode()
def measure(
    vlm: VLM, asked: Sequence[Cell], options: Measurement, clock: Clock | None = None, host: Clock | None = None
) -> dict[Cell, Measured]:
    """Time cells, those that can be compared next to each other.

    clock, host: for device spans and for spans that end on the host; those of the model's device unless given.

    Raises:
        ValueError: too few samples for a batch, or an unknown benchmark: nothing could be timed.
    """
    device_clock, host_clock = clocks(vlm.device)
    found: dict[Cell, Measured] = {}
    for group in together(asked):
        with steady(options.threads) as threads:
            found |= _session(vlm, group, options, clock or device_clock, host or clock or host_clock, threads)
    return found


def _session(vlm: VLM, group: list[Cell], options: Measurement, clock: Clock, host: Clock, threads: int) -> dict[Cell, Measured]:
    found: dict[Cell, Measured] = {}
    methods: dict[Cell, tuple[Pruner, Budget]] = {}
    for cell in group:
        try:
            methods[cell] = method(vlm, cell)
        except Exception as error:  # a cell that cannot run is an outcome
            found[cell] = _failed(error)
    mode: Mode = cuda_graph.Graphs(vlm) if measured(group[0]).mode == "graph" else eager
    inputs, reasons = _encoded(vlm, group[0], options.inputs, methods)
    for cell, reason in reasons.items():
        found[cell] = _failed(reason)
        del methods[cell]
    session = Session(vlm, inputs, options.model_copy(update={"seed": measured(group[0]).seed}), clock, host, mode)
    return found | side_by_side(session, methods, threads)


def _encoded(
    vlm: VLM, cell: Cell, number: int, methods: Mapping[Cell, tuple[Pruner, Budget]]
) -> tuple[list[Inputs], dict[Cell, str]]:
    """(batches with the evidence of all methods, the cells whose method needs what this model does not give, with the reasons)."""
    asked = {pruner.needs for pruner, _ in methods.values()}
    reasons: dict[frozenset[Evidence], str] = {}
    try:
        return batches(vlm, cell, number, frozenset[Evidence]().union(*asked)), {}
    except Exception:  # whose fault it is, the needs one by one tell
        for needs in asked - {frozenset()}:
            try:
                batches(vlm, cell, 1, needs)
            except Exception as error:
                reasons[needs] = with_class(error)
    rest = batches(vlm, cell, number, frozenset[Evidence]().union(*(asked - reasons.keys())))
    return rest, {one: reasons[pruner.needs] for one, (pruner, _) in methods.items() if pruner.needs in reasons}


@torch.inference_mode()
def side_by_side(session: Session, methods: Mapping[Cell, tuple[Pruner, Budget]], threads: int) -> dict[Cell, Measured]:
    """Time the methods of these cells on the session's inputs, all rounds; a cell that fails is an outcome with its reason."""
    start, began = processor_seconds(), time.monotonic()
    found: dict[Cell, Measured] = {}
    arms: dict[Cell, tuple[TimedVariant, TimedVariant]] = {}
    for cell, (pruner, budget) in methods.items():
        try:
            arms[cell] = session.add(pruner, budget)
        except Exception as error:
            found[cell] = _failed(error)
    if not arms:
        return found
    session.run()
    flags = machine_flags(session.vlm.device, others(start, processor_seconds()), threads)
    flags += ["no_warmup"] * (session.options.warmup == 0)
    flags += ["clock_drift"] * drifted([[v for _, v in arm.found.get("prefill", [])] for arm in session.variants if not arm.error])
    found |= {cell: _collect(session, pair, flags) for cell, pair in arms.items()}
    each = (time.monotonic() - began) / len(arms)  # shares add up to the session
    return found | {cell: found[cell]._replace(outcome=replace(found[cell].outcome, seconds=each)) for cell in arms}


def _collect(session: Session, pair: tuple[TimedVariant, TimedVariant], flags: list[str]) -> Measured:
    arms = (session.full, *pair)
    broken = [f"{arm.name}: {arm.error}" for arm in arms if arm.error]
    if broken:
        return _failed("; ".join(broken))
    try:
        costs = [session.cost(arm) for arm in arms]
    except Exception as error:
        return _failed(error)
    timings = [row for arm in arms for row in session.timings(arm, flags)]
    return Measured(timings, costs, Outcome("ok", "", len(timings) + len(costs), 0.0))
