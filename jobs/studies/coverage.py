"""How often nominal 95 % intervals hold the truth, in simulated data whose truth is known.

    python jobs/studies/coverage.py --simulations 2000 --draws 2000

Two arms answer the same questions: a question's group (picture) has a level of difficulty that both share and a part of its own for
each arm, questions of a group are 1 to 4, and each scorer seed shifts an arm's accuracy by a normal amount. Timings are log-normal
around a machine that is slow in some rounds for both. All of it goes through `diffprune.statistics` as records of a report do.

Prints a Markdown table: of how many intervals held the truth, lay above it (all of it) or lay below it.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from diffprune.statistics import DRAWS, ClusterBootstrap, Interval, average, ratio_of_medians, ratio_of_sums, totals

NOMINAL = 0.95


@dataclass(frozen=True)
class Differences:
    """Paired difference of two arms, mean over benchmarks. seed_sd: of an arm's accuracy over scorer seeds, in points; both arms
    have `seeds` of them, or the second is a rule without seeds."""

    benchmarks: int
    groups: int
    seeds: int = 1
    seed_sd: float = 0.0
    rule: bool = False
    truth: float = 3.0  # points

    def once(self, rng: np.random.Generator, draws: int) -> Interval:
        """The interval of one simulated experiment."""
        sizes = (self.seeds, 1 if self.rule else self.seeds)
        first = 0.01 * rng.normal(self.truth, self.seed_sd, sizes[0])
        shift = [first, np.zeros(1) if self.rule else 0.01 * rng.normal(0, self.seed_sd, sizes[1])]
        arms = [list(range(sizes[0])), list(range(sizes[0], sum(sizes)))]
        found = [self._benchmark(rng, shift, draws, str(i)).estimates(arms) for i in range(self.benchmarks)]
        one, two = (average(parts, together=False) for parts in zip(*found, strict=True))
        return (one - two).difference()

    def _benchmark(self, rng: np.random.Generator, shift: list[np.ndarray], draws: int, name: str) -> ClusterBootstrap:
        """Answers of all columns (arm and seed) to one benchmark, summed over its groups."""
        group = np.repeat(np.arange(self.groups), rng.integers(1, 5, self.groups))
        level = rng.uniform(0.3, 0.7, self.groups)[group]
        columns = [(level + rng.choice([-0.08, 0.08], self.groups)[group], by_seed) for by_seed in shift]
        chance = np.concatenate([own + by_seed[:, None] for own, by_seed in columns])  # [C R]
        luck = np.where(rng.random(chance.shape) < 0.7, rng.random(len(group)), rng.random(chance.shape))  # mostly shared
        credit, shape = (luck < chance).astype(float), (self.groups, len(chance))
        at = (np.tile(group, len(chance)), np.repeat(np.arange(len(chance)), len(group)))
        count = totals(np.ones(credit.size), at, shape)
        sums = np.stack([totals(credit.ravel(), at, shape), count], -1)
        return ClusterBootstrap(sums, count, ratio_of_sums(100), name=name, draws=draws)


@dataclass(frozen=True)
class Speedups:
    """Ratio of medians of two arms over `rounds` interleaved rounds."""

    rounds: int
    truth: float = 2.5

    def once(self, rng: np.random.Generator, draws: int) -> Interval:
        """The interval of one simulated measurement."""
        machine = rng.lognormal(0, 0.1, self.rounds)
        full, pruned = (ms * machine * rng.lognormal(0, 0.05, self.rounds) for ms in (10 * self.truth, 10.0))
        return ratio_of_medians(full, pruned, draws=draws)


Case = Differences | Speedups
CASES: Mapping[str, Case] = {
    "fixed scorers, 10 benchmarks of 100 groups": Differences(10, 100),
    "fixed scorers, 1 benchmark of 20 groups": Differences(1, 20),
    "3 seeds, seed SD 0.5 points": Differences(3, 200, 3, 0.5),
    "3 seeds, seed SD 5 points": Differences(3, 200, 3, 5.0),
    "5 seeds, seed SD 0.5 points": Differences(3, 200, 5, 0.5),
    "5 seeds, seed SD 5 points": Differences(3, 200, 5, 5.0),
    "5 seeds, seed SD 5 points, against a rule": Differences(3, 200, 5, 5.0, rule=True),
    "ratio of medians, 30 rounds": Speedups(30),
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


def table(simulations: int, draws: int) -> Iterator[str]:
    """Lines of the Markdown table, one case at a time."""
    error = 1.96 * (NOMINAL * (1 - NOMINAL) / simulations) ** 0.5
    yield f"{simulations:,} simulations of {draws:,} draws each; coverage is known to about ±{error:.1%}."
    yield from ("", "| case | nominal | coverage | lies above | lies below |", "|---|---|---|---|---|")
    for name, case in CASES.items():
        found = simulated(case, simulations, draws)
        yield f"| {name} | {NOMINAL:.0%} | {found.held:.1%} | {found.above:.1%} | {found.below:.1%} |"


def main() -> None:
    """Simulate every case and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--simulations", type=int, default=1000)
    parser.add_argument("--draws", type=int, default=DRAWS)
    given = parser.parse_args()
    for line in table(given.simulations, given.draws):
        print(line, flush=True)


if __name__ == "__main__":
    main()
