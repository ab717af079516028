"""What a driver does beside a training at work: the step log is read, shown and counted, and finished scorers are published."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from diffprune.core import registry
from diffprune.core.cell import Cell, TrainSpec, describe
from diffprune.core.errors import first_line
from diffprune.core.records import Outcome, Provenance, Step
from diffprune.distributed import metrics, watchdog
from diffprune.io.checkpoint import is_complete, read_config
from diffprune.io.outage import joined
from diffprune.store import Store
from diffprune.train import step_log
from diffprune.train.checkpoints import Files, as_step, damaged_lines, read_steps, verified
from diffprune.train.loop import line, missing, scorers
from diffprune.train.recipe import Recipe

LEAVE_S = 10.0  # for the last look at storage that does not answer, whose own limits are minutes


def publish(recipe: Recipe, folder: Path, store: Store | None, provenance: Provenance | None) -> None:
    """Put the step records of finished scorers into the store, each once."""
    if store is None or provenance is None:
        return
    finished = {key: place for key, place in scorers(recipe, folder).items() if is_complete(place)}
    done, steps = store.done() if finished else set(), read_steps(folder)
    if damaged := damaged_lines(folder):
        print(f"train: {damaged} damaged lines of {step_log.opened(folder)} are left out of the records", flush=True)
    for (spec, seed), place in finished.items():
        facts = read_config(place)["facts"]
        made = registry.make("pruners", spec)
        method = replace(describe(made), recipe=facts["recipe_key"], scorer_seed=seed)
        model = replace(recipe.model, weights_sha256=facts["model_hash"])
        cell = Cell(model, facts["dtype"], TrainSpec(spec, facts["recipe_key"], seed), method)
        rows = steps.get(place.name, [])
        if rows and cell.key not in done:
            store.publish({"steps": rows, "outcomes": [Outcome("ok", "", len(rows), 0.0)]}, cell=cell, provenance=provenance)


class Follower(threading.Thread):
    """Reads the step log while workers write it: shows progress, publishes finished scorers, and looks after workers that hang.

    Storage that fails costs one look, never the thread: what was not seen is seen at the next, and that it failed is said once
    for as long as it does.
    """

    every_s = 2.0

    def __init__(
        self, recipe: Recipe, folder: Path, store: Store | None, provenance: Provenance | None, files: Files | None = None
    ) -> None:
        super().__init__(daemon=True, name="step log")
        self.watchdog = watchdog.Watchdog(files.blobs, files.attempt) if files else None
        self.recipe, self.folder, self.store, self.provenance = recipe, folder, store, provenance
        recipes = {place.name: recipe.of(spec) for (spec, _), place in scorers(recipe, folder).items()}
        self.steps = {scorer: own.steps for scorer, own in recipes.items()}
        self.images = {scorer: own.images for scorer, own in recipes.items()}
        self.run_name, self.groups = provenance.run if provenance else "", 0
        self.ended, self.failing, self.finished = threading.Event(), False, 0
        self.files, self.failed = files, set[str]()
        self.log = step_log.opened(folder)
        self.place = self.log.newer(None)[1]

    def __enter__(self) -> Follower:
        left = len(missing(self.recipe, self.folder))
        few, most = self.recipe.fewest, self.recipe.workers
        workers = f"{few} to {most} workers" if few < most else f"{most} worker{'s' * (most != 1)}"
        print(f"train: starting {workers}, {left} scorer{'s' * (left != 1)} to train", flush=True)
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        joined(self, LEAVE_S)
        if not (self.is_alive() or self.failing):
            with suppress(OSError):  # how the training ended is what counts, and is raised by others
                self._show()

    def run(self) -> None:
        while not self.ended.wait(self.every_s):
            looks = (self._show, self._look_after, self._tell_failed, self._publish)
            failures = [error for look in looks if (error := _failure(look))]
            if failures and not self.failing:
                told = f"train: {first_line(failures[0])}: progress is not seen, training goes on, and it is looked again"
                print(f"{told} every {self.every_s:.0f} s", flush=True)
            self.failing = bool(failures)

    def _show(self) -> None:
        """Progress on the terminal."""
        for scorer, step in self._newest():
            print(line(scorer, step, self.steps[scorer]), flush=True)

    def _look_after(self) -> None:
        """Workers that hang are killed, and named."""
        for told in self.watchdog.look() if self.watchdog else ():
            metrics.worker_lost(self.run_name, "train", told)
            print(told, flush=True)

    def _tell_failed(self) -> None:
        """Scorers that cannot be trained, when it is noted, while the others go on."""
        for scorer, reason in (self.files.failures() if self.files else {}).items():
            if scorer not in self.failed:
                self.failed.add(scorer)
                print(f"train: {scorer} failed, the others go on: {reason}", flush=True)

    def _publish(self) -> None:
        """Records of what was finished since the last time."""
        finished = sum(is_complete(place) for place in scorers(self.recipe, self.folder).values())
        if finished > self.finished:
            self.finished = finished
            with suppress(OSError, ValueError, RuntimeError):  # the driver publishes again at the end, and raises then
                publish(self.recipe, self.folder, self.store, self.provenance)

    def _newest(self) -> list[tuple[str, Step]]:
        """(scorer, its last whole step) of what was written since the last look: the newest of the scorer that is trained now, and
        the last of each that was finished meanwhile."""
        whole, self.place = self.log.newer(self.place)
        lines = [found for piece in whole.splitlines() if (found := verified(piece))]
        rows = [row for found in lines if (row := as_step(found))]
        self._count(rows, [found["group"] for found in lines if "group" in found])
        return list(dict(rows).items())

    def _count(self, rows: Sequence[tuple[str, Step]], began: Sequence[int]) -> None:
        """Metrics of what was read. began: numbers of workers of each group that began."""
        for scorer, step in rows:
            metrics.EXAMPLES.add(self.images[scorer], self.run_name, "train")
            metrics.KEPT_TOKENS.set(step.kept, self.run_name, "train")
        for workers in began:
            self.groups += 1
            if self.groups > 1:
                metrics.restarted(self.run_name, "train", workers)
                print(f"train: {workers} worker{'s begin' if workers > 1 else ' begins'} again, from the last state", flush=True)


def _failure(look: Callable[[], None]) -> OSError | None:
    """What storage said, where one look failed on it."""
    try:
        look()
    except OSError as error:
        return error
    return None
