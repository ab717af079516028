"""The search of a tuning: candidates from the solver, their accuracies, the verification and its corrections.

It knows neither Ray nor the model: `Probes` is a process that holds the model, `trials` runs the candidates whose accuracy nobody
knows yet. Every answer is published as soon as it is found, so a run that dies repeats none of them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from statistics import median
from typing import Any, Protocol

from diffprune.core.budget import Budget, parse
from diffprune.core.cell import Cell, CurveSpec, OverheadSpec, TrialSpec, TuneKind, TuneSpec
from diffprune.core.records import TABLES, Choice, CurvePoint, HeldOut, Outcome, Prediction, Provenance, Timing, Trial, told_verdict
from diffprune.core.spec import Spec
from diffprune.store import Store
from diffprune.tune.calibration import Scored
from diffprune.tune.options import Tuning
from diffprune.tune.solver import (
    UNKNOWN,
    Accuracy,
    Latency,
    MeasuredSpeedup,
    Solver,
    Verified,
    best_trial,
    choice,
    correction,
    unreachable,
)

Candidate = tuple[Spec, Budget]  # whose accuracy on the calibration questions is asked
Trials = Callable[[Sequence[Candidate], Callable[[Candidate, Accuracy], None]], None]  # runs candidates, tells each accuracy


@dataclass(frozen=True)
class Answers:
    """Answers to the calibration questions of one benchmark, and how long they took."""

    cell: Cell
    rows: list[Prediction]
    seconds: float


class Failed(RuntimeError):
    """A probe could not be run; the process that was asked lives. The text is the reason in one line."""


class Probes(Protocol):
    """A process with the model, the encoded images and the scores. Whatever a method raises comes as `Failed`."""

    def curve(self) -> tuple[list[CurvePoint], list[Timing]]:
        """Prefill latency on a grid of lengths, and the timings it is of."""

    def overhead(self, pruner: Spec) -> list[Timing]:
        """What a method adds before prefill, at a few kept counts."""

    def scores(self, pruner: Spec) -> Scored:
        """Scores and counts of the calibration images."""

    def accuracy(self, pruner: Spec, budget: Budget) -> Accuracy:
        """Mean credit of the calibration questions."""

    def answers(self, pruner: Spec, budget: Budget) -> list[Answers]:
        """The answers that an accuracy is of, one entry for each benchmark; given once."""

    def check(self, asked: Sequence[Candidate]) -> list[MeasuredSpeedup]:
        """Measured speedups on held-out images, all of them in one interleaved session."""


@dataclass(frozen=True)
class _Trial:
    """One candidate for one question. cell: of the question it belongs to."""

    cell: Cell
    record: Trial
    budget: Budget

    @property
    def candidate(self) -> Candidate:
        return tuned(self.cell).pruner, self.budget

    @property
    def own(self) -> Cell:
        """Of the trial's own record."""
        return replace(self.cell, subject=TrialSpec(tuned(self.cell), self.budget))


def tuned(cell: Cell) -> TuneSpec:
    """What a cell to tune asks. Raises ValueError: it asks for something else."""
    if not isinstance(cell.subject, TuneSpec):
        raise ValueError(f"a cell to {cell.verb} was given where budgets are tuned")
    return cell.subject


