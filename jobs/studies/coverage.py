"""How often nominal 95 % intervals hold the truth, in simulated data whose truth is known.

    python jobs/studies/coverage.py --simulations 2000 --draws 1000

Two arms answer the same questions: a question's group (picture) has a level of difficulty that both share and a part of its own for
each arm, questions of a group are 1 to 4, and each scorer seed shifts an arm's accuracy by a normal amount; where one in so many
seeds fails, it is one of the first arm, and loses its points besides, which its mean over all seeds there could be counts. Rare
changes lose answers that the unpruned arm has right, whole pictures at a time or one by one. Timings are log-normal around a
machine that is slow in some rounds for both, independently or for many rounds on end. And the answers of a
committed page, as if they were all there is, drawn anew. All of it goes through `diffprune.statistics` as records of a report do.

Prints a Markdown table: of how many intervals held the truth, lay above it (all of it) or lay below it.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from functools import cache, cached_property
from pathlib import Path
from zlib import crc32

import numpy as np
import pandas as pd

from diffprune.report.analysis.comparison import FULL, chapters
from diffprune.report.analysis.records import Records, read
from diffprune.statistics import DRAWS, ClusterBootstrap, Interval, average, median_ratio, ratio_of_sums, totals
from diffprune.statistics.speedup import LEAST_ROUNDS

NOMINAL = 0.95


def bootstrap(credit: np.ndarray, group: np.ndarray, draws: int, name: str, groups: int = 0) -> ClusterBootstrap:
    """Answers of all columns (arm and seed) [C R] to one benchmark, summed over its groups, of which there are `groups`."""
    shape = (groups or int(group.max()) + 1, len(credit))
    at = (np.tile(group, len(credit)), np.repeat(np.arange(len(credit)), len(group)))
    count = totals(np.ones(credit.size), at, shape)
    sums = np.stack([totals(credit.ravel(), at, shape), count], -1)
    return ClusterBootstrap(sums, count, ratio_of_sums(100), name=name, draws=draws)


@dataclass(frozen=True)
class Differences:
    """Paired difference of two arms, mean over benchmarks. groups: of each of them, or of all alike. seed_sd: of an arm's accuracy
    over scorer seeds, in points; the second arm has `others` of them, as many as the first, or is a rule without seeds (0).
    failing: chance that a seed of the first arm fails, and the points it then loses."""

    benchmarks: int
    groups: int | tuple[int, ...]
    seeds: int = 1
    seed_sd: float = 0.0
    others: int | None = None
    level: tuple[float, float] = (0.3, 0.7)
    truth: float = 3.0  # points
    failing: tuple[float, float] = (0.0, 0.0)

    def once(self, rng: np.random.Generator, draws: int) -> Interval:
        """The interval of one simulated experiment."""
        num = self.seeds if self.others is None else self.others
        sizes = (self.seeds, max(1, num))
        shift = [0.01 * rng.normal(self.truth, self.seed_sd, sizes[0]), 0.01 * rng.normal(0, self.seed_sd * (num > 0), sizes[1])]
        chance, lost = self.failing
        if chance:  # the mean over all seeds there could be stays the truth
            shift[0] += 0.01 * lost * (chance - (rng.random(sizes[0]) < chance))
        arms = [list(range(sizes[0])), list(range(sizes[0], sum(sizes)))]
        sized = self.groups if isinstance(self.groups, tuple) else (self.groups,) * self.benchmarks
        found = [self._benchmark(rng, shift, draws, str(i), groups).estimates(arms) for i, groups in enumerate(sized)]
        one, two = (average(parts, together=False) for parts in zip(*found, strict=True))
        return (one - two).difference()

    def _benchmark(self, rng: np.random.Generator, shift: list[np.ndarray], draws: int, name: str, groups: int) -> ClusterBootstrap:
        group = np.repeat(np.arange(groups), rng.integers(1, 5, groups))
        level = rng.uniform(*self.level, groups)[group]
        columns = [(level + rng.choice([-0.08, 0.08], groups)[group], by_seed) for by_seed in shift]
        chance = np.concatenate([own + by_seed[:, None] for own, by_seed in columns])  # [C R]
        luck = np.where(rng.random(chance.shape) < 0.7, rng.random(len(group)), rng.random(chance.shape))  # mostly shared
        return bootstrap((luck < chance).astype(float), group, draws, name)


@dataclass(frozen=True)
class Harm:
    """Pruned minus unpruned where pruning loses a rare answer and wins none. rate: of answers lost, in percent; together: how
    often a picture that loses one answer loses all of its answers; questions: of a picture, fewest and most."""

    benchmarks: int
    groups: int
    rate: float
    together: float = 0.0
    questions: tuple[int, int] = (1, 4)

    @property
    def truth(self) -> float:
        return -self.rate

    def once(self, rng: np.random.Generator, draws: int) -> Interval:
        """The interval of one simulated experiment."""
        found = []
        for i in range(self.benchmarks):
            least, most = self.questions
            group = np.repeat(np.arange(self.groups), rng.integers(least, most + 1, self.groups))
            right = rng.random(len(group)) < 0.9
            alone, whole = (rng.random(n) < 0.01 * self.rate / 0.9 for n in (len(group), self.groups))
            lost = np.where((rng.random(self.groups) < self.together)[group], whole[group], alone)
            credit = np.stack([right & ~lost, right]).astype(float)
            found.append(bootstrap(credit, group, draws, str(i)).estimates([[0], [1]]))
        one, two = (average(parts, together=False) for parts in zip(*found, strict=True))
        return (one - two).difference()


@dataclass(frozen=True)
class Shared:
    """Paired difference of two trained methods that lose few answers, mean over benchmarks that ask about the same pictures, one or
    two questions each. lost: by each, in percent of answers, more of some pictures than of others (gamma of shape 1/2, for each
    method and for both); a question that is lost by one scorer seed is lost by the others seven times in ten, if it is as hard."""

    seeds: int
    lost: tuple[float, float]
    pictures: int = 120
    benchmarks: int = 10

    @property
    def truth(self) -> float:
        return self.lost[1] - self.lost[0]

    def once(self, rng: np.random.Generator, draws: int) -> Interval:
        """The interval of one simulated experiment."""
        both, *own = 2 * rng.gamma(0.5, size=(3, self.pictures))
        chance = [0.01 * lost * (both + one) / 2 for lost, one in zip(self.lost, own, strict=True)]
        arms = [list(range(self.seeds)), list(range(self.seeds, 2 * self.seeds))]
        found = []
        for _ in range(self.benchmarks):
            group = np.repeat(np.arange(self.pictures), rng.integers(1, 3, self.pictures))
            shape = (2, self.seeds, len(group))
            luck = np.where(rng.random(shape) < 0.7, rng.random((2, 1, len(group))), rng.random(shape))
            right = luck >= np.stack(chance)[:, None, group]
            found.append(bootstrap(right.reshape(-1, len(group)).astype(float), group, draws, "same").estimates(arms))
        one, two = (average(parts, together=True) for parts in zip(*found, strict=True))
        return (one - two).difference()


@dataclass(frozen=True)
class Accuracy:
    """Accuracy of one arm on one benchmark, in percent."""

    groups: int
    truth: float

    def once(self, rng: np.random.Generator, draws: int) -> Interval:
        """The interval of one simulated experiment."""
        group = np.repeat(np.arange(self.groups), rng.integers(1, 5, self.groups))
        luck = np.where(rng.random(len(group)) < 0.5, rng.random(self.groups)[group], rng.random(len(group)))
        (found,) = bootstrap((luck < 0.01 * self.truth)[None].astype(float), group, draws, "").estimates([[0]])
        return found.interval(0.0, 100.0)


@dataclass(frozen=True)
class Speedups:
    """Median ratio of two arms over `rounds` interleaved rounds; memory: correlation of the machine's speed in two rounds."""

    rounds: int
    memory: float = 0.0
    truth: float = 2.5

    def once(self, rng: np.random.Generator, draws: int) -> Interval:
        """The interval of one simulated measurement."""
        drift = [rng.normal()]
        for new in rng.normal(size=self.rounds - 1):
            drift.append(self.memory * drift[-1] + (1 - self.memory**2) ** 0.5 * new)
        machine = np.exp(0.1 * np.array(drift))
        full, pruned = (ms * machine * rng.lognormal(0, 0.05, self.rounds) for ms in (10 * self.truth, 10.0))
        return median_ratio(full, pruned)


