"""Cells -> timings and costs. Cells that share model, data and batch are timed together, round by round, in shuffled order.

Three arms: `full` (unpruned, through the same path), `pruned` (the cell's method and budget, tokens really gone), `native` (a
sequence that was always this short, made without any pruner). Every round runs all arms on the same batch of real images and
questions, so a slow moment of the machine meets all of them alike.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from diffprune import graphed, timed
from diffprune.core import budget as budgets_
from diffprune.core import cost, plugins
from diffprune.core.benchmark import Benchmark
from diffprune.core.budget import Budget, Share
from diffprune.core.clock import Clock, clocks
from diffprune.core.pruner import Need, Pruner
from diffprune.core.record import Cell, Cost, Outcome, Timing
from diffprune.core.vlm import VLM
from diffprune.timed import Inputs, Mode, Ready

FEW, OUTLIER, DRIFT, BUSY_CORES, FOREIGN_BYTES = 30, 5.0, 0.02, 0.25, 1.5 * 2**30
Span = Literal["encoder", "parts", "prefill", "ttft", "decode"]


class Measurement(BaseModel):
    """How to measure.

    batches: rows per request, one cell each. rounds, warmup: repetitions kept and discarded, the latter per arm and shape.
    modes: "eager", and "graph" on a CUDA device (`graphed`, which leaves out the spans parts and decode); one cell each.
    slow_rounds: repetitions of `ttft` and `decode`, which cost many times a prefill. decode_tokens: of the slope.
    spans: beside overhead, projection and prefill, which always are timed: `parts` are score, select and gather.
    inputs: different batches of images and questions the rounds go through. threads: of torch; none leaves them as they are.
    benchmark, split, limit: where images and questions come from.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    batches: tuple[int, ...] = Field((8,), min_length=1)
    modes: tuple[Literal["eager", "graph"], ...] = Field(("eager",), min_length=1)
    rounds: int = Field(30, ge=2)
    warmup: int = Field(10, ge=0)
    slow_rounds: int = Field(10, ge=2)
    decode_tokens: int = Field(16, ge=1)
    spans: tuple[Span, ...] = ("encoder", "parts", "prefill", "ttft", "decode")
    inputs: int = Field(2, ge=1)
    threads: int | None = Field(None, ge=1)
    benchmark: str = "world('gqa')"
    split: str = "test"
    limit: int | None = Field(None, ge=1)
    seed: int = 0


class Measured(NamedTuple):
    """What was found about one cell; `outcome` says why where that is nothing."""

    timings: list[Timing]
    costs: list[Cost]
    outcome: Outcome


def cells(vlm: VLM, pruners: Sequence[str], budgets: Sequence[str], options: Measurement) -> list[Cell]:
    """Every pruner at every budget and batch size. `none` is no cell: it is the `full` arm of every other.

    Raises:
        ValueError: unknown pruner, benchmark or option, a budget above what the model has, or a mode it cannot run in.
    """
    if "graph" in options.modes:
        graphed.refuse(vlm)
    parsed = [budgets_.parse(text) for text in budgets]
    for budget in parsed:
        budget.check(vlm.num_visual_tokens)
    benchmark: Benchmark = plugins.load("benchmarks", options.benchmark)
    methods = [m for m in (plugins.load("pruners", text) for text in pruners) if m.plan(Share(1))]
    made = [
        Cell(
            verb="measure", model=vlm.name, model_hash=vlm.weights_hash, pruner=m.spelling, pruner_hash=m.weights_hash,
            budget=str(budget), benchmark=benchmark.spelling, revision=benchmark.revision, split=options.split,
            limit=options.limit, batch=batch, dtype=str(vlm.model.dtype).removeprefix("torch."), seed=options.seed,
            mode=mode,
        )
        for batch in options.batches for mode in options.modes for m in methods for budget in parsed
    ]  # fmt: skip
    return list(dict.fromkeys(made))


# --- the machine -----------------------------------------------------------------------------------------------------


