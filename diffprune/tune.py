"""From a target speedup to a threshold or a count: arithmetic on cached scores and one measured latency curve.

Scores do not depend on the threshold, so what a threshold keeps is known without running the model, and latency is one monotone
curve of the sequence length with a floor (MEASURING 8). What remains to be run is the accuracy of the few candidates that reach
the target, and one measured verification on other images.

A batch costs its longest row (padding on the left), so samples are taken in batches, in their own order, and a batch of kept counts
k_i and texts t_i is predicted to cost T(max(k_i + t_i)) + o(mean k_i). The speedup is the ratio of sums over all batches.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from scipy.optimize import isotonic_regression

from diffprune import prune, timed
from diffprune.core.benchmark import Benchmark, Sample
from diffprune.core.budget import Above, Budget, Keep, Share, standardise
from diffprune.core.clock import Clock
from diffprune.core.plugins import load
from diffprune.core.pruner import Need, Pruner
from diffprune.core.record import Cell, Choice, CurvePoint, Trial
from diffprune.core.vlm import VLM
from diffprune.statistics import interval_of
from diffprune.timed import Inputs

Array = np.ndarray[Any, np.dtype[Any]]
Kind = Literal["threshold", "count"]
STEPS = (1.0, 1.1, 1.25, 1.5, 0.9)  # candidates aim at the target times these; the last shows what lies just out of reach
TOLERANCE = 0.02  # a verified speedup this share below its target still counts as reached
DIGITS = 6  # of a threshold, as budgets are spelled


class Tuning(BaseModel):
    """What to tune for.

    targets: prefill speedups, net of overhead, at `batch` rows. kinds: thresholds, counts (top-K), or both.
    benchmarks: questions asked; calibration, held_out: how many, over all benchmarks, of different images of `split`.
    margin: predicted speedup aims this share above the target. candidates: per target, tighter than needed ones included.
    least, most: guards of a threshold. corrections: rounds after a verification that missed. repeats: timings of each held-out
    batch; curve_repeats: of each length. threads: of torch; none leaves them as they are.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=True)

    targets: tuple[float, ...] = Field((1.5, 2.0, 2.85), min_length=1)
    kinds: tuple[Kind, ...] = Field(("threshold", "count"), min_length=1)
    benchmarks: tuple[str, ...] = Field(("world('gqa')", "world('textvqa')", "world('pope')"), min_length=1)
    split: str = "calibration"
    protocol: str = "llava"
    batch: int = Field(8, ge=1)
    calibration: int = Field(200, ge=1)
    held_out: int = Field(200, ge=1)
    margin: float = 0.02
    candidates: int = Field(2, ge=1, le=len(STEPS) - 1)
    least: int = Field(1, ge=1)
    most: int | None = None
    corrections: int = Field(3, ge=0)
    repeats: int = Field(3, ge=1)
    curve_repeats: int = Field(30, ge=3)
    warmup: int = Field(10, ge=0)
    threads: int | None = Field(None, ge=1)
    seed: int = 0

    @field_validator("targets")
    @classmethod
    def _above_zero(cls, targets: tuple[float, ...]) -> tuple[float, ...]:
        for target in targets:
            if not (math.isfinite(target) and target > 0):
                raise ValueError(f"a target speedup of {target} cannot be met: give a number above 0, such as 2.0")
        return targets

    @field_validator("margin")
    @classmethod
    def _small(cls, margin: float) -> float:
        if not 0 <= margin < 1:
            raise ValueError(f"margin is {margin}, it must be a share from 0 to below 1")
        return margin

    @model_validator(mode="after")
    def _ordered(self) -> Tuning:
        if self.most is not None and self.most < self.least:
            raise ValueError(f"most is {self.most} and least is {self.least}: needs least <= most")
        return self


