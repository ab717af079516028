"""Command-line overrides of a job: short options, `--set`, `--tiny`."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ValidationError

from diffprune.core import registry
from diffprune.core.spec import Spec
from diffprune.io.dataset_manifest import FIXTURE
from diffprune.job.files import load_job
from diffprune.job.job import SECTIONS, TINY_BUDGETS, Job, explain
from diffprune.train.recipe import MethodSettings, Recipe

READ = {  # sections, or settings of them, by verb; all of them by a verb that is not named
    "search": ("search",), "train": ("train",), "evaluate": ("train", "evaluate"),
    "tune": ("train", "tune", "evaluate.benchmarks", "evaluate.protocol", "evaluate.split"),
    "measure": ("train", "measure", "evaluate.benchmarks", "evaluate.protocol"),
    "report": tuple(f"evaluate.{name}" for name in ("protocol", "split", "limit", "batch", "answer_tokens")),  # the first chapter
}  # fmt: skip
MODELS = ("train.model", "search.recipe.model")
WORK = ("search", "train", "tune", "evaluate", "measure")
USED = {  # settings that stand in no section and that not every verb uses: their options, and the verbs that do, beside `run`
    "baselines": ("--pruner", ("tune", "evaluate", "measure")),
    "budgets": ("--budget", ("evaluate", "measure")),
    "workers": ("--workers", ("search", "train", "evaluate")),
    "gpus": ("--gpus", WORK),
    "trackers": ("--tracker", WORK),
}


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
    fresh: dict[str, Any] = {"name": verb, "baselines": ("unpruned",)}
    fresh |= {verb: {"recipe": {}} if verb == "search" else {}} if verb in SECTIONS else {}
    tree = _tree(job) if job else fresh
    few = tiny_settings(job) if tiny else {}
    for path, value in few.items():
        _put(tree, path, value)
    if name is not None:
        tree["name"] = name
    given = [*_long(verb, short, tree), *settings.items()]
    if verb == "train" and "train" in tree:  # whose processes are its recipe's
        given = [("train.workers" if path == "workers" else path, value) for path, value in given]
    _check_own(verb, [path for path, _ in given], settings)
    _check_used(verb, [path for path, _ in given], tree, job)
    for path, value in given:
        _put(tree, path, value)
    _hold_for_all(tree, {*few, *(path for path, _ in given)})
    try:
        if job is not None:
            _drop_gone(verb, tree, {path for path, _ in given})
        return Job.model_validate(tree)
    except ValidationError as error:
        raise ValueError(explain(error)) from None


def _tree(job: Job) -> dict[str, Any]:
    """Settings as nested dictionaries of values; sections that are None are left out."""
    values = {key: getattr(job, key) for key in Job.model_fields}
    return {key: _given(v) if isinstance(v, BaseModel) else v for key, v in values.items() if v is not None}


def _given(section: BaseModel) -> dict[str, Any]:
    """Of a section what was given: what was left to a default still is, as some of them are the job's (`tune.protocol`)."""
    values = {key: getattr(section, key) for key in type(section).model_fields if key in section.model_fields_set}
    return {key: _given(v) if isinstance(v, BaseModel) else v for key, v in values.items() if v is not None}


def tiny_settings(job: Job | None) -> dict[str, Any]:
    """What `--tiny` changes: the model; of training the data and everything that takes long; of evaluation the data, the length of
    answers and the budgets; then the job's own `tiny`. Learned methods that name their weights are trained for a few steps instead.

    Raises:
        ValueError: the job states no family.
    """
    if job is None or not job.family:
        raise ValueError(f"--tiny needs a job that states its family; {job.name if job else 'this command'} states none")
    model = Spec("tiny").with_options(**dict(job.model.options), family=job.family)
    found: dict[str, Any] = {"name": f"{job.name}-tiny", "title": f"{job.title or job.name}, tiny", "model": model, "config": {}}
    learned, rest = _apart(job.baselines)
    if learned:
        found |= {"baselines": rest, "train.pruners": learned}
    if job.train or learned:
        found |= _few(job.train or Recipe(pruners=learned, workers=1), model, "train")
    if job.search:
        found |= _few(job.search.recipe, model, "search.recipe")
        found |= {"search.configurations": 2, "search.images": (2, 1), "search.validation_images": 2}
    if job.evaluate:
        asked = tuple(map(_own_rows, job.evaluate.benchmarks))
        found |= {"evaluate.benchmarks": asked, "evaluate.answer_tokens": 2, "budgets": TINY_BUDGETS}
    return found | job.tiny


