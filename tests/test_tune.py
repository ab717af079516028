"""The tuner against brute force, on latencies and scores that are known exactly."""

from __future__ import annotations

import math
import signal
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from ray.exceptions import RayActorError

from diffprune.core import registry
from diffprune.core.budget import Above, Budget, Keep, Share, parse, standardise
from diffprune.core.cell import CalibrateSpec, Cell, EvaluateSpec, TuneKind
from diffprune.core.records import CurvePoint, HeldOut, Outcome, Provenance, Timing
from diffprune.core.spec import Spec
from diffprune.distributed import tune as running
from diffprune.embedded import vlm as embedded
from diffprune.models.llava import Llava
from diffprune.pruners.random import Random
from diffprune.store import Store
from diffprune.timing import eager
from diffprune.timing.clock import Clock
from diffprune.tune import probes
from diffprune.tune.calibration import Scored, scored
from diffprune.tune.cells import cells
from diffprune.tune.options import Tuning
from diffprune.tune.search import Answers, Candidate, Search, answers
from diffprune.tune.solver import (
    Accuracy,
    Latency,
    MeasuredSpeedup,
    Solver,
    Verified,
    best_trial,
    choice,
    correction,
    monotone,
    unreachable,
)
from diffprune.vlm.load import load
from tests.records import GQA, curve_point, evaluate_cell, prediction, provenance, timing, tune_cell

TOTAL = 40


def data(seed: int = 0, samples: int = 24, batch: int = 4, ties: bool = False) -> Scored:
    """Random scores, standardised as inference standardises them; texts of 5 to 9 tokens."""
    rng = np.random.default_rng(seed)
    raw = rng.normal(size=(samples, TOTAL)) ** 3
    raw = np.round(raw) if ties else raw
    z = ((raw - raw.mean(1, keepdims=True)) / raw.std(1, keepdims=True)).astype(np.float32)
    text = rng.integers(5, 10, samples)
    return Scored(np.full(samples, TOTAL), text, np.arange(0, samples, batch), tuple(np.sort(row) for row in z))


def synthetic(floor: float, a: float, b: float, overhead: float = 0.5) -> Latency:
    """T(n) = max(floor, a + b n), known at every length."""
    lengths = np.arange(1, TOTAL + 20)
    return Latency.fit(lengths, np.maximum(floor, a + b * lengths), [1, TOTAL], [overhead, overhead])


def brute(solver: Solver, target: float) -> list[float]:
    """Every threshold or count that reaches the target, the one that keeps most first; slow and obvious."""
    found = []
    for value in solver.values:
        full = pruned = 0.0
        ends = [*solver.data.starts[1:], len(solver.data.visual)]
        for start, end in zip(solver.data.starts, ends, strict=True):
            rows = range(start, end)
            kept = [_kept(solver, i, value) for i in rows]
            longest = max(k + solver.data.text[i] for k, i in zip(kept, rows, strict=True))
            unpruned = max(solver.data.visual[i] + solver.data.text[i] for i in rows)
            full += float(solver.latency.prefill(np.array(unpruned)))
            pruned += float(solver.latency.prefill(np.array(longest)) + solver.latency.overhead(np.array(np.mean(kept))))
        if full / pruned >= target:
            found.append((-sum(_kept(solver, i, value) for i in range(len(solver.data.visual))), value))
    return [value for _, value in sorted(found)]


def _kept(solver: Solver, sample: int, value: float) -> int:
    if solver.kind == "count":
        return min(int(value), TOTAL)
    assert solver.data.scores is not None
    over = sum(1 for score in solver.data.scores[sample] if score > np.float32(value))
    return min(max(over, solver.least), solver.most or TOTAL)


# --- solving ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["threshold", "count"])
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("target", [0.9, 1.2, 1.5, 2.0])
def test_solution_equals_brute_force(kind: TuneKind, ties: bool, target: float) -> None:
    latency = replace(synthetic(floor=4, a=1, b=0.25), overhead_ms=np.array([0.5, 2.5]))  # the more tokens are kept, the more
    solver = Solver(data(ties=ties), latency, kind)
    best = brute(solver, target)[0]
    found = solver.solve(target)
    assert found is not None and solver.kept(found).sum() == solver.kept(best).sum()
    assert solver.speedup(found) >= target