def cells(vlm: VLM, methods: Sequence[str], options: Tuning) -> list[Cell]:
    """One cell per method, kind and target. `budget` carries the target, `mode` every other option that changes the answer.

    Raises:
        ValueError: unknown method or benchmark, or guards the model cannot meet.
    """
    Keep(options.least).check(vlm.num_visual_tokens)
    pruners = [p for p in (load("pruners", text) for text in methods) if p.plan(Share(1))]
    benchmarks: list[Benchmark] = [load("benchmarks", text) for text in options.benchmarks]
    elsewhere = {"targets", "kinds", "benchmarks", "split", "protocol", "batch", "calibration", "threads", "seed"}
    rest = options.model_dump(exclude=elsewhere)
    words = " ".join(f"{k}={v}" for k, v in sorted(rest.items()) if v is not None)
    return [
        Cell(
            verb="tune", model=vlm.name, model_hash=vlm.weights_hash, pruner=p.spelling, pruner_hash=p.weights_hash,
            budget=f"target={target:g}", benchmark="+".join(b.spelling for b in benchmarks),
            revision="+".join(dict.fromkeys(b.revision for b in benchmarks)), protocol=options.protocol, split=options.split,
            limit=options.calibration, batch=options.batch, dtype=str(vlm.model.dtype).removeprefix("torch."), seed=options.seed,
            mode=f"{kind} {words}",
        )
        for p in pruners for kind in options.kinds for target in options.targets
    ]  # fmt: skip


# --- images and questions --------------------------------------------------------------------------------------------


def _cut(vlm: VLM, benchmark: Benchmark, samples: Sequence[Sample], batch: int, needs: frozenset[Need]) -> list[Inputs]:
    """Whole batches; one short batch where there are too few samples for any."""
    whole = [samples[i : i + batch] for i in range(0, len(samples) - batch + 1, batch)] or [samples]
    return [timed.prepare(vlm, [benchmark.image(s) for s in part], [s.question for s in part], needs) for part in whole if part]


@torch.inference_mode()
def splits(vlm: VLM, options: Tuning, needs: frozenset[Need]) -> tuple[list[Inputs], list[Inputs]]:
    """(calibration, held-out) batches, encoded; no image of one occurs in the other, whatever benchmark asks about it.

    Raises:
        ValueError: no image is left to hold out.
    """
    benchmarks: list[Benchmark] = [load("benchmarks", text) for text in options.benchmarks]
    share = [math.ceil(n / len(benchmarks)) for n in (options.calibration, options.held_out)]
    first = [b.samples(options.split, share[0], options.protocol) for b in benchmarks]
    used = {s.image_id for samples in first for s in samples}
    more = [b.samples(options.split, options.calibration + options.held_out, options.protocol) for b in benchmarks]
    later = [[s for s in samples if s.image_id not in used][: share[1]] for samples in more]
    if not any(later):
        raise ValueError(f"split {options.split!r} has no image beside the {len(used)} used for calibration: lower `calibration`")

    def cut(group: list[list[Sample]]) -> list[Inputs]:
        return [i for b, s in zip(benchmarks, group, strict=True) for i in _cut(vlm, b, s, options.batch, needs)]

    return cut(first), cut(later)


# --- what a threshold keeps ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scored:
    """A calibration set: counts and texts of S samples and, where the method has scores, the scores.

    visual, text: [S] tokens. starts: first sample of each batch. scores: per sample, standardised float32 in ascending order (what
    `Above` compares); None where a method has none, or draws them, so that a threshold means nothing.
    """

    visual: Array
    text: Array
    starts: Array
    scores: tuple[Array, ...] | None = None

    def kept(self, budget: Budget) -> Array:
        """[S] tokens each sample keeps, by the same comparison as inference."""
        if not isinstance(budget, Above):
            return np.array([budget.count(int(v)) for v in self.visual])
        assert self.scores is not None, "a threshold needs scores"
        limit = np.float32(budget.threshold)
        over = np.array([len(s) - np.searchsorted(s, limit, side="right") for s in self.scores])
        most = self.visual if budget.most is None else np.minimum(self.visual, budget.most)
        return np.minimum(np.maximum(over, budget.least), most)

    def longest(self, kept: Array) -> Array:
        """[batches] length of the longest row of each batch."""
        return np.asarray(np.maximum.reduceat(kept + self.text, self.starts))


def captured(vlm: VLM, inputs: Inputs, pruner: Pruner) -> tuple[Array, ...] | None:
    """Standardised scores of each image, ascending; None where the method does not pick by scores in one cut, or draws them."""
    if Need.IDENTITY in pruner.needs:
        return None
    caught: list[tuple[torch.Tensor, torch.Tensor]] = []
    probe = copy(Above(0.0))
    real = probe.pick

    def pick(scores: torch.Tensor, alive: torch.Tensor) -> torch.Tensor:
        caught.append((scores, alive))
        return real(scores, alive)

    object.__setattr__(probe, "pick", pick)
    try:
        prune.select(vlm, inputs.prompts, inputs.for_(pruner), pruner, probe)
    except ValueError:  # a method that needs a count says so
        return None
    if len(caught) != 1:
        return None
    rows = standardise(*caught[0]).cpu().numpy()
    return tuple(np.sort(row[alive]) for row, alive in zip(rows, caught[0][1].cpu().numpy(), strict=True))


