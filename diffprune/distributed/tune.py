"""Tuning as Ray work: one actor holds the model and everything cached; trials ask it for an accuracy and load nothing.

What is timed (the curve, overheads, the verification) runs in that actor while nothing else does; the trials of Ray Tune run
between. The driver alone writes, each trial as soon as it is found, so a run that dies repeats none of them.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from statistics import median
from typing import Any

import ray
from ray import tune as ray_tune

from diffprune.core import budget as budgets_
from diffprune.core import registry
from diffprune.core.pruner import Need, Pruner
from diffprune.core.records import TABLES, Cell, Choice, CurvePoint, Outcome, Provenance, Timing, Trial
from diffprune.distributed.cluster import connect
from diffprune.evaluate.evaluator import Evaluator
from diffprune.report.analysis import labels
from diffprune.store import Store
from diffprune.timing.clock import clocks
from diffprune.timing.machine import steady
from diffprune.tune.calibration import Scored, scored
from diffprune.tune.options import Tuning
from diffprune.tune.probes import check, grid, splits, time_curve, time_overhead
from diffprune.tune.solver import Latency, MeasuredSpeedup, Solver, Verified, best_trial, choice, correction, unreachable
from diffprune.vlm.load import load

Asked = tuple[str, str]  # (method, budget), as spelled


class Resident:
    """One process with the model, the encoded images and the scores. Ray makes it an actor; it also works without Ray."""

    def prepare(self, model: str, methods: Sequence[str], options: Tuning) -> None:
        """Load the model and encode calibration and held-out images once."""
        self.options = options
        self.evaluator = Evaluator(load(model))
        self.vlm = self.evaluator.vlm
        self.clock = clocks(self.vlm.device)[0]
        self.pruners: dict[str, Pruner] = {text: registry.load("pruners", text) for text in methods}
        needs = frozenset[Need]().union(*(p.needs for p in self.pruners.values()))
        self.calibration, self.held_out = splits(self.vlm, options, needs)

    def curve(self) -> list[CurvePoint]:
        """Prefill latency on a grid of lengths, on the calibration batch with the longest text."""
        inputs = max(self.calibration, key=lambda i: i.prompts.input_ids.shape[1])
        with steady(self.options.threads):
            return time_curve(self.vlm, inputs, grid(self.vlm.num_visual_tokens, self.options.least), self.options, self.clock)

    def scores(self, method: str) -> Scored:
        """Scores and counts of the calibration images."""
        return scored(self.vlm, self.calibration, self.pruners[method])

    def overhead(self, method: str) -> list[Timing]:
        """What a method adds before prefill, at three kept counts."""
        total, pruner = self.vlm.num_visual_tokens, self.pruners[method]
        counts = sorted({max(self.options.least, round(share * total)) for share in (0.05, 0.3, 1)})
        keeps = [budgets_.Keep(c) for c in counts]
        with steady(self.options.threads):
            return time_overhead(self.vlm, self.calibration[0], pruner, keeps, self.options.curve_repeats, self.clock)

    def accuracy(self, method: str, budget: str) -> float:
        """Mean credit of every calibration question.

        Raises:
            RuntimeError: a question could not be answered; a mean over the others would be another figure.
        """
        options, credits = self.options, list[float]()
        for text in options.benchmarks:
            benchmark = registry.load("benchmarks", text)
            asked = Cell(
                verb="evaluate", model=self.vlm.name, model_hash=self.vlm.weights_hash, pruner=method,
                pruner_hash=self.pruners[method].weights_hash, budget=budget, benchmark=benchmark.spelling,
                revision=benchmark.revision, protocol=options.protocol, split=options.split,
                limit=math.ceil(options.calibration / len(options.benchmarks)),
                seed=options.seed,
            )  # fmt: skip
            rows = self.evaluator.run(asked)
            if broken := [row.error for row in rows if row.error]:
                raise RuntimeError(f"{len(broken)} of {len(rows)} questions of {text} failed, the first with {broken[0]}")
            credits += [row.credit for row in rows]
        return sum(credits) / len(credits)

    def check(self, asked: Sequence[Asked]) -> list[MeasuredSpeedup]:
        """Measured speedups on held-out images, all of them in one interleaved session."""
        pairs = [(self.pruners[method], budgets_.parse(budget)) for method, budget in asked]
        with steady(self.options.threads):
            return check(self.vlm, self.held_out, pairs, self.options, self.clock)


@dataclass(frozen=True)
class _Candidate:
    """One trial to run. cell: of the question it belongs to; own: of the trial's own record."""

    cell: Cell
    trial: Trial
    budget: str

    @property
    def asked(self) -> Asked:
        return self.cell.pruner, self.budget

    @property
    def own(self) -> Cell:
        return replace(self.cell, budget=self.budget, mode=f"trial {self.cell.budget} {self.cell.mode}")


