"""A job from beginning to end: search -> train -> tune -> evaluate and measure -> report. Each stage does only what is missing.

One driver holds the run's lock and writes; Ray starts when the first stage needs it and not at all where nothing is missing.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from PIL import Image

from diffprune import report
from diffprune.core import registry
from diffprune.core.budget import Above
from diffprune.core.cell import Cell, Questions, SelectSpec, TuneSpec, describe
from diffprune.core.pruner import Pruner
from diffprune.core.records import KeptToken, Outcome, Provenance
from diffprune.core.site import ENCODED, Cut
from diffprune.core.spec import Spec
from diffprune.core.vlm import VLM
from diffprune.distributed import search as searching
from diffprune.distributed import train as training
from diffprune.distributed import tune as tuning
from diffprune.distributed.cluster import connect
from diffprune.distributed.sweep import SweepFailed, exclusive, sweep
from diffprune.embedded.world import SPLITS, WORLD_VERSION, scene
from diffprune.evaluate import grading
from diffprune.evaluate.cells import cells as evaluation_cells
from diffprune.io.blob_store import LocalBlobs
from diffprune.io.run_lock import refuse_if_held
from diffprune.job import preflight, settings
from diffprune.job.job import Job
from diffprune.measure import measure
from diffprune.store import Store, lock, readme
from diffprune.store.provenance import collect
from diffprune.timing.options import Measurement
from diffprune.train import estimate
from diffprune.train.loop import missing
from diffprune.train.search import SearchTrial, spelled, trials
from diffprune.tune.cells import cells as tuning_cells
from diffprune.vlm.load import described, load
from diffprune.vlm.meta_model import configuration

STAGES = ("search", "train", "tune", "evaluate", "measure", "report")
CELLS = ("tune", "evaluate", "measure")  # stages that ask cells of a model
ON_MODEL = ("search", *CELLS)  # stages whose keys name the loaded model
NUM_SCENES = 4  # pictures in the report


def run(
    job: Job,
    out: Path | str = "runs",
    *,
    stages: Sequence[str] = STAGES,
    workers: int | None = None,
    address: str | None = None,
    dry_run: bool = False,
) -> None:
    """Run the stages of a job that it has a section for; what the store and the folder hold already is not done again.

    out: everything lands in `<out>/<job.name>`: `scorers/`, `store/`, `report/`.

    Raises:
        ValueError: something the job asks for does not exist or cannot be; nothing has been started then.
        Busy: another process runs this name.
        SweepFailed: some cells have no result; all stages went to their end.
    """
    folder = Path(out) / job.name
    job = job if workers is None else job.model_copy(update={"workers": workers})
    asked = _wanted(job, stages)
    if not dry_run:
        refuse_if_held(folder / "store", job.name)
    vlm = load(job.model) if set(asked) & set(ON_MODEL) else None  # training loads it in its workers
    plan = Plan(job, folder, vlm)
    plan.check(asked)
    if vlm is None and "train" in asked and not dry_run and plan.untrained():
        described(job.model)
    plan.try_methods(asked)
    if dry_run:
        plan.show(asked)
        return
    if asked == ["report"]:  # reads alone, so it needs no lock, and a run in a folder that is read-only has a report, too
        plan.report(folder / "report")
        return
    with lock(plan.store_root, job.name) as attempt, contextlib.ExitStack() as stack:
        settings.keep(job, folder, asked)
        stack.callback(_explained, plan.store_root)
        PipelineRun(plan, collect(job.name, attempt, job.seed), address, stack).go(asked)


def _explained(store: Path) -> None:
    """README and views beside the store; a disk that is full by now keeps nobody from what the run itself has to say."""
    with contextlib.suppress(OSError):
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
class Plan:
    """What a job asks for, before anything is started."""

    job: Job
    folder: Path
    vlm: VLM | None
    _cells: dict[tuple[str, frozenset[tuple[Spec, int]]], list[Cell]] = field(default_factory=dict)

    @property
    def store_root(self) -> Path:
        """Where the records are."""
        return self.folder / "store"

    def untrained(self) -> list[tuple[Spec, int]]:
        """Methods and seeds without a scorer yet."""
        return missing(self.job.train, self.folder) if self.job.train else []

    def cells(self, stage: str) -> list[Cell]:
        """Cells of `tune`, `evaluate` or `measure`. Those of scorers that are not trained yet name them instead of their weights.

        Raises:
            ValueError: unknown method, benchmark or option, or a budget the model cannot meet.
        """
        waiting = set(self.untrained())
        known = stage, frozenset(waiting)
        if known not in self._cells:
            self._cells[known] = self._listed(stage, waiting)
        return self._cells[known]

    def _listed(self, stage: str, waiting: set[tuple[Spec, int]]) -> list[Cell]:
        ready = [spec for spec in self.job.baselines if self._wanted(stage, spec)]
        first = [spec for spec in ready if not (self.job.train and spec.place("weights"))]
        for (spec, seed), place in self.job.scorers(self.folder).items():
            if (spec, seed) not in waiting and self._wanted(stage, spec, seed):
                ready.append(spec.at(weights=place.absolute()))
                first += ready[-1:] if self._first(seed) else []
        found = self._asked(stage, ready, first)
        for spec, seed in self.job.scorers(self.folder):
            if (spec, seed) in waiting and self._wanted(stage, spec, seed):
                own = self._asked(stage, [spec], [spec] if self._first(seed) else [])
                found += [_planned(cell, f"untrained, seed {seed}") for cell in own if cell.method.kind != "bound"]
        return list(dict.fromkeys(found))

    def _wanted(self, stage: str, spec: Spec, seed: int | None = None) -> bool:
        """Whether a stage looks at a method: `tune` only at `tuned`. Of trained methods `tune` takes the first seed, and so
        does `measure` where budgets are counts, which cost the same whatever the weights are."""
        counted = not any(isinstance(budget, Above) for budget in self.job.budgets)
        if stage == "tune" and self.job.tuned and spec not in self.job.tuned:
            return False
        return self._first(seed) or not (stage == "tune" or (stage == "measure" and counted))

    def _first(self, seed: int | None) -> bool:
        return seed is None or not self.job.train or seed == self.job.train.seeds[0]

    def _asked(self, stage: str, methods: Sequence[Spec], first: Sequence[Spec]) -> list[Cell]:
        """The cells of these methods; `evaluate` also gets those to run with tokens replaced, of trained ones the `first` seed."""
        job = self.job
        assert self.vlm is not None, "only the report needs no model"
        if stage == "tune" and (options := job.tuning):
            return tuning_cells(self.vlm, methods, options)
        if stage == "evaluate" and job.evaluate:
            also = [Spec("replaced").with_options(method=spec) for spec in first if spec in job.replaced]
            return evaluation_cells(self.vlm, [*methods, *also], job.budgets, job.evaluate)
        assert job.measurement is not None, "a stage without a section is not asked for"
        return measure.cells(self.vlm, methods, job.budgets, job.measurement)

    def trials(self) -> list[SearchTrial]:
        """What the job's search tries."""
        options = self.job.search
        assert options is not None and self.vlm is not None, "a stage without a section is not asked for"
        return trials(options, self.vlm.spec, self.vlm.dtype if options.recipe.dtype == "auto" else options.recipe.dtype)

    def pictures(self) -> list[Cell]:
        """Cells of the pictures on the page: what the first seed of each image-only trained method keeps of a few test scenes, at
        the job's third budget or its last. Only the embedded model has scenes."""
        job = self.job
        if job.model.name != "embedded" or not job.train or not job.budgets or self.untrained():
            return []
        self.vlm = self.vlm or load(job.model)
        budget, names = job.budgets[:3][-1], tuple(map(str, SPLITS["test"][:NUM_SCENES]))
        first = [
            spec.at(weights=place.absolute())
            for (spec, seed), place in job.scorers(self.folder).items()
            if seed == job.train.seeds[0]
        ]
        pruners: list[Pruner] = [made for made in (registry.make("pruners", spec) for spec in first) if not made.reads_question]
        return [
            Cell(self.vlm.spec, self.vlm.dtype, SelectSpec(one.spec, budget, names, WORLD_VERSION), describe(one))
            for one in pruners
        ]

    def check(self, stages: Sequence[str]) -> None:
        """Refuse what cannot work while nothing has been started.

        Raises:
            ValueError: names what is wrong.
        """
        needs = [stage for stage in stages if stage in CELLS]
        for stage in needs:
            if not self.cells(stage):
                raise ValueError(f"nothing to {stage}: name at least one method other than unpruned, as in --pruner attention")
        left = self.untrained()
        if left and needs and "train" not in stages:
            spec, seed = left[0]
            raise ValueError(
                f"{spec}, seed {seed}, is not trained yet below {self.folder}: run `diffprune train {self.job.name}` first"
            )

    def try_methods(self, stages: Sequence[str]) -> None:
        """Refuse a method that cannot run on the model, where anything is left to do.

        Raises:
            ValueError: names it, with the reason.
        """
        needs = [stage for stage in stages if stage in CELLS]
        done = Store(self.store_root).done() if needs else set()
        left = [cell for stage in needs for cell in self.cells(stage) if cell.key not in done]
        if left and self.vlm is not None:
            subject: Any = left[0].subject
            asked: Questions = subject.settings.questions[0] if isinstance(subject, TuneSpec) else subject.questions
            waiting = set(self.untrained())
            trained = [
                spec if (spec, seed) in waiting else spec.at(weights=place.absolute())
                for (spec, seed), place in self.job.scorers(self.folder).items()
            ]
            preflight.check(self.vlm, [*self.job.baselines, *trained], asked, self.job.budgets)

    def report(self, out: Path) -> None:
        """Page and tables in the folder `out`, from the records alone; then the short table."""
        job = self.job
        made = report.report(
            self.store_root, out, title=job.title or job.name, command=f"diffprune run {job.name}", asked=self.setting
        )
        print(f"\n{self.summary()}\n\nreport: {made['html'].resolve()}", flush=True)

    def summary(self) -> str:
        """The short table."""
        return report.summary(self.store_root, asked=self.setting)

    @property
    def setting(self) -> dict[str, str]:
        """What of the job's evaluation tells its chapter of the report from others: columns of cells."""
        own = self.job.evaluate
        if own is None:
            return {}
        limits = {"limit": own.limit, "answer_tokens": own.answer_tokens}
        told = {name: "all" if value is None else str(value) for name, value in limits.items()}
        return {"model": str(self.job.model), "protocol": own.protocol, "split": own.split, "batch": str(own.batch)} | told

    def show(self, stages: Sequence[str]) -> None:
        """Print what would be run, one line per method and budget, and how much of it is done."""
        done = Store(self.store_root).done()
        if "search" in stages and (options := self.job.search):
            asked = self.trials()
            todo = sum(trial.cell.key not in done for trial in asked)
            each = f"{options.configurations} configurations each, of {options.training_images:,} training images"
            print(f"search: {len(options.recipe.pruners)} methods, {each}: {len(asked)} trials, {todo} to do")
        if "train" in stages and self.job.train:
            recipe, left = self.job.train, self.untrained()
            steps = sorted({recipe.of(spec).steps for spec in recipe.pruners})
            scorers = f"{len(recipe.pruners) * len(recipe.seeds)} scorers of {' or '.join(map(str, steps))} steps"
            print(f"train: {scorers}, {len(left)} to do")
            config = self.job.config or (configuration(recipe.model) if recipe.model.name != "embedded" else None)
            for found in estimate.estimate(recipe, config, self.job.assumed) if config else []:
                print("\n".join(f"  {text}" for text in estimate.lines(recipe, found)))
        for stage in CELLS:
            if stage in stages:
                cells = self.cells(stage)
                _show(stage, cells, done, len(grading.stale(cells, Store(self.store_root))) if stage == "evaluate" else 0)


