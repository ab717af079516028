"""Confidence intervals and tests: one cluster bootstrap, paired significance tests, speedups.

`bootstrap`     figures of sums over rows (means, F1, MME points, ratios, differences) over groups and scorer seeds drawn anew
`interval`      percentile intervals and the rule of three
`significance`  McNemar's mid-p, the sign-flip (permutation) test over clusters, Holm's correction
`speedup`       ratios of medians of timings, from rows of the store
"""

from diffprune.statistics.bootstrap import (
    DRAWS,
    ClusterBootstrap,
    Estimate,
    average,
    ratio_of_sums,
    resampled,
    seed_shares,
    totals,
)
from diffprune.statistics.interval import Difference, Interval, Retention, two_sided_p
from diffprune.statistics.significance import holm, mcnemar, paired_p, sign_flip
from diffprune.statistics.speedup import ratio_of_medians

__all__ = [
    "DRAWS", "ClusterBootstrap", "Difference", "Estimate", "Interval", "Retention", "average", "holm", "mcnemar",
    "paired_p", "ratio_of_medians", "ratio_of_sums", "resampled", "seed_shares", "sign_flip", "totals",
    "two_sided_p",
]  # fmt: skip
