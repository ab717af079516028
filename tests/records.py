"""Builders of cells, records and provenance for tests: every value has a default, a test names those it is about."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from diffprune.core import budget as budgets
from diffprune.core import registry
from diffprune.core.cell import (
    Cell,
    CurveSpec,
    EvaluateSpec,
    MeasureSpec,
    Method,
    Questions,
    Subject,
    TrainSpec,
    TrialSpec,
    TuneKind,
    TuneSettings,
    TuneSpec,
    describe,
)
from diffprune.core.records import Choice, Cost, CurvePoint, Outcome, Prediction, Provenance, Step, Timing, Trial
from diffprune.core.spec import Spec
from diffprune.evaluate.cells import BLIND
from diffprune.vlm.load import model_spec

MODEL_SHA, REVISION = "ab" * 10, "3"
GQA = "world('gqa')"


# What is asked -------------------------------------------------------------------------------------------------------


def pruner(text: str | Spec = "grid", *, weights: str = "") -> Spec:
    """The method spelled `text`, as if weights of this hash were loaded; of a wrapper those of what it wraps."""
    asked = registry.spec("pruners", text)
    inner = {key: pruner(value, weights=weights) for key, value in asked.options if isinstance(value, Spec)}
    return asked.with_options(**inner) if inner else replace(asked, weights_sha256=weights)


def method(asked: Spec, *, recipe: str = "", seed: int | None = None) -> Method:
    """What the plug-in says of itself; recipe, seed: as if it had been trained so."""
    about = describe(registry.make("pruners", pruner(asked)))
    return replace(about, recipe=recipe, scorer_seed=seed) if recipe else about


def questions(benchmark: str | Spec = GQA, **about: Any) -> Questions:
    """Of a benchmark by its spelling, with a revision nobody has to look up."""
    return Questions(registry.spec("benchmarks", benchmark), **{"revision": REVISION} | about)


def heading(benchmark: str | Spec) -> str:
    """What a benchmark's plug-in wants above its column."""
    return str(registry.load("benchmarks", benchmark).label)


def model(name: str = "embedded", *, weights: str = MODEL_SHA) -> Spec:
    """A model as if weights of this hash were loaded."""
    return replace(model_spec(name), weights_sha256=weights)


def cell(
    subject: Subject, *, asked: Spec | None = None, on: Spec | None = None, dtype: str = "float32", recipe: str = "",
    seed: int | None = None, label: str = "",
) -> Cell:  # fmt: skip
    """A question to a model. asked: the method, for what tables say of it; on: the model; label: the benchmark's heading."""
    return Cell(on or model(), dtype, subject, method(asked, recipe=recipe, seed=seed) if asked else Method(), label)


def evaluate_cell(
    asked: str | Spec = "grid", budget: str = "Keep(16)", benchmark: str | Spec = GQA, *, weights: str = "", recipe: str = "",
    seed: int | None = None, blind: bool = False, batch: int = 64, answer_tokens: int | None = None, on: Spec | None = None,
    dtype: str = "float32", **about: Any,
) -> Cell:  # fmt: skip
    """Accuracy of one method. A bound is asked at its own budget. about: fields of `Questions`."""
    spec = pruner("unpruned" if blind else asked, weights=weights)
    kept = budgets.Share(1) if spec.name == "unpruned" else budgets.parse(budget)
    subject = EvaluateSpec(spec, kept, questions(benchmark, **about), batch, blind, answer_tokens)
    made = cell(subject, asked=spec, on=on, dtype=dtype, recipe=recipe, seed=seed, label=heading(benchmark))
    return replace(made, method=BLIND) if blind else made


def measure_cell(
    asked: str | Spec = "grid", budget: str = "Keep(16)", benchmark: str | Spec = GQA, *, weights: str = "", recipe: str = "",
    seed: int | None = None, batch: int = 8, mode: str = "eager", session: int = 0, on: Spec | None = None, dtype: str = "float32",
    **about: Any,
) -> Cell:  # fmt: skip
    """Latency of one method. about: fields of `Questions`."""
    spec = pruner(asked, weights=weights)
    subject = MeasureSpec(spec, budgets.parse(budget), questions(benchmark, **about), batch, mode, session)
    return cell(subject, asked=spec, on=on, dtype=dtype, recipe=recipe, seed=seed, label=heading(benchmark))


def settings(benchmarks: Sequence[str] = (GQA,), **changed: Any) -> TuneSettings:
    """Of a tuning."""
    asked = tuple(questions(benchmark, limit=200) for benchmark in benchmarks)
    values = {
        "questions": asked, "graders": tuple(registry.grader(one.benchmark) for one in asked),
        "batch": 8, "calibration": 200, "held_out": 200, "margin": 0.02, "candidates": 3, "least": 1,
        "most": None, "corrections": 2, "repeats": 3, "curve_repeats": 20, "warmup": 3, "seed": 0,
    }  # fmt: skip
    return TuneSettings(**values | changed)


