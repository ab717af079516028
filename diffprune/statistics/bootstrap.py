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
from dataclasses import dataclass, field, replace
from math import prod
from zlib import crc32

import numpy as np
from scipy import special

from diffprune.statistics.interval import Array, Difference, Interval
from diffprune.statistics.spread import Part, Spread

DRAWS = 2000  # of every interval in the project
BLOCKS = 2000  # more groups than this are first joined at random: the same variance in expectation, bounded time
PSEUDO_CHANGES = 2  # one each way (Bonett and Price 2012, "Adjusted Wald confidence interval ... paired data")
FEW = 6.0  # groups changed, up to which the size of a change is presumed, not observed (see `jobs/studies/coverage.py`)
MARGIN = 0.01  # of full credit: differences within it are equivalent
LEAST_GROUPS = 5  # from fewer pictures no spread is known: two that fare alike would have an interval of no length
NORMAL = float(special.ndtri(0.975))
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


@dataclass(frozen=True)
class Seeds:
    """How the scorer seeds of an arm (or the pairs of seeds of two) differ from their mean.

    values [S]: on all groups; draws [D S]: in every draw of groups.
    """

    values: Array
    draws: Array

    def times(self, factor: float | Array) -> Seeds:
        """In other units; factor: one number, or one for each draw and one for the values."""
        return Seeds(self.values * factor, self.draws * factor)

    @property
    def part(self) -> Part:
        """Their part of an estimate's variance, by the method of moments.

        A seed's value differs from the mean by the seed itself and by how this seed fares on these groups (the interaction). The
        draws of groups show the latter alone, and the draws of the mean have it already.
        """
        num = len(self.values)
        finite = self.draws[np.isfinite(self.draws).all(1)]
        interaction = float(finite.var(0).mean()) * num / (num - 1) if len(finite) else 0.0
        return Part(float(self.values.var(ddof=1)) / num, interaction / num, num - 1.0)


