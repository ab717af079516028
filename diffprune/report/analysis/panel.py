"""Accuracies with intervals: one draw of question groups serves all cells, so every comparison is paired and costs nothing more.

The bootstrap is `diffprune.statistics.resampled`; here all cells of a benchmark go into one call, because a report makes some
hundred comparisons of the same answers. Seeds are drawn as there: S - 1 of S with replacement, paired where numbers agree.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from zlib import crc32

import numpy as np
import pandas as pd

from diffprune.statistics import Difference, Interval, resampled, two_sided_p

DRAWS = 2000
BLOCKS = 2000  # more groups than this are first joined at random: the same variance in expectation, bounded time
Arm = dict[str, dict[str, str]]  # {replicate: {stratum: cell}}: one method at one budget


@dataclass(frozen=True)
class BenchmarkSums:
    """Sums per group and cell, credit and questions [G C]; `drawn`: every cell's mean in every draw [DRAWS C]."""

    name: str
    credit: np.ndarray
    count: np.ndarray
    drawn: np.ndarray
    columns: dict[str, int]

    def means(self, cells: Sequence[str]) -> tuple[np.ndarray, np.ndarray, int, np.ndarray]:
        """Of cells compared with each other: means [C], drawn means [DRAWS C], questions, groups used [G]: those all answered."""
        index = [self.columns[c] for c in cells]
        credit, count = self.credit[:, index], self.count[:, index]
        shared = (count > 0).all(1) & (count == count[:, :1]).all(1)
        if not shared.any():
            return np.full(len(index), np.nan), np.full((DRAWS, len(index)), np.nan), 0, shared
        drawn = self.drawn[:, index]
        if (count[~shared] > 0).any():  # some cell lacks questions: only the common ones may be compared
            drawn = _draw(credit[shared], count[shared], self.name)
        return credit[shared].sum(0) / count[shared].sum(0), drawn, int(count[shared, 0].sum()), shared


def _draw(credit: np.ndarray, count: np.ndarray, name: str) -> np.ndarray:
    """Means [DRAWS C] over groups drawn with replacement; seeded by the stratum's name."""
    total = resampled(np.hstack([credit, count]).round(9), DRAWS, crc32(name.encode()))
    with np.errstate(invalid="ignore", divide="ignore"):
        return total[:, : credit.shape[1]] / total[:, credit.shape[1] :]


