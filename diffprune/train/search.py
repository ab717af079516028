"""A search of training settings: which configurations are tried, how one is trained and looked at, and which one wins.

Every method has the same budget: as many configurations, each of the same training images, looked at after the same shares of them
on the same held-out images. What is judged is never a test question: training sources hold out images of their own
(`data/sources.py`). Trials are told apart by nothing but their settings; no cluster is known here.
"""

from __future__ import annotations

import inspect
import json
import math
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

from diffprune import data as training
from diffprune.config.fields import Count, Real, Seed, Whole
from diffprune.core import registry
from diffprune.core.cell import Cell, SearchSpec, describe
from diffprune.core.fitted import TrainablePruner
from diffprune.core.records import SearchLook
from diffprune.core.spec import Spec
from diffprune.core.vlm import VLM
from diffprune.data import TrainBatch
from diffprune.train.ahead import drawn
from diffprune.train.context import LocalContext
from diffprune.train.drawn_batches import DrawnBatches
from diffprune.train.loop import KEPT_MIB, batches
from diffprune.train.recipe import MethodSettings, Recipe
from diffprune.train.scorer_trainer import Diverged, ScorerTrainer

COMPLETE, STOPPED, DIVERGED = "complete", "stopped", "diverged"
SEARCHED = (
    "steps", "images", "learning_rate", "warmup_share", "temperature_start", "temperature_end", "anneal_share", "ease_share",
)  # fmt: skip
Range = tuple[Real, Real]


class Search(BaseModel):
    """A search of training settings, of equal budget for every method of its recipe. A method's own options to search, such as the
    weight of a penalty, it states itself (`TrainablePruner.searched`).

    recipe: methods, model, data, budgets, and the settings a search starts from: the first configuration of every method. Its steps
            times its images are the training images of every trial.
    configurations: per method; all but the first are drawn, the same ones for every method.
    images: of a step, to choose from; with half as many images a training has twice the steps.
    learning_rate: range, drawn on a logarithmic scale.
    warmup_share: range.
    temperature_start: range, drawn on a logarithmic scale.
    temperature_end: range, drawn on a logarithmic scale.
    anneal_share: range.
    ease_share: values to choose from.
    seeds: scorers of each configuration, judged by their mean; none of the recipe's, with which the winners will be compared.
    validation_images: held out, three questions each.
    halvings: looks before the end, at 1/2, 1/4 ... of the training; at each, trials that are in the worse half then are stopped.
    seed: of the drawing of configurations.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)

    recipe: Annotated[Recipe, BeforeValidator(lambda given: Recipe(**given) if isinstance(given, dict) else given)] = Recipe()
    configurations: Count = 12
    images: tuple[Count, ...] = Field((4, 3, 2), min_length=1)
    learning_rate: Range = (1e-3, 1e-2)
    warmup_share: Range = (0.0, 0.2)
    temperature_start: Range = (0.5, 4.0)
    temperature_end: Range = (0.05, 0.5)
    anneal_share: Range = (0.3, 1.0)
    ease_share: tuple[Real, ...] = Field((0.0, 0.5, 1.0), min_length=1)
    seeds: tuple[Seed, ...] = Field((1000,), min_length=1)
    validation_images: Count = 48
    halvings: Whole = Field(1, ge=0, le=10)
    seed: Seed = 0

    @field_validator("recipe")
    @classmethod
    def _plain(cls, recipe: Recipe) -> Recipe:
        for spec in recipe.pruners:
            if not issubclass(registry.find("pruners", spec.name), TrainablePruner):
                raise ValueError(f"{str(spec)!r} is not trained in steps, so there are no training settings to search")
        if recipe.methods:
            raise ValueError("a search sets its methods apart itself and starts all of them from one recipe: leave out its methods")
        return recipe

    @model_validator(mode="after")
    def _fair(self) -> Search:
        for name in ("learning_rate", "temperature_start", "temperature_end", "warmup_share", "anneal_share"):
            low, high = getattr(self, name)
            if not (0 <= low <= high < math.inf and (low > 0 or name == "warmup_share")):
                raise ValueError(f"{name} is ({low}, {high}), but must be a range of numbers above 0, the smaller first")
        if shared := sorted(set(self.seeds) & set(self.recipe.seeds)):
            raise ValueError(
                f"seeds holds {shared[0]}, a seed of the recipe: winners are compared with seeds they were not chosen by"
            )
        if max(self.images) > self.training_images:
            raise ValueError(f"images holds {max(self.images)}, more than the {self.training_images} training images of a trial")
        for spec in self.recipe.pruners:
            for number in range(self.configurations):
                self.configured(spec, number)
        return self

    @property
    def training_images(self) -> int:
        """Of every trial; less than half a step more or fewer where they cannot be split evenly."""
        return self.recipe.steps * self.recipe.images

    def settings(self, number: int) -> dict[str, Any]:
        """Shared settings of a configuration, the same for every method; 0 is the recipe's own."""
        if number == 0:
            return {name: getattr(self.recipe, name) for name in SEARCHED}
        random = np.random.default_rng([self.seed, number])
        images = int(random.choice(self.images))
        return {
            "steps": max(1, round(self.training_images / images)),
            "images": images,
            "learning_rate": _log_uniform(random, self.learning_rate),
            "warmup_share": round(random.uniform(*self.warmup_share), 3),
            "temperature_start": _log_uniform(random, self.temperature_start),
            "temperature_end": _log_uniform(random, self.temperature_end),
            "anneal_share": round(random.uniform(*self.anneal_share), 3),
            "ease_share": float(random.choice(self.ease_share)),
        }

    def options(self, method: Spec, number: int) -> dict[str, Any]:
        """Options of its own that a method searches, in one configuration; in 0 they are as the method is spelled."""
        plugin: Any = registry.find("pruners", method.name)
        random = np.random.default_rng([self.seed, number, 1])
        drawn = {name: values[int(random.integers(len(values)))] for name, values in sorted(plugin.searched.items())}
        own = inspect.signature(plugin).parameters
        return drawn if number else {name: method.get(name, own[name].default) for name in drawn}

    def configured(self, method: Spec, number: int) -> Recipe:
        """The recipe of one configuration of one method.

        Raises:
            ValueError: a setting is out of its range.
        """
        spec = registry.spec("pruners", str(method.with_options(**self.options(method, number))))  # leaves defaults out
        own = {"pruners": (spec,), "seeds": self.seeds, "workers": 1, "validate_every": 0, "grad_cosine_every": 0}
        return Recipe(**{name: getattr(self.recipe, name) for name in Recipe.model_fields} | own | self.settings(number))