@dataclass(frozen=True)
class Estimate:
    """A figure of one arm, or of a comparison, with what is known of its spread.

    value: observed; draws [D]: in every draw of groups, seeds averaged; used [G]: whether it rests on a group; df: of the groups;
    seeds: the scorer seeds' differences, one entry for each independent set of them, none where there is one seed;
    full: what full credit on every row is worth in the figure's units, 0 where rows have no credit; answer: variance of one
    change that might as well have been another: of an answer, in a difference of a picture's; parts [G]: of each group in the
    error, by the jackknife: the squares of those of G independent groups sum to the variance.
    """

    value: float
    draws: Array
    used: Array
    num_rows: int
    df: float = 0.0
    num_seeds: int = 1
    seeds: tuple[Seeds, ...] = ()
    full: float = 100.0
    answer: float = 0.0
    parts: Array = field(default_factory=lambda: np.zeros(0))

    @property
    def num_groups(self) -> int:
        """Groups it rests on."""
        return int(self.used.sum())

    @property
    def most(self) -> float:
        """Its largest possible value, that of full credit everywhere; infinite where rows have no credit."""
        return self.full or np.inf

    def __sub__(self, other: Estimate) -> Estimate:
        """Paired difference in the units of both: on the same groups and, where both have equally many, seed by seed.

        What breaks a picture may break all its m answers at once, and where little changed the data cannot say so: a change is
        presumed to count as m answers, between the one that it may be and the m^2 of m that always change together.
        """
        seeds, group = (*self.seeds, *other.seeds), self.num_rows / max(1, self.num_groups)
        if self.num_seeds == other.num_seeds and len(self.seeds) == len(other.seeds) == 1:
            one, two = seeds
            seeds = (Seeds(one.values - two.values, one.draws - two.draws),)
        return replace(
            self, value=self.value - other.value, draws=self.draws - other.draws, seeds=seeds, df=min(self.df, other.df),
            num_seeds=max(self.num_seeds, other.num_seeds), answer=max(self.answer, other.answer) * group,
            parts=self.parts - other.parts,
        )  # fmt: skip

    def apart(self, other: Estimate) -> Estimate:
        """Difference of two estimates on different groups, drawn independently of each other: their variances add.

        Both come with draws of one seed, so the other's are taken in another order.
        """
        order = np.random.default_rng(0).permutation(len(other.draws))
        return replace(
            self, value=self.value - other.value, draws=self.draws - other.draws[order], seeds=(*self.seeds, *other.seeds),
            num_seeds=max(self.num_seeds, other.num_seeds), used=np.concatenate([self.used, other.used]), df=_welch((self, other)),
            num_rows=self.num_rows + other.num_rows, answer=self.answer + other.answer,
            parts=np.concatenate([self.parts, other.parts]),
        )  # fmt: skip

    def percent_of(self, other: Estimate) -> Estimate:
        """100 x self / other, of a figure without scorer seeds: relative accuracy, retention."""
        assert not other.seeds, "shares are of a bound, which has no scorer seeds"
        with np.errstate(divide="ignore", invalid="ignore"):
            share, shares = 100 / np.float64(other.value), 100 / other.draws
            return replace(
                self, value=float(self.value * share), draws=self.draws * shares, full=float(self.full * share),
                answer=float(self.answer * share**2), parts=share * (self.parts - self.value / other.value * other.parts),
                seeds=tuple(Seeds(s.values * share, s.draws * shares[:, None]) for s in self.seeds),
            )  # fmt: skip

    @property
    def unseen(self) -> float:
        """Variance of `PSEUDO_CHANGES` that were not seen.

        Each is of the size `answer` while few groups changed. Where more than `FEW` did, what they changed by says more and more of
        what a change is like: the presumed size keeps the weight FEW / seen, their mean square has the rest. Of changes of unlike
        size those count as seen that alike ones of the same kurtosis would be, (sum d^2)^2 / sum d^4.
        """
        squares = self.parts**2
        total, fourth = float(squares.sum()), float((squares**2).sum())
        seen = total**2 / fourth if fourth > 0 else 0.0
        presumed = min(1.0, FEW / seen) if seen > 0 and self.answer > 0 else 1.0
        return PSEUDO_CHANGES * (presumed * self.answer + (1 - presumed) * total / max(seen, 1.0))

    @property
    def spread(self) -> Spread:
        """Groups, unseen changes and scorer seeds together.

        Towards each side the 95 % percentile of the draws of groups sets the scale. What is `unseen` is added, so that where few
        answers changed, or none, the interval stays honest. Of answers about fewer than `LEAST_GROUPS` groups it is not known.
        """
        finite = self.draws[np.isfinite(self.draws)]
        ends = np.quantile(finite, (0.025, 0.975)) if len(finite) else (np.nan, np.nan)
        unseen = self.unseen
        sides = (max(0.0, float(side)) / NORMAL for side in (self.value - ends[0], ends[1] - self.value))
        below, above = (side**2 + unseen for side in sides)
        known = len(finite) > 0 and (self.num_groups >= LEAST_GROUPS or not self.full)
        return Spread.of(self.value, below, above, self.df if known else 0.0, [s.part for s in self.seeds])

    def interval(self, low: float = -np.inf, high: float = np.inf) -> Interval:
        """The 95 % interval, within [low, high]."""
        ends = np.clip(self.spread.interval(), low, high)
        return Interval(self.value, float(ends[0]), float(ends[1]), self.num_rows, self.num_groups, self.num_seeds)

    def difference(self) -> Difference:
        """The interval of an estimate that is a difference of two figures from 0 to full credit, and how it tests."""
        found = self.spread
        return Difference(
            **vars(self.interval(-self.most, self.most)),
            p=found.p(),
            p_outside=found.p_outside(MARGIN * self.full),
            detectable=found.detectable(),
        )