def scored(vlm: VLM, batches: Sequence[Inputs], pruner: Pruner) -> Scored:
    """Run the scorer once over a calibration set."""
    found = [captured(vlm, inputs, pruner) for inputs in batches]
    sizes = [len(inputs.questions) for inputs in batches]
    text = [(i.prompts.attention_mask.sum(1) - i.prompts.slots.sum(1)).cpu().numpy() for i in batches]
    return Scored(
        visual=np.concatenate([i.tokens.counts.cpu().numpy() for i in batches]),
        text=np.concatenate(text),
        starts=np.cumsum([0, *sizes[:-1]]),
        scores=None if any(f is None for f in found) else tuple(s for f in found if f is not None for s in f),
    )


# --- what that costs -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Latency:
    """Prefill by sequence length, and a method's overhead by kept tokens: monotone, linear between points, flat outside.

    Flat below the shortest length is the floor; nothing is ever extrapolated below it. `scale` is the bias a verification found.
    """

    lengths: Array
    prefill_ms: Array
    counts: Array
    overhead_ms: Array

    @staticmethod
    def fit(
        lengths: Sequence[float], prefill_ms: Sequence[float], counts: Sequence[float], overhead_ms: Sequence[float]
    ) -> Latency:
        """From medians at any lengths and counts, in any order."""
        return Latency(*_monotone(lengths, prefill_ms), *_monotone(counts, overhead_ms))

    def prefill(self, length: Array) -> Array:
        """ms of one batch whose longest row has this length."""
        return np.asarray(np.interp(length, self.lengths, self.prefill_ms))

    def overhead(self, kept: Array) -> Array:
        """ms a method adds to one batch that keeps this many tokens per image on average."""
        return np.asarray(np.interp(kept, self.counts, self.overhead_ms))

    def speedup(self, data: Scored, kept: Array) -> float:
        """Sum over batches of the unpruned prefill, over that of pruned prefill and overhead."""
        means = np.add.reduceat(kept.astype(float), data.starts) / np.diff([*data.starts, len(kept)])
        full = self.prefill(data.longest(data.visual)).sum()
        return float(full / (self.prefill(data.longest(kept)) + self.overhead(means)).sum())


def _monotone(x: Sequence[float], y: Sequence[float]) -> tuple[Array, Array]:
    """Non-decreasing fit: distinct x in order, least squares."""
    places, index = np.unique(np.asarray(x, float), return_inverse=True)
    weights = np.bincount(index).astype(float)
    means = np.bincount(index, np.asarray(y, float)) / weights
    return places, isotonic_regression(means, weights=weights).x


# --- from target to budget -------------------------------------------------------------------------------------------


class Solver:
    """Budgets of one method and kind, ordered from keeping most to keeping least, and their predicted speedups.

    least, most: guards of a threshold; `least` also bounds counts.
    """

    def __init__(self, data: Scored, latency: Latency, kind: Kind, least: int = 1, most: int | None = None) -> None:
        self.data, self.latency, self.kind, self.least, self.most = data, latency, kind, least, most
        self.values: Array
        if kind == "count":
            self.values = np.arange(int(data.visual.max()), least - 1, -1)
        else:
            assert data.scores is not None, "a threshold needs scores"
            distinct = np.unique(np.concatenate(data.scores)).astype(float)
            between = np.concatenate([[distinct[0] - 1], (distinct[1:] + distinct[:-1]) / 2, [distinct[-1] + 1]])
            self.values = np.unique([float(f"{t:.{DIGITS}g}") for t in between])
        if not len(self.values):
            raise ValueError(f"least is {least}, but the images have only {int(data.visual.max())} visual tokens")

    def budget(self, value: float) -> Budget:
        """The budget of one value, exactly as it will be spelled and run."""
        return Keep(int(value)) if self.kind == "count" else Above(float(value), self.least, self.most)

    def kept(self, value: float) -> Array:
        return self.data.kept(self.budget(value))

    def speedup(self, value: float) -> float:
        return self.latency.speedup(self.data, self.kept(value))

    @property
    def best(self) -> float:
        """The largest predicted speedup: everything at its floor."""
        return self.speedup(self.values[-1])

    def solve(self, aim: float) -> float | None:
        """The value that keeps most among those predicted to reach `aim`; None where none does.

        Values are in order of their speedup, as the fit is monotone; so a bisection finds it.
        """
        low, high = 0, len(self.values) - 1
        if self.best < aim:
            return None
        while low < high:
            middle = (low + high) // 2
            if self.speedup(self.values[middle]) >= aim:
                high = middle
            else:
                low = middle + 1
        return float(self.values[low])

    def candidates(self, target: float, margin: float, number: int) -> list[float]:
        """The solution, tighter ones, and (last, not feasible) what lies just out of reach; [] where the target is unreachable."""
        best = self.best
        if best < target:
            return []
        aims = [min(target * (1 + margin) * step, best) for step in (*STEPS[:number], STEPS[-1])]
        return list(dict.fromkeys(v for v in map(self.solve, aims) if v is not None))

    def trial(self, method: str, target: float, value: float, accuracy: float = math.nan) -> Trial:
        """The record of one candidate."""
        speedup = self.speedup(value)
        return Trial(method, self.kind, target, float(value), float(self.kept(value).mean()), speedup, speedup >= target, accuracy)


