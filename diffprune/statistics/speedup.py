"""Speedups and ratios from timing rows: pure functions, so that every printed figure can be recomputed from the store.

Rows are `Timing` records or the table `timings` of *one* cell, or its `Rounds`. Arms of a round ran next to each other on the same
inputs, so a figure is the median of the rounds' own ratios: what slowed the machine down in a round is in both. The *overhead* is
what a method adds before prefill (score, select, gather, and what it asks of the encoder); a *net* figure charges it.

A *session* is one process that timed many cells next to each other and one unpruned arm for all of them. Scorer seeds of a method
that share a session share that arm, and what slowed a round down; and the process, whose memory happens to lie as it lies. So an
interval from one session is of its rounds, and is that session's; one from several is of the sessions.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any, TypeAlias

import numpy as np
import pandas as pd
from scipy import special

from diffprune.core.records import Timing
from diffprune.statistics.interval import Array, Interval, Range
from diffprune.statistics.spread import LEVEL

NATIVE_LIMIT = 1.10  # pruned prefill + overhead over the prefill of a natively short sequence: the project's bound
LEAST_ROUNDS = 6  # smallest and largest of 6 hold the median in 31 of 32 cases, those of 5 in 15 of 16
NET = ("prefill", "overhead")  # spans of the pruned arm in every net figure
Rounds: TypeAlias = dict[tuple[str, str], pd.Series]  # (arm, span) -> ms by round
Rows: TypeAlias = pd.DataFrame | Iterable[Timing] | Rounds


def median_ratio(above_ms: Any, below_ms: Any) -> Interval:
    """median(above / below) of two series of times [T]; position i of both is round i.

    The ratio of the two medians, which is usual, may take one from a slow spell of the machine and the other from a fast one. From
    fewer than `LEAST_ROUNDS` no interval of a median holds 95 %: then the `Range` of these ratios.

    Raises:
        ValueError: fewer than two rounds, unequal numbers of them, or a time that is not positive.
    """
    above, below = np.asarray(above_ms, float), np.asarray(below_ms, float)
    if above.shape != below.shape or above.ndim != 1 or len(above) < 2:
        raise ValueError(f"timings are compared round by round, got {above.shape} and {below.shape}: at least 2 rounds of each")
    if not (np.isfinite(above) & np.isfinite(below) & (above > 0) & (below > 0)).all():
        raise ValueError("a timing is zero, negative, infinite or nan: leave rounds that did not run out of both")
    ratios = np.sort(above / below)
    few = len(ratios) < LEAST_ROUNDS
    low, high = (ratios[0], ratios[-1]) if few else _of_median(ratios)
    return (Range if few else Interval)(float(np.median(ratios)), float(low), float(high), len(above), len(above))


def _of_median(ordered: Array) -> tuple[float, float]:
    """95 % interval of the median of T independent values, given in order, whatever their distribution."""
    k, share = _ranks(len(ordered))
    return tuple(float((1 - share) * one[k - 1] + share * one[k]) for one in (ordered, ordered[::-1]))  # type: ignore[return-value]


@lru_cache(maxsize=1024)
def _ranks(num: int) -> tuple[int, float]:
    """Rank, from either end, at which the interval of the median begins, and how far it lies on the way to the next rank.

    Of two neighbours the binomial levels enclose 95 %, interpolated as Hettmansperger and Sheather (1986, "Confidence intervals
    based on interpolated order statistics") do.
    """
    levels = 1 - 2 * special.bdtr(np.arange(num // 2 + 1) - 1, num, 0.5)  # between the k-th value from below and from above
    k = int(np.flatnonzero(levels >= LEVEL)[-1])
    assert k > 0, "too few values for an interval"
    step = (levels[k] - LEVEL) / (levels[k] - levels[k + 1])
    return k, float((num - k) * step / (k + (num - 2 * k) * step))


def rounds(rows: Rows) -> Rounds:
    """ms by round of every arm and span of one cell; spans timed several times in a round count with their mean."""
    if isinstance(rows, dict):
        return rows
    table = rows if isinstance(rows, pd.DataFrame) else pd.DataFrame([asdict(row) for row in rows])
    means = table.groupby(["arm", "span", "repetition"], observed=True)["value_ms"].mean()
    return {(str(arm), str(span)): part.droplevel([0, 1]) for (arm, span), part in means.groupby(level=[0, 1], observed=True)}


def times(rows: Rows, arm: str, *spans: str) -> pd.Series[Any]:
    """ms by round of one arm: the sum of `spans`, in the rounds in which all of them ran.

    Raises:
        ValueError: no round has them.
    """
    found = rounds(rows)
    parts = [found[arm, span] for span in spans if (arm, span) in found]
    whole = pd.concat(parts, axis=1).dropna().sum(axis=1) if len(parts) == len(spans) else pd.Series(dtype=float)
    if whole.empty:
        raise ValueError(f"no round timed {' + '.join(spans)} of arm {arm!r}: measure these spans first")
    return whole


@dataclass(frozen=True)
class Ratio:
    """A ratio of times, `above` over `below`, each an arm and the spans of it that are summed. Called with rows, its `Interval`.

    Raises ValueError on a call: no round has these spans.
    """

    above: tuple[str, tuple[str, ...]]
    below: tuple[str, tuple[str, ...]]

    def __call__(self, rows: Rows) -> Interval:
        """Of one cell."""
        return median_ratio(*self.pair(rows))

    def pair(self, rows: Rows) -> tuple[pd.Series[Any], pd.Series[Any]]:
        """ms by round above and below, of the rounds both have."""
        found = rounds(rows)
        above, below = (times(found, arm, *spans) for arm, spans in (self.above, self.below))
        shared = above.index.intersection(below.index)
        return above[shared], below[shared]


# what others call speedup; leaves out what the method costs
prefill_speedup = Ratio(("full", ("prefill",)), ("pruned", ("prefill",)))
# the headline and the target of tuning
prefill_speedup_net = Ratio(("full", ("prefill",)), ("pruned", NET))
# the same with the encoder's time in both arms, which pruning does not save
encoded_speedup_net = Ratio(("full", ("encoder", "prefill")), ("pruned", ("encoder", *NET)))
# from PIL image and text to the first token id, unpruned over pruned
ttft_speedup = Ratio(("full", ("ttft",)), ("pruned", ("ttft",)))
# over the prefill of a sequence that was always this short; `NATIVE_LIMIT` bounds it
native_ratio = Ratio(("pruned", NET), ("native", ("prefill",)))


def pooled(figure: Ratio, cells: Sequence[Rows]) -> Interval | None:
    """One of the figures above over cells: scorer seeds of one method, in one session or several. None where no cell timed its
    spans. The interval is about these scorers.

    Of one session, the mean over its cells, with the interval of the median over rounds, in each of which the cells' ratios are
    averaged; from fewer than `LEAST_ROUNDS` rounds, the `Range` of the rounds. Of several, the geometric mean over sessions, with
    Student's interval of their logarithms, which holds whatever differs between processes as well as within them; sessions that
    timed other scorers than the rest differ by that, too, which widens it. num_groups: sessions; num_rows: rounds of the shortest.
    """
    by_session: dict[tuple[float, ...], list[tuple[Interval, pd.Series[Any]]]] = {}
    for cell in map(rounds, cells):
        try:
            own, (above, below) = figure(cell), figure.pair(cell)
        except ValueError:  # this cell did not time these spans
            continue
        by_session.setdefault(_session(cell), []).append((own, above / below))
    found = [_of_session(each) for each in by_session.values()]
    if len(found) < 2:
        return found[0] if found else None
    logs = np.log([one.estimate for one in found])
    reach = special.stdtrit(len(logs) - 1, 0.5 + LEVEL / 2) * logs.std(ddof=1) / math.sqrt(len(logs))
    middle, low, high = (float(np.exp(logs.mean() + add)) for add in (0, -reach, reach))
    fewest, seeds = min(one.num_rows for one in found), max(one.num_seeds for one in found)
    return Interval(middle, low, high, fewest, len(found), seeds)


def _session(cell: Rounds) -> tuple[float, ...]:
    """What cells of one session have in common: the times of their unpruned arm."""
    return tuple(cell["full", "prefill"]) if ("full", "prefill") in cell else ()


def _of_session(each: Sequence[tuple[Interval, pd.Series[Any]]]) -> Interval:
    """Mean over the cells of one session, of each of which the figure and the ratios by round are given, with the interval of the
    rounds in which every cell ran."""
    estimate = sum(own.estimate for own, _ in each) / len(each)
    ratios = np.sort(pd.concat([by_round for _, by_round in each], axis=1).dropna().mean(axis=1).to_numpy())
    few = len(ratios) < LEAST_ROUNDS
    if few and not len(ratios):  # no round is all cells'
        low, high = min(own.low for own, _ in each), max(own.high for own, _ in each)
    else:
        low, high = (ratios[0], ratios[-1]) if few else _of_median(ratios)
    ends = min(estimate, float(low)), max(estimate, float(high))
    return (Range if few else Interval)(estimate, *ends, len(ratios), 1, len(each))
