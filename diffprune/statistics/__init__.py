"""How sure we are: intervals of means, paired differences, ratios and retention, all by one bootstrap over groups.

What is drawn is always the *group* (picture, MME pair, rotations of one question), never the row: rows of a group are not
independent. A figure is a function of sums over rows, so a replicate needs only each group's sums; arms that are compared go into
the same sums and therefore see the same draw.

An *arm* is the credits of one method: [rows], or [S, rows] over S scorer seeds (row i the same question in all). With seeds, a
replicate draws groups *and* seeds, independently of each other (a crossed design; Owen 2007, "The pigeonhole bootstrap"), all
seeds on the same groups, and averages over the seeds drawn. Of S seeds it draws S - 1, because S of S would understate the
variance between seeds by the factor (S - 1) / S (Rao and Wu 1988). Three seeds remain three: where seeds differ more than
pictures do, the interval is too short (simulated: 89 to 96 % held the truth with three seeds), so show the seeds themselves too.

*parts* (one label per row: the benchmark) makes every figure the mean over benchmarks of the benchmark's own figure. Benchmarks
that share pictures must share group keys, and are then drawn together; where no group occurs in two parts, each part is drawn by
itself. So keys of unrelated benchmarks must not collide.

Credits are in [0, 1] and so are the results; ratios are bare numbers. A shuffled table gives the same result to the last digit.
"""

from diffprune.statistics.arms import (
    Difference,
    Retention,
    agreement,
    blind_corrected,
    harm_and_gain,
    mean_interval,
    paired,
    paired_difference,
    relative_accuracy,
)
from diffprune.statistics.bootstrap import DRAWS, Interval, group_sums, interval_of, resampled, two_sided_p
from diffprune.statistics.significance import McNemar, holm, mcnemar, paired_p, sign_flip
from diffprune.statistics.timings import ratio_of_medians

__all__ = [
    "DRAWS", "Difference", "Interval", "McNemar", "Retention", "agreement", "blind_corrected", "group_sums", "harm_and_gain",
    "holm", "interval_of", "mcnemar", "mean_interval", "paired", "paired_difference", "paired_p", "ratio_of_medians",
    "relative_accuracy", "resampled", "sign_flip", "two_sided_p",
]  # fmt: skip