class Search:
    """Cells that share model, questions and options, answered together."""

    def __init__(
        self, asked: Sequence[Cell], options: Tuning, store: Store, provenance: Provenance, probes: Probes, trials: Trials
    ) -> None:
        self.asked, self.options, self.store, self.provenance = asked, options, store, provenance
        self.probes, self.run_trials = probes, trials
        self.solvers: dict[tuple[Spec, TuneKind], Solver | None] = {}
        self.trials: list[_Trial] = []
        self.failed: dict[Cell, str] = {}
        self.labels = {tuned(cell).pruner: cell.method.label for cell in asked}
        self.accuracies = self._known()

    def _known(self) -> dict[Candidate, Accuracy]:
        """Accuracies an earlier run has found for these very models, methods and questions, by the code and graders of now."""
        table, first = self.store.read("trials"), self.asked[0].columns()
        for name in ("model_sha256", "dtype", "benchmark", "revision", "split", "limit", "protocol"):
            table = table[table[name] == getattr(first, name)]
        table = table[table["accuracy"].notna()]
        mine = {(c.pruner, c.weights_sha256, c.code): tuned(cell).pruner for cell in self.asked for c in [cell.columns()]}
        columns = ["pruner", "weights_sha256", "code", "budget", "accuracy", "accuracy_low", "accuracy_high"]
        rows = table[columns].itertuples(False, None)
        return {(mine[p, w, c], parse(budget)): Accuracy(*map(float, ends)) for p, w, c, budget, *ends in rows if (p, w, c) in mine}

    def go(self) -> None:
        """Answer every cell; those of a method that cannot be tuned are outcomes with the reason (`failed`), and the rest goes on.

        Raises:
            Failed: prefill could not be timed, on which every answer rests.
        """
        points = self._curve()
        for pruner in self.labels:
            try:
                self._solvers(pruner, points)
            except Failed as error:
                self._give_up([cell for cell in self.asked if tuned(cell).pruner == pruner], str(error))
        for cell in self.asked:
            if cell not in self.failed:
                self._propose(cell)
        self._run_trials()
        self._verify()

    def _give_up(self, cells: Sequence[Cell], reason: str) -> None:
        for cell in cells:
            self.failed[cell] = reason
            self.store.publish({"outcomes": [Outcome("failed", reason, 0, 0.0)]}, cell=cell, provenance=self.provenance)
        print(f"tune: {cells[0].method.label} cannot be tuned: {reason}", flush=True)

    def _once(self, table: str, cell: Cell, call: Callable[[], Mapping[str, list[Any]]]) -> list[Any]:
        """What was timed for a cell, from the store where it is there: a run that goes on finds the candidates it had.

        call: gives rows by table, those of `table` and what they rest on.
        """
        if cell.key in self.store.done():
            rows, record = self.store.read(table), TABLES[table]
            rows = rows[rows["cell"] == cell.key][[field.name for field in fields(record)]]
            return [record(**row) for row in rows.to_dict("records")]
        began = time.monotonic()
        found = call()
        self._publish(cell, found, time.monotonic() - began)
        return found[table]

    def _publish(self, cell: Cell, rows: Mapping[str, Sequence[Any]], seconds: float = 0.0) -> None:
        outcome = Outcome("ok", "", sum(map(len, rows.values())), seconds)
        self.store.publish({**rows, "outcomes": [outcome]}, cell=cell, provenance=self.provenance)

    def _curve(self) -> list[CurvePoint]:
        first = self.asked[0]
        cell = Cell(first.model, first.dtype, CurveSpec(tuned(first).settings), benchmark_label=first.benchmark_label)
        found: list[CurvePoint] = self._once(
            "curve", cell, lambda: dict(zip(("curve", "timings"), self.probes.curve(), strict=True))
        )
        low, high = found[0], found[-1]
        print(f"tune: prefill takes {low.prefill_ms:.2f} ms at {low.sequence} tokens, {high.prefill_ms:.2f} at {high.sequence}")
        return found

    def _solvers(self, pruner: Spec, points: Sequence[CurvePoint]) -> None:
        asked = next(cell for cell in self.asked if tuned(cell).pruner == pruner)
        cell = replace(asked, subject=OverheadSpec(pruner, tuned(asked).settings))
        spent: dict[float, list[float]] = {}
        data = self.probes.scores(pruner)
        for row in self._once("timings", cell, lambda: {"timings": self.probes.overhead(pruner), **data.records}):
            spent.setdefault(row.visual_kept, []).append(row.value_ms)
        medians = [median(values) for values in spent.values()]
        latency = Latency.fit([p.sequence for p in points], [p.prefill_ms for p in points], list(spent), medians)
        for kind in self.options.kinds:
            able = kind == "count" or data.scores is not None
            self.solvers[pruner, kind] = Solver(data, latency, kind, self.options.least, self.options.most) if able else None

    def _solver(self, cell: Cell) -> Solver | None:
        return self.solvers[tuned(cell).pruner, tuned(cell).kind]

    def _propose(self, cell: Cell) -> None:
        """Candidates of one question; the answer at once where there can be none."""
        solver, target = self._solver(cell), tuned(cell).target_speedup
        if solver is None:  # a method without scores has no threshold: nothing to answer
            return self._answer(cell, None)
        values = solver.candidates(target, self.options.margin, self.options.candidates)
        if not values:
            return self._answer(cell, unreachable(solver))
        self.trials += [_Trial(cell, solver.trial(target, value), solver.budget(value)) for value in values]

    def _run_trials(self) -> None:
        """The candidates whose accuracy nobody knows yet; those that miss the target are recorded without one."""
        for trial in self.trials:
            if not trial.record.feasible or trial.candidate in self.accuracies:
                self._record(trial)
        unknown = [t.candidate for t in self.trials if t.record.feasible and t.candidate not in self.accuracies]
        if not unknown:
            return
        try:
            self.run_trials(list(dict.fromkeys(unknown)), self._found)
        except Failed as error:
            able = {t.cell for t in self.trials if t.record.feasible and t.candidate in self.accuracies}
            for cell in dict.fromkeys(t.cell for t in self.trials if t.cell not in able):
                self._give_up([cell], str(error))
            self.trials = [t for t in self.trials if t.cell in able]

    def _found(self, candidate: Candidate, accuracy: Accuracy) -> None:
        """One accuracy: its answers are written, and it for every question it answers."""
        self._answered(candidate)
        self.accuracies[candidate] = accuracy
        pruner, budget = candidate
        print(f"tune: {self.labels[pruner]} {budget} answers {accuracy.mean:.1%} of the calibration questions", flush=True)
        for trial in self.trials:
            if trial.candidate == candidate:
                self._record(trial)

    def _answered(self, candidate: Candidate) -> None:
        for found in self.probes.answers(*candidate):
            self._publish(found.cell, {"predictions": found.rows}, found.seconds)

    def _record(self, trial: _Trial) -> None:
        accuracy = self.accuracies.get(trial.candidate, UNKNOWN) if trial.record.feasible else UNKNOWN
        self._publish(trial.own, {"trials": [accuracy.of(trial.record)]})

    def _verify(self) -> None:
        """Measure the best candidate of every question, correct those that missed, answer."""
        tried: dict[Cell, list[Verified]] = {}
        timed: dict[Cell, list[HeldOut]] = {}
        todo: dict[Cell, Trial] = {}
        for cell in dict.fromkeys(t.cell for t in self.trials):
            mine = [t for t in self.trials if t.cell == cell]
            todo[cell] = best_trial([self.accuracies.get(t.candidate, UNKNOWN).of(t.record) for t in mine])
        for turn in range(self.options.corrections + 1):
            if not todo:
                break
            try:
                found = self.probes.check([(tuned(cell).pruner, self._budget(cell, t)) for cell, t in todo.items()])
            except Failed as error:
                for cell in [cell for cell in todo if cell not in tried]:
                    self._give_up([cell], str(error))
                break
            for (cell, trial), checked in zip(todo.items(), found, strict=True):
                tried.setdefault(cell, []).append(Verified(tuned(cell).target_speedup, trial, checked))
                timed.setdefault(cell, []).extend(checked.rows)
            last = turn == self.options.corrections
            todo = {} if last else {cell: t for cell in todo if (t := self._corrected(cell, tried[cell])) is not None}
        for cell, attempts in tried.items():
            solver = self._solver(cell)
            assert solver is not None
            self._answer(cell, choice(solver, attempts), timed[cell], sum(one.checked.seconds for one in attempts))

    def _budget(self, cell: Cell, trial: Trial) -> Budget:
        solver = self._solver(cell)
        assert solver is not None
        return solver.budget(trial.value)

    def _corrected(self, cell: Cell, tried: Sequence[Verified]) -> Trial | None:
        """The next candidate of a question whose verification missed, its accuracy known."""
        solver = self._solver(cell)
        assert solver is not None
        value = None if tried[-1].settled else correction(solver, tried, self.options.margin)
        if value is None:
            return None
        candidate = tuned(cell).pruner, solver.budget(value)
        if candidate not in self.accuracies:
            try:
                self.accuracies[candidate] = self.probes.accuracy(*candidate)
                self._answered(candidate)
            except Failed:  # then the candidates before it are all there is to choose from
                return None
        record = self.accuracies[candidate].of(solver.trial(tuned(cell).target_speedup, value))
        self._publish(_Trial(cell, record, candidate[1]).own, {"trials": [record]})
        return record

    def _answer(self, cell: Cell, answer: Choice | None, timed: Sequence[HeldOut] = (), seconds: float = 0.0) -> None:
        self._publish(cell, {"choices": [answer], "held_out": timed} if answer else {}, seconds)
        if answer:
            asked = tuned(cell)
            measures = f"{answer.chosen_budget} measures {answer.measured_speedup:.2f}x" if answer.chosen_budget else ""
            verdict = told_verdict(answer.verdict, answer.measured_speedup, asked.target_speedup)
            told = ", ".join(filter(None, (verdict, measures, answer.note)))
            print(f"tune: {cell.method.label}, {asked.kind}, {asked.target_speedup:g}x: {told}", flush=True)


def answers(store: Store, asked: Sequence[Cell]) -> list[Choice]:
    """The choices the store has for these cells, in their order."""
    table = store.read("choices")
    by_cell = {row["cell"]: row for row in table.to_dict("records")}
    columns = [field.name for field in fields(Choice)]
    return [Choice(**{column: by_cell[c.key][column] for column in columns}) for c in asked if c.key in by_cell]