@dataclass(frozen=True)
class Resampled:
    """DiffPrune minus another method where the pictures and scorer seeds of a committed page are all there are: every experiment
    draws as many pictures, and `seeds` of each method, with replacement."""

    page: str
    other: str  # label
    budget: str
    seeds: int

    @cached_property
    def answered(self) -> tuple[np.ndarray, np.ndarray, pd.DataFrame]:
        """Credit of both methods [seeds R], and of each question its `benchmark` and `group` (picture)."""
        chapter = next(chapters(_records(self.page)))
        benchmark = chapter.rows["cell"].astype(str).map(chapter.evaluated["benchmark"])
        where = {"benchmark": benchmark, "sample": chapter.rows["sample"]}
        rows = chapter.rows[["cell", "group", "credit"]].assign(**where).astype({"cell": str, "group": str, "sample": str})
        credit = rows.pivot_table(index="cell", columns=["benchmark", "group", "sample"], values="credit")
        arms = [chapter.arms[name, "" if name == FULL else self.budget].values() for name in ("DiffPrune", self.other)]
        one, two = (np.array([credit.loc[list(cells.values())].sum().to_numpy() for cells in arm]) for arm in arms)
        return one, two, credit.columns.to_frame(index=False)

    @property
    def truth(self) -> float:
        """The difference over all there is, in points."""
        one, two, about = self.answered
        return float(pd.Series(100 * (one.mean(0) - two.mean(0))).groupby(about["benchmark"]).mean().mean())

    def once(self, rng: np.random.Generator, draws: int) -> Interval:
        """The interval of one experiment."""
        one, two, about = self.answered
        sizes = [self.seeds if len(arm) > 1 else 1 for arm in (one, two)]
        credit = np.concatenate([arm[rng.integers(0, len(arm), n)] for arm, n in zip((one, two), sizes, strict=True)])
        places = about.groupby("group").indices
        drawn = [places[group] for group in rng.choice(sorted(places), len(places))]
        row, group = np.concatenate(drawn), np.repeat(np.arange(len(drawn)), [len(rows) for rows in drawn])
        arms = [list(range(sizes[0])), list(range(sizes[0], sum(sizes)))]
        found = []
        for _, at in pd.Series(row).groupby(about["benchmark"].to_numpy()[row]):
            mine = group[at.index]
            found.append(bootstrap(credit[:, at], mine, draws, "same", len(drawn)).estimates(arms))
        before, behind = (average(parts, together=True) for parts in zip(*found, strict=True))
        return (before - behind).difference()


