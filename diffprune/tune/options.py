"""What to tune for: targets, questions, guards."""

from __future__ import annotations

import math

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from diffprune.config.fields import BenchmarkSpec
from diffprune.core.cell import TuneKind
from diffprune.core.spec import Spec
from diffprune.tune.solver import STEPS


class Tuning(BaseModel):
    """What to tune for.

    targets: prefill speedups, net of overhead, at `batch` rows. kinds: thresholds, counts (top-K), or both.
    benchmarks: questions asked; calibration, held_out: how many, over all benchmarks, of different images of `split`.
    margin: predicted speedup aims this share above the target. candidates: per target, tighter than needed ones included.
    least, most: guards of a threshold. corrections: rounds after a verification that missed. repeats: timings of each held-out
    batch; curve_repeats: of each length. threads: of torch; none leaves them as they are.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=True, validate_default=True)

    targets: tuple[float, ...] = Field((1.5, 2.0, 2.85), min_length=1)
    kinds: tuple[TuneKind, ...] = Field(("threshold", "count"), min_length=1)
    benchmarks: tuple[BenchmarkSpec, ...] = Field(
        tuple(Spec("world").with_options(like=name) for name in ("gqa", "textvqa", "pope")), min_length=1
    )
    split: str = "calibration"
    protocol: str = "llava"
    batch: int = Field(8, ge=1)
    calibration: int = Field(200, ge=1)
    held_out: int = Field(200, ge=1)
    margin: float = 0.02
    candidates: int = Field(2, ge=1, le=len(STEPS) - 1)
    least: int = Field(1, ge=1)
    most: int | None = None
    corrections: int = Field(3, ge=0)
    repeats: int = Field(3, ge=1)
    curve_repeats: int = Field(30, ge=3)
    warmup: int = Field(10, ge=0)
    threads: int | None = Field(None, ge=1)
    seed: int = 0

    @field_validator("targets")
    @classmethod
    def _above_zero(cls, targets: tuple[float, ...]) -> tuple[float, ...]:
        for target in targets:
            if not (math.isfinite(target) and target > 0):
                raise ValueError(f"a target speedup of {target} cannot be met: give a number above 0, such as 2.0")
        return targets

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