def test_counts_are_those_of_inference() -> None:
    """The cached arithmetic and the budget's own choice agree on every image, ties and exact hits included."""
    torch.manual_seed(0)
    raw = torch.randn(24, TOTAL).mul(2).round()
    valid = torch.ones_like(raw, dtype=torch.bool)
    z = standardise(raw, valid).numpy()
    cached = Scored(np.full(24, TOTAL), np.zeros(24, int), np.array([0]), tuple(np.sort(row) for row in z))
    exact = float(z[3, 7])
    for budget in (Above(0.3), Above(exact), Above(1.5, least=4), Above(-1.0, most=9), Keep(7), Share(0.3)):
        assert cached.kept(budget).tolist() == budget.pick(raw, valid).sum(1).tolist(), budget


def test_a_target_beyond_the_floor_is_unreachable_and_says_what_is_best() -> None:
    solver = Solver(data(), synthetic(floor=6, a=1, b=0.25), "threshold")
    assert not brute(solver, 3.0) and solver.solve(3.0) is None and solver.candidates(3.0, 0.02, 2) == []
    answer = unreachable(solver)
    assert (answer.verdict, answer.chosen_budget) == ("unreachable", "") and answer.best_speedup == pytest.approx(solver.best)
    assert f"{solver.best:.2f}x" in answer.note and math.isnan(answer.measured_speedup)
    assert "at the floor of 3 visual tokens" in unreachable(Solver(data(), solver.latency, "threshold", least=3)).note


def test_a_target_within_the_margin_of_the_floor_is_still_met() -> None:
    solver = Solver(data(), synthetic(floor=6, a=1, b=0.25), "count")
    target = solver.best * 0.99
    values = solver.candidates(target, 0.05, 2)
    assert values and all(solver.speedup(v) >= target for v in values[:1])


@pytest.mark.parametrize("least", [1, 3, 12])
def test_no_image_keeps_fewer_than_the_floor(least: int) -> None:
    for kind in ("threshold", "count"):
        solver = Solver(data(), synthetic(floor=0, a=1, b=0.25), kind, least=least)
        assert all(solver.kept(v).min() >= least for v in solver.values)
        assert solver.kept(solver.values[-1]).max() == least
        assert (solver.kept(solver.values[0]) == solver.data.visual).all(), "the first value takes nothing away"
    solver = Solver(data(), synthetic(floor=0, a=1, b=0.25), "threshold", least=least, most=20)
    assert all(solver.kept(v).max() <= 20 for v in solver.values)


def test_a_budget_runs_as_it_is_spelled() -> None:
    solver = Solver(data(), synthetic(floor=0, a=1, b=0.25), "threshold", least=2)
    for value in solver.values[::50]:
        assert parse(str(solver.budget(value))) == solver.budget(value)


def test_candidates_start_with_the_solution_and_end_just_out_of_reach() -> None:
    solver = Solver(data(), synthetic(floor=0, a=1, b=0.25), "count")
    trials = [solver.trial(2.0, v) for v in solver.candidates(2.0, 0.02, 3)]
    assert [t.feasible for t in trials] == [True, True, True, False]
    assert trials[0].value == solver.solve(2.04) and trials[0].kept > trials[1].kept > trials[2].kept


def test_the_best_trial_is_accurate_then_gentle() -> None:
    solver = Solver(data(), synthetic(floor=0, a=1, b=0.25), "count")
    low, high = (solver.trial(2.0, v, accuracy=0.8) for v in (5, 9))
    assert best_trial([low, high]) == high
    assert best_trial([low, high, solver.trial(2.0, 7, accuracy=0.9)]).value == 7
    slow = solver.trial(2.0, TOTAL, accuracy=1.0)
    assert not slow.feasible and best_trial([low, slow]) == low


# --- the curve -------------------------------------------------------------------------------------------------------


def test_the_fit_is_monotone_and_flat_below_its_grid() -> None:
    latency = Latency.fit([10, 30, 20, 40], [5, 6, 7, 9], [1, 10], [0.4, 0.2])
    assert list(latency.prefill(np.array([10, 20, 30, 40]))) == [5, 6.5, 6.5, 9]
    assert float(latency.prefill(np.array(2))) == 5 and float(latency.prefill(np.array(35))) == pytest.approx(7.75)
    assert float(latency.overhead(np.array(5))) == pytest.approx(0.3), "overhead never falls with more tokens"


