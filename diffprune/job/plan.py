"""What a job asks for before anything is started: its cells, what is done of them, and what is refused."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from diffprune import report
from diffprune.core import registry
from diffprune.core.budget import Above, Budget, Share
from diffprune.core.cell import Cell, Questions, SelectSpec, TuneSpec, describe, weights
from diffprune.core.pruner import Pruner
from diffprune.core.site import for_images
from diffprune.core.spec import Spec
from diffprune.core.vlm import VLM
from diffprune.embedded.world import SPLITS, WORLD_VERSION
from diffprune.evaluate import grading
from diffprune.evaluate.cells import cells as evaluation_cells
from diffprune.io.blob_store import absolute, open_blobs
from diffprune.job import changed_recipe, overlap, preflight, questions, seen, settings, training_data, tuning
from diffprune.job.job import Job
from diffprune.measure import measure
from diffprune.store import Store
from diffprune.train import estimate
from diffprune.train.loop import missing
from diffprune.train.search import SearchTrial, trials
from diffprune.tune.cells import cells as tuning_cells
from diffprune.vlm.load import load
from diffprune.vlm.meta_model import configuration

CELLS = ("tune", "evaluate", "measure")  # stages that ask cells of a model
NUM_SCENES = 4  # pictures in the report
UNTRAINED = "to be trained, seed"  # in place of the hash of weights that are not there yet
TUNED_AT = Share(1 / 2)  # where only tuning is left, which finds budgets itself, methods are tried at this one, if they can meet it


@dataclass
class Plan:
    """What a job asks for, before anything is started. trained_on: sentences on the data of a stage that trains."""

    job: Job
    folder: Path
    vlm: VLM | None
    trained_on: dict[str, list[str]] = field(default_factory=dict)
    _cells: dict[tuple[str, frozenset[tuple[Spec, int]]], list[Cell]] = field(default_factory=dict)
    _reasons: dict[tuple[Spec, Budget], str] = field(default_factory=dict)

    @property
    def store_root(self) -> Path:
        """Where the records are."""
        return self.folder / "store"

    @cached_property
    def store(self) -> Store:
        """The records: one object for the whole run, so that each manifest is read, and each part looked at, once."""
        return Store(self.store_root)

    def untrained(self) -> list[tuple[Spec, int]]:
        """Methods and seeds without a scorer yet.

        Raises:
            ValueError: the folder holds one that was trained otherwise; names the settings that differ.
        """
        if not self.job.train:
            return []
        try:
            return missing(self.job.train, self.folder)
        except ValueError as error:
            raise ValueError(changed_recipe.told(self.job.train, self.folder) or str(error)) from None

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
            if (spec, seed) not in waiting:
                own = self._wanted_of(stage, spec, seed, spec.at(weights=absolute(place)))
                ready += own
                first += own if self._first(seed) else []
        found = self._asked(stage, ready, first)
        for spec, seed in self.job.scorers(self.folder):
            if (spec, seed) in waiting and (own := self._wanted_of(stage, spec, seed, spec)):
                asked = self._asked(stage, own, own if self._first(seed) else [])
                found += [_planned(cell, f"{UNTRAINED} {seed}") for cell in asked if cell.method.kind != "bound"]
        return [cell for cell in dict.fromkeys(found) if not self._unmet(cell)]

    def _wanted_of(self, stage: str, spec: Spec, seed: int, ready: Spec) -> list[Spec]:
        """What a stage looks at of a trained method and its wrappers, as `ready`, which may have its weights."""
        named = {spec: ready, **dict(zip(self.job.wrappers(spec, spec), self.job.wrappers(spec, ready), strict=True))}
        return [made for name, made in named.items() if self._wanted(stage, name, seed)]

    def _unmet(self, cell: Cell) -> str:
        """Why a cell's method cannot meet its budget in this model, where the job leaves such cells out; "" where it can.

        Raises:
            ValueError: it cannot, and the job does not leave it out.
        """
        budget, spec = getattr(cell.subject, "budget", None), cell.pruner
        if budget is None or spec is None:
            return ""
        if (spec, budget) not in self._reasons:
            self._reasons[spec, budget] = self._reason(spec, budget)
        reason = self._reasons[spec, budget]
        if reason and not self.job.leave_out:
            told = f"{cell.method.label} cannot meet {budget} on {self.job.model}: {reason.rstrip('.')}"
            raise ValueError(f"{told}; or leave such budgets out, as in --set leave_out=true")
        return reason

    def _reason(self, spec: Spec, budget: Budget) -> str:
        """Why a method cannot meet a budget in this model; "" where it can. Of one that is not trained yet: as its options say."""
        assert self.vlm is not None, "only the report needs no model"
        pruner: Pruner = registry.make("pruners", _bare(spec) if UNTRAINED in weights(spec) else spec)
        try:
            for_images(pruner.cuts(budget, self.vlm.shape), [self.vlm.shape.visual_tokens])
        except ValueError as error:
            return str(error)
        return ""

    def _wanted(self, stage: str, spec: Spec, seed: int | None = None) -> bool:
        """Whether a stage looks at a method: `tune` only at `tuned`. Of trained methods `tune` takes the first seed, and so
        does `measure` where what is kept is a count, which costs the same whatever the weights are."""
        if stage == "tune" and self.job.tuned and spec not in self.job.tuned:
            return False
        return self._first(seed) or not (stage == "tune" or (stage == "measure" and self._counts(spec)))

    def _counts(self, spec: Spec) -> bool:
        """Whether at every budget a method keeps a count that is the budget's, and not each picture's own."""
        assert self.vlm is not None, "only the report needs no model"
        pruner: Pruner = registry.make("pruners", _bare(spec))
        for budget in self.job.budgets:
            with contextlib.suppress(ValueError):  # a budget that it cannot meet, of which `_unmet` tells
                if isinstance(budget, Above) or any(cut.adaptive for cut in pruner.cuts(budget, self.vlm.shape)):
                    return False
        return True

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
        """Cells of the pictures on the page: what the first seed of each image-only trained method, and of its wrappers, keeps of a
        few test scenes, at the job's third budget or its last. Only the embedded model has scenes."""
        job = self.job
        if job.model.name != "embedded" or not job.train or not job.budgets or self.untrained():
            return []
        self.vlm = self.vlm or load(job.model)
        budget, names = job.budgets[:3][-1], tuple(map(str, SPLITS["test"][:NUM_SCENES]))
        first = []
        for (spec, seed), place in job.scorers(self.folder).items():
            if seed == job.train.seeds[0]:
                ready = spec.at(weights=absolute(place))
                first += [ready, *job.wrappers(spec, ready)]
        pruners: list[Pruner] = [made for made in (registry.make("pruners", spec) for spec in first) if not made.reads_question]
        return [
            Cell(self.vlm.spec, self.vlm.dtype, SelectSpec(one.spec, budget, names, WORLD_VERSION), describe(one))
            for one in pruners
        ]

    def check_training(self, stages: Sequence[str], dry: bool = False) -> None:
        """Look at what is trained on, before a model is loaded; what was found is told by `tell_training`. Data that are gone by
        now keep nobody from asking scorers that are there.

        Raises:
            ValueError: it cannot be used, is fewer than is asked for, or is what is tested.
        """
        job, here, trains = self.job, True, "train" in stages and bool(self.untrained())
        if "search" in stages and job.search:
            self.trained_on["search"] = [training_data.check(job.search.recipe, "search.recipe", dry, bool(job.config)).told]
        if trains and job.train:
            found = training_data.check(job.train, "train", dry, bool(job.config))
            self.trained_on["train"], here = [found.told], found.here
        if job.train and job.evaluate and here and {"train", "evaluate"} & set(stages):
            try:
                compared = overlap.refuse(job.train, job.evaluate)
            except overlap.Overlap:
                raise
            except ValueError as error:
                if trains:
                    raise
                compared = f"not compared with what is asked, as the data cannot be read: {error}"
            self.trained_on.setdefault("train", []).append(compared)

    def tell_training(self, stages: Sequence[str]) -> None:
        """Print what was found of the data to train on."""
        for stage, sentences in self.trained_on.items():
            for sentence in filter(None, sentences if stage in stages else ()):
                print(f"{stage}: {sentence}", flush=True)

    def check(self, stages: Sequence[str]) -> None:
        """Refuse what cannot work while nothing has been started.

        Raises:
            ValueError: names what is wrong.
        """
        needs = [stage for stage in stages if stage in CELLS]
        for stage in needs:
            if not self.cells(stage):
                raise ValueError(f"nothing to {stage}: name at least one method other than unpruned, as in --pruner attention")
        if "tune" in stages and self.job.tuning and self.vlm is not None:
            tuning.check(self.vlm, self.job.tuning)
        for spec in self.job.evaluate.benchmarks if self.job.evaluate and "evaluate" in stages else ():
            registry.grader(spec)  # a user's function is imported now
        left = self.untrained() if needs and "train" not in stages else []
        if left:
            spec, seed = left[0]
            raise ValueError(
                f"{spec}, seed {seed}, is not trained yet below {self.folder}: run `diffprune train` on this job, name and folder "
                "first, or leave out what it trains, as in --set train=null"
            )

    def try_methods(self, stages: Sequence[str]) -> None:
        """Refuse questions that cannot be asked and a method that cannot run on the model, where anything is left to do.

        Raises:
            ValueError: names what it is, with the reason.
        """
        needs = [stage for stage in stages if stage in CELLS]
        done = self.store.done() if needs else set()
        left = [cell for stage in needs for cell in self.cells(stage) if cell.key not in done]
        questions.check(questions.asked(left))
        if left and self.vlm is not None:
            subject: Any = left[0].subject
            asked: Questions = subject.settings.questions[0] if isinstance(subject, TuneSpec) else subject.questions
            waiting = set(self.untrained())
            trained = [
                spec if (spec, seed) in waiting else spec.at(weights=absolute(place))
                for (spec, seed), place in self.job.scorers(self.folder).items()
            ]
            trained += [wrapper for spec in trained for wrapper in self.job.wrappers(spec.without_places(), spec)]
            tunes = all(isinstance(cell.subject, TuneSpec) for cell in left)
            budgets, leave_out = ((TUNED_AT,), True) if tunes else (self.job.budgets, self.job.leave_out)
            preflight.check(self.vlm, [*self.job.baselines, *trained], asked, budgets, leave_out)

    def report(self, out: Path) -> None:
        """Page and tables in the folder `out`, from the records alone; then the short table."""
        job, before = self.job, seen.commits(self.store_root)
        found = report.read(self.store_root, self.subject)
        made = report.report(found, out, title=job.title or job.name, command=f"diffprune run {job.name}", asked=self.setting)
        seen.note(out, before)
        print(f"\n{report.summary(found, asked=self.setting)}\n\nreport: {open_blobs(out)}/{made['html'].name}", flush=True)

    def summary(self) -> str:
        """The short table."""
        return report.summary(report.read(self.store_root, self.subject), asked=self.setting)

    @property
    def subject(self) -> str:
        """Label of the method that the report is about; "" where the job chooses none."""
        return describe(registry.make("pruners", self.job.subject)).label if self.job.subject else ""

    @property
    def setting(self) -> dict[str, str]:
        """What of the job's evaluation tells its chapter of the report from others: columns of cells."""
        return settings.chapter(settings.noted(self.job))

    def show(self, stages: Sequence[str]) -> None:
        """Print what would be run, one line per method and budget, and how much of it is done."""
        self.tell_training(stages)
        done = self.store.done()
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
                _show(stage, cells, done, len(grading.stale(cells, self.store)) if stage == "evaluate" else 0)


def _planned(cell: Cell, scorer: str) -> Cell:
    """A cell of a scorer that is not there yet, told from those of other seeds."""
    subject: Any = cell.subject
    spec: Spec = subject.pruner
    inner = {key: replace(value, weights_sha256=scorer) for key, value in spec.options if isinstance(value, Spec)}
    planned = spec.with_options(**inner) if inner else replace(spec, weights_sha256=scorer)
    return replace(cell, subject=replace(subject, pruner=planned))


def _bare(spec: Spec) -> Spec:
    """A method as its options say, without what was learnt, by itself or by what it wraps."""
    inner = {key: _bare(value) for key, value in spec.options if isinstance(value, Spec)}
    return replace(spec.with_options(**inner), weights_sha256="", places=())


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