@cache
def _records(page: str) -> Records:
    return read(PAGES / page / "store")


Case = Differences | Harm | Shared | Accuracy | Speedups | Resampled
PAGES = Path(__file__).parents[2] / "reports"
RATES = (0.3, 0.6, 1.2)
SPREADS = (0.0, 0.5, 2.5, 5.0, 8.0, 12.0)
CASES: Mapping[str, Case] = {
    "fixed scorers, 10 benchmarks of 100 groups": Differences(10, 100),
    "fixed scorers, 1 benchmark of 20 groups": Differences(1, 20),
    **{
        f"{kind}, benchmarks of {' and '.join(map(str, groups))} groups": Differences(len(groups), groups, seeds, sd)
        for kind, seeds, sd in (("fixed scorers", 1, 0.0), ("5 seeds, seed SD 2.5", 5, 2.5))
        for groups in ((5, 200), (10, 30, 1000))
    },
    **{f"accuracy of {level} %, 1 benchmark of 20 groups": Accuracy(20, level) for level in (60, 90, 95)},
    **{f"1 seed, seed SD {sd:g}, as a claim about the method (none is made)": Differences(3, 100, 1, sd) for sd in (2.5, 8.0)},
    **{f"2 seeds, seed SD {sd:g}": Differences(3, 100, 2, sd) for sd in (0.0, 5.0, 12.0)},
    **{f"{n} seeds, seed SD {sd:g}": Differences(3, 100, n, sd) for n in (3, 5, 10) for sd in SPREADS},
    **{f"{n} seeds, seed SD {sd:g}, against a rule": Differences(3, 100, n, sd, 0) for n in (3, 5, 10) for sd in SPREADS},
    **{f"3 against 5 seeds, seed SD {sd:g}": Differences(3, 100, 3, sd, 5) for sd in SPREADS},
    **{
        f"{n} seeds, {round(10 * chance)} in 10 lose {lost:g} points": Differences(
            3, 100, n, 0.5, level=(0.75, 0.8), failing=(chance, lost)
        )
        for chance, lost in ((0.1, 60.0), (0.3, 10.0))
        for n in (5, 10)
    },
    **{f"{rate} % of answers lost, 10 benchmarks of 40 groups": Harm(10, 40, rate) for rate in RATES},
    **{f"{rate} % lost, half by whole pictures, 10 of 40": Harm(10, 40, rate, 0.5) for rate in RATES},
    **{f"{rate} % lost, half by whole pictures of 8 to 12 questions, 10 of 12": Harm(10, 12, rate, 0.5, (8, 12)) for rate in RATES},
    **{f"{rate} % of answers lost, pictures of 8 to 12 questions, 10 of 12": Harm(10, 12, rate, 0.0, (8, 12)) for rate in RATES},
    **{f"{rate} % of answers lost, 1 benchmark of 400 groups": Harm(1, 400, rate) for rate in RATES},
    **{
        f"{who} {one:g} and {two:g} % of answers, 10 benchmarks of the same 120 pictures": Shared(n, (one, two))
        for n, who in ((1, "1 seed each loses"), (5, "5 seeds each lose"), (10, "10 seeds each lose"))
        for one, two in ((0.5, 0.5), (1.0, 2.0), (3.0, 4.0))
    },
    **{
        f"compare_gumbel drawn anew, {seeds} seeds: DiffPrune against {other}, {budget}": Resampled(
            "compare_gumbel", other, f"Share({float(Fraction(budget)):.6g})", seeds
        )
        for seeds in (5, 10)
        for other in ("Gumbel keep/drop", "Gumbel keep/drop, budget offset", "DivPrune", FULL)
        for budget in ("1/3", "2/9", "1/9", "1/20")
    },
    **{f"median of ratios, {n} rounds": Speedups(n) for n in (3, 5, 6, 7, 10, 20, 30)},
    **{f"median of ratios, {n} rounds, AR(1) 0.9": Speedups(n, 0.9) for n in (3, 5, 6, 7, 10, 20, 30)},
}