def tune_cell(
    asked: str | Spec = "attention", kind: TuneKind = "threshold", target: float = 2.0, *, weights: str = "", recipe: str = "",
    seed: int | None = None, on: Spec | None = None, **changed: Any,
) -> Cell:  # fmt: skip
    """The budget for a target. changed: fields of `TuneSettings`."""
    spec = pruner(asked, weights=weights)
    return cell(TuneSpec(spec, kind, target, settings(**changed)), asked=spec, on=on, recipe=recipe, seed=seed)


def trial_cell(tune: Cell, budget: str) -> Cell:
    """One candidate of a question to tune."""
    assert isinstance(tune.subject, TuneSpec)
    return replace(tune, subject=TrialSpec(tune.subject, budgets.parse(budget)))


def curve_cell(**changed: Any) -> Cell:
    """Prefill by length. changed: fields of `TuneSettings`."""
    return cell(CurveSpec(settings(**changed)))


def train_cell(asked: str | Spec = "diffprune", recipe: str = "r" * 20, seed: int = 0) -> Cell:
    """One scorer."""
    spec = pruner(asked)
    return cell(TrainSpec(spec, recipe, seed), asked=spec, recipe=recipe, seed=seed)


# What is found -------------------------------------------------------------------------------------------------------


def provenance(**changed: Any) -> Provenance:
    """Of a run called `made-up`."""
    values = {
        "run": "made-up", "attempt": 1, "commit": "0" * 40, "dirty": False, "versions": "{}", "hardware": "{}", "job_seed": 0,
        "started": "2026-01-01T00:00:00+00:00",
    }  # fmt: skip
    return Provenance(**values | changed)


def prediction(number: int = 0, credit: float = 1.0, **changed: Any) -> Prediction:
    """The answer to question `number`; every question is a group of its own."""
    values = {
        "sample": f"s{number}", "group": f"g{number}", "category": "", "question_type": "", "question": "What is it?",
        "answer": "yes", "parsed": "yes", "target": "yes", "credit": credit, "visual_total": 144, "visual_kept": 16,
        "text_tokens": 20, "generated_tokens": 2, "error": "",
    }  # fmt: skip
    return Prediction(**values | changed)


def timing(value_ms: float = 1.0, **changed: Any) -> Timing:
    """One repetition of one span."""
    values = {
        "span": "prefill", "arm": "full", "repetition": 0, "value_ms": float(value_ms), "visual_kept": 16.0, "sequence": 40,
        "flags": "",
    }  # fmt: skip
    return Timing(**values | changed)


def cost(**changed: Any) -> Cost:
    """Arithmetic of one arm."""
    values = {
        "arm": "pruned", "visual_kept": 16.0, "text_tokens": 20.0, "prefill_flops": 1e9, "encoder_flops": 1e8, "counted_flops": 1e9,
        "kv_bytes": 1024.0, "kv_measured_bytes": 1024.0, "peak_bytes": math.nan,
    }  # fmt: skip
    return Cost(**values | changed)


def step(number: int = 0, loss: float = 1.0, **changed: Any) -> Step:
    """One training step."""
    values = {
        "step": number, "loss": loss, "penalty": 0.0, "temperature": 1.0, "drawn_budget": "Keep(16)", "kept": 16.0,
        "grad_norm": 1.0, "clipped": False,
        "score_sd": 1.0, "overlap": 0.5, "grad_cosine": math.nan, "step_ms": 3.0, "workers": 2, "validation_soft": math.nan,
        "validation_hard": math.nan,
    }  # fmt: skip
    return Step(**values | changed)


def curve_point(kept: int, prefill_ms: float, **changed: Any) -> CurvePoint:
    """Prefill at one length, of batches of eight with 24 text tokens."""
    values = {
        "num_rows": 8, "sequence": 24 + kept, "visual_kept": kept, "prefill_ms": prefill_ms, "p10_ms": 0.95 * prefill_ms,
        "p90_ms": 1.05 * prefill_ms, "repeats": 20, "fitted_ms": prefill_ms,
    }  # fmt: skip
    return CurvePoint(**values | changed)


def trial(value: float, kept: float, predicted_speedup: float, target: float = 2.0, accuracy: float = math.nan) -> Trial:
    """One candidate of a tuning to `target`."""
    return Trial(value, kept, predicted_speedup, predicted_speedup >= target, accuracy)


def choice(**changed: Any) -> Choice:
    """The tuner's answer: reached."""
    values = {
        "verdict": "reached", "chosen_budget": "Above(0.5)", "value": 0.5, "kept": 16.0, "predicted_speedup": 2.0,
        "measured_speedup": 2.0, "measured_low": 1.9, "measured_high": 2.1, "num_held_out": 200, "accuracy": 0.5,
        "best_speedup": 3.0, "note": "",
    }  # fmt: skip
    return Choice(**values | changed)


def outcome(rows: int = 0, status: str = "ok", reason: str = "") -> Outcome:
    """Of a cell."""
    return Outcome(status, reason, rows, 1.0)