def _planned(cell: Cell, scorer: str) -> Cell:
    """A cell of a scorer that is not there yet, told from those of other seeds."""
    subject: Any = cell.subject
    spec: Spec = subject.pruner
    inner = {key: replace(value, weights_sha256=scorer) for key, value in spec.options if isinstance(value, Spec)}
    planned = spec.with_options(**inner) if inner else replace(spec, weights_sha256=scorer)
    return replace(cell, subject=replace(subject, pruner=planned))


def _show(stage: str, cells: Sequence[Cell], done: set[str], stale: int = 0) -> None:
    """Counts, what the cells have in common, and a line per method. stale: cells whose grader has changed."""
    told = [(cell.columns(), cell.key not in done) for cell in cells]
    first = told[0][0]
    todo = sum(left for _, left in told)
    print(f"{stage}: {len(cells)} cells, " + (f"{todo} to ask, {stale} to grade again" if stale else f"{todo} to do"))
    print(f"  {' '.join(dict.fromkeys(c.benchmark for c, _ in told))}, split {first.split}, batch {first.batch}")
    rows = Counter((c.method, c.weights_sha256) for c, _ in told)
    asked = Counter((c.method, c.weights_sha256) for c, left in told if left)
    print(f"  {'cells':>5} {'to do':>5}  method at its budgets")
    for method, count in rows.items():
        mine = [c for c, _ in told if (c.method, c.weights_sha256) == method]
        listed = " ".join(dict.fromkeys(c.budget or (f"{c.target_speedup:g}x" if c.target_speedup else "") for c in mine))
        print(f"  {count:5d} {asked[method]:5d}  {' '.join(filter(None, method))}  {listed}")