def best_trial(trials: Sequence[Trial]) -> Trial:
    """The most accurate among those that reach their target; of equals the one that keeps most."""
    able = [t for t in trials if t.feasible and not math.isnan(t.accuracy)]
    assert able, "a target within reach has a candidate that reaches it"
    return max(able, key=lambda t: (t.accuracy, t.kept))


def unreachable(solver: Solver, method: str, target: float) -> Choice:
    """The answer where even the fewest tokens are not fast enough: no budget, but the best there is, and why."""
    best, value, nan = solver.best, solver.values[-1], math.nan
    note = (
        f"unreachable here, best is {best:.2f}x at the floor of {solver.kept(value).mean():.0f} visual tokens: "
        f"{float(solver.data.text.mean()):.0f} text tokens and the method's overhead remain"
    )
    return Choice(
        method=method, kind=solver.kind, target_speedup=target, verdict="unreachable", budget="", value=nan, kept=nan,
        predicted_speedup=nan, measured_speedup=nan, low=nan, high=nan, held_out=0, accuracy=nan, best_speedup=best, note=note,
    )  # fmt: skip


# --- verification ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Checked:
    """A measured net speedup on held-out samples: ratio of sums, with its 95 % interval over batches."""

    speedup: float
    low: float
    high: float
    num: int


@dataclass(frozen=True)
class Verified:
    """One tried answer: the candidate, what was measured, and the accuracy of that candidate."""

    trial: Trial
    checked: Checked

    @property
    def reached(self) -> bool:
        return self.checked.speedup >= self.trial.target_speedup * (1 - TOLERANCE)

    @property
    def settled(self) -> bool:
        """Close to the target from above: nothing to correct."""
        return self.reached and self.checked.speedup <= self.trial.target_speedup * (1 + 3 * TOLERANCE)


def correction(solver: Solver, tried: Sequence[Verified], margin: float) -> float | None:
    """The next value to try: T multiplied by the bias the last verification found. None where there is none left to try."""
    last = tried[-1]
    bias = last.trial.predicted_speedup / last.checked.speedup
    value = solver.solve(min(last.trial.target_speedup * (1 + margin) * bias, solver.best))
    if value is None or any(value == t.trial.value for t in tried):
        return None
    return value


def choice(solver: Solver, tried: Sequence[Verified], method: str) -> Choice:
    """Of all verified candidates: the most accurate that measured up, else the fastest, with how much it missed by."""
    able = [t for t in tried if t.reached]
    best = max(able, key=lambda t: (t.trial.accuracy, t.trial.kept)) if able else max(tried, key=lambda t: t.checked.speedup)
    trial, found = best.trial, best.checked
    off = found.speedup / trial.target_speedup - 1
    note = "" if abs(off) <= TOLERANCE else f"measured {abs(off):.1%} {'above' if off > 0 else 'below'} the target"
    return Choice(
        method=method, kind=solver.kind, target_speedup=trial.target_speedup, verdict="reached" if able else "missed",
        budget=str(solver.budget(trial.value)), value=trial.value, kept=trial.kept, predicted_speedup=trial.predicted_speedup,
        measured_speedup=found.speedup, low=found.low, high=found.high, held_out=found.num, accuracy=trial.accuracy,
        best_speedup=solver.best, note=note,
    )  # fmt: skip


# --- what is timed ---------------------------------------------------------------------------------------------------