def _few(recipe: Recipe, model: Spec, section: str) -> dict[str, Any]:
    """Settings by which a recipe takes seconds."""
    few = 2 * recipe.workers
    small = {
        "model": model, "seeds": recipe.seeds[:1], "workers": recipe.workers,
        "data": "world", "steps": 3, "images": few, "validation_images": few, "calibration_images": 4,
        "questions": 2, "questions_alone": 1, "micro_images": 1, "budgets": TINY_BUDGETS,
        "checkpoint_every": 2, "validate_every": 2, "grad_cosine_every": 0,
    }  # fmt: skip
    return {f"{section}.{key}": value for key, value in small.items()}


def _apart(baselines: Sequence[Spec]) -> tuple[tuple[Spec, ...], tuple[Spec, ...]]:
    """(learned methods without the weights they name, each once; the others)."""
    learned = dict.fromkeys(spec.without_places() for spec in baselines if spec.place("weights"))
    return tuple(learned), tuple(spec for spec in baselines if not spec.place("weights"))


def _own_rows(benchmark: Spec) -> Spec:
    """A published benchmark on the few rows of our own that need no download; others as they are."""
    has_folder = "folder" in inspect.signature(registry.find("benchmarks", benchmark.name)).parameters
    return benchmark.at(folder=FIXTURE) if has_folder else benchmark