class _Publish(ray_tune.Callback):
    """Writes each finished trial of Ray Tune to the store, and says so."""

    def __init__(self, run: _Run, candidates: Sequence[_Candidate]) -> None:
        self.run, self.candidates = run, candidates

    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any) -> None:
        if "accuracy" in result:
            self.run.found(self.candidates[trial.config["spot"]["index"]].asked, float(result["accuracy"]))


def _trial(config: dict[str, Any], actor: Any) -> None:
    """The trainable: no model of its own, one question to the resident one."""
    spot = config["spot"]
    ray_tune.report({"accuracy": ray.get(actor.accuracy.remote(spot["method"], spot["budget"]))})


class _Run:
    """One tuning: what is known, what is asked, and where it goes."""

    def __init__(self, asked: Sequence[Cell], options: Tuning, store: Store, provenance: Provenance, actor: Any) -> None:
        self.asked, self.options, self.store, self.provenance, self.actor = asked, options, store, provenance, actor
        self.solvers: dict[tuple[str, str], Solver | None] = {}
        self.candidates: list[_Candidate] = []
        self.accuracies = self._known()

    def _known(self) -> dict[Asked, float]:
        """Accuracies an earlier run has found for these very models, methods and images."""
        table, first = self.store.read("trials"), self.asked[0]
        same = {"model_hash": first.model_hash, "benchmark": first.benchmark, "revision": first.revision, "split": first.split,
                "limit": first.limit, "protocol": first.protocol, "seed": first.seed}  # fmt: skip
        for column, value in same.items():
            table = table[table[column] == value]
        table = table[table["accuracy"].notna()]
        hashes = {cell.pruner: cell.pruner_hash for cell in self.asked}
        rows = zip(table["pruner"], table["budget"], table["pruner_hash"], table["accuracy"], strict=True)
        return {(p, b): float(a) for p, b, h, a in rows if hashes.get(p) == h}

    def go(self) -> None:
        points = self._curve()
        for method in dict.fromkeys(cell.pruner for cell in self.asked):
            self._solvers(method, points)
        for cell in self.asked:
            self._candidates(cell)
        self._trials()
        self._verify()

    def _once(self, table: str, cell: Cell, call: Callable[[], Any]) -> list[Any]:
        """What was timed for a cell, from the store where it is there: a run that goes on finds the candidates it had."""
        if cell.key in self.store.done():
            rows, record = self.store.read(table), TABLES[table]
            rows = rows[rows["cell"] == cell.key][[field.name for field in fields(record)]]
            return [record(**row) for row in rows.to_dict("records")]
        found: list[Any] = ray.get(call())
        self.store.publish({table: found, "outcomes": [_ok(len(found))]}, cell=cell, provenance=self.provenance)
        return found

    def _curve(self) -> list[CurvePoint]:
        asked = self.asked[0]
        cell = replace(asked, pruner="none", pruner_hash="", budget="curve", mode=asked.mode.partition(" ")[2])
        found: list[CurvePoint] = self._once("curve", cell, self.actor.curve.remote)
        first, last = found[0], found[-1]
        print(f"tune: prefill takes {first.prefill_ms:.2f} ms at {first.sequence} tokens, {last.prefill_ms:.2f} at {last.sequence}")
        return found

    def _solvers(self, method: str, points: Sequence[CurvePoint]) -> None:
        asked = next(cell for cell in self.asked if cell.pruner == method)
        cell = replace(asked, budget="overhead", mode=asked.mode.partition(" ")[2])
        spent: dict[float, list[float]] = {}
        for row in self._once("timings", cell, lambda: self.actor.overhead.remote(method)):
            spent.setdefault(row.visual_kept, []).append(row.value_ms)
        data = ray.get(self.actor.scores.remote(method))
        medians = [median(values) for values in spent.values()]
        latency = Latency.fit([p.sequence for p in points], [p.prefill_ms for p in points], list(spent), medians)
        for kind in self.options.kinds:
            able = kind == "count" or data.scores is not None
            self.solvers[method, kind] = Solver(data, latency, kind, self.options.least, self.options.most) if able else None

    def _solver(self, cell: Cell) -> Solver | None:
        return self.solvers[cell.pruner, cell.mode.partition(" ")[0]]

    def _candidates(self, cell: Cell) -> None:
        solver, target = self._solver(cell), _target(cell)
        if solver is None:  # a method without scores has no threshold: nothing to answer
            return self._answer(cell, None)
        values = solver.candidates(target, self.options.margin, self.options.candidates)
        if not values:
            return self._answer(cell, unreachable(solver, cell.pruner, target))
        for value in values:
            self.candidates.append(_Candidate(cell, solver.trial(cell.pruner, target, value), str(solver.budget(value))))

    def _trials(self) -> None:
        """Ray Tune over the candidates whose accuracy nobody knows yet; those that miss the target are recorded without one."""
        for candidate in self.candidates:
            if not candidate.trial.feasible or candidate.asked in self.accuracies:
                self._record(candidate)
        unknown = list({c.asked: c for c in self.candidates if c.trial.feasible and c.asked not in self.accuracies}.values())
        if not unknown:
            return
        space = [{"index": i, "method": c.cell.pruner, "budget": c.budget} for i, c in enumerate(unknown)]
        # Ctrl-C stays ours: Ray's handler ends the trials as if they were done, and then swallows one more.
        os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"
        folder = self.store.root.parent / f"ray-tune-{self.provenance.run}-{self.provenance.attempt}"
        trainable = ray_tune.with_resources(ray_tune.with_parameters(_trial, actor=self.actor), {"cpu": 0.1})
        tuner = ray_tune.Tuner(
            trainable, param_space={"spot": ray_tune.grid_search(space)},
            tune_config=ray_tune.TuneConfig(metric="accuracy", mode="max", reuse_actors=True, max_concurrent_trials=2),
            run_config=ray_tune.RunConfig(name="trials", storage_path=str(folder), callbacks=[_Publish(self, unknown)], verbose=0),
        )  # fmt: skip
        try:
            results = tuner.fit()
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        if results.errors:
            reason = (str(results.errors[0]).strip().splitlines() or [""])[-1]
            raise RuntimeError(f"{results.num_errors} of {len(unknown)} trials failed, the first with: {reason}")

    def found(self, asked: Asked, accuracy: float) -> None:
        """One accuracy: written for every question it answers."""
        self.accuracies[asked] = accuracy
        print(f"tune: {labels.method(asked[0]).label} {asked[1]} answers {accuracy:.1%} of the calibration questions", flush=True)
        for candidate in self.candidates:
            if candidate.asked == asked:
                self._record(candidate)

    def _record(self, candidate: _Candidate) -> None:
        accuracy = self.accuracies.get(candidate.asked, math.nan) if candidate.trial.feasible else math.nan
        row = replace(candidate.trial, accuracy=accuracy)
        self.store.publish({"trials": [row], "outcomes": [_ok(1)]}, cell=candidate.own, provenance=self.provenance)

    def _verify(self) -> None:
        """Measure the best candidate of every question, correct those that missed, answer."""
        tried: dict[Cell, list[Verified]] = {}
        todo: dict[Cell, Trial] = {}
        for cell in dict.fromkeys(c.cell for c in self.candidates):
            mine = [c for c in self.candidates if c.cell == cell]
            todo[cell] = best_trial([replace(c.trial, accuracy=self.accuracies.get(c.asked, math.nan)) for c in mine])
        for turn in range(self.options.corrections + 1):
            if not todo:
                break
            found = ray.get(self.actor.check.remote([(cell.pruner, self._spelled(cell, t)) for cell, t in todo.items()]))
            for (cell, trial), checked in zip(todo.items(), found, strict=True):
                tried.setdefault(cell, []).append(Verified(trial, checked))
            last = turn == self.options.corrections
            todo = {} if last else {cell: t for cell in todo if (t := self._corrected(cell, tried[cell])) is not None}
        for cell, attempts in tried.items():
            solver = self._solver(cell)
            assert solver is not None
            self._answer(cell, choice(solver, attempts, cell.pruner))

    def _spelled(self, cell: Cell, trial: Trial) -> str:
        solver = self._solver(cell)
        assert solver is not None
        return str(solver.budget(trial.value))

    def _corrected(self, cell: Cell, tried: Sequence[Verified]) -> Trial | None:
        """The next candidate of a question whose verification missed, its accuracy known."""
        solver = self._solver(cell)
        assert solver is not None
        value = None if tried[-1].settled else correction(solver, tried, self.options.margin)
        if value is None:
            return None
        asked = cell.pruner, str(solver.budget(value))
        if asked not in self.accuracies:
            self.accuracies[asked] = ray.get(self.actor.accuracy.remote(*asked))
        trial = replace(solver.trial(cell.pruner, _target(cell), value), accuracy=self.accuracies[asked])
        own = _Candidate(cell, trial, asked[1]).own
        self.store.publish({"trials": [trial], "outcomes": [_ok(1)]}, cell=own, provenance=self.provenance)
        return trial

    def _answer(self, cell: Cell, answer: Choice | None) -> None:
        rows: Mapping[str, Sequence[Any]] = {"choices": [answer]} if answer else {}
        self.store.publish({**rows, "outcomes": [_ok(len(rows))]}, cell=cell, provenance=self.provenance)
        if answer:
            told = f"{answer.budget} measures {answer.measured_speedup:.2f}x" if answer.budget else answer.note
            print(
                f"tune: {labels.method(answer.method).label}, {answer.kind}, {answer.target_speedup:g}x: {answer.verdict}, {told}",
                flush=True,
            )