def _log_uniform(random: np.random.Generator, ends: Range) -> float:
    """Three digits, which a job file can spell."""
    return float(f"{math.exp(random.uniform(math.log(ends[0]), math.log(ends[1]))):.3g}")


@dataclass(frozen=True)
class SearchTrial:
    """One configuration of one method. settings: what it sets, options of the method's own included. cell: its key in the store."""

    number: int
    method: Spec
    recipe: Recipe
    settings: dict[str, Any]
    cell: Cell

    @property
    def looks(self) -> tuple[int, ...]:
        """Steps after which it is looked at."""
        subject = self.cell.subject
        assert isinstance(subject, SearchSpec), f"a cell to {subject} is no trial"
        return subject.looks

    @property
    def winner(self) -> dict[str, Any]:
        """Its settings as a recipe names them for single methods."""
        shared = {name: self.settings[name] for name in SEARCHED}
        return MethodSettings(pruner=self.recipe.pruners[0], **shared).model_dump(mode="json", exclude_none=True)


def trials(search: Search, model: Spec, dtype: str) -> list[SearchTrial]:
    """All trials of a search, method by method.

    model, dtype: as they were loaded.
    """
    found = []
    for method in search.recipe.pruners:
        about = describe(registry.make("pruners", method))
        for number in range(search.configurations):
            recipe = search.configured(method, number)
            (spec,) = recipe.pruners
            looks = [math.ceil(recipe.steps / 2**halving) for halving in range(search.halvings, -1, -1)]
            asked = SearchSpec(spec, recipe.key(spec), search.seeds, search.validation_images, tuple(dict.fromkeys(looks)))
            settings = search.settings(number) | search.options(method, number)
            found.append(SearchTrial(number, method, recipe, settings, Cell(model, dtype, asked, about)))
    return found


