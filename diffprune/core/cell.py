"""Cells: frozen values of what is asked of a model, whose hash is the key of the record. A run resumes by set difference.

Keys hold names, options and content hashes, never a path: the same question has the same key on every machine and in every folder.
The hashes are of data, of weights and of the code behind every name (`Spec.source`), so that nothing old passes for new.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any, Literal

from diffprune.core.budget import Budget
from diffprune.core.pruner import Pruner
from diffprune.core.source import joined
from diffprune.core.spec import Spec

TuneKind = Literal["threshold", "count"]


@dataclass(frozen=True)
class Questions:
    """Which questions are asked. revision: of the data, a content hash; limit: at most so many, whole groups, drawn by hash."""

    benchmark: Spec
    revision: str
    protocol: str = "llava"
    split: str = "test"
    limit: int | None = None


@dataclass(frozen=True)
class EvaluateSpec:
    """Accuracy of one method at one budget on one benchmark.

    blind: every question without its picture (then the pruner is `unpruned`). answer_tokens: the most an answer may have where the
    benchmark allows more; None is the benchmark's own limit.
    """

    pruner: Spec
    budget: Budget
    questions: Questions
    batch: int = 64
    blind: bool = False
    answer_tokens: int | None = None


@dataclass(frozen=True)
class MeasureSpec:
    """Latency and cost of one method at one budget, beside the unpruned model. seed: of the order in which variants are timed, and
    so the number of the session in which they are."""

    pruner: Spec
    budget: Budget
    questions: Questions
    batch: int
    mode: str = "eager"
    seed: int = 0


@dataclass(frozen=True)
class TuneSettings:
    """All options of a tuning that change its answers; see `diffprune.tune.options.Tuning`. questions: calibration and held-out;
    graders: digests of the code that grades them (`registry.grader`): candidates were chosen by those grades."""

    questions: tuple[Questions, ...]
    graders: tuple[str, ...]
    batch: int
    calibration: int
    held_out: int
    margin: float
    candidates: int
    least: int
    most: int | None
    corrections: int
    repeats: int
    curve_repeats: int
    warmup: int
    seed: int


@dataclass(frozen=True)
class TuneSpec:
    """The budget with which one method reaches a prefill speedup, as a threshold or as a count."""

    pruner: Spec
    kind: TuneKind
    target_speedup: float
    settings: TuneSettings


@dataclass(frozen=True)
class TrialSpec:
    """One candidate of a tuning: its accuracy on the calibration questions."""

    tune: TuneSpec
    budget: Budget


@dataclass(frozen=True)
class CurveSpec:
    """Prefill latency by sequence length, on which a tuning's predictions rest."""

    settings: TuneSettings


@dataclass(frozen=True)
class OverheadSpec:
    """What one method adds before prefill, at a few kept counts."""

    pruner: Spec
    settings: TuneSettings


@dataclass(frozen=True)
class TrainSpec:
    """One scorer: the method, the hash of its recipe (seeds aside), the seed."""

    pruner: Spec
    recipe: str
    seed: int


@dataclass(frozen=True)
class SearchSpec:
    """One configuration tried by a search of training settings: the method, the hash of its recipe (seeds aside), and the seeds.

    looks: steps after which its scorers are judged on so many held-out images; the last is the end of training.
    """

    pruner: Spec
    recipe: str
    seeds: tuple[int, ...]
    validation_images: int
    looks: tuple[int, ...]


@dataclass(frozen=True)
class CalibrateSpec:
    """Answers of one method at one budget to the calibration questions of one benchmark: what the accuracy of a trial is of.

    grader: digest of the code that grades them, as in `TuneSettings`.
    """

    pruner: Spec
    budget: Budget
    questions: Questions
    grader: str = ""


@dataclass(frozen=True)
class SelectSpec:
    """Which tokens of a few pictures a method keeps at one budget. pictures: their names; revision: of the data."""

    pruner: Spec
    budget: Budget
    pictures: tuple[str, ...]
    revision: str


