"""What each scorer seed by itself says of a difference."""

from __future__ import annotations

from diffprune.report.analysis.comparison import BOUNDS, Comparison


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
