"""The cluster bootstrap over groups of rows and scorer seeds, for any figure that is a function of sums over rows.

Rows of a group (a picture's questions, an MME pair, the rotations of one question) are not independent, so whole groups are drawn
with replacement, never rows. A replicate needs only each group's sums; columns that are compared are drawn together, so every
comparison is paired and costs nothing more.

Scorer seeds are drawn too, independently of groups: a crossed design, the pigeonhole bootstrap (Owen 2007, "The pigeonhole
bootstrap", Annals of Applied Statistics 1). Of S seeds S - 1 are drawn, because S of S would understate their variance by the
factor (S - 1) / S (Rao and Wu 1988, "Resampling inference with complex survey data"). Arms with equally many seeds get the same
draws of them, so seed s of one arm is paired with seed s of the other. Few seeds remain few: where seeds differ more than groups
do the interval is too short (see `jobs/studies/coverage.py`), so show the seeds themselves too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import prod
from zlib import crc32

import numpy as np

from diffprune.statistics.interval import Array, Difference, Interval, percentile_interval, two_sided_p

DRAWS = 2000  # of every interval in the project
BLOCKS = 2000  # more groups than this are first joined at random: the same variance in expectation, bounded time
Figure = Callable[[Array], Array]  # sums [... M] -> [...]


def totals(values: Array, codes: Sequence[Array], shape: tuple[int, ...]) -> Array:
    """Sums of `values` [R] by their codes (group, column, ...: one [R] for each axis), float of `shape`."""
    return np.bincount(np.ravel_multi_index(codes, shape), values, prod(shape)).reshape(shape)


def ratio_of_sums(scale: float = 1.0) -> Figure:
    """The figure `scale` x first sum / second sum: a mean where the second counts rows, percent with scale 100."""
    return lambda sums: scale * sums[..., 0] / sums[..., 1]


def resampled(sums: Array, seed: int = 0, strata: Array | None = None, draws: int = DRAWS) -> Array:
    """Sums over G groups drawn with replacement: [G ...] -> float [draws ...].

    strata: code of each group [G]; each stratum then keeps its number of groups. Every draw is kept as how often each group came,
    so it costs one count and one product. Rounded, so that the order of rows cannot show in the last digits.
    """
    rng = np.random.default_rng(seed)
    flat = sums.reshape(len(sums), -1).round(9)
    codes = np.zeros(len(sums), int) if strata is None else strata
    total = np.zeros((draws, flat.shape[1]))
    for code in np.unique(codes):
        part = flat[codes == code]
        num = len(part)
        step = min(draws, max(1, 200_000 // num))  # counts of one step stay in the cache
        for start in range(0, draws, step):
            some = min(step, draws - start)
            drawn = rng.integers(0, num, (some, num)) + num * np.arange(some)[:, None]
            counts = np.bincount(drawn.ravel(), minlength=some * num).reshape(some, num)
            total[start : start + some] += counts.astype(float) @ part
    return total.reshape(draws, *sums.shape[1:])


def joined(sums: Array) -> Array:
    """[G ...] -> [BLOCKS ...]: groups joined at random into blocks of nearly equal size."""
    block = np.random.default_rng(0).permutation(len(sums)) % BLOCKS
    order = np.argsort(block, kind="stable")
    return np.add.reduceat(sums[order], np.searchsorted(block[order], np.arange(BLOCKS)))


def seed_shares(num: int, draws: int = DRAWS) -> Array:
    """Share of each of `num` scorer seeds in a replicate, float [draws num]: num - 1 seeds drawn with replacement."""
    if num == 1:
        return np.ones((draws, 1))
    return np.random.default_rng(num).multinomial(num - 1, np.full(num, 1 / num), size=draws) / (num - 1)


@dataclass(frozen=True)
class Estimate:
    """A figure of one arm with its bootstrap distribution.

    value: observed; draws [D]: in every replicate; used [G]: whether it rests on a group;
    full: what full credit on every row is worth in the figure's units.
    """

    value: float
    draws: Array
    used: Array
    num_rows: int
    num_seeds: int = 1
    full: float = 100.0

    @property
    def num_groups(self) -> int:
        """Groups it rests on."""
        return int(self.used.sum())

    def __sub__(self, other: Estimate) -> Estimate:
        """Paired difference in the units of both."""
        seeds = max(self.num_seeds, other.num_seeds)
        return replace(self, value=self.value - other.value, draws=self.draws - other.draws, num_seeds=seeds)

    def percent_of(self, other: Estimate) -> Estimate:
        """100 x self / other: relative accuracy, retention."""
        with np.errstate(divide="ignore", invalid="ignore"):
            draws = 100 * self.draws / other.draws
        return replace(self, value=100 * self.value / other.value, draws=draws, full=100 * self.full / other.value)

    def interval(self, low: float = -np.inf, high: float = np.inf) -> Interval:
        """The 95 % percentile interval, within [low, high]."""
        ends = percentile_interval(self.value, self.draws, self.num_groups, self.full, (low, high))
        return Interval(self.value, *ends, self.num_rows, self.num_groups, self.num_seeds)

    def difference(self) -> Difference:
        """The interval of an estimate that is a difference, with its bootstrap p."""
        return Difference(**vars(self.interval()), p=two_sided_p(self.draws))


def average(parts: Sequence[Estimate], *, together: bool, cap: float = np.inf) -> Estimate:
    """Unweighted mean over benchmarks, each at most `cap` first; together: whether the benchmarks share their groups."""
    used = [part.used for part in parts]
    return Estimate(
        float(np.mean([min(part.value, cap) for part in parts])),
        np.mean([np.minimum(part.draws, cap) for part in parts], axis=0),
        np.any(used, axis=0) if together else np.concatenate(used),
        sum(part.num_rows for part in parts),
        max(part.num_seeds for part in parts),
        float(np.mean([part.full for part in parts])),
    )


class ClusterBootstrap:
    """One figure of many columns (an arm and a scorer seed each) of one benchmark, in every draw of its groups."""

    def __init__(
        self,
        sums: Array,
        count: Array,
        figure: Figure,
        *,
        name: str = "",
        strata: Array | None = None,
        full: float = 100.0,
        draws: int = DRAWS,
    ) -> None:
        """sums: float [G C M], of M quantities over the rows of each group and column; count [G C]: those rows;
        figure: sums [... M] -> [...]; name: seeds the draws, so that bootstraps of one name and the same groups are drawn alike;
        strata [G]: draw within these; full: see `Estimate`."""
        self.sums, self.count, self.figure, self.strata, self.full = sums, count, figure, strata, full
        self.num_draws, self._seed = draws, crc32(name.encode())
        self.value = self._of(sums.sum(0))
        self._drawn = self._draw(sums, strata)

    def _of(self, sums: Array) -> Array:
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.asarray(self.figure(sums), float)

    def _draw(self, sums: Array, strata: Array | None) -> Array:
        """The figure of every column [draws C]; nan without groups."""
        if not len(sums):
            return np.full((self.num_draws, sums.shape[1]), np.nan)
        if len(sums) > BLOCKS:
            sums, strata = joined(sums), None
        return self._of(resampled(sums, self._seed, strata, self.num_draws))

    def compared(self, columns: Sequence[int]) -> tuple[Array, Array, Array]:
        """Values [c], draws [draws c] and the groups [G] they rest on: those of which all `columns` have equally many rows.

        Where some column lacks rows of a group, only the groups common to all are compared, and drawn anew.
        """
        index = list(columns)
        count = self.count[:, index]
        shared = (count > 0).all(1) & (count == count[:, :1]).all(1)
        if not (count[~shared] > 0).any():
            return self.value[index], self._drawn[:, index], shared
        part = self.sums[shared][:, index]
        value = self._of(part.sum(0)) if len(part) else np.full(len(index), np.nan)
        return value, self._draw(part, None if self.strata is None else self.strata[shared]), shared

    def estimates(self, arms: Sequence[Sequence[int]]) -> list[Estimate]:
        """One estimate per arm, the mean over its seeds' columns, all on the groups that every column has answered."""
        columns = [column for arm in arms for column in arm]
        value, drawn, shared = self.compared(columns)
        rows, found, start = int(self.count[shared][:, columns[0]].sum()), [], 0
        for arm in arms:
            own = slice(start, start := start + len(arm))
            draws = (drawn[:, own] * seed_shares(len(arm), self.num_draws)).sum(1)
            found.append(Estimate(float(value[own].mean()), draws, shared, rows, len(arm), self.full))
        return found
