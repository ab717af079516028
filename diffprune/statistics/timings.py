"""Ratios of timings that were taken in rounds."""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy import stats

from diffprune.statistics.bootstrap import DRAWS, Array, Interval


def ratio_of_medians(numerator_ms: Any, denominator_ms: Any, *, draws: int = DRAWS, seed: int = 0) -> Interval:
    """Speedup median(full) / median(pruned) of timings; position i of both is round i, and rounds are drawn as pairs.

    Raises:
        ValueError: fewer than two rounds, unequal numbers of them, or a time that is not positive.
    """
    top, bottom = np.asarray(numerator_ms, float), np.asarray(denominator_ms, float)
    if top.shape != bottom.shape or top.ndim != 1 or len(top) < 2:
        raise ValueError(f"timings are compared round by round, got {top.shape} and {bottom.shape}: at least 2 rounds of each")
    if not (np.isfinite(top) & np.isfinite(bottom) & (top > 0) & (bottom > 0)).all():
        raise ValueError("a timing is zero, negative, infinite or nan: leave rounds that did not run out of both")

    def ratio(x: Array, y: Array, axis: int = -1) -> Any:
        return np.median(x, axis=axis) / np.median(y, axis=axis)

    found = stats.bootstrap(
        (top, bottom), ratio, paired=True, vectorized=True, n_resamples=draws, batch=1000, method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval  # fmt: skip
    return Interval(float(ratio(top, bottom)), float(found.low), float(found.high), len(top), len(top))
