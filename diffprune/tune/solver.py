"""From a target speedup to a threshold or a count: arithmetic on cached scores and one measured latency curve.

Nothing runs here. A batch costs its longest row (padding on the left), so samples are taken in batches, in their own order, and a
batch of kept counts k_i and texts t_i is predicted to cost T(max(k_i + t_i)) + o(mean k_i). The speedup is the ratio of sums over
all batches. A verification that missed corrects the next answer by the bias it found.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy.optimize import isotonic_regression

from diffprune.core.budget import Above, Budget, Keep
from diffprune.core.cell import TuneKind
from diffprune.core.records import OVERSHOOT, Choice, HeldOut, Trial
from diffprune.tune.calibration import Array, Scored

STEPS = (1.0, 1.1, 1.25, 1.5, 0.9)  # candidates aim at the target times these; the last shows what lies just out of reach
TOLERANCE = 0.02  # a verified speedup this share below its target still counts as reached
DIGITS = 6  # of a threshold, as budgets are spelled


# --- what a length costs ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Latency:
    """Prefill by sequence length, and a method's overhead by kept tokens: monotone, linear between points, flat outside.

    Flat below the shortest length is the floor; nothing is ever extrapolated below it.
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
        return Latency(*monotone(lengths, prefill_ms), *monotone(counts, overhead_ms))

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


def monotone(x: Sequence[float], y: Sequence[float]) -> tuple[Array, Array]:
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

    def __init__(self, data: Scored, latency: Latency, kind: TuneKind, least: int = 1, most: int | None = None) -> None:
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

    def trial(self, target: float, value: float, accuracy: float = math.nan) -> Trial:
        """The record of one candidate."""
        speedup = self.speedup(value)
        return Trial(float(value), float(self.kept(value).mean()), speedup, speedup >= target, accuracy)


@dataclass(frozen=True)
class Accuracy:
    """Mean credit of the calibration questions, with its 95 % interval over their pictures."""

    mean: float
    low: float = math.nan
    high: float = math.nan

    def of(self, trial: Trial) -> Trial:
        """The trial with this accuracy."""
        return replace(trial, accuracy=self.mean, accuracy_low=self.low, accuracy_high=self.high)


UNKNOWN = Accuracy(math.nan)


def best_trial(trials: Sequence[Trial]) -> Trial:
    """The most accurate among those that reach their target; of equals the one that keeps most."""
    able = [t for t in trials if t.feasible and not math.isnan(t.accuracy)]
    assert able, "a target within reach has a candidate that reaches it"
    return max(able, key=lambda t: (t.accuracy, t.kept))


def unreachable(solver: Solver) -> Choice:
    """The answer where even the fewest tokens are not fast enough: no budget, but the best there is, and why."""
    best, value, nan = solver.best, solver.values[-1], math.nan
    note = (
        f"best is {best:.2f}x at the floor of {solver.kept(value).mean():.0f} visual tokens: "
        f"{float(solver.data.text.mean()):.0f} text tokens and the method's overhead remain"
    )
    return Choice(
        verdict="unreachable", chosen_budget="", value=nan, kept=nan, predicted_speedup=nan, measured_speedup=nan,
        measured_low=nan, measured_high=nan, num_held_out=0, accuracy=nan, best_speedup=best, note=note,
    )  # fmt: skip


# --- verification ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MeasuredSpeedup:
    """A measured net speedup on held-out samples: ratio of sums, with its 95 % interval over batches.

    rows: every timing it is of; seconds: its share of the session.
    """

    speedup: float
    low: float
    high: float
    num: int
    rows: tuple[HeldOut, ...] = ()
    seconds: float = 0.0


@dataclass(frozen=True)
class Verified:
    """One tried answer to a target: the candidate with its accuracy, and what was measured."""

    target_speedup: float
    trial: Trial
    checked: MeasuredSpeedup

    @property
    def reached(self) -> bool:
        return self.checked.speedup >= self.target_speedup * (1 - TOLERANCE)

    @property
    def settled(self) -> bool:
        """Close to the target from above: nothing to correct."""
        return self.reached and self.checked.speedup <= self.target_speedup * (1 + OVERSHOOT)


def correction(solver: Solver, tried: Sequence[Verified], margin: float) -> float | None:
    """The next value to try: T multiplied by the bias the last verification found. None where there is none left to try."""
    last = tried[-1]
    bias = last.trial.predicted_speedup / last.checked.speedup
    value = solver.solve(min(last.target_speedup * (1 + margin) * bias, solver.best))
    if value is None or any(value == t.trial.value for t in tried):
        return None
    return value


def choice(solver: Solver, tried: Sequence[Verified]) -> Choice:
    """Of all verified candidates: the most accurate that measured up, else the fastest, with how much it missed by."""
    able = [t for t in tried if t.reached]
    best = max(able, key=lambda t: (t.trial.accuracy, t.trial.kept)) if able else max(tried, key=lambda t: t.checked.speedup)
    trial, found = best.trial, best.checked
    off = found.speedup / best.target_speedup - 1
    if abs(off) > TOLERANCE:
        note = f"measured {abs(off):.1%} {'above' if off > 0 else 'below'} the target"
    else:
        note = "its interval begins below the target" if found.low < best.target_speedup else ""
    return Choice(
        verdict="reached" if able else "missed", chosen_budget=str(solver.budget(trial.value)), value=trial.value,
        kept=trial.kept, predicted_speedup=trial.predicted_speedup, measured_speedup=found.speedup, measured_low=found.low,
        measured_high=found.high, num_held_out=found.num, accuracy=trial.accuracy, best_speedup=solver.best, note=note,
        accuracy_low=trial.accuracy_low, accuracy_high=trial.accuracy_high,
    )  # fmt: skip
