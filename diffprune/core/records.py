"""What is asked is a value (a cell), what is found is a record (a row of a table).

A cell's hash is its key: the same cell gives the same record, so a sweep resumes by set difference.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Cell:
    """One measurement asked for. Every field changes the answer, so every field is in the key.

    verb:       "evaluate" (accuracy) or "measure" (latency, memory, FLOPs).
    model, model_hash:   checkpoint asked for and sha256 of its weights.
    pruner, pruner_hash: spelling of the method and sha256 of what it learnt ("" for rules).
    budget:     spelling, e.g. "Keep(64)".
    benchmark, protocol, split, limit, revision: where images and questions come from.
    batch, dtype, seed: how it is run.
    mode:       free text for variants of the run itself (e.g. "eager").
    """

    verb: str
    model: str
    model_hash: str
    pruner: str
    pruner_hash: str
    budget: str
    benchmark: str
    revision: str
    protocol: str = "llava"
    split: str = "test"
    limit: int | None = None
    batch: int = 64
    dtype: str = "float32"
    seed: int = 0
    mode: str = "eager"

    @property
    def key(self) -> str:
        """20 hexadecimal digits of the sha256 of the canonical JSON of all fields."""
        text = json.dumps(asdict(self), sort_keys=True, separators=(",", ":"), allow_nan=False)
        return hashlib.sha256(text.encode()).hexdigest()[:20]


@dataclass(frozen=True)
class Provenance:
    """Who made a row, on what: every row in the store carries one.

    commit: of this repository ("" outside one); dirty: uncommitted changes; versions, hardware: JSON text;
    seed: of the job; run: the job's name; attempt: its fencing number; started: UTC, ISO 8601.
    """

    run: str
    attempt: int
    commit: str
    dirty: bool
    versions: str
    hardware: str
    seed: int
    started: str


# ------------------------------------------------------------------------------------------------------------------
# Records: one dataclass is one table of the store. Types map to columns, names carry units, "" means "does not apply".


@dataclass(frozen=True)
class Prediction:
    """One answer to one question, table `predictions`. Grades are recomputable from `answer` without the model."""

    sample: str
    group: str
    category: str
    kind: str
    question: str
    answer: str  # decoded text as the model wrote it
    parsed: str
    target: str
    credit: float  # in [0, 1]
    visual_total: int
    visual_kept: int
    text_tokens: int
    generated_tokens: int
    error: str  # class and message of a failure; such a row is no wrong answer


@dataclass(frozen=True)
class Timing:
    """One repetition of one timed span, table `timings`. Warm-up rows are not stored.

    span: encoder, score, select, gather, overhead (their sum, timed as one), prefill, ttft, decode.
    arm:  full (unpruned), pruned, native (a sequence that was always this short).
    """

    span: str
    arm: str
    round: int
    value_ms: float
    batch: int
    visual_kept: float  # mean over the batch
    sequence: int  # tokens of the longest row
    flags: str  # space separated, MEASURING section 11


@dataclass(frozen=True)
class Cost:
    """What a cell needs by arithmetic and what the cache really held, table `costs`. Per image, batch 1."""

    arm: str
    visual_kept: float
    text_tokens: float
    prefill_flops: float
    encoder_flops: float
    counted_flops: float  # torch's own counter over one prefill; nan where it was not run
    kv_bytes: float  # from the plan
    kv_measured_bytes: float  # from the cache object after prefill
    peak_bytes: float  # above weights; nan on devices that do not report it


@dataclass(frozen=True)
class Step:
    """One training step of one arm, table `steps`."""

    arm: str  # pruner spelling
    seed: int
    step: int
    loss: float  # answer NLL, nats per token
    penalty: float
    temperature: float
    budget: str
    kept: float  # tokens let through, mean over the batch
    grad_norm: float
    coherence: float  # mean pairwise cosine of micro-batch gradients (METHODS 2.12); nan between probes
    step_ms: float
    workers: int
    validation_soft: float  # NLL through the throttle, nan between validations
    validation_hard: float  # NLL with tokens removed, nan between validations


@dataclass(frozen=True)
class CurvePoint:
    """Prefill latency at one sequence length, table `curve`."""

    batch: int
    sequence: int
    visual_kept: int
    prefill_ms: float  # median
    p10_ms: float
    p90_ms: float
    repeats: int
    fitted_ms: float  # monotone fit with a floor


@dataclass(frozen=True)
class Trial:
    """One candidate the tuner looked at, table `trials`."""

    method: str
    kind: str  # "threshold" or "count"
    target_speedup: float
    value: float  # threshold in standard deviations, or tokens
    kept: float  # mean over the calibration images
    predicted_speedup: float  # net of overhead
    feasible: bool
    accuracy: float  # mean credit on the calibration split, nan where not evaluated


@dataclass(frozen=True)
class Choice:
    """What the tuner answers for one method and target, table `choices`."""

    method: str
    kind: str
    target_speedup: float
    verdict: str  # "reached", "missed" or "unreachable"
    budget: str  # spelling, ready to use
    value: float
    kept: float
    predicted_speedup: float
    measured_speedup: float  # on held-out samples, net of overhead
    low: float  # 95 % interval of measured_speedup
    high: float
    held_out: int
    accuracy: float  # calibration split, mean credit
    best_speedup: float  # at the floor of this machine and this input length
    note: str


@dataclass(frozen=True)
class Outcome:
    """What happened to a cell, table `outcomes`: `ok`, or `failed` with the reason."""

    status: str
    reason: str
    rows: int
    seconds: float


TABLES: dict[str, type] = {
    "predictions": Prediction,
    "timings": Timing,
    "costs": Cost,
    "steps": Step,
    "curve": CurvePoint,
    "trials": Trial,
    "choices": Choice,
    "outcomes": Outcome,
}
