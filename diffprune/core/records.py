"""Record types: one dataclass is one table of the store."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Provenance:
    """Who made a row, on what: every row in the store carries one.

    commit: of this repository ("" outside one); dirty: uncommitted changes; versions, hardware: JSON text;
    job_seed: of the job; run: the job's name; attempt: its fencing number; started: UTC, ISO 8601.
    """

    run: str
    attempt: int
    commit: str
    dirty: bool
    versions: str
    hardware: str
    job_seed: int
    started: str


# ------------------------------------------------------------------------------------------------------------------
# Records: one dataclass is one table of the store. Types map to columns, names carry units, "" means "does not apply".


@dataclass(frozen=True)
class Answered:
    """One question and what the model said, table `answers`. Nothing in it hangs on how it is graded."""

    sample: str
    group: str
    category: str
    question_type: str
    question: str
    answer: str  # decoded text as the model wrote it
    visual_total: int
    visual_kept: int
    text_tokens: int
    generated_tokens: int  # the end token included, so 0 says that the question could not be answered
    error: str  # class and message of what kept it from an answer; such a row is no wrong answer


@dataclass(frozen=True)
class Credited:
    """The grade of one answer, table `grades`: one row for each of `answers`, in the same order.

    Computed from `answers` without the model. Grades that a changed grader gives stand beside those before; of a cell those
    published last count (`store.commits.gradings`), never a mixture.
    """

    sample: str
    parsed: str
    target: str
    credit: float  # in [0, 1]
    grade_error: str  # class and message of a grader that failed on this answer; such a row is no wrong answer
    grader: str  # digest of the code that graded (`registry.grader`)


@dataclass(frozen=True)
class Prediction:
    """One answer with its grade: the view `predictions`, which joins `answers` and `grades` cell by cell, row by row."""

    sample: str
    group: str
    category: str
    question_type: str
    question: str
    answer: str  # decoded text as the model wrote it
    parsed: str
    target: str
    credit: float  # in [0, 1]
    visual_total: int
    visual_kept: int
    text_tokens: int
    generated_tokens: int
    error: str  # of the answer, else of the grade; such a row is no wrong answer

    @property
    def answered(self) -> Answered:
        """The answer alone. An error where tokens were generated is the grader's."""
        error = "" if self.generated_tokens else self.error
        return Answered(
            self.sample, self.group, self.category, self.question_type, self.question, self.answer, self.visual_total,
            self.visual_kept, self.text_tokens, self.generated_tokens, error,
        )  # fmt: skip

    def credited(self, grader: str) -> Credited:
        """The grade alone."""
        error = self.error if self.generated_tokens else ""
        return Credited(self.sample, self.parsed, self.target, self.credit, error, grader)


@dataclass(frozen=True)
class Figure:
    """The main figure of a benchmark for one cell, as the benchmark's own code says it, table `figures`: one row."""

    figure: str  # its name, such as f1_mean; "incomplete" or "failed" where the benchmark has none: the value is nan
    figure_value: float  # in the benchmark's own units
    formula: str  # how it follows from rows: mean, f1_mean, circular or paired_sum, see `core.benchmark.Formula`
    formula_categories: str  # of the rows that count, separated by commas; "" is all


@dataclass(frozen=True)
class Timing:
    """One repetition of one timed span, table `timings`. Warm-up rows are not stored.

    span: encoder, score, select, gather, overhead (their sum, timed as one), prefill, ttft, decode.
    arm:  full (unpruned), pruned, native (a sequence that was always this short).
    """

    span: str
    arm: str
    repetition: int
    value_ms: float
    visual_kept: float  # mean over the batch
    sequence: int  # tokens of the longest row
    flags: str  # space separated; the report explains each


@dataclass(frozen=True)
class Cost:
    """What a cell needs by arithmetic and what the cache really held, table `costs`. Per image, batch 1."""

    arm: str
    visual_kept: float
    text_tokens: float
    prefill_flops: float
    encoder_flops: float  # counted by torch over the picture's own tiles
    counted_flops: float  # torch's own counter over one prefill; nan where it was not run
    kv_bytes: float  # from the plan
    kv_measured_bytes: float  # from the cache object after prefill
    peak_bytes: float  # above weights; nan on devices that do not report it


@dataclass(frozen=True)
class Step:
    """One training step of one scorer, table `steps`; which scorer, its cell says."""

    step: int
    loss: float  # answer NLL, nats per token
    penalty: float
    temperature: float
    drawn_budget: str
    kept: float  # tokens let through, mean over the batch
    grad_norm: float  # before clipping
    clipped: bool  # it was above the recipe's clip
    score_sd: float  # of an image's scores, mean over images; nan where the objective is not the default one
    overlap: float  # share of the tokens that selection would keep which the draw let through, mean over images; nan likewise
    grad_cosine: float  # mean pairwise cosine of micro-batch gradients; nan between probes
    step_ms: float  # without drawing its batch
    workers: int
    validation_soft: float  # loss of the objective per answer token, nan between validations
    validation_hard: float  # NLL with tokens removed, nan between validations