def grid(total: int, least: int = 1) -> list[int]:
    """About a dozen visual counts from the floor to all of them, closer together where pruning happens."""
    shares = (0, 0.03, 0.06, 0.11, 0.17, 0.22, 0.28, 0.33, 0.42, 0.5, 0.67, 0.83, 1)
    return sorted({max(least, round(share * total)) for share in shares})


@torch.inference_mode()
def time_curve(vlm: VLM, inputs: Inputs, counts: Sequence[int], options: Tuning, clock: Clock) -> list[CurvePoint]:
    """Prefill of sequences that were always this short, interleaved in shuffled rounds; medians and their monotone fit."""
    ready = [timed.native(vlm, inputs, [min(c, int(v)) for v in inputs.tokens.counts]) for c in counts]
    order, found = list(range(len(counts))), [[] for _ in counts]  # type: list[int], list[list[float]]
    shuffled = random.Random(options.seed)
    for turn in range(-options.warmup, options.curve_repeats):
        shuffled.shuffle(order)
        for index in order:
            spent = timed.prefill(vlm, ready[index], clock)[0]
            if turn >= 0:
                found[index].append(spent)
    lengths, medians = [r.sequence for r in ready], [float(np.median(f)) for f in found]
    places, fitted = _monotone(lengths, medians)
    return [
        CurvePoint(
            batch=len(inputs.questions), sequence=r.sequence, visual_kept=c, prefill_ms=m, p10_ms=float(np.quantile(f, 0.1)),
            p90_ms=float(np.quantile(f, 0.9)), repeats=len(f), fitted_ms=float(np.interp(r.sequence, places, fitted)),
        )
        for r, c, m, f in zip(ready, counts, medians, found, strict=True)
    ]  # fmt: skip


def _added(vlm: VLM, inputs: Inputs, pruner: Pruner, clock: Clock, repeats: int) -> float:
    """ms a method's needs add to the encoder (median); 0 where they add nothing or cannot be told apart."""
    if not pruner.needs - timed.NOT_OF_THE_ENCODER:
        return 0.0
    return float(np.nan_to_num(np.median([timed.encode(vlm, inputs, pruner.needs, clock)[1] for _ in range(repeats)])))


@torch.inference_mode()
def time_overhead(
    vlm: VLM, inputs: Inputs, pruner: Pruner, budgets: Sequence[Budget], repeats: int, clock: Clock
) -> list[tuple[float, float]]:
    """(mean kept, median ms a method adds before prefill) of each budget."""
    added = _added(vlm, inputs, pruner, clock, max(3, repeats // 3))
    found = []
    for budget in budgets:
        runs = [timed.shrink(vlm, inputs, pruner, budget, clock) for _ in range(repeats + 1)][1:]
        kept = float(runs[0][0].packed.kept.float().mean())
        found.append((kept, added + float(np.median([spans["overhead"] for _, spans in runs]))))
    return found


@torch.inference_mode()
def check(
    vlm: VLM, batches: Sequence[Inputs], asked: Sequence[tuple[Pruner, Budget]], options: Tuning, clock: Clock
) -> list[Checked]:
    """Measure net speedups on held-out batches: real pruned runs beside unpruned ones, in shuffled order, each batch repeated."""
    arms: list[tuple[Pruner, Budget]] = [(load("pruners", "none"), Share(1)), *asked]
    order, shuffled = list(range(len(arms))), random.Random(options.seed)
    sums = np.zeros((len(batches), len(arms)))
    for row, inputs in enumerate(batches):
        added = {pruner.spelling: _added(vlm, inputs, pruner, clock, 3) for pruner, _ in arms}
        spent = np.zeros((options.repeats, len(arms)))
        for turn in range(-1, options.repeats):
            shuffled.shuffle(order)
            for index in order:
                ready, spans = timed.shrink(vlm, inputs, *arms[index], clock)
                extra = spans["overhead"] + added[arms[index][0].spelling] if index else 0.0
                spent[turn, index] = timed.prefill(vlm, ready, clock)[0] + extra  # turn -1 warms up and is overwritten
        sums[row] = np.median(spent, axis=0)
    num = sum(len(inputs.questions) for inputs in batches)
    ones = np.ones(len(batches))
    columns = [np.column_stack([sums[:, 0], sums[:, i], ones]) for i in range(1, len(arms))]
    found = [interval_of(lambda s: s[..., 0] / s[..., 1], c, limits=(0.0, np.inf))[0] for c in columns]
    return [Checked(f.estimate, f.low, f.high, num) for f in found]