def average(parts: Sequence[Estimate], *, together: bool, cap: float = np.inf) -> Estimate:
    """Unweighted mean over benchmarks, each at most `cap` first; together: whether the benchmarks share their groups."""
    used, num = [part.used for part in parts], len(parts)
    rows = sum(part.num_rows for part in parts)
    every = np.any(used, axis=0) if together else np.concatenate(used)
    return Estimate(
        float(np.mean([min(part.value, cap) for part in parts])),
        np.mean([np.minimum(part.draws, cap) for part in parts], axis=0),
        every,
        rows,
        max(0.0, float(every.sum()) - 1) if together else _welch(parts),
        max(part.num_seeds for part in parts),
        _seeds([tuple(s.times(float(part.value < cap)) for s in part.seeds) for part in parts]),
        float(np.mean([part.full for part in parts])),
        sum(part.num_rows * part.answer for part in parts) / max(1, rows) / num**2,
        (np.sum if together else np.concatenate)([part.parts * (part.value < cap) for part in parts], axis=0) / num,
    )


def _welch(parts: Sequence[Estimate]) -> float:
    """Degrees of freedom of a sum or a mean of estimates on groups of their own, after Welch (1947).

    Where a part of few groups has most of the variance, little is known of it, however many groups the others have; nothing (0)
    where one part's spread is not known, as that of a single group.
    """
    if any(part.df <= 0 or not np.isfinite(part.draws).any() for part in parts):
        return 0.0
    variances = [float(np.var(part.draws[np.isfinite(part.draws)])) + part.unseen for part in parts]
    spread = sum(variance**2 / part.df for variance, part in zip(variances, parts, strict=True))
    return sum(variances) ** 2 / spread if spread > 0 else sum(part.df for part in parts)


def _seeds(parts: Sequence[tuple[Seeds, ...]]) -> tuple[Seeds, ...]:
    """Seeds of a mean over benchmarks; of benchmarks that were not asked with the same ones, as if all varied together."""
    num, shapes = len(parts), {tuple(len(s.values) for s in part) for part in parts}
    if len(shapes) > 1:
        return tuple(s.times(num**-0.5) for part in parts for s in part)
    return tuple(
        Seeds(np.mean([s.values for s in same], axis=0), np.mean([s.draws for s in same], axis=0))
        for same in zip(*parts, strict=True)
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

    def _jackknife(self, shared: Array, columns: Sequence[int]) -> Array:
        """Parts of the groups that are compared in each column's error [g c]: its figure without the group, from the mean of such
        figures, scaled so that squares sum to the jackknife's variance; 0 where there is no figure without it."""
        part = self.sums[shared][:, list(columns)]
        if len(part) < 2:
            return np.zeros(part.shape[:2])
        without = self._of(part.sum(0) - part)
        away = without - without.mean(0)
        return np.nan_to_num(away * -(((len(part) - 1) / len(part)) ** 0.5))

    def estimates(self, arms: Sequence[Sequence[int]]) -> list[Estimate]:
        """One estimate per arm, the mean over its seeds' columns, all on the groups that every column has answered.

        The draws are stretched by sqrt(G / (G - 1)): of G groups a bootstrap understates the variance by (G - 1) / G (Rao and
        Wu 1988, "Resampling inference with complex survey data").
        """
        columns = [column for arm in arms for column in arm]
        value, drawn, shared = self.compared(columns)
        rows, num = int(self.count[shared][:, columns[0]].sum()), int(shared.sum())
        drawn = value + (drawn - value) * (num / max(1, num - 1)) ** 0.5
        jackknife = self._jackknife(shared, columns)
        found, start = [], 0
        for arm in arms:
            own = slice(start, start := start + len(arm))
            mean, draws = float(value[own].mean()), drawn[:, own].mean(1)
            seeds = (Seeds(value[own] - mean, drawn[:, own] - draws[:, None]),) if len(arm) > 1 else ()
            answer = (self.full / max(1, rows)) ** 2
            parts = np.zeros(len(shared))
            parts[shared] = jackknife[:, own].mean(1)
            found.append(Estimate(mean, draws, shared, rows, max(0, num - 1), len(arm), seeds, self.full, answer, parts))
        return found
