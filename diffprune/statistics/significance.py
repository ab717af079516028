"""Paired significance tests: McNemar's mid-p for independent units, sign flips (permutation) for clusters, Holm's correction."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import stats

from diffprune.statistics.interval import Array


def mcnemar(b: int, c: int) -> float:
    """Mid-p of McNemar's test on 0/1 outcomes of *independent* units (ScienceQA rows, MMBench groups, MME pairs).

    b: units of which only the first arm is right, c: only the second; 1 if b + c = 0. Mid-p counts half the probability of what
    was observed (Fagerland et al. 2013, "The McNemar test for binary matched-pairs data: mid-p and asymptotic are better than
    exact conditional").

    Raises:
        ValueError: a negative count.
    """
    if b < 0 or c < 0:
        raise ValueError(f"counts of discordant pairs are at least 0, got b={b}, c={c}")
    if b == c:
        return 1.0
    fewer, discordant = min(b, c), b + c
    return min(1.0, float(2 * stats.binom.cdf(fewer, discordant, 0.5) - stats.binom.pmf(fewer, discordant, 0.5)))


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
        p[i] = mcnemar(int((table[:, i] < -0.5).sum()), int((table[:, i] > 0.5).sum()))
    if not binary.all():
        p[~binary] = sign_flip(table[:, ~binary], seed=seed)
    return p, ["McNemar, mid-p" if exact else "sign flips" for exact in binary]
