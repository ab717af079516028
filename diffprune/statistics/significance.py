"""Tests of paired outcomes: McNemar for independent units, sign flips for clusters, Holm for many tests at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

from diffprune.statistics.bootstrap import Array


@dataclass(frozen=True)
class McNemar:
    """p: mid-p, the default. `difference` is (c - b) / n, in [-1, 1], with its standard error."""

    p: float
    exact: float
    chi2: float
    chi2_p: float
    difference: float
    standard_error: float


def mcnemar(b: int, c: int, num_rows: int | None = None) -> McNemar:
    """McNemar's test on 0/1 outcomes of *independent* units (ScienceQA rows, MMBench groups, MME pairs); p = 1 if b + c = 0.

    b: only the full model is right, c: only the pruned one; num_rows: all pairs, discordant or not (default b + c).
    """
    if b < 0 or c < 0:
        raise ValueError(f"counts of discordant pairs are at least 0, got b={b}, c={c}")
    discordant, least = b + c, min(b, c)
    n = discordant if num_rows is None else num_rows
    if n < discordant:
        raise ValueError(f"{n} pairs cannot hold b + c = {discordant} discordant ones")
    if not discordant:
        return McNemar(1.0, 1.0, 0.0, 1.0, 0.0, 0.0)
    mid = 2 * (stats.binom.cdf(least, discordant, 0.5) - stats.binom.pmf(least, discordant, 0.5) / 2)
    exact = stats.binomtest(least, discordant, 0.5).pvalue
    chi2 = (abs(b - c) - 1) ** 2 / discordant
    error = max(0.0, discordant - (b - c) ** 2 / n) ** 0.5 / n
    return McNemar(min(1.0, float(mid)), float(exact), chi2, float(stats.chi2.sf(chi2, 1)), (c - b) / n, error)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjusted p values, in the order given."""
    p = np.asarray(p_values, float)
    order = np.argsort(p, kind="stable")
    adjusted = np.empty(len(p))
    adjusted[order] = np.minimum(np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)), 1) if len(p) else []
    return [float(value) for value in adjusted]


FLIPS = 10_000
_EXACT = 12  # up to so many clusters that differ, all sign patterns are counted


def sign_flip(differences: Any, *, flips: int = FLIPS, seed: int = 0) -> Array:
    """Two-sided p of paired differences of clusters: under the null each cluster's difference is as likely with the other sign.

    differences: [G] or [G, M], the sum of (a - b) over a cluster's rows, for M comparisons on the same clusters; soft credits are
    welcome. Returns p, [] or [M]: (1 + #{|T*| >= |T|}) / (flips + 1) with T the sum over clusters; where at most 12 clusters
    differ, the exact share of all sign patterns; 1 where none differs. The same as `scipy.stats.permutation_test` on one sample,
    but one draw of signs serves all comparisons.

    Raises:
        ValueError: a difference that is not finite.
    """
    table = np.asarray(differences, float)
    if not np.isfinite(table).all():
        raise ValueError("a difference is nan or infinite: leave rows that failed out of both arms")
    columns = np.atleast_2d(table.T).T
    reached = np.abs(columns.sum(0)) - 1e-9
    few = (columns != 0).sum(0) <= _EXACT
    p = np.ones(columns.shape[1])
    for i in np.flatnonzero(few):
        own = columns[columns[:, i] != 0, i]
        patterns = 1 - 2.0 * (np.arange(2 ** len(own))[:, None] >> np.arange(len(own)) & 1)
        p[i] = (np.abs(patterns @ own) >= reached[i]).mean()
    if not few.all():
        p[~few] = _flipped(columns[:, ~few], reached[~few], flips, seed)
    return p.reshape(table.shape[1:])


def _flipped(columns: Array, reached: Array, flips: int, seed: int) -> Array:
    """p [M] by random signs."""
    rng = np.random.default_rng(seed)
    columns = columns[(columns != 0).any(1)]
    num = len(columns)
    step, beyond = max(1, 4_000_000 // num), np.zeros(columns.shape[1])
    for start in range(0, flips, step):
        some = min(step, flips - start)
        bits = np.unpackbits(rng.integers(0, 256, (some, -(-num // 8)), np.uint8), axis=1)[:, :num]
        beyond += (np.abs(columns.sum(0) - 2 * (bits.astype(float) @ columns)) >= reached).sum(0)
    return (1 + beyond) / (flips + 1)


def paired_p(differences: Any, counts: Any, *, seed: int = 0) -> tuple[Array, list[str]]:
    """p [M] and the test behind each: McNemar's mid-p where every cluster is one 0/1 outcome, else sign flips over clusters.

    differences: [G, M] sums of (a - b) over a cluster's rows; counts: [G] rows per cluster.
    """
    table = np.asarray(differences, float)
    single = bool((np.asarray(counts) == 1).all())
    binary = single & (np.abs(table) * (1 - np.abs(table)) < 1e-9).all(0)
    p = np.empty(table.shape[1])
    for i in np.flatnonzero(binary):
        p[i] = mcnemar(int((table[:, i] < -0.5).sum()), int((table[:, i] > 0.5).sum()), len(table)).p
    if not binary.all():
        p[~binary] = sign_flip(table[:, ~binary], seed=seed)
    return p, ["McNemar, mid-p" if exact else "sign flips" for exact in binary]
