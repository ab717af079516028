"""Records arranged for the bootstrap: accuracies and paired differences of arms over benchmarks, or over kinds of question."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from diffprune.statistics import ClusterBootstrap, Difference, Estimate, Interval, average, ratio_of_sums, totals

Arm = dict[str, dict[str, str]]  # {replicate (scorer seed): {stratum: cell}}: one method at one budget
NOTHING = Estimate(float("nan"), np.full(1, np.nan), np.zeros(0, bool), 0)  # where no stratum is shared


def codes(column: pd.Series, index: pd.Index) -> np.ndarray:
    """Place of every value [R] in `index`; each category of a categorical column is looked up once."""
    if isinstance(column.dtype, pd.CategoricalDtype):
        return index.get_indexer(column.cat.categories)[column.cat.codes]
    return index.get_indexer(column)


def distinct(column: pd.Series) -> pd.Index:
    """Distinct values in the order of their text, in whatever order they were coded: so the draws are always the same."""
    return pd.Index(sorted(column.unique(), key=str), dtype=object)


class MeanCredit(ClusterBootstrap):
    """Mean credit in percent of every cell of one stratum."""

    def __init__(self, rows: pd.DataFrame, groups: pd.Index, name: str) -> None:
        """rows: cell, group and credit; groups: their keys, those of other strata too where all are drawn together."""
        cells = distinct(rows["cell"])
        self.columns = {str(cell): i for i, cell in enumerate(cells)}
        at, shape = (codes(rows["group"], groups), codes(rows["cell"], cells)), (len(groups), len(cells))
        count = totals(np.ones(len(rows)), at, shape)
        credit = totals(rows["credit"].to_numpy(float), at, shape)
        super().__init__(np.stack([credit, count], -1), count, ratio_of_sums(100), name=name)


class BootstrapTable:
    """Answers of many cells, ready for means and paired differences over strata (benchmarks, or kinds of question)."""

    def __init__(self, rows: pd.DataFrame, stratum: str) -> None:
        """rows: cell, group, credit and the column named `stratum`; rows of failed answers left out before.

        Groups that occur in several strata (the same picture asked by two benchmarks) are drawn together.
        """
        parts = {str(name): part for name, part in rows.groupby(stratum, observed=True, sort=True)}
        groups = {name: distinct(part["group"]) for name, part in parts.items()}
        every = distinct(rows["group"])
        self.together = len(parts) > 1 and len(every) < sum(map(len, groups.values()))
        self.strata = {
            name: MeanCredit(part, every, "all") if self.together else MeanCredit(part, groups[name], name)
            for name, part in parts.items()
        }

    def mean(self, arm: Arm) -> Interval:
        """Mean accuracy in percent, unweighted over the strata that every replicate has."""
        (found,) = self.estimates([arm])
        return found.interval(0.0, 100.0)

    def value(self, arm: Arm) -> float:
        """The mean alone, without its interval."""
        return self.estimates([arm])[0].value

    def difference(self, one: Arm, two: Arm) -> Difference:
        """`one` - `two` in points, over the strata and the groups that both have answered."""
        first, second = self.estimates([one, two])
        return (first - second).difference()

    def estimates(self, arms: Sequence[Arm]) -> list[Estimate]:
        """Mean over the strata that every replicate of every arm has, one estimate per arm."""
        replicates = [set(cells) for arm in arms for cells in arm.values()]
        shared = sorted(set.intersection(*replicates)) if all(arms) else []
        if not shared:
            return [NOTHING] * len(arms)
        by_stratum = []
        for name in shared:
            stratum = self.strata[name]
            by_stratum.append(stratum.estimates([[stratum.columns[arm[r][name]] for r in sorted(arm)] for arm in arms]))
        return [average(parts, together=self.together) for parts in zip(*by_stratum, strict=True)]