class BootstrapTable:
    """Answers of many cells, ready for means and paired differences over strata (benchmarks, or kinds of question)."""

    def __init__(self, rows: pd.DataFrame, stratum: str) -> None:
        """rows: cell, group, credit and the column named `stratum`; rows of failed answers left out before.

        Groups that occur in several strata (the same picture asked by two benchmarks) are drawn together.
        """
        sums = rows.groupby([stratum, "group", "cell"], observed=True, sort=True)["credit"].agg(["sum", "count"])
        names = [str(n) for n in sums.index.get_level_values(0).unique()]
        parts = {str(n): part.droplevel(0) for n, part in sums.groupby(level=0, observed=True, sort=True)}
        groups = [set(part.index.get_level_values(0)) for part in parts.values()]
        self.together = len(names) > 1 and len(set().union(*groups)) < sum(map(len, groups))
        every = pd.Index(sorted(set().union(*groups), key=str)) if self.together else None
        self.strata: dict[str, BenchmarkSums] = {}
        tables = {name: _sums(part, every) for name, part in parts.items()}
        credits, counts = [t[0] for t in tables.values()], [t[1] for t in tables.values()]
        drawn = _draw(np.hstack(credits), np.hstack(counts), "all") if self.together else None
        start = 0
        for name, (credit, count, columns) in tables.items():
            mine = drawn[:, start : start + len(columns)] if drawn is not None else _draw(credit, count, name)
            self.strata[name] = BenchmarkSums(name, credit, count, mine, columns)
            start += len(columns)

    def mean(self, arm: Arm) -> Interval:
        """Mean accuracy in percent, unweighted over the strata that every replicate has."""
        value, drawn, rows, groups = self._over(arm, {}, _shared(arm))
        return Interval(value, *bounds(value, drawn, groups, (0.0, 100.0)), rows, groups, len(arm))

    def difference(self, one: Arm, two: Arm) -> Difference:
        """`one` - `two` in points, over the strata and the groups that both have answered."""
        strata = [s for s in _shared(one) if s in set(_shared(two))]
        value, drawn, rows, groups = self._over(one, two, strata)
        other, drawn_other, _, _ = self._over(two, one, strata)
        low, high = bounds(value - other, drawn - drawn_other, groups)
        p = two_sided_p(drawn - drawn_other)
        return Difference(value - other, low, high, rows, groups, max(len(one), len(two)), p=p)

    def _over(self, arm: Arm, beside: Arm, strata: list[str]) -> tuple[float, np.ndarray, int, int]:
        """Value, draws, questions and groups of `arm` in percent, on groups that the arm `beside` has answered too."""
        if not strata:
            return float("nan"), np.full(DRAWS, np.nan), 0, 0
        replicates = sorted(arm)
        value, drawn, rows = 0.0, np.zeros((DRAWS, len(replicates))), 0
        used: list[np.ndarray] = []
        for s in strata:
            cells = sorted({r[s] for r in (*arm.values(), *beside.values())})
            means, draws, n, shared = self.strata[s].means(cells)
            index = [cells.index(arm[r][s]) for r in replicates]
            value, drawn = value + means[index].mean() / len(strata), drawn + draws[:, index] / len(strata)
            rows += n
            used.append(shared)
        groups = int(np.any(used, axis=0).sum()) if self.together else sum(int(u.sum()) for u in used)
        return 100 * float(value), 100 * (drawn * seed_shares(len(replicates))).sum(1), rows, groups


def _sums(part: pd.DataFrame, every: pd.Index | None) -> tuple[Any, Any, dict[str, int]]:
    """Credit and questions [G C] of one stratum, on all groups if `every` is given, in at most BLOCKS blocks."""
    total, count = part["sum"].unstack(fill_value=0.0), part["count"].unstack(fill_value=0)
    names = pd.Index(sorted(total.index, key=str)) if every is None else every  # in whatever order they were coded: the same draws
    total, count = total.reindex(names, fill_value=0.0), count.reindex(names, fill_value=0)
    columns = {str(c): i for i, c in enumerate(total.columns)}
    sums = [total.to_numpy(float), count.to_numpy(float)]
    if len(total) > BLOCKS:
        block = np.random.default_rng(0).permutation(len(total)) % BLOCKS
        order = np.argsort(block, kind="stable")
        sums = [np.add.reduceat(s[order], np.searchsorted(block[order], np.arange(BLOCKS))) for s in sums]
    return sums[0], sums[1], columns


def _shared(arm: Arm) -> list[str]:
    """Strata that every replicate has."""
    return sorted(set.intersection(*(set(cells) for cells in arm.values()))) if arm else []


def seed_shares(num: int) -> np.ndarray:
    """Share of each seed in a draw, [DRAWS num]; equal numbers of seeds get equal draws, so that seeds are paired."""
    if num == 1:
        return np.ones((DRAWS, 1))
    return np.random.default_rng(num).multinomial(num - 1, np.full(num, 1 / num), size=DRAWS) / (num - 1)


def bounds(value: float, drawn: np.ndarray, groups: int, limits: tuple[float, float] = (-np.inf, np.inf)) -> tuple[float, float]:
    """Middle 95 % of the draws; where all agree, the rule of three: the value +- 3 / groups of a full credit, 100."""
    finite = drawn[np.isfinite(drawn)]
    if not len(finite):
        return float("nan"), float("nan")
    if np.ptp(finite) < 1e-9:
        reach = 100 * min(1.0, 3 / groups)
        return max(limits[0], value - reach), min(limits[1], value + reach)
    low, high = np.percentile(finite, [2.5, 97.5])
    return float(low), float(high)
