"""A job: one Python file under `jobs/` that defines `job`, a full configuration of one run.

Every verb reads its own section and the few things they share (model, methods, budgets). A job is a frozen value; the command
line makes a changed copy, never a changed job.
"""

from __future__ import annotations

import inspect
import runpy
from collections.abc import Container, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from diffprune.core import budget as budgets_
from diffprune.core import plugins
from diffprune.core.pruner import Throttler
from diffprune.estimate import Assumed
from diffprune.evaluate import Evaluation
from diffprune.hub.manifest import FIXTURE
from diffprune.measurement import Measurement
from diffprune.models._load import spelling
from diffprune.recipe import Recipe
from diffprune.store.files import checked_name
from diffprune.train import scorers
from diffprune.tune import Tuning

SECTIONS: dict[str, type[BaseModel]] = {"train": Recipe, "tune": Tuning, "evaluate": Evaluation, "measure": Measurement}
TINY_BUDGETS = ("Share(1/3)", "Share(1/9)")
REPOSITORY = Path(__file__).parent.parent


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
        if family and family not in (known := plugins.names("models")):
            raise ValueError(f"no family {family!r}: {plugins.nearest(family, known)}")
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
                raise ValueError(f"{field} names {text!r}, which the job does not run: {plugins.nearest(text, known)}")
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
    name, given, options = plugins.parse_call(text)
    weights = {key: options.pop(key) for key in ("weights",) if key in options}
    made = plugins.load("pruners", _written(name, given, options))
    if isinstance(made, Throttler) and not weights:
        raise ValueError(f"{made.spelling} is not trained: add it to train.arms, or write {name}(weights='folder')")
    if weights and not isinstance(made, Throttler):
        raise ValueError(f"{text} learns nothing and has no weights: write {made.spelling}")
    return with_option(made.spelling, **weights) if weights else made.spelling


def with_option(spelling: str, **options: Any) -> str:
    """The same call with more keywords: `diffprune(depth=1)`, weights='a' -> `diffprune(depth=1, weights='a')`."""
    name, args, kwargs = plugins.parse_call(spelling)
    return _written(name, args, {**kwargs, **options})


def _written(name: str, args: Sequence[Any], options: Mapping[str, Any]) -> str:
    written = [repr(a) for a in args] + [f"{k}={v!r}" for k, v in sorted(options.items())]
    return f"{name}({', '.join(written)})" if written else name


# --- files ------------------------------------------------------------------------------------------------------------


def folders() -> list[Path]:
    """Where jobs are looked for: the working directory first, then the repository the package lies in."""
    return list(dict.fromkeys([Path.cwd() / "jobs", REPOSITORY / "jobs"]))


def find_job(text: str) -> Path:
    """The file of a job, by name or path.

    Raises:
        ValueError: there is none; the nearest name is given.
    """
    path = Path(text)
    if path.suffix == ".py":
        if not path.is_file():
            raise ValueError(f"no job file {text}")
        return path
    known = {file.stem: file for folder in reversed(folders()) if folder.is_dir() for file in sorted(folder.glob("*.py"))}
    if text not in known:
        hint = plugins.nearest(text, known) if known else f"there is no folder {folders()[0]}"
        raise ValueError(f"no job named {text!r}: {hint}")
    return known[text]


def load_job(text: str) -> Job:
    """The `job` a file defines.

    Raises:
        ValueError: no such job, a file that does not run, or one that defines none.
    """
    path = find_job(text)
    try:
        found = runpy.run_path(str(path), run_name="diffprune_job").get("job")
    except ValidationError as error:
        raise ValueError(f"{path}: {explain(error)}") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    except (SyntaxError, NameError, TypeError, AttributeError, ImportError, KeyError) as error:
        raise ValueError(f"{path}: {type(error).__name__}: {error}") from error
    if not isinstance(found, Job):
        raise ValueError(f"{path} defines no job: it must end with a line such as job = Job(name={path.stem!r}, ...)")
    return found


# --- the command line's changes ---------------------------------------------------------------------------------------


def configure(
    verb: str, text: str | None, name: str | None, short: Mapping[str, Any], settings: Mapping[str, Any], tiny: bool = False
) -> Job:
    """The job `text` (or a fresh one for `verb`) with the options of the command line.

    short:    --model, --pruner ... by name; None or () where not given.
    settings: `--set` pairs, dotted keys.
    tiny:     the job's family in its tiny instance and a few steps, under a name of its own; other options come on top.

    Raises:
        ValueError: one sentence on the first thing that is wrong, with the nearest valid name.
    """
    job = load_job(text) if text else None
    fresh: dict[str, Any] = {"name": verb, "baselines": ("none",)} | ({verb: {}} if verb in SECTIONS else {})
    tree = {key: value for key, value in job.model_dump().items() if value is not None} if job else fresh
    if tiny:
        for path, value in tiny_settings(job).items():
            _put(tree, path, value)
    if name is not None:
        tree["name"] = name
    for path, value in (*_long(verb, short, tree, fresh=job is None), *settings.items()):
        _put(tree, path, value)
    try:
        return Job.model_validate(tree)
    except ValidationError as error:
        raise ValueError(explain(error)) from None


