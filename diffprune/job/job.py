"""A job: one Python file under `jobs/` that defines `job`, a full configuration of one run.

Every verb reads its own section and the few things they share (model, methods, budgets). A job is a frozen value; the command
line makes a changed copy, never a changed job. Text becomes a value here, once.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from diffprune.config.fields import BudgetValue, ModelSpec, PrunerSpec, Real, Seed, Workers, each_once
from diffprune.core import registry
from diffprune.core.budget import Budget, Share
from diffprune.core.fitted import FittedPruner
from diffprune.core.pruner import Kind
from diffprune.core.spec import Spec
from diffprune.evaluate.cells import Evaluation
from diffprune.io.names import checked_name
from diffprune.timing.options import Measurement
from diffprune.track.trackers import checked as tracker
from diffprune.train.estimate import Assumed
from diffprune.train.loop import scorers
from diffprune.train.recipe import Recipe
from diffprune.train.search import Search
from diffprune.tune.options import Tuning

SECTIONS: dict[str, type[BaseModel]] = {
    "search": Search, "train": Recipe, "tune": Tuning, "evaluate": Evaluation, "measure": Measurement,
}  # fmt: skip
TINY_BUDGETS = ("Share(1/3)", "Share(1/9)")


class Job(BaseModel):
    """What to run. A section that is None is a verb the job does not do.

    name:      of the run and its folder.
    title:     of the report.
    subject:   method of the job that the report is about, held against all others; without one DiffPrune, or the only trained one.
    model:     what is pruned: embedded, a folder, or a name of the Hub.
    search, train, tune, evaluate, measure, report: the verbs; each section's settings are shown by its own name.
    baselines: methods that need no training, or name their weights; compared with the trained ones. `unpruned` is the bound.
               Weights are looked for when a verb needs them.
    wrapped:   wrappers around methods of `train.pruners` that learn nothing themselves, such as `dpp(diffprune)`: asked with the
               scorers of the method inside, all seeds.
    replaced:  methods of the job also run with tokens replaced by their mean instead of removed, a diagnostic of what removal
               itself costs; such a run takes as long as an unpruned one.
    tuned:     methods of the job that `tune` looks at, trained ones with their first seed; () for all.
    budgets:   for evaluation and measuring; training draws from `train.budgets`.
    leave_out: budgets that a method cannot meet in this model, such as one below what the layers before its first cut see alone,
               are left out for this method; else the job is refused. It is refused for a threshold (`Above`) and a method that
               needs a count, whatever this says.
    seed:      of the job's provenance; training seeds are `train.seeds`.
    workers:   processes that share the cells (training has `train.workers`).
    gpus:      of every worker: 1, or a share, as 0.5, for two workers on one (to train and time a whole one). None: none, and
               a cluster that has some is refused, as nothing says whether to use them.
    accelerator: kind of GPU to time on, as Ray names it (H100), where a cluster has several.
    family:    of the model, for `--tiny`: the same job on that family's tiny random instance, which needs no download.
    tiny:      settings (dotted, as for `--set`) that `--tiny` changes beside those it always does (`tiny_settings`).
    config:    what config.json of the model says, so that `--dry-run` can tell memory and time without a network.
    assumed:   how long questions and answers of the training data will be, for the same.
    trackers:  wandb, mlflow: told of losses and accuracies as they come, beside TensorBoard's files, which are always written.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)

    name: str
    title: str = ""
    subject: PrunerSpec | None = None
    model: ModelSpec = Spec("embedded")
    search: Search | None = None
    train: Recipe | None = None
    tune: Tuning | None = None
    evaluate: Evaluation | None = None
    measure: Measurement | None = None
    report: bool = True
    baselines: tuple[PrunerSpec, ...] = tuple(map(Spec, ("unpruned", "random", "grid", "attention")))
    wrapped: tuple[PrunerSpec, ...] = ()
    replaced: tuple[PrunerSpec, ...] = ()
    tuned: tuple[PrunerSpec, ...] = ()
    budgets: tuple[BudgetValue, ...] = (Share(1 / 3), Share(2 / 9), Share(1 / 9), Share(1 / 20))
    leave_out: bool = False
    seed: Seed = 0
    workers: Workers = 2
    gpus: Real | None = Field(None, ge=0, le=64)
    accelerator: str = Field("", max_length=60)
    family: str = ""
    tiny: dict[str, Any] = {}
    config: dict[str, Any] = {}
    assumed: Assumed = Assumed()
    trackers: tuple[str, ...] = ()

    @field_validator("trackers")
    @classmethod
    def _installed(cls, found: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(dict.fromkeys(map(tracker, found)))

    @field_validator("family")
    @classmethod
    def _family(cls, family: str) -> str:
        if family and family not in (known := registry.names("models")):
            raise ValueError(f"no family {family!r}: {registry.nearest(family, known)}")
        return family

    @field_validator("name")
    @classmethod
    def _name(cls, name: str) -> str:
        return checked_name(name, "the name")

    @field_validator("budgets")
    @classmethod
    def _once(cls, found: tuple[Budget, ...]) -> tuple[Budget, ...]:
        return each_once(found)

    @field_validator("baselines")
    @classmethod
    def _ready(cls, found: tuple[Spec, ...]) -> tuple[Spec, ...]:
        """Methods that can run without training by this job; weights they name need not be there yet."""
        for spec in found:
            _refuse_without_weights(spec)
        return each_once(found)

    @model_validator(mode="after")
    def _consistent(self) -> Job:
        for place, recipe in (("train", self.train), ("search.recipe", self.search.recipe if self.search else None)):
            if recipe and recipe.model != self.model:
                asked = f"the job is about {str(self.model)!r} but {place}.model is {str(recipe.model)!r}"
                raise ValueError(f"{asked}: give both the same model")
        trained = self.train.pruners if self.train else ()
        for spec in self.wrapped:
            self._check_wrapper(spec, trained)
        if self.subject and getattr(registry.find("pruners", self.subject.name), "kind", None) in (Kind.BOUND, Kind.DIAGNOSTIC):
            raise ValueError(f"subject names {str(self.subject)!r}: a report is about a method that prunes")
        known = {*self.baselines, *trained, *self.wrapped}
        named = {"replaced": self.replaced, "tuned": self.tuned, "subject": (self.subject,) if self.subject else ()}
        for field, specs in named.items():
            for spec in set(specs) - known:
                hint = registry.nearest(str(spec), map(str, known))
                raise ValueError(f"{field} names {str(spec)!r}, which the job does not run: {hint}")
        return self

    def _check_wrapper(self, spec: Spec, trained: Sequence[Spec]) -> None:
        """Raises ValueError: a method that wraps none of the trained ones, or learns something itself."""
        if not any(map(spec.wraps, trained)):
            told = ", ".join(map(str, trained)) or "none"
            hint = "make it a baseline, or leave it out, as in --set wrapped=[]"
            raise ValueError(f"wrapped names {str(spec)!r}, which wraps no method of train.pruners ({told}): {hint}")
        if issubclass(registry.find("pruners", spec.name), FittedPruner):
            raise ValueError(f"wrapped names {str(spec)!r}, which learns something itself: put it into train.pruners")

    def wrappers(self, inner: Spec, ready: Spec) -> tuple[Spec, ...]:
        """The job's wrappers around a trained method, with the one that has its weights in its place."""
        return tuple(spec.around(inner, ready) for spec in self.wrapped if spec.wraps(inner))

    @property
    def tuning(self) -> Tuning | None:
        """`tune` with what it leaves to the job: benchmarks, protocol, and the split that is tested.

        Raises:
            ValueError: a model of one's own, and nobody says what to ask it.
        """
        if self.tune is None:
            return None
        own = self.evaluate
        asked = self.tune.benchmarks or (own.benchmarks if own else ())
        if not asked and self.model.name != "embedded":
            raise ValueError(f"nothing says what to ask {self.model} while tuning: name a benchmark, as in --benchmark ...")
        tested = own.split if own else self.tune.tested
        return self.tune.model_copy(update={"benchmarks": asked, "protocol": self.protocol(self.tune), "tested": tested})

    @property
    def measurement(self) -> Measurement | None:
        """`measure` with what it leaves to the job: the benchmark, the first of the job's, and the protocol.

        Raises:
            ValueError: a model of one's own, and nobody says what to ask it.
        """
        if self.measure is None:
            return None
        own = self.evaluate
        asked = self.measure.benchmark or (own.benchmarks[0] if own else None)
        if not asked and self.model.name != "embedded":
            raise ValueError(f"nothing says what to ask {self.model} while measuring: name a benchmark, as in --benchmark ...")
        return self.measure.model_copy(update={"benchmark": asked, "protocol": self.protocol(self.measure)})

    def protocol(self, section: Tuning | Measurement) -> str:
        """Whose prompts and rules `tune` or `measure` asks by: its own where they were given, else the evaluation's."""
        given = "protocol" in section.model_fields_set
        return self.evaluate.protocol if self.evaluate and not given else section.protocol

    def scorers(self, folder: Path) -> dict[tuple[Spec, int], Path]:
        """Where the scorer of each method and seed is, or will be, saved."""
        return scorers(self.train, folder) if self.train else {}


def _refuse_without_weights(spec: Spec) -> None:
    """Raises ValueError: a method, or one inside it, that has neither learnt anything nor names its weights."""
    made = registry.make("pruners", spec.without_places())
    if isinstance(made, FittedPruner) and not made.ready and not spec.place("weights"):
        raise ValueError(f"{spec} is not trained: {made.lacking}")
    for _, value in spec.options:
        if isinstance(value, Spec):
            _refuse_without_weights(value)


PLAIN = {  # pydantic's words, in ours
    "Input should be a valid tuple": "must be a list, as in [1, 2]",
    "Input should be a valid list": "must be a list, as in [1, 2]",
    "Input should be a valid integer, unable to parse string as an integer": "must be a whole number",
    "Input should be a valid integer, got a number with a fractional part": "must be a whole number",
    "Input should be a valid integer": "must be a whole number",
    "Input should be a valid number, unable to parse string as a number": "must be a number",
    "Input should be a valid number": "must be a number",
    "Input should be a valid string": "must be text",
    "Input should be a valid boolean, unable to interpret input": "must be true or false",
    "Input should be a valid boolean": "must be true or false",
    "Input should be a valid dictionary or instance of": "must hold the settings of",
    "Tuple should have at least 1 item after validation, not 0": "must name at least one",
    "Input should be": "must be",
    "Field required": "must be given",
    "Extra inputs are not permitted": "there is no such setting",
}
PYDANTIC = re.compile("|".join(map(re.escape, sorted(PLAIN, key=len, reverse=True))))


def explain(error: ValidationError) -> str:
    """What pydantic found wrong first, in one sentence: key path, what is wrong, nearest valid key. A key that is none comes before
    one that is missing, which may be the same, mistyped."""
    every = error.errors()
    first = next((one for one in every if one["type"] == "extra_forbidden"), every[0])
    place = [str(part) for part in first["loc"]]
    path = ".".join(place)
    if first["type"] == "extra_forbidden":
        keys = _keys(error.title, place[:-1])
        return f"no setting {path!r}: {registry.nearest(place[-1], keys)}"
    reason = str(first.get("ctx", {}).get("error", first["msg"]))
    reason = PYDANTIC.sub(lambda found: PLAIN[found[0]], reason)
    given = "" if first["type"] in ("value_error", "missing") else f", not {first['input']!r:.60}"
    return f"{path}: {reason}{given}" if path else reason


def _keys(title: str, parents: list[str]) -> list[str]:
    """Settings valid at a place below the model called `title`."""
    models: dict[str, type[BaseModel]] = {"Job": Job} | {section.__name__: section for section in SECTIONS.values()}
    model = models.get(title, Job)
    for part in parents:
        model = Assumed if part == "assumed" else SECTIONS.get(part, model)
    return list(model.model_fields)