@dataclass(frozen=True)
class Coverage:
    """Shares of simulated intervals that held the truth, lay wholly above it, lay wholly below it."""

    held: float
    above: float
    below: float


def simulated(case: Case, simulations: int, draws: int, seed: int = 0) -> Coverage:
    """Coverage of a case, from independent experiments."""
    rng = np.random.default_rng(seed)
    found = [case.once(rng, draws) for _ in range(simulations)]
    above, below = (float(np.mean(side)) for side in zip(*((i.low > case.truth, i.high < case.truth) for i in found), strict=True))
    return Coverage(1 - above - below, above, below)


def table(simulations: int, draws: int, only: str = "") -> Iterator[str]:
    """Lines of the Markdown table, one case at a time."""
    error = 1.96 * (NOMINAL * (1 - NOMINAL) / simulations) ** 0.5
    yield f"{simulations:,} simulations of {draws:,} draws each; coverage is known to about ±{error:.1%}."
    yield from ("", "| case | nominal | coverage | lies above | lies below |", "|---|---|---|---|---|")
    for name, case in CASES.items():
        if only in name:
            found = simulated(case, simulations, draws, crc32(name.encode()))
            nominal = "range" if isinstance(case, Speedups) and case.rounds < LEAST_ROUNDS else f"{NOMINAL:.0%}"
            yield f"| {name} | {nominal} | {found.held:.1%} | {found.above:.1%} | {found.below:.1%} |"


def main() -> None:
    """Simulate every case and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--simulations", type=int, default=1000)
    parser.add_argument("--draws", type=int, default=DRAWS)
    parser.add_argument("--only", default="", help="part of a case's name")
    given = parser.parse_args()
    for line in table(given.simulations, given.draws, given.only):
        print(line, flush=True)


if __name__ == "__main__":
    main()
