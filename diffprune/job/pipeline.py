"""A job from beginning to end: search -> train -> tune -> evaluate and measure -> report. Each stage does only what is missing.

One driver holds the run's lock and writes; Ray starts when the first stage needs it and not at all where nothing is missing.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from diffprune.core import registry
from diffprune.core.cell import Cell, SelectSpec
from diffprune.core.errors import with_class
from diffprune.core.pruner import Pruner
from diffprune.core.records import KeptToken, Outcome, Provenance
from diffprune.core.site import ENCODED, Cut
from diffprune.core.vlm import VLM
from diffprune.distributed import measure as measuring
from diffprune.distributed import resources
from diffprune.distributed import search as searching
from diffprune.distributed import train as training
from diffprune.distributed import tune as tuning
from diffprune.distributed.cluster import connect
from diffprune.distributed.sweep import SweepFailed, sweep
from diffprune.embedded.world import scene
from diffprune.evaluate import grading
from diffprune.io import event_log
from diffprune.io.blob_store import open_blobs, refuse_if_unwritable
from diffprune.io.run_lock import refuse_if_held
from diffprune.job import settings
from diffprune.job.job import Job
from diffprune.job.plan import CELLS, Plan
from diffprune.store import lock, readme
from diffprune.store.provenance import collect
from diffprune.train.search import spelled
from diffprune.vlm.load import described, load
from diffprune.watch.observer import Observer

STAGES = ("search", "train", "tune", "evaluate", "measure", "report")
ON_MODEL = ("search", *CELLS)  # stages whose keys name the loaded model


def run(
    job: Job,
    out: Path | str = "runs",
    *,
    stages: Sequence[str] = STAGES,
    address: str | None = None,
    dry_run: bool = False,
    tell: Callable[[Plan, Sequence[str]], None] = Plan.show,
) -> None:
    """Run the stages of a job that it has a section for; what the store and the folder hold already is not done again.

    out: everything lands in `<out>/<job.name>`: `scorers/`, `store/`, `report/`. tell: what a dry run does with the plan.

    Raises:
        ValueError: something the job asks for does not exist or cannot be; nothing has been started then.
        Busy: another process runs this name.
        Fenced: another took over, or the store was moved away, while this one was at work.
        SweepFailed: some cells have no result; all stages went to their end.
    """
    folder = Path(out) / job.name
    asked = _wanted(job, stages)
    if not dry_run:
        refuse_if_held(folder / "store", job.name)
    refuse_if_unwritable(folder, attempt=not dry_run and asked != ["report"])  # a folder that is read-only may be looked at
    plan = Plan(job, folder, None)
    plan.check_training(asked, dry_run)
    vlm = plan.vlm = load(job.model) if set(asked) & set(ON_MODEL) else None  # training loads it in its workers
    plan.check(asked)
    if vlm is None and "train" in asked and not dry_run and plan.untrained():
        described(job.model)
    plan.try_methods(asked)
    if dry_run:
        tell(plan, asked)
        return
    if asked == ["report"]:  # reads alone, so it needs no lock, and a run in a folder that is read-only has a report, too
        plan.report(folder / "report")
        return
    with lock(plan.store_root, job.name) as attempt, contextlib.ExitStack() as stack:
        stack.enter_context(event_log.kept(open_blobs(plan.store_root), job.name, attempt))
        settings.keep(job, folder, asked)
        stack.callback(_explained, plan.store_root)
        going = PipelineRun(plan, collect(job.name, attempt, job.seed), address, stack)
        stack.enter_context(going.observer)
        going.go(asked)


def _observer(job: Job, folder: Path, attempt: int) -> Observer:
    steps = {place.name: job.train.of(spec).steps for (spec, _), place in job.scorers(folder).items()} if job.train else {}
    return Observer(folder, job.name, job.title, attempt, steps, job.trackers, settings.noted(job))


def _explained(store: Path) -> None:
    """README and views beside the store; a disk that is full by now keeps nobody from what the run itself has to say, and a store
    that was moved away is not made anew."""
    with contextlib.suppress(OSError):
        if store.is_dir():
            readme.write(store)


def _wanted(job: Job, stages: Sequence[str]) -> list[str]:
    """The stages asked for that the job has.

    Raises:
        ValueError: none of them.
    """
    found = [stage for stage in stages if getattr(job, stage)]
    if not found:
        raise ValueError(f"job {job.name!r} has no section {' or '.join(stages)}: give it one, or name another verb")
    return found


@dataclass
class PipelineRun:
    """A run that holds its lock. address: of a running cluster; stack: closes Ray at the end of the run. Who enters
    `observer` has the run watched."""

    plan: Plan
    provenance: Provenance
    address: str | None
    stack: contextlib.ExitStack
    began: float = field(default_factory=time.monotonic)
    connected: bool = False
    gpus: float = 0.0

    def __post_init__(self) -> None:
        self.observer = _observer(self.job, self.plan.folder, self.provenance.attempt)

    @property
    def job(self) -> Job:
        return self.plan.job

    def go(self, stages: Sequence[str]) -> None:
        """The stages in order; cells without a result do not keep the others from theirs.

        Raises:
            SweepFailed: some cells have none; said when all is done.
        """
        failed = []
        self.observer.plan({stage: [cell.key for cell in self.plan.cells(stage)] if stage in CELLS else [] for stage in stages})
        for stage in stages:
            try:
                with self.timed(stage):
                    getattr(self, stage)()
            except SweepFailed as error:
                failed.append(f"{stage}: {error}")
        if "report" not in stages and stages != ["train"] and stages != ["search"]:
            print(f"\n{self.plan.summary()}", flush=True)
        if failed:
            raise SweepFailed("; ".join(failed))

    @contextlib.contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Say when a stage begins, and how long it took where it came to its end, if with cells that have no result."""
        self.plan.store.check_owner(self.provenance)
        start = time.monotonic()
        print(f"[{start - self.began:6.1f} s] {stage}", flush=True)
        self.observer.begins(stage)
        event_log.tell("stage_began", stage=stage)
        failed: BaseException | None = None
        try:
            yield
        except BaseException as error:
            failed = error
            raise
        finally:
            seconds = time.monotonic() - start
            event_log.tell("stage_ended", stage=stage, seconds=round(seconds, 3), reason=with_class(failed) if failed else "")
            if failed is None or isinstance(failed, SweepFailed):
                if failed:
                    print(f"{stage}: {failed}", flush=True)
                self.observer.ends(stage, str(failed or ""))
                print(f"[{time.monotonic() - self.began:6.1f} s] {stage}: {seconds:.1f} s", flush=True)

    def ray(self) -> None:
        """Ray from here to the end of the run, so that it is started once."""
        if not self.connected:
            self.stack.enter_context(connect(self.address, max(self.job.workers, self.job.train.workers if self.job.train else 1)))
            self.connected, self.gpus = True, resources.each(self.job.gpus)

    def search(self) -> None:
        """Trials that are missing; the winners as text for a job file, and in `winners.json` as arguments of a recipe.

        Raises:
            SweepFailed: a method has no winner; those of the others are there.
        """
        options, asked, store = self.job.search, self.plan.trials(), self.plan.store
        assert options is not None
        self.observer.expects("search", [trial.cell.key for trial in asked])
        if not {trial.cell.key for trial in asked} - store.done():
            print(f"search: all {len(asked)} trials are in the store already", flush=True)
        else:
            self.ray()
        found, without = searching.search(
            options, asked, store, self.provenance, workers=self.job.workers, address=self.address, gpus=self.gpus
        )
        winners = [found[method] for method in options.recipe.pruners if method in found]
        told = {"pruners": [str(trial.recipe.pruners[0]) for trial in winners], "methods": [trial.winner for trial in winners]}
        if winners:
            open_blobs(self.plan.folder).replace("winners.json", (json.dumps(told, indent=1) + "\n").encode())
            print(f"search: the winners, as a job file's Recipe names them\n{spelled(winners)}", flush=True)
        if without:
            raise SweepFailed("; ".join(without))

    def train(self) -> None:
        """Scorers that are missing, and the step records of all."""
        recipe = self.job.train
        assert recipe is not None
        self.observer.expects("train", scorers=list(self.job.scorers(self.plan.folder).values()))
        if self.plan.untrained():
            self.ray()
        else:
            print(f"train: all {len(recipe.pruners) * len(recipe.seeds)} scorers are there already", flush=True)
        training.train(recipe, self.plan.folder, self.plan.store, self.provenance, gpus=self.gpus)

    def tune(self) -> None:
        """Thresholds and counts for the targets."""
        assert self.job.tune is not None
        if left := self.todo("tune"):
            self.ray()
            assert self.job.tuning is not None
            tuning.tune(left, self.job.tuning, self.plan.store, self.provenance, model=self.job.model, gpus=self.gpus)

    def todo(self, stage: str) -> list[Cell]:
        """Cells of a stage that the store does not have; says so where it has all."""
        cells, done = self.plan.cells(stage), self.plan.store.done()
        self.observer.expects(stage, [cell.key for cell in cells])
        left = [cell for cell in cells if cell.key not in done]
        if not left:
            print(f"{stage}: all {len(cells)} cells are in the store already", flush=True)
        return left

    def evaluate(self) -> None:
        """Grades that a changed grader made stale, without the model; then answers to every question of cells that are missing."""
        store = self.plan.store
        if stale := grading.stale(self.plan.cells("evaluate"), store):
            print(f"evaluate: the answers of {len(stale)} cells are graded again, as their grader has changed", flush=True)
            grading.grade_again(stale, store, self.provenance)
        if left := self.todo("evaluate"):
            self.ray()
            sweep(
                left, self.plan.store, self.provenance, workers=self.job.workers, model=self.job.model, address=self.address,
                tell=partial(self.observer.note, "evaluate"), gpus=self.gpus,
            )  # fmt: skip

    def measure(self) -> None:
        """Timings of every cell that is missing, by one process that has a host to itself."""
        options = self.job.measurement
        assert options is not None
        left, store = self.todo("measure"), self.plan.store
        if not left:
            return
        sessions = f", {options.sessions} sessions" if options.sessions > 1 else ""
        print(
            f"measure: {len(left)} cell{'s' * (len(left) != 1)}, next to each other, {options.rounds} rounds{sessions}", flush=True
        )
        self.ray()
        measuring.measure(
            left,
            options,
            store,
            self.provenance,
            model=self.job.model,
            address=self.address,
            gpus=self.gpus,
            accelerator=self.job.accelerator,
        )

    def report(self) -> None:
        """What is kept of the pictures on the page, where the store does not say; page and tables; the short table."""
        store = self.plan.store
        done = store.done()
        for cell in self.plan.pictures():
            if cell.key not in done:
                store.publish(selected(self.plan.vlm or load(self.job.model), cell), cell=cell, provenance=self.provenance)
        self.plan.report(self.plan.folder / "report")


def selected(vlm: VLM, cell: Cell) -> dict[str, Sequence[Any]]:
    """Rows by table: which tokens of the cell's scenes its method keeps."""
    began, asked = time.monotonic(), cell.subject
    assert isinstance(asked, SelectSpec), f"a cell to {cell.verb} asks for no pictures"
    pruner: Pruner = registry.make("pruners", asked.pruner)
    tokens = vlm.encode(vlm.pixels([Image.fromarray(scene(int(name)).image) for name in asked.pictures]), pruner.needs)
    keep = pruner.select(tokens, Cut(ENCODED, asked.budget)).keep.tolist()
    rows = [
        KeptToken(name, token, bool(kept)) for name, row in zip(asked.pictures, keep, strict=True) for token, kept in enumerate(row)
    ]
    return {"kept_tokens": rows, "outcomes": [Outcome("ok", "", len(rows), time.monotonic() - began)]}