def test_the_fit_is_the_nearest_monotone_one_of_all_points() -> None:
    """Oracle: of the means of all stretches that end at or after a place and begin at or before it, the largest of the smallest."""
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 6, 30), rng.normal(size=30)  # several values at each length, as of images of unlike size
    places, fitted = monotone(list(x), list(y))
    assert places.tolist() == sorted(set(x))

    def mean(first: int, last: int) -> float:
        return float(y[(x >= first) & (x <= last)].mean())

    expected = [max(min(mean(a, b) for b in places if b >= at) for a in places if a <= at) for at in places]
    assert fitted == pytest.approx(expected)


def test_the_grid_ends_at_floor_and_full_length() -> None:
    assert probes.grid(144, 4)[0] == 4 and probes.grid(144)[-1] == 144 and 10 <= len(probes.grid(144)) <= 14


# --- verification ----------------------------------------------------------------------------------------------------


def test_a_machine_slower_than_predicted_is_corrected_for() -> None:
    """Measured speedups are 10 % below prediction: one correction lands within 2 % of the target."""
    solver = Solver(data(samples=64), synthetic(floor=0, a=1, b=0.25), "threshold")
    tried: list[Verified] = []
    value = solver.solve(2.0 * 1.02)
    while value is not None and len(tried) < 4:
        trial = solver.trial(2.0, value, accuracy=0.5)
        measured = trial.predicted_speedup * 0.9
        tried.append(Verified(2.0, trial, MeasuredSpeedup(measured, measured - 0.1, measured + 0.1, 200)))
        value = None if tried[-1].settled else correction(solver, tried, 0.02)
    assert len(tried) == 2 and not tried[0].reached and tried[1].settled
    answer = choice(solver, tried)
    assert answer.verdict == "reached" and answer.measured_speedup == pytest.approx(2.0, rel=0.04) and answer.num_held_out == 200


def test_of_answers_that_measured_up_the_most_accurate_is_chosen_and_none_is_tried_twice() -> None:
    solver = Solver(data(), synthetic(floor=0, a=1, b=0.25), "count")
    fast, good, slow = (
        Verified(2.0, solver.trial(2.0, kept, accuracy), MeasuredSpeedup(speedup, speedup - 0.1, speedup + 0.1, 200))
        for kept, accuracy, speedup in ((6, 0.5, 2.4), (9, 0.7, 2.1), (20, 0.9, 1.7))
    )
    assert choice(solver, [fast, good, slow]).chosen_budget == "Keep(9)" and choice(solver, [slow, fast]).chosen_budget == "Keep(6)"
    first, second = good.trial.predicted_speedup, solver.trial(2.0, 3).predicted_speedup
    for again, value in ((first, None), (second, 3.0)):  # as fast as predicted: the bias is none
        last = replace(good, target_speedup=again, checked=replace(good.checked, speedup=first))
        assert correction(solver, [fast, last], 0.0) == value


def test_a_miss_says_by_how_much() -> None:
    solver = Solver(data(), synthetic(floor=0, a=1, b=0.25), "count")
    tried = [Verified(2.0, solver.trial(2.0, 8, 0.5), MeasuredSpeedup(1.8, 1.7, 1.9, 200))]
    answer = choice(solver, tried)
    assert answer.verdict == "missed" and answer.note == "measured 10.0% below the target" and answer.chosen_budget == "Keep(8)"
    for low, note in ((1.95, "its interval begins below the target"), (2.0, "")):
        tried = [Verified(2.0, solver.trial(2.0, 8, 0.5), MeasuredSpeedup(2.01, low, 2.1, 200))]
        assert (choice(solver, tried).verdict, choice(solver, tried).note) == ("reached", note)
    slow, slower = (
        Verified(2.0, solver.trial(2.0, kept, 0.5), MeasuredSpeedup(speed, 1.0, 2.0, 200)) for kept, speed in ((8, 1.8), (9, 1.7))
    )
    assert {choice(solver, tried).chosen_budget for tried in ([slow, slower], [slower, slow])} == {"Keep(8)"}, "the fastest"
    near = [Verified(2.0, solver.trial(2.0, 8, 0.5), MeasuredSpeedup(speedup, 1.9, 2.1, 200)) for speedup in (1.95, 1.961)]
    assert [one.reached for one in near] == [False, True], "2 % are let pass"


# --- options ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", [0.0, -1.0, math.nan, math.inf])
def test_impossible_targets_are_refused(target: float) -> None:
    with pytest.raises(ValueError, match="above 0"):
        Tuning(targets=(target,))