Subject = (
    EvaluateSpec | MeasureSpec | TuneSpec | TrialSpec | CurveSpec | OverheadSpec | TrainSpec | SearchSpec | CalibrateSpec
    | SelectSpec
)  # fmt: skip
VERBS: dict[type, str] = {
    EvaluateSpec: "evaluate", MeasureSpec: "measure", TuneSpec: "tune", TrialSpec: "trial", CurveSpec: "curve",
    OverheadSpec: "overhead", TrainSpec: "train", SearchSpec: "search", CalibrateSpec: "calibrate", SelectSpec: "select",
}  # fmt: skip


@dataclass(frozen=True)
class Method:
    """What tables and figures say of a method, told by the plug-in itself and stored beside every row. No part of a key.

    label:   name and, of variants, the options in words; base: the name alone; kind: see `Pruner.kind`.
    recipe, scorer_seed: of a trained scorer; seeds of one recipe are replicates. A rule's own seed is a replicate, too.
    """

    label: str = ""
    base: str = ""
    kind: str = ""
    reads_question: bool = False
    reference: str = ""
    recipe: str = ""
    scorer_seed: int | None = None


@dataclass(frozen=True)
class Cell:
    """One question to a model. subject: what is asked, by its type; every field of it changes the answer, so all are in the key.

    method, benchmark_label: for tables; they follow from the subject and are no part of the key.
    """

    model: Spec
    dtype: str
    subject: Subject
    method: Method = field(default=Method(), compare=False)
    benchmark_label: str = field(default="", compare=False)

    @property
    def verb(self) -> str:
        """The subject's type in a word."""
        return VERBS[type(self.subject)]

    @cached_property
    def key(self) -> str:
        """20 hexadecimal digits of the sha256 of the canonical JSON of all that is asked."""
        asked = {"verb": self.verb, "model": self.model.identity, "dtype": self.dtype, **_plain(self.subject)}
        text = json.dumps(asked, sort_keys=True, separators=(",", ":"), allow_nan=False)
        return hashlib.sha256(text.encode()).hexdigest()[:20]

    @property
    def questions(self) -> tuple[Questions, ...]:
        """The questions asked, of all benchmarks."""
        subject: Any = self.subject.tune if isinstance(self.subject, TrialSpec) else self.subject
        settings = getattr(subject, "settings", None)
        return settings.questions if settings else (subject.questions,) if hasattr(subject, "questions") else ()

    @property
    def code(self) -> str:
        """One digest of the code of method, benchmarks, graders that count and family; "" where none is known."""
        subject: Any = self.subject.tune if isinstance(self.subject, TrialSpec) else self.subject
        graders = getattr(getattr(subject, "settings", None), "graders", (getattr(subject, "grader", ""),))
        specs = [*filter(None, [self.pruner]), *(asked.benchmark for asked in self.questions), self.model]
        return joined(*(digest for spec in specs for digest in _sources(spec)), *graders)

    @property
    def pruner(self) -> Spec | None:
        """The method asked about, if it is one."""
        subject = self.subject.tune if isinstance(self.subject, TrialSpec) else self.subject
        return None if isinstance(subject, CurveSpec) else subject.pruner

    def columns(self) -> CellColumns:
        """The flat form in which the store keeps it."""
        subject: Any = self.subject
        tune: Any = subject.tune if isinstance(subject, TrialSpec) else subject
        settings = getattr(tune, "settings", None)
        asked, pruner = self.questions, self.pruner
        first = asked[0] if asked else None
        return CellColumns(
            verb=self.verb, model=str(self.model), model_sha256=self.model.weights_sha256, dtype=self.dtype,
            method=self.method.label, base_method=self.method.base, method_kind=self.method.kind,
            reads_question=self.method.reads_question, reference=self.method.reference,
            pruner=str(pruner) if pruner else "", weights_sha256=weights(pruner) if pruner else "",
            recipe=self.method.recipe, scorer_seed=self.method.scorer_seed, code=self.code,
            budget=str(subject.budget) if hasattr(subject, "budget") and not getattr(subject, "blind", False) else "",
            benchmark=" ".join(str(q.benchmark) for q in asked), benchmark_label=self.benchmark_label,
            revision=" ".join(dict.fromkeys(q.revision for q in asked)),
            protocol=first.protocol if first else "", split=first.split if first else "", limit=first.limit if first else None,
            batch=settings.batch if settings else getattr(subject, "batch", 0), blind=getattr(subject, "blind", False),
            answer_tokens=getattr(subject, "answer_tokens", None), mode=getattr(subject, "mode", "eager"),
            tuned_kind=getattr(tune, "kind", ""), target_speedup=getattr(tune, "target_speedup", None),
        )  # fmt: skip


