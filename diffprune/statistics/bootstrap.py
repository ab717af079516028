"""The bootstrap over groups: sums of groups drawn with replacement, and the interval of any figure of such sums."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

DRAWS = 10_000
Array = np.ndarray[Any, np.dtype[Any]]
Statistic = Callable[..., Array]


@dataclass(frozen=True)
class Interval:
    """An estimate with its 95 % bootstrap interval. `note` says so where the interval is a rule-of-three bound instead."""

    estimate: float
    low: float
    high: float
    num_rows: int
    num_groups: int
    num_seeds: int = 1
    note: str = ""


def group_sums(columns: Sequence[Any], groups: Any) -> Array:
    """Sums per group, float [G, len(columns) + 1]; the last column counts rows. Groups in the order of their keys.

    Raises:
        ValueError: no rows, columns of unequal length, or a value that is not finite.
    """
    codes, num = codes_of(groups)
    values = [np.asarray(column, float) for column in columns]
    for column in values:
        if column.shape != codes.shape:
            raise ValueError(f"{len(column)} credits for {len(codes)} group keys: every row needs both")
        if not np.isfinite(column).all():
            raise ValueError("a credit is nan or infinite: leave rows that failed out and report their number")
    sums = [np.bincount(codes, column, num) for column in [*values, np.ones(len(codes))]]
    return np.stack(sums, axis=1).round(9)  # rounded, so that the order of rows cannot show in the last digits


def codes_of(keys: Any) -> tuple[Array, int]:
    """Codes [rows] of the sorted distinct keys, and how many there are."""
    codes, known = pd.factorize(np.asarray(keys), sort=True)
    if not len(codes):
        raise ValueError("no rows to draw from: an interval needs at least one graded row")
    if (codes < 0).any():
        raise ValueError("a group key is missing: every row needs one")
    return np.asarray(codes), len(known)


def resampled(sums: Array, draws: int = DRAWS, seed: int = 0, strata: Any | None = None) -> Array:
    """Sums over G groups drawn with replacement, float [draws, M]; within each stratum (MME: category) if given.

    sums: float [G, M]; strata: a label per group. Each draw is kept as how often every group came, so its cost is one count and
    one product, whatever the number of rows.
    """
    rng = np.random.default_rng(seed)
    labels, num_labels = (np.zeros(len(sums), int), 1) if strata is None else codes_of(strata)
    total = np.zeros((draws, sums.shape[1]))
    for label in range(num_labels):
        part = sums[labels == label]
        num = len(part)
        step = min(draws, max(1, 200_000 // num))  # counts of one step stay in the cache
        for start in range(0, draws, step):
            some = min(step, draws - start)
            drawn = rng.integers(0, num, (some, num)) + num * np.arange(some)[:, None]
            counts = np.bincount(drawn.ravel(), minlength=some * num).reshape(some, num)
            total[start : start + some] += counts.astype(float) @ part
    return total


def two_sided_p(replicates: Array, null: float = 0.0) -> float:
    """2 min(1 + #{T <= null}, 1 + #{T >= null}) / (draws + 1), at most 1."""
    values = replicates[np.isfinite(replicates)]
    tail = min(int((values <= null).sum()), int((values >= null).sum()))
    return min(1.0, 2 * (1 + tail) / (len(values) + 1))


def bounds(replicates: Array, estimate: float, num_groups: int, unit: float, limits: tuple[float, float]) -> dict[str, Any]:
    """The middle 95 % of the finite replicates; where all agree, the rule of three: the estimate +- 3 / G units of credit."""
    values = replicates[np.isfinite(replicates)]
    if not len(values) or not np.isfinite(estimate):
        return {"low": float("nan"), "high": float("nan"), "note": "undefined"}
    low, high = (float(bound) for bound in np.quantile(values, (0.025, 0.975)))
    if np.ptp(values) > 1e-12:
        return {"low": low, "high": high}
    reach = min(1.0, 3 / num_groups) * unit
    note = f"rule of three: all draws of {num_groups} groups agree"
    return {"low": max(limits[0], estimate - reach), "high": min(limits[1], estimate + reach), "note": note}


NO_LIMITS = (-np.inf, np.inf)


def interval_of(
    statistic: Statistic,
    sums: Array,
    *,
    draws: int = DRAWS,
    seed: int = 0,
    strata: Any | None = None,
    unit: float = 1.0,
    limits: tuple[float, float] = NO_LIMITS,
) -> tuple[Interval, Array]:
    """Interval of any figure that is a function of sums over rows (F1, MME points, their differences), and its replicates.

    statistic: sums float [..., M] -> [...]; sums: of each group, as `group_sums` gives them (last column = rows);
    unit, limits: what one full credit is worth in the figure, and its range, for the rule of three.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        estimate = float(statistic(sums.sum(0)))
        replicates = np.asarray(statistic(resampled(sums, draws, seed, strata)), float)
    ends = bounds(replicates, estimate, len(sums), unit, limits)
    return Interval(estimate, num_rows=int(sums[:, -1].sum()), num_groups=len(sums), **ends), replicates