def _target(cell: Cell) -> float:
    return float(cell.budget.removeprefix("target="))


def _ok(rows: int) -> Outcome:
    return Outcome("ok", "", rows, 0.0)


def tune(
    asked: Sequence[Cell],
    options: Tuning,
    store_root: Path | str,
    provenance: Provenance,
    *,
    model: str,
    address: str | None = None,
) -> list[Choice]:
    """Answer the cells of `diffprune.tune.cells` that the store has no answer to; returns the answers to all of them.

    Where nothing is missing, neither Ray nor a model is started. address: of a running cluster; None starts a local one.

    Raises:
        ValueError: no method that could be tuned, or the model cannot be loaded.
    """
    store = Store(store_root)
    done = store.done()
    todo = [cell for cell in asked if cell.key not in done]
    if not asked:
        raise ValueError("nothing to tune: name at least one method other than none")
    if todo:
        with connect(address, 2):
            gpus = 1 if ray.cluster_resources().get("GPU", 0) >= 1 else 0
            actor = ray.remote(num_cpus=1, num_gpus=gpus)(Resident).remote()
            try:
                _ready(actor, model, list(dict.fromkeys(cell.pruner for cell in todo)), options)
                _Run(todo, options, store, provenance, actor).go()
            finally:
                ray.kill(actor)
    return answers(store, asked)


def _ready(actor: Any, model: str, methods: list[str], options: Tuning) -> None:
    """Load the model in the actor; a user's mistake comes back as itself."""
    try:
        ray.get(actor.prepare.remote(model, methods, options))
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, ValueError):
            raise error.cause from None
        raise


def answers(store: Store, asked: Sequence[Cell]) -> list[Choice]:
    """The choices the store has for these cells, in their order."""
    table = store.read("choices")
    by_cell = {row["cell"]: row for row in table.to_dict("records")}
    columns = [field.name for field in fields(Choice)]
    return [Choice(**{column: by_cell[c.key][column] for column in columns}) for c in asked if c.key in by_cell]