@dataclass(frozen=True)
class CurvePoint:
    """Prefill latency at one sequence length, table `curve`."""

    num_rows: int  # of the timed batch
    sequence: int
    visual_kept: int
    prefill_ms: float  # median
    p10_ms: float
    p90_ms: float
    repeats: int
    fitted_ms: float  # monotone fit with a floor


@dataclass(frozen=True)
class CalibrationPicture:
    """Lengths of one question of a tuning's calibration set, table `calibration`; a method's own where it merges tokens."""

    picture: int  # in the order of the batches
    batch_index: int  # the batch it is timed and predicted in
    visual_total: int
    text_tokens: int


@dataclass(frozen=True)
class TokenScore:
    """The score of one visual token of one calibration picture, table `scores`: what a threshold is compared with."""

    picture: int
    rank: int  # 0 is the lowest
    score: float  # standard deviations from the picture's mean, a float32


@dataclass(frozen=True)
class HeldOut:
    """One timing of a tuning's verification, table `held_out`: the measured speedup is the sum over batches of the medians of
    `full`, over that of `pruned`."""

    tried_budget: str
    batch_index: int
    repetition: int
    arm: str  # full (unpruned) or pruned
    spent_ms: float  # prefill, of `pruned` with its overhead; of `full` the mean of the turn's runs
    num_rows: int  # of the batch


@dataclass(frozen=True)
class KeptToken:
    """Whether a method keeps one token of one picture shown on the page, table `kept_tokens`."""

    picture: str
    token: int
    token_kept: bool


@dataclass(frozen=True)
class Trial:
    """One candidate the tuner looked at, table `trials`; method, kind and target are its cell's."""

    value: float  # threshold in standard deviations, or tokens
    kept: float  # mean over the calibration images
    predicted_speedup: float  # net of overhead
    feasible: bool
    accuracy: float  # mean credit on the calibration split, nan where not evaluated
    accuracy_low: float = math.nan  # its 95 % interval over pictures
    accuracy_high: float = math.nan


OVERSHOOT = 0.06  # of a target: beyond it the tuner itself goes on looking


def told_verdict(verdict: str, measured: float, target: float) -> str:
    """The verdict of a choice for people: a target that is far exceeded was reached by fewer tokens than it needs."""
    return "overshoots" if verdict == "reached" and measured > (1 + OVERSHOOT) * target else verdict


@dataclass(frozen=True)
class Choice:
    """What the tuner answers for one method, kind and target (its cell's), table `choices`."""

    verdict: str  # "reached", "missed" or "unreachable"
    chosen_budget: str  # spelling, ready to use
    value: float
    kept: float
    predicted_speedup: float
    measured_speedup: float  # on held-out samples, net of overhead
    measured_low: float  # 95 % interval of measured_speedup
    measured_high: float
    num_held_out: int
    accuracy: float  # calibration split, mean credit
    best_speedup: float  # at the floor of this machine and this input length
    note: str
    accuracy_low: float = math.nan  # 95 % interval of accuracy over pictures
    accuracy_high: float = math.nan


@dataclass(frozen=True)
class SearchLook:
    """One look at one scorer that a search of training settings trains, table `search`; which method, its cell says."""

    configuration: int  # its number in the search, the same for every method; 0 is the recipe's own settings
    searched_settings: str  # JSON: what the configuration sets
    training_seed: int
    training_step: int  # steps done
    training_images: int  # images seen
    validation_hard: float  # NLL with tokens removed, nats per answer token, mean over the budgets; inf where training diverged
    trial_state: str  # of the trial in the end: "complete", "stopped" early, or "diverged"
    spent_s: float  # of training and validation since the look before


@dataclass(frozen=True)
class Outcome:
    """What happened to a cell, table `outcomes`: `ok`, or `failed` with the reason."""

    status: str
    reason: str
    rows: int
    seconds: float  # of work; of cells that are timed together an equal share of their session, so that seconds add up


TABLES: dict[str, type] = {
    "answers": Answered,
    "grades": Credited,
    "figures": Figure,
    "timings": Timing,
    "costs": Cost,
    "steps": Step,
    "curve": CurvePoint,
    "calibration": CalibrationPicture,
    "scores": TokenScore,
    "held_out": HeldOut,
    "kept_tokens": KeptToken,
    "trials": Trial,
    "choices": Choice,
    "search": SearchLook,
    "outcomes": Outcome,
}
VIEWS: dict[str, type] = {"predictions": Prediction}  # published and read like a table, kept as others
GRADED = ("grades", "figures")  # tables that hang on the grader: of a cell they count as its grades do