@contextmanager
def pinned(threads: int | None) -> Iterator[int]:
    """Run with this many threads of torch, then as before; yields the number."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        yield threads or before
    finally:
        torch.set_num_threads(before)


def _processor_seconds() -> tuple[float, float, float]:
    """(wall, processor seconds of the whole machine, of this process); the machine's is nan where the system does not tell."""
    own = sum(os.times()[:4])
    try:
        ticks = [int(word) for word in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    except (OSError, ValueError):
        return time.monotonic(), float("nan"), own
    return time.monotonic(), (sum(ticks) - ticks[3] - ticks[4]) / os.sysconf("SC_CLK_TCK"), own


def others(start: tuple[float, float, float], end: tuple[float, float, float]) -> float:
    """Cores that anybody else kept busy between two readings; nan where unknown."""
    return (end[1] - start[1] - (end[2] - start[2])) / max(end[0] - start[0], 1e-9)


def machine_flags(device: torch.device, busy_cores: float, threads: int) -> list[str]:
    """Flags of the session: device, threads, and whether others used the machine."""
    shared = busy_cores > BUSY_CORES
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        shared |= total - free - torch.cuda.memory_reserved(device) > FOREIGN_BYTES
    return [f"threads_{threads}"] + ["cpu_only"] * (device.type == "cpu") + ["shared_device"] * shared


def drifted(series: Sequence[Sequence[float]]) -> bool:
    """Whether the machine became slower or faster by over 2 %: last third against first, each series by its own median."""
    rows = np.array([np.asarray(s) / np.median(s) for s in series if len(s) >= 6 and np.median(s) > 0])
    if not rows.size:
        return False
    third = rows.shape[1] // 3
    return bool(abs(np.median(rows[:, -third:]) / np.median(rows[:, :third]) - 1) > DRIFT)


def value_flags(values: Sequence[float]) -> list[str]:
    """Flags of one series of repetitions. Nothing is ever removed from it."""
    far = bool(len(values)) and bool(max(values) > OUTLIER * max(float(np.median(values)), 1e-9))
    return ["few_repeats"] * (len(values) < FEW) + ["outlier"] * far


# --- costs -----------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def counted_flops(vlm: VLM, ready: Ready) -> float:
    """torch's own counter over one prefill. Attention runs in its unfused form, which the counter knows on every device, so it
    is counted in full: `cost.causal_half` above the formula."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        vlm.model(**ready.keywords, use_cache=True, logits_to_keep=1)
    return float(counter.get_total_flops())


@torch.inference_mode()
def _cost(vlm: VLM, arm: str, ready: Ready, clock: Clock, mode: Mode) -> Cost:
    """Cost of one image (batch 1), with the proof that its tokens were removed; a graph has its memory beforehand."""
    kept, shape = int(ready.packed.kept[0]), vlm.shape
    text = int(ready.packed.prompts.attention_mask.sum()) - kept
    cuda = vlm.device.type == "cuda" and mode is timed
    if cuda:
        clock.wait()
        torch.cuda.reset_peak_memory_stats(vlm.device)
    before = torch.cuda.memory_allocated(vlm.device) if cuda else 0
    output = mode.prefill(vlm, ready, clock)[1]
    peak = float(torch.cuda.max_memory_allocated(vlm.device) - before) if cuda else float("nan")
    visual = (kept,) * shape.layers
    return Cost(
        arm=arm, visual_kept=kept, text_tokens=text, prefill_flops=cost.prefill_flops(shape, visual, text),
        encoder_flops=cost.encoder_flops(shape), counted_flops=counted_flops(vlm, ready) if ready.keywords else float("nan"),
        kv_bytes=cost.kv_bytes(shape, visual, text, vlm.model.dtype.itemsize),
        kv_measured_bytes=mode.prove_removed(ready, output), peak_bytes=peak,
    )  # fmt: skip


# --- one session -----------------------------------------------------------------------------------------------------


@dataclass
class _Arm:
    """One thing to time, and what was found. cells: who asked for it. fixed: rows made beforehand (native), per batch of inputs."""

    name: str
    pruner: Pruner
    budget: Budget
    cells: list[Cell]
    fixed: list[Ready] = field(default_factory=list)
    sizes: list[tuple[float, int]] = field(default_factory=list)  # (mean kept, sequence) per batch of inputs
    found: dict[str, list[tuple[int, float]]] = field(default_factory=dict)  # span -> (round, ms)
    error: str = ""

    def add(self, turn: int, spans: Mapping[str, float]) -> None:
        for span, value in spans.items():
            self.found.setdefault(span, []).append((turn, value))

    @property
    def encoder_needs(self) -> frozenset[Need]:
        return self.pruner.needs - timed.NOT_OF_THE_ENCODER


class Session:
    """Arms timed next to each other on the same inputs, in one mode."""

    def __init__(
        self, vlm: VLM, inputs: Sequence[Inputs], options: Measurement, clock: Clock, host: Clock, mode: Mode = timed
    ) -> None:
        self.vlm, self.inputs, self.options, self.clock, self.host = vlm, inputs, options, clock, host
        self.mode, self.spans = mode, frozenset(options.spans) - mode.UNTIMED
        none = plugins.load("pruners", "none")
        self.full = _Arm("full", none, Share(1), [])
        self.arms = [self.full]
        self.costs: dict[int, Cost] = {}  # by id of the arm
        self._natives: dict[tuple[tuple[int, ...], ...], _Arm] = {}
        self._order = random.Random(options.seed)

    def add(self, cell: Cell, pruner: Pruner, budget: Budget) -> tuple[_Arm, _Arm]:
        """The (pruned, native) arms of a cell; equal counts of different methods share one native arm."""
        ready = [self.mode.shrink(self.vlm, inputs, pruner, budget, self.clock)[0] for inputs in self.inputs]
        pruned = _Arm("pruned", pruner, budget, [cell], sizes=[_size(r) for r in ready])
        counts = tuple(tuple(r.packed.kept.tolist()) for r in ready)
        if counts not in self._natives:
            made = [self.mode.native(self.vlm, inputs, kept) for inputs, kept in zip(self.inputs, counts, strict=True)]
            self._natives[counts] = _Arm("native", self.full.pruner, Share(1), [], made, [_size(r) for r in made])
            self.arms.append(self._natives[counts])
        natives = self._natives[counts]
        natives.cells.append(cell)
        for one in ready:
            self.mode.prove_removed(one, self.mode.prefill(self.vlm, one, self.clock)[1])
        self.arms.append(pruned)
        return pruned, natives

    def run(self) -> None:
        """Warm up every arm on every input, then time all rounds."""
        self._guarded([self.full], lambda arm: arm.sizes.extend(_size(self._once(arm, i)[0]) for i in self.inputs))
        for _ in range(self.options.warmup):
            self._guarded(self.arms, lambda arm: [self._once(arm, inputs, i) for i, inputs in enumerate(self.inputs)])
        for turn in range(self.options.rounds):
            self._round(turn)
        for turn in range(self.options.slow_rounds):
            self._slow_round(turn)

    def _once(self, arm: _Arm, inputs: Inputs, index: int = 0, parts: bool = False) -> tuple[Ready, dict[str, float]]:
        spans: dict[str, float] = {}
        if arm.fixed:
            ready = arm.fixed[index]
        else:
            ready, spans = self.mode.shrink(self.vlm, inputs, arm.pruner, arm.budget, self.clock, parts)
            if arm is self.full:
                spans = {"project": spans["project"]}  # nothing is added to an unpruned request
        if not parts:
            spans["prefill"] = self.mode.prefill(self.vlm, ready, self.clock)[0]
        return ready, spans

    def _round(self, turn: int) -> None:
        index = turn % len(self.inputs)
        inputs, extra = self.inputs[index], self._encoders(turn)
        arms = [arm for arm in self.arms if not arm.error]
        self._order.shuffle(arms)

        def once(arm: _Arm) -> None:
            spans = self._once(arm, inputs, index)[1]
            if "overhead" in spans:
                spans["overhead"] += extra.get(arm.encoder_needs, 0.0)
            arm.add(turn, spans)

        def again(arm: _Arm) -> None:
            spans = self._once(arm, inputs, index, parts=True)[1]
            spans["score"] += extra.get(arm.encoder_needs, 0.0)
            arm.add(turn, {name: spans[name] for name in ("score", "select", "gather")})

        self._guarded(arms, once)
        if "parts" in self.spans:
            self._guarded([arm for arm in arms if arm.name == "pruned"], again)

    def _encoders(self, turn: int) -> dict[frozenset[Need], float]:
        """Time the encoder once per set of needs; what each adds to it, which is overhead of the methods that ask for it."""
        inputs, added = self.inputs[turn % len(self.inputs)], {}
        asked = {arm.encoder_needs for arm in self.arms if arm.name == "pruned"} - {frozenset()}
        wanted = [frozenset[Need](), *sorted(asked, key=str)] if "encoder" in self.spans else sorted(asked, key=str)
        self._order.shuffle(wanted)
        for needs in wanted:
            spent, more = timed.encode(self.vlm, inputs, needs, self.clock)
            added[needs] = 0.0 if np.isnan(more) else more
            if "encoder" in self.spans:
                for arm in (a for a in self.arms if a.name != "native" and a.encoder_needs == needs):
                    arm.add(turn, {"encoder": spent})
        return added

    def _slow_round(self, turn: int) -> None:
        index = turn % len(self.inputs)
        arms = [arm for arm in self.arms if not arm.error]
        self._order.shuffle(arms)
        if "ttft" in self.spans:
            asked = [arm for arm in arms if arm.name != "native"]
            if turn == 0 and self.options.warmup:
                self._guarded(asked, lambda arm: self._ttft(arm, index))
            self._guarded(asked, lambda arm: arm.add(turn, {"ttft": self._ttft(arm, index)}))
        if "decode" in self.spans:
            self._guarded(arms, lambda arm: self._decode(arm, turn, index))

    def _ttft(self, arm: _Arm, index: int) -> float:
        return self.mode.first_token(self.vlm, self.inputs[index], arm.pruner, arm.budget, self.host)

    def _decode(self, arm: _Arm, turn: int, index: int) -> None:
        ready = self._ready(arm, index)
        arm.add(turn, {"decode": self.mode.decode(self.vlm, ready, self.options.decode_tokens, self.host)})

    def _ready(self, arm: _Arm, index: int) -> Ready:
        """Rows of an arm, untimed."""
        if arm.fixed:
            return arm.fixed[index]
        return self.mode.shrink(self.vlm, self.inputs[index], arm.pruner, arm.budget, self.clock)[0]

    def _guarded(self, arms: Sequence[_Arm], call: Callable[[_Arm], object]) -> None:
        """`call` every arm; one that fails is out of the session, with its reason."""
        for arm in arms:
            if arm.error:
                continue
            try:
                call(arm)
            except Exception as error:  # out of memory, or whatever a method raises: an outcome, never a time
                arm.error = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]:.300}"

    def cost(self, arm: _Arm) -> Cost:
        """Of the image whose count is nearest the arm's mean, alone."""
        if id(arm) not in self.costs:
            where, row = self._typical(arm)
            whole = self.inputs[where]
            pixels = self.vlm.part(whole.pixels, row, row + 1)
            alone = whole.tokens[torch.tensor([row], device=whole.prompts.input_ids.device)]
            prompts = self.vlm.prompts(whole.questions[row : row + 1], alone.present.sum(1).tolist(), alone.layout)
            one = Inputs(whole.images[row : row + 1], whole.questions[row : row + 1], pixels, alone, prompts)
            if arm.fixed:
                ready = self.mode.native(self.vlm, one, [int(arm.fixed[where].packed.kept[row])])
            else:
                ready = self.mode.shrink(self.vlm, one, arm.pruner, arm.budget, self.clock)[0]
            self.costs[id(arm)] = _cost(self.vlm, arm.name, ready, self.clock, self.mode)
        return self.costs[id(arm)]

    def _typical(self, arm: _Arm) -> tuple[int, int]:
        """(batch of inputs, row) of the image nearest the mean count."""
        counts = []
        for i in range(len(self.inputs)):
            counts += [(int(k), i, row) for row, k in enumerate(self._ready(arm, i).packed.kept)]
        mean = sum(k for k, _, _ in counts) / len(counts)
        return min(counts, key=lambda c: (abs(c[0] - mean), c))[1:]

    def timings(self, arm: _Arm, cell: Cell, flags: Sequence[str]) -> list[Timing]:
        rows = []
        for span, values in arm.found.items():
            own = [*flags, *value_flags([v for _, v in values]), *self._excluded(arm, span)]
            for turn, value in values:
                kept, sequence = arm.sizes[turn % len(self.inputs)]
                rows.append(Timing(span, arm.name, turn, value, cell.batch, kept, sequence, " ".join(own)))
        return rows

    def _excluded(self, arm: _Arm, span: str) -> list[str]:
        """Flag an overhead that lacks what the method needs of an encoder whose end cannot be marked, or whose parts disagree."""
        if span != "overhead":
            return []
        unknown = bool(arm.encoder_needs) and not hasattr(self.vlm.model, "get_encoder")
        parts = [sum(v) for v in zip(*([x for _, x in arm.found.get(p, [])] for p in ("score", "select", "gather")), strict=False)]
        whole = float(np.median([v for _, v in arm.found[span]]))
        differ = bool(parts) and abs(float(np.median(parts)) - whole) > max(0.1, 0.05 * whole)
        return ["overhead_excluded"] * unknown + ["parts_differ"] * differ


def _size(ready: Ready) -> tuple[float, int]:
    return float(ready.packed.kept.float().mean()), ready.sequence


# --- cells in, rows out ----------------------------------------------------------------------------------------------


def together(asked: Sequence[Cell]) -> list[list[Cell]]:
    """Cells that may share a session: everything equal but method and budget."""
    groups: dict[Cell, list[Cell]] = {}
    for cell in asked:
        groups.setdefault(replace(cell, pruner="", pruner_hash="", budget=""), []).append(cell)
    return list(groups.values())


def batches(vlm: VLM, cell: Cell, number: int, needs: frozenset[Need]) -> list[Inputs]:
    """Up to `number` batches of real images and questions of the cell's benchmark, in its own order.

    Raises:
        ValueError: the split has fewer samples than one batch.
    """
    benchmark: Benchmark = plugins.load("benchmarks", cell.benchmark)
    samples = benchmark.samples(cell.split, cell.limit, cell.protocol)
    if len(samples) < cell.batch:
        found = f"{cell.benchmark} gives {len(samples)} samples of split {cell.split!r}"
        raise ValueError(f"{found}; a batch takes {cell.batch}: raise the limit")
    starts = range(0, len(samples) - cell.batch + 1, cell.batch)[:number]
    made = []
    for start in starts:
        chosen = samples[start : start + cell.batch]
        made.append(timed.prepare(vlm, [benchmark.image(s) for s in chosen], [s.question for s in chosen], needs))
    return made


def method(vlm: VLM, cell: Cell) -> tuple[Pruner, Budget]:
    """Method and budget a cell asks for.

    Raises:
        ValueError: unknown or refused, or other weights than the cell names.
    """
    pruner: Pruner = plugins.load("pruners", cell.pruner)
    hashes = (cell.model, cell.model_hash, vlm.weights_hash), (cell.pruner, cell.pruner_hash, pruner.weights_hash)
    for name, wanted, found in hashes:
        if wanted != found:
            raise ValueError(f"the weights of {name} have changed: the cell asks for {wanted!r}, found {found!r}")
    budget = budgets_.parse(cell.budget)
    budget.check(vlm.num_visual_tokens)
    return pruner, budget


def _failed(error: Exception | str) -> Measured:
    reason = error if isinstance(error, str) else f"{type(error).__name__}: {error!s:.300}"
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
        with pinned(options.threads) as threads:
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
    needs = frozenset[Need]().union(*(pruner.needs for pruner, _ in methods.values()))
    mode: Mode = graphed.Graphs(vlm) if group[0].mode == "graph" else timed
    session = Session(vlm, batches(vlm, group[0], options.inputs, needs), options, clock, host, mode)
    return found | side_by_side(session, methods, threads)


@torch.inference_mode()
def side_by_side(session: Session, methods: Mapping[Cell, tuple[Pruner, Budget]], threads: int) -> dict[Cell, Measured]:
    """Time the methods of these cells on the session's inputs, all rounds; a cell that fails is an outcome with its reason."""
    start, began = _processor_seconds(), time.monotonic()
    found: dict[Cell, Measured] = {}
    arms: dict[Cell, tuple[_Arm, _Arm]] = {}
    for cell, (pruner, budget) in methods.items():
        try:
            arms[cell] = session.add(cell, pruner, budget)
        except Exception as error:
            found[cell] = _failed(error)
    if not arms:
        return found
    session.run()
    flags = machine_flags(session.vlm.device, others(start, _processor_seconds()), threads)
    flags += ["no_warmup"] * (session.options.warmup == 0)
    flags += ["clock_drift"] * drifted([[v for _, v in arm.found.get("prefill", [])] for arm in session.arms if not arm.error])
    return found | {cell: _collect(session, cell, pair, flags, time.monotonic() - began) for cell, pair in arms.items()}


def _collect(session: Session, cell: Cell, pair: tuple[_Arm, _Arm], flags: list[str], seconds: float) -> Measured:
    arms = (session.full, *pair)
    broken = [f"{arm.name}: {arm.error}" for arm in arms if arm.error]
    if broken:
        return _failed("; ".join(broken))
    try:
        costs = [session.cost(arm) for arm in arms]
    except Exception as error:
        return _failed(error)
    timings = [row for arm in arms for row in session.timings(arm, cell, flags)]
    return Measured(timings, costs, Outcome("ok", "", len(timings) + len(costs), seconds))