@dataclass(frozen=True)
class CellColumns:
    """A cell as columns of every table. Text "" and None: does not apply.

    method, base_method, method_kind, reads_question, reference, recipe, scorer_seed: see `Method`; pruner: its canonical spelling.
    code: see `Cell.code`.
    budget: canonical spelling of what is kept; blind: asked without pictures; tuned_kind, target_speedup: of `tune` and `trial`.
    """

    verb: str
    model: str
    model_sha256: str
    dtype: str
    method: str
    base_method: str
    method_kind: str
    reads_question: bool
    reference: str
    pruner: str
    weights_sha256: str
    recipe: str
    scorer_seed: int | None
    code: str
    budget: str
    benchmark: str
    benchmark_label: str
    revision: str
    protocol: str
    split: str
    limit: int | None
    batch: int
    blind: bool
    answer_tokens: int | None
    mode: str
    tuned_kind: str
    target_speedup: float | None


def describe(pruner: Pruner) -> Method:
    """What a method says of itself. A diagnostic keeps the label of the method it looks at; another wrapper names both."""
    words = [_words(pruner, key, value) for key, value in pruner.spec.options if _shown(pruner, key, value)]
    if pruner.inner is not None:
        own = pruner.label + (f" ({', '.join(words)})" if words else "")
        inner = describe(pruner.inner)
        if pruner.kind == "diagnostic":
            return replace(inner, kind=str(pruner.kind))
        return replace(
            inner, label=f"{own} of {inner.label}", base=f"{pruner.label} of {inner.base}", kind=str(pruner.kind),
            reads_question=pruner.reads_question, reference=pruner.reference.arxiv or inner.reference,
            recipe=pruner.recipe or inner.recipe,
            scorer_seed=inner.scorer_seed if pruner.trained_seed is None else pruner.trained_seed,
        )  # fmt: skip
    own = ", ".join((pruner.label, *words))
    seed = next((pruner.spec.get(key, 0) for key in sorted(pruner.replicate_options)), pruner.trained_seed)
    return Method(
        label=own, base=pruner.label, kind=str(pruner.kind), reads_question=pruner.reads_question,
        reference=pruner.reference.arxiv, recipe=pruner.recipe, scorer_seed=seed,
    )  # fmt: skip


def _shown(pruner: Pruner, key: str, value: Any) -> bool:
    """Whether an option tells one method from another: not one that makes replicates, nor the method inside a wrapper."""
    return key not in pruner.replicate_options and not isinstance(value, Spec)


def _words(pruner: Pruner, key: str, value: Any) -> str:
    """An option in the words of a table: `question-aware`, `without denoiser`, `depth 2`."""
    words = pruner.option_labels.get(key, key.replace("_", "-"))
    if value is True:
        return words
    if value is False or value is None:
        return f"without {words}"
    return f"{words} {value}"


def _sources(spec: Spec) -> list[str]:
    """The digests of the code behind a value and behind what it wraps."""
    return [spec.source, *(digest for _, value in spec.options if isinstance(value, Spec) for digest in _sources(value))]


def weights(pruner: Spec) -> str:
    """The hash of what was learnt, of a wrapper that of what it wraps."""
    inner = [weights(value) for _, value in pruner.options if isinstance(value, Spec)]
    return pruner.weights_sha256 or "".join(inner)


def _plain(value: Any) -> Any:
    """Dataclasses, specs and budgets as JSON values."""
    if isinstance(value, Spec):
        return value.identity
    if isinstance(value, Budget):
        return str(value)
    if isinstance(value, tuple):
        return [_plain(one) for one in value]
    if hasattr(value, "__dataclass_fields__"):
        return {f.name: _plain(getattr(value, f.name)) for f in fields(value)}
    return value