@pytest.mark.parametrize(
    "wrong", [{"margin": -0.1}, {"margin": math.nan}, {"least": 0}, {"least": 5, "most": 4}, {"targets": ()}, {"speedups": (2,)}]
)
def test_other_mistakes_are_refused(wrong: dict) -> None:  # type: ignore[type-arg]
    with pytest.raises(ValueError):
        Tuning(**wrong)


# --- on the real path ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny() -> Llava:
    return Llava(embedded.build(0), embedded.processor(), "tiny")


@pytest.fixture(scope="module")
def batches(tiny: Llava) -> list:  # type: ignore[type-arg]
    options = Tuning(benchmarks=("world('gqa')", "world('pope')"), calibration=8, held_out=8, batch=2)
    needs = registry.load("pruners", "attention").needs
    calibration, held_out = probes.splits(tiny, options, needs)
    pictures = [{im.tobytes() for inputs in group for im in inputs.images} for group in (calibration, held_out)]
    assert pictures[0] and pictures[1] and not pictures[0] & pictures[1], "held-out images are no calibration images"
    return calibration


def test_cached_scores_predict_what_inference_keeps(tiny: Llava, batches: list) -> None:  # type: ignore[type-arg]
    pruner = registry.load("pruners", "attention")
    found = scored(tiny, batches, pruner)
    assert found.scores is not None
    solver = Solver(found, synthetic(floor=0, a=1, b=0.25), "threshold", least=3)
    for value in solver.values[:: len(solver.values) // 5]:
        with torch.inference_mode():
            ready = [eager.shrink(tiny, inputs, pruner, solver.budget(value), Clock())[0] for inputs in batches]
        assert solver.kept(value).tolist() == torch.cat([r.packed.kept for r in ready]).tolist()
        assert found.longest(solver.kept(value)).tolist() == [r.sequence for r in ready]


@pytest.mark.parametrize("method", ["random", "grid", "unpruned"])
def test_methods_without_scores_are_tuned_by_count_alone(tiny: Llava, batches: list, method: str) -> None:  # type: ignore[type-arg]
    with torch.inference_mode():
        named = [replace(i, tokens=tiny.encode(i.pixels, Random.needs)) for i in batches[:1]]
        assert scored(tiny, named, registry.load("pruners", method)).scores is None


def test_timing_the_curve_and_the_check_on_the_path(tiny: Llava, batches: list) -> None:  # type: ignore[type-arg]
    options = Tuning(curve_repeats=3, warmup=1, repeats=1, batch=2)
    points, spent = probes.time_curve(tiny, batches[0], [4, 72, 144], options, Clock())
    assert [np.median([t.value_ms for t in spent if t.sequence == p.sequence]) for p in points] == [p.prefill_ms for p in points]
    assert [p.visual_kept for p in points] == [4, 72, 144] and points[0].sequence == points[2].sequence - 140
    assert points[0].fitted_ms <= points[1].fitted_ms <= points[2].fitted_ms and all(p.repeats == 3 for p in points)
    attention = registry.load("pruners", "attention")
    overhead = probes.time_overhead(tiny, batches[0], attention, [Keep(4), Keep(72)], 3, Clock())
    assert [row.visual_kept for row in overhead] == [4] * 3 + [72] * 3 and all(row.value_ms > 0 for row in overhead)
    found = probes.check(tiny, batches, [(attention, Keep(4)), (attention, Keep(144))], options, Clock())
    assert found[0].speedup > found[1].speedup and found[0].num == sum(len(b.questions) for b in batches)
    assert all(f.low <= f.speedup <= f.high for f in found)
    assert [{row.tried_budget for row in f.rows} for f in found] == [{"Keep(4)"}, {"Keep(144)"}]
    assert found[0].seconds == found[1].seconds > 0


def test_the_unpruned_run_is_timed_more_often_and_counts_once(
    tiny: Llava,
    batches: list,  # type: ignore[type-arg]
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Known times: every ratio is exact, whatever the order and however often the run they share is timed."""

    def prefill(vlm: Llava, ready: str, clock: Clock) -> probes.eager.Pass:
        runs.append(ready)
        return probes.eager.Pass(times[ready], None)

    runs: list[str] = []
    times = {"Share(1)": 100.0, "Keep(1)": 9.0, "Keep(2)": 19.0, "Keep(3)": 24.0, "Keep(4)": 49.0}
    monkeypatch.setattr(probes.eager, "shrink", lambda vlm, inputs, pruner, budget, clock: (str(budget), {"overhead": 1.0}))
    monkeypatch.setattr(probes.eager, "prefill", prefill)
    grid, options = registry.load("pruners", "grid"), Tuning(repeats=3, batch=2)
    found = probes.check(tiny, batches, [(grid, Keep(n)) for n in (1, 2, 3, 4)], options, Clock())
    assert [f.speedup for f in found] == pytest.approx([10.0, 5.0, 4.0, 2.0])
    told = [{(row.arm, row.spent_ms) for row in f.rows} for f in found]
    assert told == [{("full", 100.0), ("pruned", ms)} for ms in (10.0, 20.0, 25.0, 50.0)]
    turns = len(batches) * (1 + options.repeats)
    assert {name: runs.count(name) for name in times} == {**dict.fromkeys(times, turns), "Share(1)": 2 * turns}


def test_one_cell_per_method_kind_and_target(tiny: Llava) -> None:
    options, names = Tuning(targets=(2.0, 3.0)), [Spec(name) for name in ("unpruned", "attention", "grid")]
    asked = cells(tiny, names, options)
    assert len(asked) == 2 * 2 * 2 == len({c.key for c in asked}) and {c.verb for c in asked} == {"tune"}
    told = {(c.method.label, c.columns().tuned_kind, c.columns().target_speedup) for c in asked}
    assert told == {(m, k, t) for m in ("Attention", "Grid") for k in ("threshold", "count") for t in (2.0, 3.0)}
    other = cells(tiny, names, options.model_copy(update={"held_out": 100}))
    assert not {c.key for c in other} & {c.key for c in asked}, "every option that changes the answer changes the key"
    with pytest.raises(ValueError, match="144"):
        cells(tiny, names, Tuning(least=145))


# --- the search, without a model --------------------------------------------------------------------------------------


class Known:
    """A process with a model whose times and accuracies are exact: prefill 1 + n / 4 ms, overhead 0.5 ms, 10 % too optimistic."""

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()

    def curve(self) -> tuple[list[CurvePoint], list[Timing]]:
        self.calls["curve"] += 1
        lengths = range(1, TOTAL + 12)
        return [curve_point(n, 1 + n / 4, sequence=n) for n in lengths], [
            timing(1 + n / 4, arm="native", sequence=n) for n in lengths
        ]

    def overhead(self, pruner: Spec) -> list[Timing]:
        self.calls["overhead"] += 1
        return [timing(0.5, span="overhead", arm="pruned", visual_kept=float(kept)) for kept in (1, TOTAL)]

    def scores(self, pruner: Spec) -> Scored:
        return data() if pruner.name == "attention" else replace(data(), scores=None)

    def accuracy(self, pruner: Spec, budget: Budget) -> Accuracy:
        self.calls["accuracy"] += 1
        mean = float(data().kept(budget).mean()) / TOTAL
        return Accuracy(mean, mean - 0.1, mean + 0.1)

    def answers(self, pruner: Spec, budget: Budget) -> list[Answers]:
        kept = data().kept(budget)
        cell = evaluate_cell(pruner, str(budget), split="calibration")
        assert isinstance(cell.subject, EvaluateSpec)
        cell = replace(cell, subject=CalibrateSpec(cell.subject.pruner, budget, cell.subject.questions))
        return [Answers(cell, [prediction(i, float(k) / TOTAL, visual_kept=int(k)) for i, k in enumerate(kept)], 0.5)]

    def check(self, asked: Sequence[Candidate]) -> list[MeasuredSpeedup]:
        latency = synthetic(floor=0, a=1, b=0.25)
        found = [0.9 * latency.speedup(data(), data().kept(budget)) for _, budget in asked]
        rows = [
            tuple(HeldOut(str(budget), 0, 0, arm, ms, 200) for arm, ms in (("full", speed), ("pruned", 1.0)))
            for (_, budget), speed in zip(asked, found, strict=True)
        ]
        return [MeasuredSpeedup(s, s - 0.1, s + 0.1, 200, own, 2.0) for s, own in zip(found, rows, strict=True)]

    def trials(self, candidates: Sequence[Candidate], found: Callable[[Candidate, Accuracy], None]) -> None:
        for candidate in candidates:
            found(candidate, self.accuracy(*candidate))


class Interrupted(Known):
    """Is stopped after its first accuracy."""

    def accuracy(self, pruner: Spec, budget: Budget) -> Accuracy:
        if self.calls["accuracy"]:
            raise KeyboardInterrupt
        return super().accuracy(pruner, budget)


TARGETS = [
    tune_cell(method, kind, target) for method, kind in (("attention", "threshold"), ("attention", "count"), ("grid", "count"))
    for target in (1.5, 2.0, 90.0)
]  # fmt: skip


def searched(store: Store, probes: Known, asked: Sequence[Cell] = TARGETS) -> list[Any]:
    todo = [cell for cell in asked if cell.key not in store.done()]
    Search(todo, Tuning(least=1), store, provenance(), probes, probes.trials).go()
    return answers(store, asked)


def test_targets_are_met_after_one_correction_or_called_unreachable(tmp_path: Path) -> None:
    store = Store(tmp_path)
    found = dict(zip(TARGETS, searched(store, Known()), strict=True))
    for cell, answer in found.items():
        target = cell.columns().target_speedup
        assert target and answer.verdict == ("unreachable" if target == 90 else "reached")
        if target < 90:
            assert target * 0.98 <= answer.measured_speedup < 1.15 * target and parse(answer.chosen_budget)
    columns = store.read("choices")[["method", "tuned_kind", "target_speedup"]]
    assert sorted(columns.itertuples(index=False, name=None)) == sorted(
        (c.method, c.tuned_kind, c.target_speedup) for c in (cell.columns() for cell in TARGETS)
    )
    trials = store.read("trials")
    assert trials["accuracy"].notna().equals(trials["feasible"]) and set(trials["tuned_kind"]) == {"threshold", "count"}
    assert all(parse(text) for text in trials["budget"])


def test_what_a_tuning_rests_on_is_in_the_store(tmp_path: Path) -> None:
    """Accuracy, kept tokens, predicted and measured speedup of every answer, computed anew from the rows."""
    store = Store(tmp_path)
    searched(store, Known())
    trials, scores, lengths = store.read("trials"), store.read("scores"), store.read("calibration")
    answered = store.read("predictions").groupby(["pruner", "budget"])["credit"].mean()
    for row in trials[trials["accuracy"].notna()].to_dict("records"):
        assert answered[row["pruner"], row["budget"]] == pytest.approx(row["accuracy"])
    for row in trials[trials["tuned_kind"] == "threshold"].to_dict("records"):
        mine = scores[scores["pruner"] == row["pruner"]]
        over = mine[mine["score"] > np.float32(row["value"])].groupby("picture").size().reindex(range(24), fill_value=0)
        assert over.clip(lower=1).mean() == pytest.approx(row["kept"])
    assert lengths.groupby("pruner").size().eq(24).all() and set(lengths["batch_index"]) == set(range(6))
    held = store.read("held_out").groupby(["cell", "tried_budget", "arm"])["spent_ms"].sum().unstack()
    for row in store.read("choices").dropna(subset="measured_speedup").to_dict("records"):
        one = held.loc[row["cell"], row["chosen_budget"]]
        assert one["full"] / one["pruned"] == pytest.approx(row["measured_speedup"])
    seconds = store.read("outcomes").groupby("verb")["seconds"].sum()
    assert seconds["calibrate"] == 0.5 * len(answered) and seconds["tune"] % 2 == 0 and seconds["tune"] > 0


def test_a_tuning_that_was_interrupted_repeats_nothing(tmp_path: Path) -> None:
    whole, cut = Store(tmp_path / "whole"), Store(tmp_path / "cut")
    first, stopped, resumed = Known(), Interrupted(), Known()
    expected = searched(whole, first)
    with pytest.raises(KeyboardInterrupt):
        searched(cut, stopped)
    kept = cut.read("trials")
    assert kept["accuracy"].notna().any(), "what was found before is kept"
    assert [repr(answer) for answer in searched(cut, resumed)] == [repr(answer) for answer in expected]
    assert (resumed.calls["curve"], resumed.calls["overhead"]) == (0, 0) and set(kept["cell"]) <= set(cut.read("trials")["cell"])
    assert stopped.calls["accuracy"] + resumed.calls["accuracy"] == first.calls["accuracy"]


class Changed(Known):
    """The same questions under another grader, by which every answer earns half."""

    def accuracy(self, pruner: Spec, budget: Budget) -> Accuracy:
        found = super().accuracy(pruner, budget)
        return Accuracy(found.mean / 2, found.low / 2, found.high / 2)


@pytest.mark.parametrize("changed", ["grader", "dtype"])
def test_accuracies_of_other_code_are_not_taken_for_those_of_now(changed: str, tmp_path: Path) -> None:
    """A changed grader or dtype makes other cells, whose candidates are asked anew."""
    store, (before,) = Store(tmp_path), [tune_cell(target=2.0)]
    now = tune_cell(target=2.0, graders=("f" * 12,)) if changed == "grader" else replace(before, dtype="bfloat16")
    (old,), (new,) = searched(store, Known(), [before]), searched(store, Changed(), [now])
    assert old.chosen_budget == new.chosen_budget and new.accuracy == pytest.approx(old.accuracy / 2)


def test_a_method_without_scores_has_no_threshold_and_no_answer(tmp_path: Path) -> None:
    asked = [tune_cell("grid", "threshold")]
    assert searched(Store(tmp_path), Known(), asked) == [] and asked[0].key in Store(tmp_path).done()


# --- with Ray --------------------------------------------------------------------------------------------------------


class Fragile:
    """A search that answers one cell, if any is to be answered before it ends, and whose process dies then."""

    def __init__(self, todo: Sequence[Cell], options: Tuning, store: Store, made: Provenance, *rest: Any) -> None:
        self.todo, self.store, self.made, self.failed = todo, store, made, dict[Cell, str]()

    def go(self) -> None:
        if self.todo and self.made.run != "stuck":
            self.store.publish({"outcomes": [Outcome("ok", "", 0, 0.0)]}, cell=self.todo[0], provenance=self.made)
        if self.todo:
            raise RayActorError


def test_only_deaths_in_a_row_end_a_tuning(tiny: Llava, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that finds something before it dies may die as often as it likes."""
    started: list[int] = []
    actors = SimpleNamespace(remote=lambda **_: lambda _: SimpleNamespace(remote=lambda: started.append(1)), kill=lambda _: None)
    for name, value in {"ray": actors, "Search": Fragile, "_ready": lambda *_: None}.items():
        monkeypatch.setattr(running, name, value)
    monkeypatch.setattr(running.resources, "awaited", lambda *_: None)
    asked = cells(tiny, [Spec("attention")], Tuning(targets=(1.2, 1.3, 1.4), batch=1, calibration=1, held_out=1))
    assert len(asked) > running.TRIES
    running._searched(asked, Tuning(), Store(tmp_path / "store"), provenance(), Spec("embedded"), 0.0)
    assert len(started) == len(asked) + 1
    with pytest.raises(RuntimeError, match="died 3 times in a row"):
        running._searched(asked, Tuning(), Store(tmp_path / "other"), provenance(run="stuck"), Spec("embedded"), 0.0)


@pytest.mark.slow
def test_trials_share_one_model_and_ctrl_c_stays_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Accuracies are written as they come, through Ctrl-C; asked again, nothing runs: not even Ray starts."""
    options = Tuning(
        targets=(1.5,), benchmarks=(GQA,), calibration=8, held_out=8, batch=4, candidates=1, curve_repeats=3, warmup=1,
        repeats=1, corrections=0, threads=1,
    )  # fmt: skip
    asked = cells(load("embedded"), [Spec("attention"), Spec("grid")], options)
    given: Any = (asked, options, tmp_path / "store", provenance())
    found = Search._found

    def interrupted(search: Search, candidate: Candidate, accuracy: Accuracy) -> None:
        found(search, candidate, accuracy)
        signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Search, "_found", interrupted)
        running.tune(*given, model=Spec("embedded"))
    assert Store(tmp_path / "store").read("trials")["accuracy"].notna().any()

    first = running.tune(*given, model=Spec("embedded"))
    assert all(line.startswith("tune: ") for line in capsys.readouterr().out.splitlines() if line), "Ray has a heading of its own"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert len(first) == 3 and all(c.measured_speedup > 0 and 0 <= c.accuracy <= 1 and c.num_held_out == 8 for c in first)
    assert not list(tmp_path.glob("*ray-tune*"))
    monkeypatch.setattr(running, "connect", None)
    assert [repr(c) for c in running.tune(*given, model=Spec("embedded"))] == [repr(c) for c in first]
