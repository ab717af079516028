"""What to tune for: targets, questions, guards."""

from __future__ import annotations

import math
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from diffprune.config.fields import MOST, BenchmarkSpec, Count, Real, Seed, Whole, Workers, each_once
from diffprune.core.benchmark import MAIN_SPLIT
from diffprune.core.cell import TuneKind
from diffprune.tune.solver import STEPS


class Tuning(BaseModel):
    """What to tune for.

    targets: prefill speedups, net of overhead, at `batch` rows.
    kinds: threshold, count (top-K), or both.
    benchmarks: questions asked; none given, the job's own.
    split: they are taken from, which may not be the `tested` one; none given, each benchmark's own for calibration or validation.
    tested: split on which the job is evaluated.
    protocol: whose prompts and rules; the job's unless given.
    batch: rows of a timed request.
    calibration, held_out: how many questions, over all benchmarks, of different images.
    margin: predicted speedup aims this share above the target.
    candidates: per target, tighter than needed ones included.
    least, most: guards of a threshold, in tokens.
    corrections: rounds after a verification that missed.
    repeats: timings of each held-out batch.
    curve_repeats: timings of each length.
    warmup: timings of each length that are not kept.
    threads: of torch; none leaves them as they are.
    seed: of the order in which variants are timed.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=True, validate_default=True)

    targets: tuple[Real, ...] = Field((1.5, 2.0, 2.85), min_length=1)
    kinds: tuple[TuneKind, ...] = Field(("threshold", "count"), min_length=1)
    benchmarks: tuple[BenchmarkSpec, ...] = ()
    split: str = ""
    tested: str = MAIN_SPLIT
    protocol: str = "llava"
    batch: Count = 8
    calibration: Count = 200
    held_out: Count = 200
    margin: Real = 0.02
    candidates: Whole = Field(2, ge=1, le=len(STEPS) - 1)
    least: Count = 1
    most: Count | None = None
    corrections: Whole = Field(3, ge=0, le=100)
    repeats: Count = 3
    curve_repeats: Count = Field(30, ge=3)
    warmup: Whole = Field(10, ge=0, le=MOST)
    threads: Workers | None = None
    seed: Seed = 0

    @field_validator("targets")
    @classmethod
    def _above_zero(cls, targets: tuple[float, ...]) -> tuple[float, ...]:
        for target in targets:
            if not (math.isfinite(target) and target > 0):
                raise ValueError(f"a target speedup of {target} cannot be met: give a number above 0, such as 2.0")
        return targets

    @field_validator("targets", "kinds", "benchmarks")
    @classmethod
    def _once(cls, found: tuple[Any, ...]) -> tuple[Any, ...]:
        """Of a benchmark that is named twice every question would count twice."""
        return each_once(found)

    @field_validator("margin")
    @classmethod
    def _small(cls, margin: float) -> float:
        if not 0 <= margin < 1:
            raise ValueError(f"margin is {margin}, it must be a share from 0 to below 1")
        return margin

    @model_validator(mode="after")
    def _ordered(self) -> Tuning:
        if self.most is not None and self.most < self.least:
            raise ValueError(f"most is {self.most} and least is {self.least}: needs least <= most")
        return self
