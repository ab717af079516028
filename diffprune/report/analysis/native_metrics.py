"""Figures in a benchmark's own units (F1, MME points, circular accuracy) with intervals: sums per group, recomputed in every draw.

A figure that is no mean cannot be averaged from rows; but each is a function of sums over groups (rows right, true positives,
pairs all right), so a draw of groups needs only those sums. `FIGURES` says which sums a figure is made of. A figure that its sums
do not reproduce to the last digit is shown without an interval.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from zlib import crc32

import numpy as np
import pandas as pd

from diffprune.benchmarks._aggregate import MME_COGNITION, MME_PERCEPTION
from diffprune.report.analysis.panel import BLOCKS, DRAWS
from diffprune.statistics import resampled

Sums = np.ndarray
Figure = Callable[[Sums], Sums]  # sums [... M] -> [...]


@dataclass(frozen=True)
class Rows:
    """The rows of one benchmark: codes of group [R], cell [R] and category [R], credit [R], and whether they said and were yes."""

    group: np.ndarray
    cell: np.ndarray
    category: np.ndarray
    credit: np.ndarray
    parsed: np.ndarray
    target: np.ndarray
    shape: tuple[int, int]  # groups, cells
    categories: tuple[str, ...]

    def total(self, values: np.ndarray, per_category: bool = False) -> np.ndarray:
        """Sums per group and cell [G C], or [G C K] per category."""
        key: np.ndarray = self.group * self.shape[1] + self.cell
        shape: tuple[int, ...] = self.shape
        if per_category:
            key, shape = key * len(self.categories) + self.category, (*self.shape, len(self.categories))
        return np.bincount(key, values, int(np.prod(shape))).reshape(shape).round(9)


@dataclass(frozen=True)
class Ingredients:
    """sums [G C M]; figure: of sums; outcomes [U C] and rows [U C]: of units, for tests; full: the figure's largest value."""

    sums: np.ndarray
    figure: Figure
    outcomes: np.ndarray
    rows: np.ndarray
    full: float = 100.0
    by_category: bool = False  # draws stay within a category
    grouped: bool = False  # what counts is whether all rows of a group are right


def _mean(rows: Rows) -> Ingredients:
    credit, count = rows.total(rows.credit), rows.total(np.ones(len(rows.credit)))
    return Ingredients(np.stack([credit, count], 2), lambda s: 100 * s[..., 0] / s[..., 1], credit, count)


def _f1_mean(rows: Rows) -> Ingredients:
    """Mean over categories of F1, positive = yes."""
    yes, said_yes, said_no = rows.target == "yes", rows.parsed == "yes", rows.parsed == "no"
    hits, false, missed = (rows.total(x, True) for x in (yes & said_yes, (rows.target == "no") & said_yes, yes & said_no))

    def figure(s: Sums) -> Sums:
        tp, fp, fn = np.split(s, 3, axis=-1)
        return (200 * tp / np.maximum(2 * tp + fp + fn, 1)).mean(-1)

    return Ingredients(
        np.concatenate([hits, false, missed], 2), figure, rows.total(rows.credit), rows.total(np.ones(len(rows.credit)))
    )


def _units(rows: Rows, per_category: bool) -> tuple[np.ndarray, np.ndarray]:
    """Units (groups, or a group's rows of one category): whether all rows are right, and whether it is there at all."""
    there = rows.total(np.ones(len(rows.credit)), per_category) > 0
    return (there & (rows.total(rows.credit != 1, per_category) == 0)).astype(float), there.astype(float)


def _circular(rows: Rows) -> Ingredients:
    right, there = _units(rows, False)
    return Ingredients(np.stack([right, there], 2), lambda s: 100 * s[..., 0] / s[..., 1], right, there, grouped=True)


def _mme(categories: Sequence[str]) -> Callable[[Rows], Ingredients]:
    def ingredients(rows: Rows) -> Ingredients:
        """Per category 100 x rows right / rows + 100 x pairs right / pairs, summed."""
        right, there = _units(rows, True)
        credit, count = rows.total(rows.credit, True), rows.total(np.ones(len(rows.credit)), True)
        mine = np.isin(rows.categories, categories)

        def figure(s: Sums) -> Sums:
            credits, counts, pairs, all_pairs = (part[..., mine] for part in np.split(s, 4, axis=-1))
            return 100 * (credits / counts + pairs / all_pairs).sum(-1)

        flat = (right.transpose(0, 2, 1).reshape(-1, rows.shape[1]), there.transpose(0, 2, 1).reshape(-1, rows.shape[1]))
        sums = np.concatenate([credit, count, right, there], 2)
        return Ingredients(sums, figure, *flat, 200.0 * int(mine.sum()), by_category=True, grouped=True)

    return ingredients


