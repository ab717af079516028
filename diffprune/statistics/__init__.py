"""Confidence intervals and verdicts: one cluster bootstrap, scorer seeds as replicates, one rule, speedups.

`bootstrap`  figures of sums over rows (means, F1, MME points, ratios, differences): groups drawn anew, seeds as replicates
`spread`     the distribution of an estimate's error: Student's t and its mixtures, with a scale of its own on each side
`interval`   what is said of a figure: intervals, ranges, differences
`verdict`    better, worse, equivalent, cannot tell; corrected for families after Holm
`speedup`    medians of ratios of timings, from rows of the store
"""

from diffprune.statistics.bootstrap import (
    DRAWS,
    LEAST_GROUPS,
    ClusterBootstrap,
    Estimate,
    average,
    ratio_of_sums,
    resampled,
    totals,
)
from diffprune.statistics.interval import Difference, Interval, Range, Retention
from diffprune.statistics.speedup import median_ratio
from diffprune.statistics.spread import Spread
from diffprune.statistics.verdict import Verdict, counted, holm, judged

__all__ = [
    "DRAWS", "LEAST_GROUPS", "ClusterBootstrap", "Difference", "Estimate", "Interval", "Range", "Retention", "Spread", "Verdict",
    "average", "counted", "holm", "judged", "median_ratio", "ratio_of_sums", "resampled", "totals",
]  # fmt: skip
