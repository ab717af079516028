"""Figures in a benchmark's own units (F1, MME points, circular accuracy) with intervals.

A figure that is no mean cannot be averaged from rows; but each is a function of sums over groups (credit, true positives, pairs all
right), so a draw of groups needs only those sums. Which ones, the benchmark's `Formula` says. A figure that its sums do not
reproduce as the benchmark printed it is shown without an interval.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd

from diffprune.core.benchmark import Formula
from diffprune.report.analysis.panel import codes, distinct
from diffprune.statistics import ClusterBootstrap, ratio_of_sums, totals
from diffprune.statistics.bootstrap import Figure


@dataclass(frozen=True)
class Rows:
    """The rows of one benchmark: codes of group [R], cell [R] and category [R], credit [R], and whether they said and were yes."""

    group: np.ndarray
    cell: np.ndarray
    category: np.ndarray
    credit: np.ndarray
    parsed: np.ndarray
    target: np.ndarray
    shape: tuple[int, int, int]  # groups, cells, categories

    def total(self, values: np.ndarray, per_category: bool = False) -> np.ndarray:
        """Sums per group and cell [G C], or [G C K] per category."""
        axes = 2 + per_category
        return totals(values, (self.group, self.cell, self.category)[:axes], self.shape[:axes])

    def counted(self, per_category: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """Credit and number of rows."""
        return self.total(self.credit, per_category), self.total(np.ones(len(self.credit)), per_category)

    def all_right(self, per_category: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """Of units (groups, or a group's rows of one category), 0 or 1: whether all rows are right, and whether it has rows."""
        there = self.total(np.ones(len(self.credit)), per_category) > 0
        return (there & (self.total(self.credit != 1, per_category) == 0)).astype(float), there.astype(float)


@dataclass(frozen=True)
class Quantities:
    """What a figure is made of. sums: [G C M]; figure: of sums; full: its largest value."""

    sums: np.ndarray
    figure: Figure
    full: float = 100.0


def _mean(rows: Rows) -> Quantities:
    credit, count = rows.counted()
    return Quantities(np.stack([credit, count], 2), ratio_of_sums(100))


def _share(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """part / whole per category; 0 where a category has nothing, as in the benchmarks' own sums."""
    return np.divide(part, whole, out=np.zeros_like(part), where=whole > 0)


def _f1_mean(rows: Rows) -> Quantities:
    yes, said_yes, said_no = rows.target == "yes", rows.parsed == "yes", (rows.parsed == "no") | (rows.parsed == "unknown")
    parts = [rows.total(x, True) for x in (yes & said_yes, (rows.target == "no") & said_yes, yes & said_no)]

    def figure(sums: np.ndarray) -> np.ndarray:
        true, false, missed, count = np.split(sums, 4, axis=-1)
        return 100 * _share(2 * true, 2 * true + false + missed).sum(-1) / (count > 0).sum(-1)

    return Quantities(np.concatenate([*parts, rows.counted(True)[1]], 2), figure)


def _circular(rows: Rows) -> Quantities:
    right, there = rows.all_right()
    return Quantities(np.stack([right, there], 2), ratio_of_sums(100))


def _paired_sum(rows: Rows) -> Quantities:
    credit, count = rows.counted(True)
    right, there = rows.all_right(True)

    def figure(sums: np.ndarray) -> np.ndarray:
        credits, counts, pairs, all_pairs = np.split(sums, 4, axis=-1)
        points = 100 * (_share(credits, counts) + _share(pairs, all_pairs)).sum(-1)
        return np.where((counts > 0).any(-1), points, np.nan)

    return Quantities(np.concatenate([credit, count, right, there], 2), figure, 200.0 * rows.shape[2])


_QUANTITIES: Mapping[str, Callable[[Rows], Quantities]] = {
    "mean": _mean, "f1_mean": _f1_mean, "circular": _circular, "paired_sum": _paired_sum,
}  # fmt: skip


def _undefined(sums: np.ndarray) -> np.ndarray:
    return np.full(sums.shape[:-1], np.nan)


def _categories(rows: Rows) -> np.ndarray | None:
    """The category of each group, where every group has one: draws then stay within categories."""
    there = rows.counted(True)[1].sum(1) > 0
    return there.argmax(1) if there.size and (there.sum(1) == 1).all() else None


class Native(ClusterBootstrap):
    """One benchmark's figure for many cells, in every draw of groups."""

    def __init__(
        self, name: str, frame: pd.DataFrame, formula: Formula, printed: Mapping[str, float], every: pd.Index | None = None
    ) -> None:
        """frame: cell, group, category, credit, parsed, target of one benchmark; printed: cell -> what the benchmark itself says;
        every: all groups, where benchmarks share groups and are drawn together."""
        if formula.categories:
            frame = frame[frame["category"].isin(formula.categories)]
        groups = distinct(frame["group"]) if every is None else every
        cells, kinds = pd.Index(sorted(printed), dtype=object), distinct(frame["category"])
        rows = Rows(
            codes(frame["group"], groups), codes(frame["cell"], cells), codes(frame["category"], kinds),
            frame["credit"].to_numpy(float), frame["parsed"].to_numpy(object), frame["target"].to_numpy(object),
            (len(groups), len(cells), len(kinds)),
        )  # fmt: skip
        made = _QUANTITIES[formula.kind](rows)
        said = np.array([printed[cell] for cell in cells], float)
        with np.errstate(invalid="ignore", divide="ignore"):
            exact = np.allclose(made.figure(made.sums.sum(0)), said, equal_nan=True)
        super().__init__(
            made.sums, rows.counted()[1], made.figure if exact else _undefined, name=name if every is None else "all",
            strata=_categories(rows) if formula.kind == "paired_sum" and every is None else None, full=made.full,
        )  # fmt: skip
        self.formula, self.columns, self.value = formula, {cell: i for i, cell in enumerate(cells)}, said
