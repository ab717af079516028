"""What is said of a figure: an interval, a range from few rounds, a paired difference, what the image contributes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class Interval:
    """A figure with its 95 % confidence interval, all three in the figure's own units (percent, points, a bare ratio).

    low, high: nan where there is no interval. num_rows: answers, or rounds of a timing; num_groups: clusters that were drawn
    (pictures); num_seeds: scorer seeds.
    """

    estimate: float
    low: float
    high: float
    num_rows: int
    num_groups: int
    num_seeds: int = 1


@dataclass(frozen=True)
class Range(Interval):
    """A ratio from so few rounds that no interval holds 95 %: low and high are the smallest and the largest of single rounds."""


@dataclass(frozen=True)
class Difference(Interval):
    """Paired difference a - b in the units of both, and how it tests; all of it from one distribution (`Spread`).

    p: two-sided, of no difference; p_outside: of a difference larger than the margin of equivalence; detectable: the difference
    that would have been found with 80 % power; scorers_only: whether a trained method stands here with one scorer seed, so that
    nothing can be said of the method, only of this scorer; counts: tokens that each of the two kept, where one was given more than
    the other, so that nothing can be said of them at one budget; () where they were given as many.
    """

    p: float = 1.0
    p_outside: float = 1.0
    detectable: float = float("inf")
    scorers_only: bool = False
    counts: tuple[float, ...] = ()


@dataclass(frozen=True)
class Retention(Interval):
    """What the image contributes, unpruned - blind, in the benchmark's units; the denominator of blind-corrected retention.

    image_bound: false where the contribution does not exceed 3 standard errors. Then there is nothing to retain, and a
    retention (pruned - blind) / (unpruned - blind) means nothing.
    """

    image_bound: bool = True
