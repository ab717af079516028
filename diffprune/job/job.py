"""A job: one Python file under `jobs/` that defines `job`, a full configuration of one run.

Every verb reads its own section and the few things they share (model, methods, budgets). A job is a frozen value; the command
line makes a changed copy, never a changed job.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from diffprune.core import budget as budgets_
from diffprune.core import registry
from diffprune.core.pruner import TrainablePruner
from diffprune.evaluate.cells import Evaluation
from diffprune.store.files import checked_name
from diffprune.timing.options import Measurement
from diffprune.train.estimate import Assumed
from diffprune.train.loop import scorers
from diffprune.train.recipe import Recipe
from diffprune.tune.options import Tuning

SECTIONS: dict[str, type[BaseModel]] = {"train": Recipe, "tune": Tuning, "evaluate": Evaluation, "measure": Measurement}
TINY_BUDGETS = ("Share(1/3)", "Share(1/9)")


class Job(BaseModel):
    """What to run. A section that is None is a verb the job does not do.

    baselines: spellings that need no training, or name their weights; compared with the trained arms. `none` is the unpruned
               bound. Weights are looked for when a verb needs them.
    replaced:  methods (of `train.arms` or `baselines`) also run with tokens replaced by their mean instead of removed, a
               diagnostic of what removal itself costs; such a run takes as long as an unpruned one.
    tuned:     methods (of `train.arms` or `baselines`) that `tune` looks at, arms with their first seed; () for all of them.
    budgets:   for evaluation and measuring; training draws from `train.budgets`.
    seed:      of the job's provenance; training seeds are `train.seeds`.
    workers:   processes that share the cells (training has `train.workers`).
    family:    of the model, for `--tiny`: the same job on that family's tiny random instance, which needs no download.
    tiny:      settings (dotted, as for `--set`) that `--tiny` changes beside those it always does (`tiny_settings`).
    config:    what config.json of the model says, so that `--dry-run` can tell memory and time without a network.
    assumed:   how long questions and answers of the training data will be, for the same.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    title: str = ""
    model: str = "embedded"
    train: Recipe | None = None
    tune: Tuning | None = None
    evaluate: Evaluation | None = None
    measure: Measurement | None = None
    report: bool = True
    baselines: tuple[str, ...] = ("none", "random", "grid", "attention")
    replaced: tuple[str, ...] = ()
    tuned: tuple[str, ...] = ()
    budgets: tuple[str, ...] = ("Share(1/3)", "Share(2/9)", "Share(1/9)", "Share(1/20)")
    seed: int = 0
    workers: int = Field(2, ge=1)
    family: str = ""
    tiny: dict[str, Any] = {}
    config: dict[str, Any] = {}
    assumed: Assumed = Assumed()

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
    def _budgets(cls, found: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(dict.fromkeys(str(budgets_.parse(text)) for text in found))

    @field_validator("baselines")
    @classmethod
    def _baselines(cls, found: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(dict.fromkeys(_ready(text) for text in found))

    @model_validator(mode="after")
    def _consistent(self) -> Job:
        if self.train and self.train.model != self.model:
            raise ValueError(f"the job is about {self.model!r} but train.model is {self.train.model!r}: give both the same model")
        known = {*self.baselines, *(self.train.arms if self.train else ())}
        for field in ("replaced", "tuned"):
            for text in set(getattr(self, field)) - known:
                raise ValueError(f"{field} names {text!r}, which the job does not run: {registry.nearest(text, known)}")
        return self

    def methods(self, folder: Path, untrained: Container[Path] = (), verb: str = "evaluate") -> dict[str, str]:
        """Spellings of what a verb looks at -> the same as it can be loaded now.

        Baselines, then arms and seeds with their weights below `folder`. The two differ for scorers in `untrained`, which can only
        be loaded without their weights. `evaluate` also gets the methods to run with tokens replaced, `tune` only `tuned`.
        """
        found, also = {}, {}
        first = self.train.seeds[0] if self.train else 0
        entries = [(text, text, text, first) for text in self.baselines]
        for (arm, seed), place in self.scorers(folder).items():
            spelling = with_option(arm, weights=str(place))
            entries.append((arm, spelling, arm if place in untrained else spelling, seed))
        for name, spelling, now, seed in entries:
            if verb != "tune" or (seed == first and (not self.tuned or name in self.tuned)):
                found[spelling] = now
            if verb == "evaluate" and name in self.replaced:
                also[f"replaced(method={spelling!r})"] = f"replaced(method={now!r})"
        return found | also

    def scorers(self, folder: Path) -> dict[tuple[str, int], Path]:
        """Where the scorer of each arm and seed is, or will be, saved."""
        return scorers(self.train, folder) if self.train else {}


def _ready(text: str) -> str:
    """The canonical spelling of a method that needs no training by this job; weights it names need not be there yet."""
    name, given, options = registry.parse_call(text)
    weights = {key: options.pop(key) for key in ("weights",) if key in options}
    made = registry.load("pruners", written(name, given, options))
    if isinstance(made, TrainablePruner) and not weights:
        raise ValueError(f"{made.spelling} is not trained: add it to train.arms, or write {name}(weights='folder')")
    if weights and not isinstance(made, TrainablePruner):
        raise ValueError(f"{text} learns nothing and has no weights: write {made.spelling}")
    return with_option(made.spelling, **weights) if weights else made.spelling


def with_option(spelling: str, **options: Any) -> str:
    """The same call with more keywords: `diffprune(depth=1)`, weights='a' -> `diffprune(depth=1, weights='a')`."""
    name, args, kwargs = registry.parse_call(spelling)
    return written(name, args, {**kwargs, **options})


def written(name: str, args: Sequence[Any], options: Mapping[str, Any]) -> str:
    """A call as it is spelled, keywords sorted."""
    written = [repr(a) for a in args] + [f"{k}={v!r}" for k, v in sorted(options.items())]
    return f"{name}({', '.join(written)})" if written else name


# --- files ------------------------------------------------------------------------------------------------------------


# --- the command line's changes ---------------------------------------------------------------------------------------


# --- what pydantic found, in one sentence -----------------------------------------------------------------------------


def explain(error: ValidationError) -> str:
    """The first thing pydantic found wrong: key path, what is wrong, nearest valid key."""
    first = error.errors()[0]
    place = [str(part) for part in first["loc"]]
    path = ".".join(place)
    if first["type"] == "extra_forbidden":
        keys = _keys(error.title, place[:-1])
        return f"no setting {path!r}: {registry.nearest(place[-1], keys)}"
    reason = str(first.get("ctx", {}).get("error", first["msg"]))
    given = "" if first["type"] in ("value_error", "missing") else f", not {first['input']!r:.60}"
    return f"{path}: {reason}{given}" if path else reason


def _keys(title: str, parents: list[str]) -> list[str]:
    """Settings valid at a place below the model called `title`."""
    models: dict[str, type[BaseModel]] = {"Job": Job} | {section.__name__: section for section in SECTIONS.values()}
    model = models.get(title, Job)
    for part in parents:
        model = SECTIONS.get(part, model)
    return list(model.model_fields)