def _long(verb: str, short: Mapping[str, Any], tree: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Short options as the settings they stand for."""
    found: list[tuple[str, Any]] = []
    given = {key: value for key, value in short.items() if value not in (None, ())}
    recipe = "search.recipe" if verb == "search" or ("search" in tree and "train" not in tree) else "train"  # whose recipe is meant
    if "model" in given:
        found += [("model", given["model"])]
        found += [(path, given["model"]) for path in MODELS if path.partition(".")[0] in tree]
    if "scorers" in given:
        found += [(f"{recipe}.pruners", given["scorers"])]
    if "pruners" in given and verb in ("search", "train"):
        raise ValueError(f"{verb} has no use for --pruner, which names methods that are ready: name what to train with --scorer")
    if "pruners" in given:
        found += [("baselines", given["pruners"] if "unpruned" in given["pruners"] else ("unpruned", *given["pruners"]))]
    if "budgets" in given:
        found += [(f"{recipe}.budgets" if verb in ("search", "train") else "budgets", given["budgets"])]
    asks = verb if verb in ("tune", "measure") else "evaluate"  # whose questions are meant
    if verb == "measure" and len(given.get("benchmarks", ())) > 1:
        raise ValueError("measure takes its pictures from one benchmark: give --benchmark once")
    if verb == "measure" and "benchmarks" in given:
        found += [("measure.benchmark", given.pop("benchmarks")[0])]
    if verb == "tune" and "limit" in given:
        raise ValueError("tune takes its numbers of questions from tune.calibration and tune.held_out: --set tune.calibration=100")
    paths = {
        "benchmarks": f"{asks}.benchmarks",
        "limit": f"{asks}.limit",
        "protocol": f"{asks}.protocol",
        "steps": f"{recipe}.steps",
        "targets": "tune.targets",
        "trackers": "trackers",
        "workers": "workers",
        "gpus": "gpus",
    }
    return found + [(path, given[key]) for key, path in paths.items() if key in given]


def _check_own(verb: str, paths: Sequence[str], settings: Collection[str]) -> None:
    """Raises ValueError: a setting of the job itself that the verb does not use, or that no command line changes. settings: those
    that `--set` names."""
    for path in paths:
        if path.partition(".")[0] == "tiny":  # read from the job's file before anything is put into its copy
            raise ValueError(f"--set {path} would change nothing, as `tiny` is read from the job's file: give the setting itself")
        option, users = USED.get(path, ("", ()))
        if option and verb not in ("run", "demo", *users):
            told = f"--set {path}" if path in settings else option
            raise ValueError(f"{verb} has no use for {told}, which {', '.join(users)} and run use: leave it out")


def _check_used(verb: str, paths: Sequence[str], tree: Mapping[str, Any], job: Job | None) -> None:
    """Raises ValueError: a setting of a section that the verb does not read, or that is not part of the job and would come to be by
    it. A job that is told what to train trains, and a verb's own section may be made."""
    for path in paths:
        section, dot, name = path.partition(".")
        if not dot or section not in SECTIONS or name.partition(".")[0] not in SECTIONS[section].model_fields:
            continue  # `_put` says what is wrong with it
        if path in MODELS and section in tree:
            continue  # one for all sections
        if not {section, path} & {*READ.get(verb, SECTIONS)} or (job is None and section != verb in SECTIONS):
            hint = f"give it to {section}"
            if path == "train.pruners" and verb != "report":
                hint = "train it first, then name it with its weights, as in --pruner \"diffprune(weights='folder')\""
            raise ValueError(f"{verb} has no use for {path}: {hint}")
        if job is not None and section not in tree and section != verb and "train.pruners" not in paths:
            hint = f"leave it out, or write {section} into the job"
            raise ValueError(f"{job.name} has no {section}, so {path} would change nothing: {hint}")


def _hold_for_all(tree: Mapping[str, Any], paths: Collection[str]) -> None:
    """What is asked of training here holds for every method, in place of what the job says of some of them apart (`methods`)."""
    asked = {path.removeprefix("train.") for path in paths if path.startswith("train.")}
    shared = dict.fromkeys(asked & MethodSettings.model_fields.keys())
    train = tree.get("train", {})
    if shared and "methods" not in asked and train.get("methods"):
        train["methods"] = tuple(own.model_copy(update=shared) for own in train["methods"])


def _drop_gone(verb: str, tree: dict[str, Any], paths: Collection[str]) -> None:
    """Methods that the options put out of the job leave what it says of its methods, unless that was given as well: who names
    others has said nothing of them. Methods that `tune` is given join those it looks at.

    Raises:
        ValidationError: the methods cannot be those of a job.
    """
    if not {"baselines", "train", "train.pruners"} & {*paths}:
        return
    own = {"wrapped", "replaced", "tuned", "subject"} - {*paths}
    job = Job.model_validate({key: value for key, value in tree.items() if key not in {*own, "replaced", "tuned", "subject"}})
    trained = job.train.pruners if job.train else ()
    if "wrapped" in own:
        tree["wrapped"] = tuple(spec for spec in tree["wrapped"] if any(map(spec.wraps, trained)))
    known = {*job.baselines, *trained, *(tree["wrapped"] if "wrapped" in own else job.wrapped)}
    for name in own & {"replaced", "tuned"}:
        tree[name] = tuple(spec for spec in tree[name] if spec in known)
    if "subject" in own and tree.get("subject") not in known:
        tree["subject"] = None
    if verb == "tune" and "tuned" in own and tree["tuned"]:
        named = (job.baselines if "baselines" in paths else ()) + (trained if "train.pruners" in paths else ())
        tree["tuned"] = tuple(dict.fromkeys(tree["tuned"] + named))


def _put(tree: dict[str, Any], path: str, value: Any) -> None:
    """Set `a.b` in nested dictionaries; sections that are missing are made."""
    *parents, leaf = path.split(".")
    here = tree
    if parents and parents[0] not in SECTIONS and not isinstance(tree.get(parents[0]), dict):
        raise ValueError(f"--set {path}: no section {parents[0]!r}: {registry.nearest(parents[0], SECTIONS)}")
    if len(parents) > 1 and parents[0] in SECTIONS and parents[1] not in (known := SECTIONS[parents[0]].model_fields):
        raise ValueError(f"--set {path}: {parents[0]} has no setting {parents[1]!r}: {registry.nearest(parents[1], known)}")
    for part in parents:
        below = here.get(part)
        if not isinstance(below, dict):
            below = here[part] = {}
        here = below
    here[leaf] = value