def tiny_settings(job: Job | None) -> dict[str, Any]:
    """What `--tiny` changes: the model; of training the data and everything that takes long; of evaluation the data, the length of
    answers and the budgets; then the job's own `tiny`. Learned methods that name their weights are trained for a few steps instead.

    Raises:
        ValueError: the job states no family.
    """
    if job is None or not job.family:
        raise ValueError(f"--tiny needs a job that states its family; {job.name if job else 'this command'} states none")
    options = spelling(job.model)[1]
    model = f"tiny({', '.join([job.family, *(f'{key}={options[key]!r}' for key in sorted(options))])})"
    found: dict[str, Any] = {"name": f"{job.name}-tiny", "title": f"{job.title or job.name}, tiny", "model": model, "config": {}}
    arms, rest = _apart(job.baselines)
    if arms:
        found |= {"baselines": rest, "train.arms": arms}
    if job.train or arms:
        recipe = job.train or Recipe(arms=arms, workers=1)
        few = 2 * recipe.workers
        small = {
            "model": model, "seeds": recipe.seeds[:1], "workers": recipe.workers,
            "data": "world", "steps": 3, "images": few, "validation_images": few, "calibration_images": 4,
            "questions": 2, "questions_alone": 1, "micro_images": 1, "budgets": TINY_BUDGETS,
            "checkpoint_every": 2, "validate_every": 2, "coherence_every": 0,
        }  # fmt: skip
        found |= {f"train.{key}": value for key, value in small.items()}
    if job.evaluate:
        asked = tuple(_own_rows(text) for text in job.evaluate.benchmarks)
        found |= {"evaluate.benchmarks": asked, "evaluate.answer_tokens": 2, "budgets": TINY_BUDGETS}
    return found | job.tiny


def _apart(baselines: Sequence[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(learned methods without the weights they name, each once; the others)."""
    arms, rest = dict[str, None](), []
    for text in baselines:
        name, given, options = plugins.parse_call(text)
        if "weights" in options:
            arms[_written(name, given, {key: value for key, value in options.items() if key != "weights"})] = None
        else:
            rest.append(text)
    return tuple(arms), tuple(rest)


def _own_rows(text: str) -> str:
    """A published benchmark on the few rows of our own that need no download; others as they are."""
    folder = "folder" in inspect.signature(plugins.find("benchmarks", plugins.parse_call(text)[0])).parameters
    return with_option(text, folder=FIXTURE) if folder else text


def _long(verb: str, short: Mapping[str, Any], tree: Mapping[str, Any], fresh: bool) -> list[tuple[str, Any]]:
    """Short options as the settings they stand for."""
    found: list[tuple[str, Any]] = []
    given = {key: value for key, value in short.items() if value not in (None, ())}
    if "model" in given:
        found += [("model", given["model"])] + ([("train.model", given["model"])] if "train" in tree else [])
    if "pruners" in given:
        arms, rest = _split(given["pruners"])
        if arms or verb == "train":
            found += [("train.arms", arms or given["pruners"])]
        if rest and verb != "train":
            found += [("baselines", rest if "none" in rest else ("none", *rest))]
    if "budgets" in given:
        found += [("train.budgets" if verb == "train" else "budgets", given["budgets"])]
    paths = {
        "benchmarks": "evaluate.benchmarks",
        "limit": "evaluate.limit",
        "protocol": "evaluate.protocol",
        "steps": "train.steps",
        "targets": "tune.targets",
    }
    found += [(path, given[key]) for key, path in paths.items() if key in given]
    idle = [path for path, _ in found if fresh and path.partition(".")[0] in SECTIONS and path.partition(".")[0] != verb]
    if idle:
        hint = (
            "train it first, then write its weights into the spelling"
            if idle[0] == "train.arms"
            else f"give it to {idle[0].partition('.')[0]}"
        )
        raise ValueError(f"{verb} has no use for {idle[0]}: {hint}")
    return found


def _split(pruners: tuple[str, ...]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(methods to be trained, methods ready to run)."""
    untrained = {p for p in pruners if isinstance(made := plugins.load("pruners", p), Throttler) and not made.weights_hash}
    return tuple(p for p in pruners if p in untrained), tuple(p for p in pruners if p not in untrained)


def _put(tree: dict[str, Any], path: str, value: Any) -> None:
    """Set `a.b` in nested dictionaries; sections that are missing are made."""
    *parents, leaf = path.split(".")
    here = tree
    for part in parents:
        below = here.get(part)
        if not isinstance(below, dict):
            if part not in SECTIONS:
                raise ValueError(f"--set {path}: no section {part!r}: {plugins.nearest(part, SECTIONS)}")
            below = here[part] = {}
        here = below
    here[leaf] = value


# --- what pydantic found, in one sentence -----------------------------------------------------------------------------


def explain(error: ValidationError) -> str:
    """The first thing pydantic found wrong: key path, what is wrong, nearest valid key."""
    first = error.errors()[0]
    place = [str(part) for part in first["loc"]]
    path = ".".join(place)
    if first["type"] == "extra_forbidden":
        keys = _keys(error.title, place[:-1])
        return f"no setting {path!r}: {plugins.nearest(place[-1], keys)}"
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
