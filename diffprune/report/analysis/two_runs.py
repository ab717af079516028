"""Two runs side by side: the second minus the first for every method and budget that both asked, and what else differs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import pandas as pd

from diffprune.report.analysis.comparison import BLIND, BOUNDS, Comparison, chapters, same_count
from diffprune.report.analysis.panel import Arm, BootstrapTable
from diffprune.report.analysis.records import Records
from diffprune.statistics import Estimate, Interval, Verdict, judged

Key = tuple[str, str]  # method and budget, as in `Comparison.arms`


@dataclass(frozen=True)
class Compared:
    """One method at one budget in both runs: accuracies in percent, on what is compared, and the verdict on second minus first.

    seeds: the difference by each scorer seed, where both runs have several and equally many.
    """

    first: Interval
    second: Interval
    verdict: Verdict
    seeds: tuple[float, ...]


class TwoRuns:
    """One chapter of each of two runs.

    Paired where both asked the same questions: on those alone, benchmark by benchmark, and the others left out. Where no benchmark
    has a question in common (other data, another split) the runs are independent samples of all their questions, and said to be.
    """

    def __init__(self, names: tuple[str, str], two: tuple[Comparison, Comparison]) -> None:
        """names: what each run is called on the page."""
        self.names, self.two = names, two

    @cached_property
    def benchmarks(self) -> list[str]:
        """Spellings of those that both asked."""
        return [b for b in self.two[0].benchmarks if b in self.two[1].benchmarks]

    @cached_property
    def questions(self) -> dict[str, set[str]]:
        """Benchmark -> names of the questions that both asked of the same data; {} where there are none."""
        if self.two[0].setting.get("split") != self.two[1].setting.get("split"):
            return {}
        found = {}
        for benchmark in self.benchmarks:
            revisions, asked = zip(*(_asked(chapter, benchmark) for chapter in self.two), strict=True)
            if revisions[0] == revisions[1] and (both := asked[0] & asked[1]):
                found[benchmark] = both
        return found

    @property
    def paired(self) -> bool:
        """Whether the same questions are compared."""
        return bool(self.questions)

    @cached_property
    def shared(self) -> list[Key]:
        """What can be compared: the unpruned model first, then by budget, most tokens first, in the order of tables."""
        one, two = self.two
        budgets = ["", *(b.spelling for b in one.budgets), *(budget for _, budget in one.thresholds)]
        there = [key for key in one.arms if key in two.arms and key[0] != BLIND and self._common(key)]
        return sorted(there, key=lambda key: (budgets.index(key[1]), one.order(key[0]), key[0]))

    def _common(self, key: Key) -> set[str]:
        """Compared benchmarks that every seed of an arm has answered in both runs: a mean without one is of other questions."""
        return set(self._compared).intersection(*(cells for arm in key_arms(self.two, key) for cells in arm.values()))

    @property
    def _compared(self) -> list[str]:
        return list(self.questions) if self.paired else self.benchmarks

    @cached_property
    def _answers(self) -> tuple[pd.DataFrame, pd.DataFrame]:
        """The answers of each run that are compared."""
        one, two = (_rows(chapter, number, self._compared, self.questions) for number, chapter in enumerate(self.two))
        return one, two

    @cached_property
    def _tables(self) -> tuple[BootstrapTable, BootstrapTable]:
        """Where the answers of each run are: one table for both where they are paired."""
        if self.paired:
            both = BootstrapTable(_coded(pd.concat(self._answers)), "benchmark")
            return both, both
        one, two = (BootstrapTable(_coded(part), "benchmark") for part in self._answers)
        return one, two

    def _arms(self, key: Key) -> tuple[Arm, Arm]:
        """Of both runs, their cells told apart, on what is compared."""
        common = self._common(key)
        one, two = (
            {r: {b: f"{number} {cell}" for b, cell in cells.items() if b in common} for r, cells in arm.items()}
            for number, arm in enumerate(key_arms(self.two, key))
        )
        return one, two

    def _estimates(self, one: Arm, two: Arm) -> tuple[Estimate, Estimate, Estimate]:
        """Of the first run, of the second, and of second minus first."""
        if self.paired:
            first, second = self._tables[0].estimates([one, two])
            return first, second, second - first
        first, second = (table.estimates([arm])[0] for table, arm in zip(self._tables, (one, two), strict=True))
        return first, second, second.apart(first)

    @cached_property
    def compared(self) -> dict[Key, Compared]:
        """Everything that both asked, as one family of comparisons."""
        found = {key: self._estimates(*self._arms(key)) for key in self.shared}
        alone = {key: any(chapter.one_scorer(*key) for chapter in self.two) for key in found}
        family = {
            key: replace(gap.difference(), scorers_only=alone[key], counts=self._counts(key)) for key, (_, _, gap) in found.items()
        }
        verdicts = judged(family)
        return {
            key: Compared(first.interval(0, 100), second.interval(0, 100), verdicts[key], self._seeds(key))
            for key, (first, second, _) in found.items()
        }

    def _seeds(self, key: Key) -> tuple[float, ...]:
        one, two = self._arms(key)
        if key[0] in BOUNDS or len(one) != len(two) or len(one) < 2:
            return ()
        pairs = zip(sorted(one), sorted(two), strict=True)
        return tuple(self._estimates({a: one[a]}, {b: two[b]})[2].value for a, b in pairs)

    @cached_property
    def _kept(self) -> pd.Series:
        """index cell, told apart by its run: mean tokens kept, of the answers that are compared."""
        return pd.concat(self._answers).groupby("cell")["visual_kept"].mean()

    def kept(self, key: Key) -> tuple[float, float]:
        """Mean tokens per image that each run kept on what is compared: on other questions a threshold keeps other counts."""
        cells = ([cell for by_benchmark in arm.values() for cell in by_benchmark.values()] for arm in self._arms(key))
        one, two = (float(self._kept.reindex(mine).mean()) for mine in cells)
        return one, two

    def _counts(self, key: Key) -> tuple[float, ...]:
        """Tokens kept in each run where they are not as many, else ()."""
        found = self.kept(key)
        return () if key[0] in BOUNDS or same_count(*found) else found


def key_arms(two: tuple[Comparison, Comparison], key: Key) -> tuple[Arm, Arm]:
    """The arms of one method at one budget; a bound has no replicates."""
    return two[0].arms.get(key, {}), two[1].arms.get(key, {})


def matched(names: tuple[str, str], one: Records, two: Records) -> Iterator[TwoRuns]:
    """Chapters of two runs side by side: those of one setting, else the first of each."""
    first, second = list(chapters(one)), list(chapters(two))
    pairs = [(a, b) for a in first for b in second if a.setting == b.setting]
    for pair in pairs or list(zip(first[:1], second[:1], strict=False)):
        yield TwoRuns(names, pair)


def _asked(chapter: Comparison, benchmark: str) -> tuple[tuple[str, ...], set[str]]:
    """Revisions of a benchmark's data, and the names of the questions that have answers."""
    cells = chapter.evaluated.index[chapter.evaluated["benchmark"] == benchmark]
    rows = chapter.rows.loc[chapter.rows["cell"].isin(cells), "sample"]
    return tuple(sorted({str(r) for r in chapter.evaluated.loc[cells, "revision"]})), set(rows.astype(str).unique())


def _rows(chapter: Comparison, number: int, benchmarks: list[str], questions: dict[str, set[str]]) -> pd.DataFrame:
    """cell (numbered by its run), group, credit, visual_kept and benchmark of the answers that are compared; questions: {} for
    all."""
    rows = chapter.rows[["cell", "group", "sample", "credit", "visual_kept"]]
    benchmark = rows["cell"].astype(str).map(chapter.evaluated["benchmark"].astype(str))
    sample = rows["sample"].astype(str)
    mine = benchmark.isin(benchmarks)
    for name, asked in questions.items():
        mine &= (benchmark != name) | sample.isin(asked)
    return pd.DataFrame({
        "cell": f"{number} " + rows.loc[mine, "cell"].astype(str), "group": rows.loc[mine, "group"].astype(str),
        "credit": rows.loc[mine, "credit"], "visual_kept": rows.loc[mine, "visual_kept"], "benchmark": benchmark[mine],
    })  # fmt: skip


def _coded(rows: pd.DataFrame) -> pd.DataFrame:
    return rows.astype({name: "category" for name in ("cell", "group", "benchmark")})
