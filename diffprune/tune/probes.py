"""Measurements of a tuning: calibration and held-out batches, the latency curve, overheads, the verification.

Scores do not depend on the threshold, so what a threshold keeps is known without running the model (`scored`), and latency is one
monotone curve of the sequence length with a floor: the answer is arithmetic (`solver`). What remains to be run is the
accuracy of the few candidates that reach the target, and one measured verification on other images.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean

import numpy as np
import torch

from diffprune.core.benchmark import Benchmark, Sample
from diffprune.core.budget import Budget, Share
from diffprune.core.evidence import Evidence
from diffprune.core.pruner import Pruner
from diffprune.core.records import CurvePoint, HeldOut, Prediction, Timing
from diffprune.core.registry import load
from diffprune.core.vlm import VLM
from diffprune.statistics import ClusterBootstrap, ratio_of_sums, totals
from diffprune.timing import eager
from diffprune.timing.clock import Clock
from diffprune.timing.eager import Inputs
from diffprune.tune.cells import benchmarks, calibration_split
from diffprune.tune.options import Tuning
from diffprune.tune.solver import Accuracy, MeasuredSpeedup, monotone

# --- images and questions --------------------------------------------------------------------------------------------


def _cut(vlm: VLM, benchmark: Benchmark, samples: Sequence[Sample], batch: int, needs: frozenset[Evidence]) -> list[Inputs]:
    """Whole batches; one short batch where there are too few samples for any."""
    whole = [samples[i : i + batch] for i in range(0, len(samples) - batch + 1, batch)] or [samples]
    return [eager.prepare(vlm, [benchmark.image(s) for s in part], [s.question for s in part], needs) for part in whole if part]


@torch.inference_mode()
def splits(vlm: VLM, options: Tuning, needs: frozenset[Evidence]) -> tuple[list[Inputs], list[Inputs]]:
    """(calibration, held-out) batches, encoded; no image of one occurs in the other, whatever benchmark asks about it.

    Raises:
        ValueError: no image is left to hold out.
    """
    asked = [(b, calibration_split(b, options)) for b in benchmarks(options)]
    share = [math.ceil(n / len(asked)) for n in (options.calibration, options.held_out)]
    first = [b.samples(split, share[0], options.protocol) for b, split in asked]
    used = {s.image_id for samples in first for s in samples}
    more = [b.samples(split, options.calibration + options.held_out, options.protocol) for b, split in asked]
    later = [[s for s in samples if s.image_id not in used][: share[1]] for samples in more]
    if not any(later):
        splits = ", ".join(dict.fromkeys(split for _, split in asked))
        raise ValueError(f"split {splits} has no image beside the {len(used)} used for calibration: lower tune.calibration")

    def cut(group: list[list[Sample]]) -> list[Inputs]:
        return [i for (b, _), s in zip(asked, group, strict=True) for i in _cut(vlm, b, s, options.batch, needs)]

    return cut(first), cut(later)


def accuracy(rows: Sequence[Prediction]) -> Accuracy:
    """Mean credit of calibration questions, with its interval over their pictures."""
    groups = np.unique([row.group for row in rows], return_inverse=True)[1]
    credits, where = np.array([row.credit for row in rows], float), (groups, np.zeros(len(rows), int))
    count, credit = (totals(values, where, (int(groups.max()) + 1, 1)) for values in (np.ones(len(rows)), credits))
    (found,) = ClusterBootstrap(np.stack([credit, count], -1), count, ratio_of_sums(), full=1.0).estimates([[0]])
    ends = found.interval(0.0, 1.0)
    return Accuracy(sum(row.credit for row in rows) / len(rows), ends.low, ends.high)


# --- what is timed ---------------------------------------------------------------------------------------------------


def grid(total: int, least: int = 1) -> list[int]:
    """About a dozen visual counts from the floor to all of them, closer together where pruning happens."""
    shares = (0, 0.03, 0.06, 0.11, 0.17, 0.22, 0.28, 0.33, 0.42, 0.5, 0.67, 0.83, 1)
    return sorted({max(least, round(share * total)) for share in shares})


@torch.inference_mode()
def time_curve(
    vlm: VLM, inputs: Inputs, counts: Sequence[int], options: Tuning, clock: Clock
) -> tuple[list[CurvePoint], list[Timing]]:
    """Prefill of sequences that were always this short, interleaved in shuffled rounds; medians and their monotone fit, and every
    timing they are of."""
    ready = [eager.native(vlm, inputs, [min(c, int(v)) for v in inputs.tokens.counts]) for c in counts]
    order, found = list(range(len(counts))), [[] for _ in counts]  # type: list[int], list[list[float]]
    shuffled = random.Random(options.seed)
    for turn in range(-options.warmup, options.curve_repeats):
        shuffled.shuffle(order)
        for index in order:
            spent = eager.prefill(vlm, ready[index], clock).ms
            if turn >= 0:
                found[index].append(spent)
    lengths, medians = [r.sequence for r in ready], [float(np.median(f)) for f in found]
    places, fitted = monotone(lengths, medians)
    points = [
        CurvePoint(
            num_rows=len(inputs.questions), sequence=r.sequence, visual_kept=c, prefill_ms=m, p10_ms=float(np.quantile(f, 0.1)),
            p90_ms=float(np.quantile(f, 0.9)), repeats=len(f), fitted_ms=float(np.interp(r.sequence, places, fitted)),
        )
        for r, c, m, f in zip(ready, counts, medians, found, strict=True)
    ]  # fmt: skip
    return points, [
        Timing("prefill", "native", turn, value, float(r.packed.kept.float().mean()), r.sequence, "")
        for r, f in zip(ready, found, strict=True) for turn, value in enumerate(f)
    ]  # fmt: skip


def _added(vlm: VLM, inputs: Inputs, pruner: Pruner, clock: Clock, repeats: int) -> float:
    """ms a method's needs add to the encoder (median); 0 where they add nothing or cannot be told apart."""
    if not eager.from_encoder(pruner.needs):
        return 0.0
    return float(np.nan_to_num(np.median([eager.encode(vlm, inputs, pruner.needs, clock)[1] for _ in range(repeats)])))


