"""Tuning as Ray work: one actor holds the model and everything cached; trials ask it for an accuracy and load nothing.

What is timed (the curve, overheads, the verification) runs in that actor while nothing else does; the trials of Ray Tune run
between. The driver alone writes (`diffprune.tune.search`).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import ray
from ray.exceptions import RayActorError, RayTaskError

from diffprune.core import registry
from diffprune.core.budget import Budget, Keep
from diffprune.core.cell import CalibrateSpec, Cell, EvaluateSpec, describe
from diffprune.core.errors import first_line, with_class
from diffprune.core.evidence import Evidence
from diffprune.core.pruner import Pruner
from diffprune.core.records import Choice, CurvePoint, Provenance, Timing
from diffprune.core.spec import Spec
from diffprune.distributed import metrics, resources
from diffprune.distributed.cluster import connect
from diffprune.distributed.liveness import watched
from diffprune.distributed.sweep import TRIES, SweepFailed
from diffprune.distributed.trials import failures
from diffprune.evaluate.evaluator import Evaluator
from diffprune.evaluate.transformers_backend import TransformersBackend
from diffprune.io.run_lock import attempts_at
from diffprune.io.shared_storage import Proof, Unseen, proof
from diffprune.store import Store, opened
from diffprune.timing.clock import clocks
from diffprune.timing.machine import steady
from diffprune.tune.calibration import Scored, scored
from diffprune.tune.cells import settings
from diffprune.tune.options import Tuning
from diffprune.tune.probes import accuracy, check, grid, splits, time_curve, time_overhead
from diffprune.tune.search import Answers, Candidate, Failed, Probes, Search, answers, tuned
from diffprune.tune.solver import Accuracy, MeasuredSpeedup
from diffprune.vlm.load import load


class Resident:
    """One process with the model, the encoded images and the scores (`search.Probes`). Ray makes it an actor."""

    def prepare(self, model: Spec, pruners: Sequence[Spec], options: Tuning, storage: Proof | None) -> None:
        """Load the model and encode calibration and held-out images once. storage: of the run, which this host has to see."""
        if storage:
            storage.check()
        self.options = options
        self.vlm = load(model)
        self.evaluator = Evaluator(TransformersBackend(self.vlm))
        self.clock = clocks(self.vlm.device)[0]
        self.pruners: dict[Spec, Pruner] = {spec: registry.make("pruners", spec) for spec in pruners}
        needs = frozenset[Evidence]().union(*(p.needs for p in self.pruners.values()))
        self.calibration, self.held_out = splits(self.vlm, options, needs)
        self.answered: dict[Candidate, list[Answers]] = {}

    def curve(self) -> tuple[list[CurvePoint], list[Timing]]:
        """Prefill latency on a grid of lengths, on the calibration batch with the longest text."""
        inputs = max(self.calibration, key=lambda i: i.prompts.input_ids.shape[1])
        with steady(self.options.threads):
            return time_curve(self.vlm, inputs, grid(self.vlm.num_visual_tokens, self.options.least), self.options, self.clock)

    def scores(self, pruner: Spec) -> Scored:
        """Scores and counts of the calibration images."""
        return scored(self.vlm, self.calibration, self.pruners[pruner])

    def overhead(self, pruner: Spec) -> list[Timing]:
        """What a method adds before prefill, at three kept counts."""
        total, made = self.vlm.num_visual_tokens, self.pruners[pruner]
        keeps = [Keep(c) for c in sorted({max(self.options.least, round(share * total)) for share in (0.05, 0.3, 1)})]
        with steady(self.options.threads):
            return time_overhead(self.vlm, self.calibration[0], made, keeps, self.options.curve_repeats, self.clock)

    def accuracy(self, pruner: Spec, budget: Budget) -> Accuracy:
        """Mean credit of every calibration question.

        Raises:
            RuntimeError: a question could not be answered; a mean over the others would be another figure.
        """
        options, answered = self.options, list[Answers]()
        asked = settings(options).questions
        for questions in (replace(one, limit=math.ceil(options.calibration / len(asked))) for one in asked):
            began = time.monotonic()
            rows = self.evaluator.run(Cell(self.vlm.spec, self.vlm.dtype, EvaluateSpec(pruner, budget, questions)))
            if broken := [row.error for row in rows if row.error]:
                what = f"{len(broken)} of {len(rows)} questions of {questions.benchmark}"
                raise RuntimeError(f"{what} failed, the first with {broken[0]}")
            label = registry.make("benchmarks", questions.benchmark).label
            subject = CalibrateSpec(pruner, budget, questions, registry.grader(questions.benchmark))
            about = describe(self.pruners[pruner])
            cell = Cell(self.vlm.spec, self.vlm.dtype, subject, about, label)
            answered.append(Answers(cell, rows, time.monotonic() - began))
        self.answered[pruner, budget] = answered
        return accuracy([row for one in answered for row in one.rows])

    def answers(self, pruner: Spec, budget: Budget) -> list[Answers]:
        """Those that `accuracy` has found for a candidate; given once, then forgotten."""
        return self.answered.pop((pruner, budget), [])

    def check(self, asked: Sequence[Candidate]) -> list[MeasuredSpeedup]:
        """Measured speedups on held-out images, all of them in one interleaved session."""
        pairs = [(self.pruners[pruner], budget) for pruner, budget in asked]
        with steady(self.options.threads):
            return check(self.vlm, self.held_out, pairs, self.options, self.clock)


class _Remote:
    """`search.Probes` by an actor."""

    def __init__(self, actor: Any) -> None:
        self.actor = actor

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def asked(*args: Any) -> Any:
            try:
                with watched(lambda: [self.actor]):
                    return ray.get(getattr(self.actor, name).remote(*args))
            except RayTaskError as error:
                raise Failed(with_class(error.cause)) from error

        return asked


class _Tell:
    """Passes on each accuracy that a trial of Ray Tune reports."""

    def __init__(self, candidates: Sequence[Candidate], found: Callable[[Candidate, Accuracy], None]) -> None:
        self.candidates, self.found = candidates, found

    def reported(self, index: int, result: dict[str, Any]) -> None:
        """Pass it on."""
        if "accuracy" in result:
            ends = (float(result[name]) for name in ("accuracy", "low", "high"))
            self.found(self.candidates[index], Accuracy(*ends))

    def ended(self, index: int) -> None:
        """Nothing: it has reported once."""


def _trial(config: dict[str, Any], actor: Any, candidates: Sequence[Candidate]) -> None:
    """The trainable: no model of its own, one question to the resident one."""
    from ray import tune as ray_tune

    with watched(lambda: [actor]):
        found: Accuracy = ray.get(actor.accuracy.remote(*candidates[config["index"]]))
    ray_tune.report({"accuracy": found.mean, "low": found.low, "high": found.high})


def _trials(actor: Any, candidates: Sequence[Candidate], found: Callable[[Candidate, Accuracy], None]) -> None:
    """Ray Tune over candidates.

    Raises:
        Failed: a trial failed; the first one's reason. The accuracies of the others have been told.
    """
    failed = failures(
        _trial,
        len(candidates),
        {"actor": actor, "candidates": list(candidates)},
        _Tell(candidates, found),
        {"cpu": 0.1},
        metric="accuracy",
        mode="max",
        max_concurrent_trials=2,
    )
    if failed:
        raise Failed(f"{len(failed)} of {len(candidates)} trials failed, the first with: {next(iter(failed.values()))}")


def tune(
    asked: Sequence[Cell],
    options: Tuning,
    place: Store | Path | str,
    provenance: Provenance,
    *,
    model: Spec,
    address: str | None = None,
    gpus: float = 0.0,
) -> list[Choice]:
    """Answer the cells of `diffprune.tune.cells` that the store has no answer to; returns the answers to all of them.

    Where nothing is missing, neither Ray nor a model is started. address: of a running cluster; None starts a local one.
    gpus: of the process that times, which shares none.

    Raises:
        ValueError: no method that could be tuned, or the model cannot be loaded.
        SweepFailed: some cells failed; the others are in the store, and so are the reasons (`outcomes`).
    """
    store = opened(place)
    done = store.done()
    todo = [cell for cell in asked if cell.key not in done]
    if not asked:
        raise ValueError("nothing to tune: name at least one method other than unpruned")
    if todo:
        with connect(address, 2):
            search = _searched(todo, options, store, provenance, model, resources.whole(gpus))
        if search.failed:
            cell, reason = next(iter(search.failed.items()))
            what = f"{len(search.failed)} of {len(todo)} cells could not be tuned and will be tried again by the next run"
            raise SweepFailed(f"{what}; first {cell.method.label}: {reason}")
    return answers(store, asked)


def _searched(todo: Sequence[Cell], options: Tuning, store: Store, provenance: Provenance, model: Spec, gpus: float) -> Search:
    """Answer the cells by a resident process; where it dies, or hangs, another goes on from what is in the store.

    Raises:
        RuntimeError: it died again and again, and found nothing in between; or its host does not see the run's storage.
    """
    resources.awaited(1, 1, gpus)
    deaths, done = 0, store.done()
    storage = proof(attempts_at(store.blobs, provenance.run), provenance.attempt)
    while True:
        actor = ray.remote(num_cpus=1, num_gpus=gpus)(Resident).remote()
        try:
            _ready(actor, model, list(dict.fromkeys(tuned(cell).pruner for cell in todo)), options, storage)
            search = Search(todo, options, store, provenance, cast(Probes, _Remote(actor)), partial(_trials, actor))
            search.go()
            metrics.CELLS.add(len(todo) - len(search.failed), provenance.run, "tune", "ok")
            metrics.CELLS.add(len(search.failed), provenance.run, "tune", "failed")
            return search
        except Failed as error:
            raise SweepFailed(f"prefill could not be timed: {error}") from error
        except RayActorError as error:
            reason, before, done = first_line(error), done, store.done()
            deaths = 1 if done > before else deaths + 1
            metrics.worker_lost(provenance.run, "tune", reason)
            if deaths == TRIES:
                raise RuntimeError(f"the process that tunes died {TRIES} times in a row, last: {reason}") from error
            print(f"tune: its process died ({reason}); another goes on from what it had found", flush=True)
        finally:
            ray.kill(actor)
        todo = [cell for cell in todo if cell.key not in done]


def _ready(actor: Any, model: Spec, pruners: list[Spec], options: Tuning, storage: Proof | None) -> None:
    """Load the model in the actor; a user's mistake, and a host that does not see the run's storage, come back as themselves."""
    try:
        with watched(lambda: [actor]):
            ray.get(actor.prepare.remote(model, pruners, options, storage))
    except RayTaskError as error:
        if isinstance(error.cause, ValueError | Unseen):
            raise error.cause from None
        raise