@dataclass
class PipelineRun:
    """A run that holds its lock. address: of a running cluster; stack: closes Ray at the end of the run."""

    plan: Plan
    provenance: Provenance
    address: str | None
    stack: contextlib.ExitStack
    began: float = field(default_factory=time.monotonic)
    connected: bool = False

    @property
    def job(self) -> Job:
        return self.plan.job

    def go(self, stages: Sequence[str]) -> None:
        """The stages in order; cells without a result do not keep the others from theirs.

        Raises:
            SweepFailed: some cells have none; said when all is done.
        """
        failed = []
        for stage in stages:
            with self.timed(stage):
                try:
                    getattr(self, stage)()
                except SweepFailed as error:
                    print(f"{stage}: {error}", flush=True)
                    failed.append(f"{stage}: {error}")
        if "report" not in stages and stages != ["train"] and stages != ["search"]:
            print(f"\n{self.plan.summary()}", flush=True)
        if failed:
            raise SweepFailed("; ".join(failed))

    @contextlib.contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Say when a stage begins and how long it took."""
        start = time.monotonic()
        print(f"[{start - self.began:6.1f} s] {stage}", flush=True)
        yield
        print(f"[{time.monotonic() - self.began:6.1f} s] {stage}: {time.monotonic() - start:.1f} s", flush=True)

    def ray(self) -> None:
        """Ray from here to the end of the run, so that it is started once."""
        if not self.connected:
            self.stack.enter_context(connect(self.address, max(self.job.workers, self.job.train.workers if self.job.train else 1)))
            self.connected = True

    def search(self) -> None:
        """Trials that are missing; the winners as text for a job file, and in `winners.json` as arguments of a recipe."""
        options, asked, store = self.job.search, self.plan.trials(), Store(self.plan.store_root)
        assert options is not None
        if not {trial.cell.key for trial in asked} - store.done():
            print(f"search: all {len(asked)} trials are in the store already", flush=True)
        else:
            self.ray()
        found = searching.search(options, asked, store, self.provenance, workers=self.job.workers, address=self.address)
        winners = [found[method] for method in options.recipe.pruners]
        told = {"pruners": [str(trial.recipe.pruners[0]) for trial in winners], "methods": [trial.winner for trial in winners]}
        LocalBlobs(self.plan.folder).replace("winners.json", (json.dumps(told, indent=1) + "\n").encode())
        print(f"search: the winners, as a job file's Recipe names them\n{spelled(winners)}", flush=True)

    def train(self) -> None:
        """Scorers that are missing, and the step records of all."""
        recipe = self.job.train
        assert recipe is not None
        if self.plan.untrained():
            self.ray()
        else:
            print(f"train: all {len(recipe.pruners) * len(recipe.seeds)} scorers are there already", flush=True)
        training.train(recipe, self.plan.folder, Store(self.plan.store_root), self.provenance)

    def tune(self) -> None:
        """Thresholds and counts for the targets."""
        assert self.job.tune is not None
        if left := self.todo("tune"):
            self.ray()
            assert self.job.tuning is not None
            tuning.tune(left, self.job.tuning, self.plan.store_root, self.provenance, model=self.job.model)

    def todo(self, stage: str) -> list[Cell]:
        """Cells of a stage that the store does not have; says so where it has all."""
        cells, done = self.plan.cells(stage), Store(self.plan.store_root).done()
        left = [cell for cell in cells if cell.key not in done]
        if not left:
            print(f"{stage}: all {len(cells)} cells are in the store already", flush=True)
        return left

    def evaluate(self) -> None:
        """Grades that a changed grader made stale, without the model; then answers to every question of cells that are missing."""
        store = Store(self.plan.store_root)
        if stale := grading.stale(self.plan.cells("evaluate"), store):
            print(f"evaluate: the answers of {len(stale)} cells are graded again, as their grader has changed", flush=True)
            grading.grade_again(stale, store, self.provenance)
        if left := self.todo("evaluate"):
            self.ray()
            sweep(left, self.plan.store_root, self.provenance, workers=self.job.workers, model=self.job.model, address=self.address)

    def measure(self) -> None:
        """Timings of every cell that is missing, by one process that has a host to itself."""
        options = self.job.measurement
        assert options is not None
        left, store = self.todo("measure"), Store(self.plan.store_root)
        if not left:
            return
        print(f"measure: {len(left)} cells next to each other, {options.rounds} rounds", flush=True)
        self.ray()
        failed = []
        for cell, found in exclusive(measured, self.job.model, left, options, address=self.address).items():
            store.publish(found.tables, cell=cell, provenance=self.provenance)
            failed += (
                [f"{cell.method.label} {cell.columns().budget}: {found.outcome.reason}"] if found.outcome.status != "ok" else []
            )
        if failed:
            raise SweepFailed(f"{len(failed)} of {len(left)} cells could not be measured; first {failed[0]}")

    def report(self) -> None:
        """What is kept of the pictures on the page, where the store does not say; page and tables; the short table."""
        store = Store(self.plan.store_root)
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


def measured(model: Spec, cells: Sequence[Cell], options: Measurement) -> dict[Cell, measure.Measured]:
    """`measure.measure` in the process that calls it, which loads the model itself."""
    return measure.measure(load(model), cells, options)
