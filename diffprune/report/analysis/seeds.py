"""What each scorer seed by itself says: of a difference, and whether it failed."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from diffprune.report.analysis.comparison import BOUNDS, Comparison

FAR = 10.0  # points below the median of its method's seeds from which on a seed counts as failed


@lru_cache(maxsize=4096)
def failed(chapter: Comparison, label: str, budget: str) -> tuple[int, int]:
    """(seeds of an arm that lie more than `FAR` points of mean credit below the median of its seeds, its seeds).

    An interval takes seeds to scatter about their mean; of some that fail now and then it knows too little, so they are counted.
    """
    arm = chapter.arms.get((label, budget), {})
    found = np.array([chapter.panel.value({replicate: cells}) for replicate, cells in arm.items()]) if len(arm) > 2 else np.zeros(0)
    return int((found < np.median(found) - FAR).sum()) if len(found) else 0, len(arm)


def differences(chapter: Comparison, one: str, two: str, budget: str) -> list[float]:
    """`one` minus `two` in points for each scorer seed; their mean is the difference that tables print.

    Where both have as many seeds the first stands against the first; else each seed of the one that has several against all of
    the other (both several but unequal: the seeds of `one`).
    """
    left, right = (chapter.arms.get((label, "" if label in BOUNDS else budget), {}) for label in (one, two))
    if not left or not right:
        return []
    if len(left) == len(right):
        pairs = [({a: left[a]}, {b: right[b]}) for a, b in zip(sorted(left), sorted(right), strict=True)]
    elif len(left) > 1:
        pairs = [({a: left[a]}, right) for a in sorted(left)]
    else:
        pairs = [(left, {b: right[b]}) for b in sorted(right)]
    return [chapter.panel.difference(*pair).estimate for pair in pairs]
