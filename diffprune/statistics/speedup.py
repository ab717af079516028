"""Speedups and ratios from timing rows: pure functions, so that every printed figure can be recomputed from the store.

Rows are `Timing` records or the table `timings` of *one* cell, or its `Rounds`. Arms of a round ran next to each other on the same
inputs, so a ratio is one of medians, and its interval rests on the ratio of every single round. The *overhead* is what a method
adds before prefill (score, select, gather, and what it asks of the encoder); a *net* figure charges it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
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


def ratio_of_medians(above_ms: Any, below_ms: Any) -> Interval:
    """median(above) / median(below) of two series of times [T]; position i of both is round i.

    The interval is that of the median of the rounds' own ratios: what slowed the machine down in a round is in both. From fewer
    than `LEAST_ROUNDS` no interval holds 95 %: then the `Range` of these ratios.

    Raises:
        ValueError: fewer than two rounds, unequal numbers of them, or a time that is not positive.
    """
    above, below = np.asarray(above_ms, float), np.asarray(below_ms, float)
    if above.shape != below.shape or above.ndim != 1 or len(above) < 2:
        raise ValueError(f"timings are compared round by round, got {above.shape} and {below.shape}: at least 2 rounds of each")
    if not (np.isfinite(above) & np.isfinite(below) & (above > 0) & (below > 0)).all():
        raise ValueError("a timing is zero, negative, infinite or nan: leave rounds that did not run out of both")
    estimate, ratios = float(np.median(above) / np.median(below)), np.sort(above / below)
    few = len(ratios) < LEAST_ROUNDS
    low, high = (ratios[0], ratios[-1]) if few else _of_median(ratios)
    ends = min(estimate, float(low)), max(estimate, float(high))
    return (Range if few else Interval)(estimate, *ends, len(above), len(above))


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


def ratio(above: pd.Series[Any], below: pd.Series[Any]) -> Interval:
    """Median of `above` over median of `below`, over the rounds both have."""
    shared = above.index.intersection(below.index)
    return ratio_of_medians(above[shared].to_numpy(), below[shared].to_numpy())


def prefill_speedup(rows: Rows) -> Interval:
    """prefill full / prefill pruned: what others call speedup; leaves out what the method costs."""
    found = rounds(rows)
    return ratio(times(found, "full", "prefill"), times(found, "pruned", "prefill"))


def prefill_speedup_net(rows: Rows) -> Interval:
    """prefill full / (prefill pruned + overhead): the headline and the target of tuning."""
    found = rounds(rows)
    return ratio(times(found, "full", "prefill"), times(found, "pruned", *NET))


def ttft_speedup(rows: Rows) -> Interval:
    """From PIL image and text to the first token id, unpruned over pruned."""
    found = rounds(rows)
    return ratio(times(found, "full", "ttft"), times(found, "pruned", "ttft"))


def native_ratio(rows: Rows) -> Interval:
    """(prefill pruned + overhead) / prefill of a sequence that was always this short; `NATIVE_LIMIT` bounds it."""
    found = rounds(rows)
    return ratio(times(found, "pruned", *NET), times(found, "native", "prefill"))


def over_seeds(figure: Callable[[Rows], Interval], cells: Sequence[Rows]) -> Interval | None:
    """Mean over cells (scorer seeds of one method, timed apart) of one of the figures above; None where no cell timed its spans.

    Cells are independent, so the distances from the estimates to their bounds add in quadrature. Where one of them is a `Range`,
    the answer is one, too: over all rounds of all cells.
    """
    found = []
    for cell in cells:
        try:
            found.append(figure(cell))
        except ValueError:  # this cell did not time these spans
            continue
    if not found:
        return None
    num, fewest = len(found), min(f.num_rows for f in found)
    value = sum(f.estimate for f in found) / num
    if any(isinstance(f, Range) for f in found):
        return Range(value, min(f.low for f in found), max(f.high for f in found), fewest, fewest, num)
    down = math.sqrt(sum((f.estimate - f.low) ** 2 for f in found)) / num
    up = math.sqrt(sum((f.estimate - f.high) ** 2 for f in found)) / num
    return Interval(value, value - down, value + up, fewest, fewest, num)
