"""Confidence intervals from bootstrap replicates: the percentile interval, and the rule of three where no replicate varies."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]
LEVEL = (0.025, 0.975)  # quantiles of the replicates: a 95 % percentile interval


@dataclass(frozen=True)
class Interval:
    """A figure with its 95 % confidence interval, all three in the figure's own units (percent, points, a bare ratio).

    low, high: nan where there is no interval. num_rows: answers, or rounds of a timing; num_groups: clusters that were drawn;
    num_seeds: scorer seeds.
    """

    estimate: float
    low: float
    high: float
    num_rows: int
    num_groups: int
    num_seeds: int = 1


@dataclass(frozen=True)
class Difference(Interval):
    """Paired difference a - b in the units of both, with its two-sided bootstrap p (see `two_sided_p`)."""

    p: float = 1.0

    @property
    def verdict(self) -> str:
        """On a: `better`, `worse`, `tie` where the interval holds 0, "" where there is no interval."""
        if self.low > 0:
            return "better"
        if self.high < 0:
            return "worse"
        return "tie" if self.low <= 0 <= self.high else ""


@dataclass(frozen=True)
class Retention(Interval):
    """What the image contributes, unpruned - blind, in the benchmark's units; the denominator of blind-corrected retention.

    image_bound: false where the contribution does not exceed 3 standard errors. Then there is nothing to retain, and a
    retention (pruned - blind) / (unpruned - blind) means nothing.
    """

    image_bound: bool = True


def percentile_interval(
    estimate: float, draws: Array, num_groups: int, full: float = 100.0, limits: tuple[float, float] = (-np.inf, np.inf)
) -> tuple[float, float]:
    """(low, high): the middle 95 % of the finite replicates; (nan, nan) where there are none.

    Where all replicates agree (no group was wrong, or no two arms differ) they say nothing about what was not seen: then the
    rule of three, estimate +- 3 / num_groups of `full`, what full credit on every row is worth. Nothing leaves `limits`.
    """
    finite = draws[np.isfinite(draws)]
    if not len(finite) or not np.isfinite(estimate):
        return float("nan"), float("nan")
    low, high = (float(end) for end in np.quantile(finite, LEVEL))
    if np.ptp(finite) < 1e-11 * abs(full):
        reach = min(1.0, 3 / max(1, num_groups)) * full
        low, high = estimate - reach, estimate + reach
    return max(limits[0], low), min(limits[1], high)


def two_sided_p(draws: Array, null: float = 0.0) -> float:
    """Two-sided bootstrap p of replicates T: 2 min(1 + #{T <= null}, 1 + #{T >= null}) / (draws + 1), at most 1."""
    finite = draws[np.isfinite(draws)]
    tail = min(int((finite <= null).sum()), int((finite >= null).sum()))
    return min(1.0, 2 * (1 + tail) / (len(finite) + 1))
