"""Speedups and ratios from timing rows: pure functions, so that every printed figure can be recomputed from the store.

Rows are `Timing` records or the table `timings` of *one* cell, or its `Rounds`. Arms of a round ran next to each other on the same
inputs, so a ratio is one of medians, with a bootstrap interval over rounds that are drawn in pairs. The *overhead* is what a
method adds before prefill (score, select, gather, and what it asks of the encoder); a *net* figure charges it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from typing import Any, TypeAlias

import numpy as np
import pandas as pd

from diffprune.core.records import Timing
from diffprune.statistics.bootstrap import DRAWS
from diffprune.statistics.interval import LEVEL, Interval

NATIVE_LIMIT = 1.10  # pruned prefill + overhead over the prefill of a natively short sequence: the project's bound
NET = ("prefill", "overhead")  # spans of the pruned arm in every net figure
Rounds: TypeAlias = dict[tuple[str, str], pd.Series]  # (arm, span) -> ms by round
Rows: TypeAlias = pd.DataFrame | Iterable[Timing] | Rounds


def ratio_of_medians(above_ms: Any, below_ms: Any, *, draws: int = DRAWS) -> Interval:
    """median(above) / median(below) of two series of times [T]; position i of both is round i, and rounds are drawn as pairs.

    Raises:
        ValueError: fewer than two rounds, unequal numbers of them, or a time that is not positive.
    """
    above, below = np.asarray(above_ms, float), np.asarray(below_ms, float)
    if above.shape != below.shape or above.ndim != 1 or len(above) < 2:
        raise ValueError(f"timings are compared round by round, got {above.shape} and {below.shape}: at least 2 rounds of each")
    if not (np.isfinite(above) & np.isfinite(below) & (above > 0) & (below > 0)).all():
        raise ValueError("a timing is zero, negative, infinite or nan: leave rounds that did not run out of both")
    drawn = np.random.default_rng(0).integers(0, len(above), (draws, len(above)))
    replicates = np.median(above[drawn], axis=1) / np.median(below[drawn], axis=1)
    low, high = np.quantile(replicates, LEVEL)
    return Interval(float(np.median(above) / np.median(below)), float(low), float(high), len(above), len(above))


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

    Cells are independent, so the distances from the estimates to their bounds add in quadrature.
    """
    found = []
    for cell in cells:
        try:
            found.append(figure(cell))
        except ValueError:  # this cell did not time these spans
            continue
    if not found:
        return None
    num = len(found)
    value = sum(f.estimate for f in found) / num
    down = math.sqrt(sum((f.estimate - f.low) ** 2 for f in found)) / num
    up = math.sqrt(sum((f.estimate - f.high) ** 2 for f in found)) / num
    fewest = min(f.num_rows for f in found)
    return Interval(value, value - down, value + up, fewest, fewest, num)
