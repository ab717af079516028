"""The distribution of an estimate's error: a scale mixture of normals, with a scale of its own on each side.

A bootstrap of rare or skewed outcomes spreads further to one side; two scales keep that. How well a variance is known from few
groups or seeds is a scaled chi-squared, so each part of the variance is drawn as v df / chi2(df), and the parts add: with one part
this is Student's t, with several it is Weerahandi's generalized confidence interval (1993, Journal of the American Statistical
Association 88), which holds its level with three seeds, where Satterthwaite's degrees of freedom do not: they cover 88 to 92 %.

Intervals, p values, equivalence and the difference that could have been seen are all read off this one distribution, so no two of
them can contradict each other.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from scipy import optimize, special

from diffprune.statistics.interval import Array

LEVEL = 0.95  # of every interval in the project
POWER = 0.8  # of a difference that could have been seen
POINTS = 256  # of the quadrature over chi-squared variables
_LEAST = 1e-300  # a standard error of 0: certain, however small the distance
_STEPS = (1, 75)  # of the lattice: which point of the second variable goes with a point of the first


@lru_cache(maxsize=4096)
def doubts(df: float, variable: int) -> Array:
    """df / chi2(df) at equally likely points [POINTS], in an order of its own for each variable."""
    order = (np.arange(POINTS) * _STEPS[variable]) % POINTS
    return np.asarray(df / special.chdtri(df, (order + 0.5) / POINTS))


@dataclass(frozen=True)
class Part:
    """Variance of a mean over scorer seeds, how much of it the variance of groups has already, and its degrees of freedom."""

    variance: float
    in_groups: float
    df: float


@dataclass(frozen=True)
class Spread:
    """estimate; below, above [POINTS]: standard errors towards smaller and larger values, each as likely as the other."""

    estimate: float
    below: Array
    above: Array

    @staticmethod
    def of(estimate: float, below: float, above: float, df: float, seeds: Sequence[Part] = ()) -> Spread:
        """From variances: of groups, towards either side, known with `df` degrees of freedom (0: not at all).

        seeds: of each independent set of scorer seeds; two sets are one variance with the degrees of freedom of Welch (1947),
        because chi-squares of their own cover 98 % (Behrens and Fisher). A variance that does not exceed what groups have of it
        adds nothing, twice as much adds all it has beyond, and between them in proportion, so that nothing hinges on a last digit;
        of two seeds, which may be alike by chance, always all.
        """
        if df <= 0 or not math.isfinite(estimate + below + above):
            return Spread(estimate, np.full(POINTS, np.nan), np.full(POINTS, np.nan))
        variance, share, added = sum(part.variance for part in seeds), sum(part.in_groups for part in seeds), np.zeros(POINTS)
        if variance > 0:
            own = variance**2 / sum(part.variance**2 / part.df for part in seeds)
            weight = min(1.0, max(0.0, 2 * (1 - share / variance))) if own >= 2 else 1.0
            added = weight * np.maximum(0.0, variance * doubts(own, 1) - share)
        return Spread(estimate, *(np.sqrt(side * doubts(df, 0) + added) for side in (below, above)))

    @property
    def known(self) -> bool:
        """Whether anything can be said."""
        return bool(np.isfinite(self.below).all())

    def interval(self, level: float = LEVEL) -> tuple[float, float]:
        """The central interval of this level; (nan, nan) where the spread is not known."""
        tail = (1 - level) / 2
        return self.estimate - _quantile(self.below, tail), self.estimate + _quantile(self.above, tail)

    def p(self, null: float = 0.0) -> float:
        """Two-sided p of `null`: below 0.05 exactly where the 95 % interval excludes it."""
        return float(np.minimum(1.0, 2 * self._tail(null, 1 if self.estimate > null else -1)))

    def p_outside(self, margin: float) -> float:
        """p of the truth's lying outside +-`margin`: the larger of two one-sided tests (Schuirmann 1987).

        Below 0.05 exactly where the 90 % interval lies inside.
        """
        return max(self._tail(-margin, 1), self._tail(margin, -1))

    def detectable(self, level: float = LEVEL, power: float = POWER) -> float:
        """The difference that a test of this level would find with this power, by the larger standard error."""
        scale = max(self.below, self.above, key=lambda side: float(side.sum()))
        return _quantile(scale, (1 - level) / 2) + _quantile(scale, 1 - power)

    def _tail(self, null: float, sign: int) -> float:
        """One-sided p of the null: how likely an error is that leads from it to the estimate, upwards for sign 1."""
        away, scale = sign * (self.estimate - null), self.below if sign > 0 else self.above
        return float(special.ndtr(-away / np.maximum(scale, _LEAST)).mean()) if self.known else math.nan


def _quantile(scale: Array, tail: float) -> float:
    """The distance that an error exceeds with probability `tail`."""
    if not np.isfinite(scale).all():
        return math.nan
    z = -float(special.ndtri(tail))
    low, high = z * float(scale.min()), z * float(scale.max())
    if high - low <= 1e-12 * high:
        return high
    scale = np.maximum(scale, _LEAST)
    return float(optimize.brentq(lambda distance: float(special.ndtr(-distance / scale).mean()) - tail, low, high, xtol=1e-13))