class Bench:
    """What the trials of one process share: the frozen model, and batches that are drawn and encoded once."""

    def __init__(self, vlm: VLM) -> None:
        self.vlm, self.drawn = vlm, DrawnBatches(KEPT_MIB)
        self._validation: dict[tuple[Spec, int], TrainBatch] = {}

    def validation(self, data: Spec, images: int) -> TrainBatch:
        """The held-out images on which every trial is judged."""
        if (data, images) not in self._validation:
            self._validation[data, images] = training.validation(self.vlm, data, images=images)
        return self._validation[data, images]

    def looks(self, trial: SearchTrial) -> Iterator[list[SearchLook]]:
        """Train a configuration, its seeds side by side, and give what each look finds, a row per seed; the state is left open.

        Ends early where a training diverges. Nothing is kept of the scorers.

        Raises:
            BadData: the training data cannot be read.
        """
        subject = trial.cell.subject
        assert isinstance(subject, SearchSpec), f"a cell to {subject} is no trial"
        with tempfile.TemporaryDirectory() as folder:
            held_out = self.validation(trial.recipe.data, subject.validation_images)
            scorers = [_Scorer(self, trial, seed, held_out, folder) for seed in subject.seeds]
            for steps in subject.looks:
                rows = [scorer.until(steps) for scorer in scorers]
                yield rows
                if not all(math.isfinite(row.validation_hard) for row in rows):
                    return


class _Scorer:
    """One scorer of a trial, trained by the steps of any training."""

    def __init__(self, bench: Bench, trial: SearchTrial, seed: int, held_out: TrainBatch, folder: str) -> None:
        self.trial, self.seed = trial, seed
        pruner = registry.make("pruners", trial.recipe.pruners[0])
        self.trainer = ScorerTrainer(LocalContext(folder), bench.vlm, trial.recipe, pruner, seed, bench.drawn)
        self.trainer.batch = held_out
        self.stream = batches(self.trainer)

    def until(self, steps: int) -> SearchLook:
        """Train until so many steps are done, then validate."""
        began, trainer = time.perf_counter(), self.trainer
        try:
            while trainer.done < steps:
                trainer.step(drawn(trainer.context, lambda: next(self.stream)))
            hard = trainer.validate(soft=False)[1]
        except Diverged:
            hard = math.inf
        return SearchLook(
            configuration=self.trial.number, searched_settings=json.dumps(self.trial.settings), training_seed=self.seed,
            training_step=trainer.done, training_images=trainer.done * trainer.recipe.images,
            validation_hard=hard if math.isfinite(hard) else math.inf, trial_state="", spent_s=time.perf_counter() - began,
        )  # fmt: skip


def mean_hard(rows: Sequence[SearchLook]) -> float:
    """What a look is judged by: the mean over seeds."""
    return float(np.mean([row.validation_hard for row in rows]))


def state(trial: SearchTrial, rows: Sequence[SearchLook]) -> str:
    """What became of a trial that ended with these rows."""
    if any(not math.isfinite(row.validation_hard) for row in rows):
        return DIVERGED
    return COMPLETE if max(row.training_step for row in rows) == trial.looks[-1] else STOPPED


def best(asked: Sequence[SearchTrial], found: Mapping[str, Sequence[SearchLook]]) -> dict[Spec, SearchTrial]:
    """The trial of each method that is best at the end of its training; a method none of whose trials came that far has none.

    found: rows by key of the trial's cell.
    """
    won: dict[Spec, tuple[float, SearchTrial]] = {}
    for trial in asked:
        last = [row for row in found.get(trial.cell.key, ()) if row.training_step == trial.looks[-1]]
        if last and math.isfinite(mean_hard(last)) and mean_hard(last) < won.get(trial.method, (math.inf, trial))[0]:
            won[trial.method] = mean_hard(last), trial
    return {method: trial for method, (_, trial) in won.items()}


def spelled(winners: Sequence[SearchTrial]) -> str:
    """The winners as a job file's recipe names them."""
    names = "".join(f"\n        {str(trial.recipe.pruners[0])!r}," for trial in winners)
    methods = "".join(f"\n        {trial.winner!r}," for trial in winners)
    return f"    pruners=({names}\n    ),\n    methods=({methods}\n    ),"
