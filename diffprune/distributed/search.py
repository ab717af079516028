"""The search of training settings as trials of Ray Tune, which stops bad ones early (ASHA, arXiv 1810.05934).

Each process holds the frozen model and whatever is drawn and encoded once; a trial trains a scorer there on one CPU. Methods take
turns, so that trials are stopped only by others of their own method. The driver alone writes: a trial is in the store as soon as
it ends, and is not trained again by a later run, which tells the scheduler what is known of it. Which trials are stopped depends
on the order in which they come to a look; what a look finds does not.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, fields, replace
from functools import cache
from typing import Any

import torch

from diffprune.core.records import Outcome, Provenance, SearchLook
from diffprune.core.spec import Spec
from diffprune.distributed import metrics, resources
from diffprune.distributed.cluster import connect
from diffprune.distributed.trials import failures
from diffprune.io.run_lock import attempts_at
from diffprune.io.shared_storage import Proof, proof
from diffprune.store import Store
from diffprune.train.search import Bench, Search, SearchTrial, best, mean_hard, state
from diffprune.vlm.load import load

WORST = 1e6  # what the scheduler is told of a training that diverged: it computes with what it is told
Known = Mapping[str, Sequence[SearchLook]]  # by key of the trial's cell


def stored(store: Store, asked: Sequence[SearchTrial]) -> dict[str, list[SearchLook]]:
    """What the store holds of these trials."""
    names = [f.name for f in fields(SearchLook)]
    rows = store.read("search", ["cell", *names], cells={trial.cell.key for trial in asked} & store.done())
    found: dict[str, list[SearchLook]] = {}
    for row in rows.to_dict("records"):
        found.setdefault(row["cell"], []).append(SearchLook(**{name: row[name] for name in names}))
    return found


def search(
    options: Search,
    asked: Sequence[SearchTrial],
    store: Store,
    provenance: Provenance,
    *,
    workers: int,
    address: str | None = None,
    gpus: float = 0.0,
) -> tuple[dict[Spec, SearchTrial], list[str]]:
    """Run the trials that the store does not hold; where nothing is missing, Ray is not started. Returns the winner of each method,
    and a sentence on each that has none, as trials of it failed or none came to the end of its training.

    gpus: of each worker.
    """
    winners: dict[Spec, SearchTrial] = {}
    without: list[str] = []
    with ExitStack() as stack:
        for method in options.recipe.pruners:
            mine = [trial for trial in asked if trial.method == method]
            known = stored(store, mine)
            if left := len(mine) - len(known):
                print(f"search: {method}, {left} of {len(mine)} trials to run", flush=True)
                stack.enter_context(connect(address, workers))
                failed = _run(mine, known, store, provenance, workers, options.halvings, gpus)
                if failed:
                    first = f"{next(iter(failed.values()))}; the same command tries them again"
                    without.append(f"{len(failed)} of {len(mine)} trials of {method} failed, the first with {first}")
                    print(f"search: {without[-1]}", flush=True)
                    continue
            if won := best(mine, stored(store, mine)):
                winners |= won
            else:
                without.append(f"no trial of {method} came to the end of its training without diverging: lower the learning rates")
    return winners, without


def _run(
    asked: Sequence[SearchTrial], known: Known, store: Store, provenance: Provenance, workers: int, halvings: int, gpus: float
) -> dict[int, str]:
    """All trials of one method, those that are known told again; returns why some failed, by their number."""
    from ray.tune.schedulers import ASHAScheduler

    resources.awaited(workers, 1, gpus)
    storage = proof(attempts_at(store.blobs, provenance.run), provenance.attempt)
    failed = failures(
        _trial, len(asked), {"asked": list(asked), "known": dict(known), "storage": storage},
        _Publish(asked, known, store, provenance), {"cpu": 1, "gpu": gpus}, computing=True, max_concurrent_trials=workers,
        scheduler=ASHAScheduler("look", "validation_hard", "min", max_t=2**halvings, grace_period=1, reduction_factor=2),
    )  # fmt: skip
    for index, reason in failed.items():
        store.publish({"outcomes": [Outcome("failed", reason, 0, 0.0)]}, cell=asked[index].cell, provenance=provenance)
        metrics.CELLS.add(1, provenance.run, "search", "failed")
    return failed


def _trial(config: dict[str, Any], asked: Sequence[SearchTrial], known: Known, storage: Proof | None) -> None:
    """The trainable: what each look finds of one configuration. storage: of the run, which its host has to see."""
    from ray import tune as ray_tune

    if storage:
        storage.check()
    trial = asked[config["index"]]
    told = known.get(trial.cell.key)
    for number, rows in enumerate(_again(told) if told else _bench(trial.recipe.model, trial.recipe.dtype).looks(trial)):
        value = min(mean_hard(rows), WORST)
        ray_tune.report({"look": 2**number, "validation_hard": value, "rows": [asdict(row) for row in rows]})


@cache
def _bench(model: Spec, dtype: str) -> Bench:
    """The one of this process, which serves one trial after the other."""
    gpu = torch.cuda.is_available()
    if not gpu:
        torch.set_num_threads(1)
    options: dict[str, Any] = {} if dtype == "auto" else {"dtype": dtype}
    return Bench(load(model, device="cuda" if gpu else "cpu", **options))


def _again(rows: Sequence[SearchLook]) -> Iterator[list[SearchLook]]:
    """Rows look by look."""
    for step in sorted({row.training_step for row in rows}):
        yield [row for row in rows if row.training_step == step]


class _Publish:
    """Puts each trial that ends into the store, and says how it ended."""

    def __init__(self, asked: Sequence[SearchTrial], known: Known, store: Store, provenance: Provenance) -> None:
        self.asked, self.known, self.store, self.provenance = asked, known, store, provenance
        self.rows: dict[int, dict[tuple[int, int], SearchLook]] = {}

    def reported(self, index: int, result: dict[str, Any]) -> None:
        """Kept until the trial ends."""
        found = [SearchLook(**row) for row in result.get("rows", ())]
        mine = self.rows.setdefault(index, {})
        mine.update({(row.training_step, row.training_seed): row for row in found})

    def ended(self, index: int) -> None:
        """Its rows go into the store, unless they are there or it has none."""
        asked, rows = self.asked[index], list(self.rows.get(index, {}).values())
        if asked.cell.key in self.known or not rows:
            return
        how = state(asked, rows)
        seconds = sum(row.spent_s for row in rows)
        tables: dict[str, Sequence[Any]] = {
            "search": [replace(row, trial_state=how) for row in rows],
            "outcomes": [Outcome("ok", "", len(rows), seconds)],
        }
        self.store.publish(tables, cell=asked.cell, provenance=self.provenance)
        metrics.CELLS.add(1, self.provenance.run, "search", "ok")
        print(_line(asked, rows, how, seconds), flush=True)


def _line(trial: SearchTrial, rows: Sequence[SearchLook], ended: str, seconds: float) -> str:
    last = [row for row in rows if row.training_step == max(row.training_step for row in rows)]
    value = mean_hard(last)
    shown = f"{value:.4f}" if math.isfinite(value) else "infinite"
    return (
        f"search {trial.method}  configuration {trial.number}  {ended} after {last[0].training_step}/{trial.recipe.steps} steps  "
        f"validation {shown}  {seconds:.0f} s"
    )