FIGURES: Mapping[str, Callable[[Rows], Ingredients]] = {
    "f1_mean": _f1_mean,
    "circular_accuracy": _circular,
    "mme_perception": _mme(MME_PERCEPTION),
    "mme_cognition": _mme(MME_COGNITION),
    "mme_total": _mme(MME_PERCEPTION + MME_COGNITION),
}  # fmt: skip; every other figure is taken for the mean credit in percent, if that is what it is


def _strata(rows: Rows) -> np.ndarray | None:
    """The category of each group, where every group has one."""
    there = rows.total(np.ones(len(rows.credit)), True).sum(1) > 0
    return there.argmax(1) if there.sum(1).max() == 1 else None


class Native:
    """One benchmark's figure for many cells, in every draw of groups."""

    def __init__(self, name: str, frame: pd.DataFrame, figure: str, printed: Mapping[str, float], every: pd.Index | None) -> None:
        """frame: cell, group, category, credit, parsed, target of one benchmark; printed: cell -> what the benchmark itself says;
        every: all groups, where benchmarks share groups and are drawn together."""
        cells = sorted(printed)
        groups = every if every is not None else pd.Index(sorted(frame["group"].unique(), key=str))
        kinds = sorted(map(str, frame["category"].unique()))
        text = {c: frame[c].to_numpy(object) for c in ("parsed", "target")}
        rows = Rows(
            groups.get_indexer(frame["group"].astype(object)), pd.Index(cells).get_indexer(frame["cell"].astype(object)),
            pd.Index(kinds).get_indexer(frame["category"].astype(str)), frame["credit"].to_numpy(float), text["parsed"],
            text["target"], (len(groups), len(cells)), tuple(kinds),
        )  # fmt: skip
        made = FIGURES.get(figure, _mean)(rows)
        self.name, self.columns, self.made = name, {c: i for i, c in enumerate(cells)}, made
        self.seed, self.count = crc32(b"all" if every is not None else name.encode()), rows.total(np.ones(len(rows.credit)))
        self.strata = _strata(rows) if made.by_category and every is None else None
        said = np.array([printed[c] for c in cells])
        with np.errstate(invalid="ignore", divide="ignore"):
            self.value = made.figure(made.sums.sum(0))
        self.exact = bool(np.allclose(self.value, said, equal_nan=True))
        self.value = said
        self.drawn = self._draw(made.sums, self.strata)

    def _draw(self, sums: np.ndarray, strata: np.ndarray | None) -> np.ndarray:
        """The figure of every cell [DRAWS C] over groups drawn with replacement."""
        num, cells, parts = sums.shape
        flat = sums.reshape(num, -1)
        if num > BLOCKS:  # joined at random: the same variance in expectation, bounded time
            block = np.random.default_rng(0).permutation(num) % BLOCKS
            order = np.argsort(block, kind="stable")
            flat, strata = np.add.reduceat(flat[order], np.searchsorted(block[order], np.arange(BLOCKS))), None
        with np.errstate(invalid="ignore", divide="ignore"):
            return self.made.figure(resampled(flat, DRAWS, self.seed, strata).reshape(DRAWS, cells, parts))

    def of(self, cells: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Values [C] and draws [DRAWS C] of cells that are compared: on the groups that all of them have answered alike."""
        index = [self.columns[c] for c in cells]
        count = self.count[:, index]
        shared = (count == count[:, :1]).all(1) & (count > 0).all(1)
        if not (count[~shared] > 0).any():
            return self.value[index], self.drawn[:, index] if self.exact else np.full((DRAWS, len(index)), np.nan)
        part = self.made.sums[shared][:, index]
        if not len(part):
            return np.full(len(index), np.nan), np.full((DRAWS, len(index)), np.nan)
        with np.errstate(invalid="ignore", divide="ignore"):
            value = self.made.figure(part.sum(0))
        return value, self._draw(part, None if self.strata is None else self.strata[shared])

    def outcomes(self, cells: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Outcomes [U C] and rows [U] of the units that all `cells` have answered alike."""
        index = [self.columns[c] for c in cells]
        rows = self.made.rows[:, index]
        shared = (rows == rows[:, :1]).all(1) & (rows > 0).all(1)
        return self.made.outcomes[shared][:, index], rows[shared, 0]