@torch.inference_mode()
def time_overhead(vlm: VLM, inputs: Inputs, pruner: Pruner, budgets: Sequence[Budget], repeats: int, clock: Clock) -> list[Timing]:
    """What a method adds before prefill, ms, several times for each budget.

    Each run ends with its prefill, as requests do: in a loop of its own a method finds its caches warm and looks cheap.
    """
    repeats = max(3, repeats // 3)
    added = _added(vlm, inputs, pruner, clock, repeats)
    found = []
    for budget in budgets:
        for turn in range(-1, repeats):
            ready, spans = eager.shrink(vlm, inputs, pruner, budget, clock)
            inside = eager.prefill(vlm, ready, clock).overhead
            if turn >= 0:
                spent, kept = added + spans["overhead"] + inside, fmean(ready.packed.averages(vlm.shape.layers))
                found.append(Timing("overhead", "pruned", turn, spent, kept, ready.sequence, ""))
    return found


@torch.inference_mode()
def check(
    vlm: VLM, batches: Sequence[Inputs], asked: Sequence[tuple[Pruner, Budget]], options: Tuning, clock: Clock
) -> list[MeasuredSpeedup]:
    """Measure net speedups on held-out batches: real pruned runs beside unpruned ones, in shuffled order, each batch repeated.

    Every batch brings new lengths, so every arm is warmed up on each. The unpruned run is in every ratio, so that its noise would
    move all answers together: of k methods it is timed sqrt(k) times as often as each of them (Dunnett 1955).
    """
    arms: list[tuple[Pruner, Budget]] = [(load("pruners", "unpruned"), Share(1)), *asked]
    often = np.array([max(1, round(math.sqrt(len(asked)))), *[1] * len(asked)])
    order, shuffled = np.repeat(np.arange(len(arms)), often).tolist(), random.Random(options.seed)
    sums, began = np.zeros((len(batches), len(arms))), time.monotonic()
    rows: list[list[HeldOut]] = [[] for _ in arms]
    for row, inputs in enumerate(batches):
        added = {pruner.spec: _added(vlm, inputs, pruner, clock, 3) for pruner, _ in arms}
        spent = np.zeros((1 + options.repeats, len(arms)))  # the first turn warms up
        for turn in spent:
            shuffled.shuffle(order)
            for index in order:
                ready, spans = eager.shrink(vlm, inputs, *arms[index], clock)
                extra = spans["overhead"] + added[arms[index][0].spec] if index else 0.0
                done = eager.prefill(vlm, ready, clock)
                turn[index] += (done.ms + done.overhead + extra) / often[index]
        sums[row] = np.median(spent[1:], axis=0)
        for index, (_, budget) in enumerate(arms):
            rows[index] += [
                HeldOut(str(budget), row, turn, "pruned" if index else "full", float(ms), len(inputs.questions))
                for turn, ms in enumerate(spent[1:, index])
            ]
    num = sum(len(inputs.questions) for inputs in batches)
    pairs = np.stack([np.repeat(sums[:, :1], len(asked), 1), sums[:, 1:]], 2)
    batched = ClusterBootstrap(pairs, np.ones(pairs.shape[:2]), ratio_of_sums(), full=0.0)
    found = [one.interval(low=0.0) for one in batched.estimates([[i] for i in range(len(asked))])]
    each = (time.monotonic() - began) / len(asked)
    told = [[*(replace(one, tried_budget=str(budget)) for one in rows[0]), *rows[i]] for i, (_, budget) in enumerate(asked, 1)]
    return [MeasuredSpeedup(f.estimate, f.low, f.high, num, tuple(own), each) for f, own in zip(found, told, strict=True)]
