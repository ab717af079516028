"""Figures of one comparison that need two or three arms, all paired: relative accuracy, retention, agreement, verdicts."""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property

import numpy as np
import pandas as pd

from diffprune.report.analysis.comparison import BLIND, BOUNDS, FULL, Comparison
from diffprune.report.analysis.panel import Arm, BootstrapTable
from diffprune.statistics import Estimate, Interval, Retention, Verdict, average, judged

IMAGE_BOUND = 3.0  # standard errors by which the image must help


class Derived:
    """Figures of one chapter that need two or three runs on the same questions."""

    def __init__(self, chapter: Comparison) -> None:
        self.chapter = chapter
        self._ratios: dict[tuple[str, str], dict[str, Estimate]] = {}

    def _arm(self, label: str, budget: str, benchmark: str) -> list[str]:
        arm = self.chapter.arms.get((label, "" if label in BOUNDS else budget), {})
        return [arm[r][benchmark] for r in sorted(arm) if benchmark in arm[r]]

    def beside(self, labels: tuple[str, ...], budget: str, benchmark: str) -> list[Estimate] | None:
        """The benchmark's figure of several arms on the questions all have answered, seeds averaged; None where one is missing."""
        native = self.chapter.natives.get(benchmark)
        arms = [self._arm(label, budget, benchmark) for label in labels]
        if native is None or not all(arms):
            return None
        return native.estimates([[native.columns[cell] for cell in arm] for arm in arms])

    def ratios(self, label: str, budget: str) -> dict[str, Estimate]:
        """Per benchmark: pruned / unpruned in percent, in its own units. Without benchmarks on which the unpruned model has 0;
        {} where one of the two lacks a benchmark."""
        if (label, budget) not in self._ratios:
            whole = not (self.chapter.missing(label, budget) or self.chapter.missing(FULL, ""))
            pairs = {b: self.beside((label, FULL), budget, b) for b in self.chapter.benchmarks if whole}
            self._ratios[label, budget] = {b: pair[0].percent_of(pair[1]) for b, pair in pairs.items() if pair and pair[1].value}
        return self._ratios[label, budget]

    def _mean(
        self, parts: list[Estimate], cap: float = np.inf, low: float = -np.inf, high: float = np.inf
    ) -> Interval | None:  # fmt: skip
        """Mean over benchmarks, each at most `cap` first, with its interval within [low, high]; None without benchmarks."""
        return average(parts, together=self.chapter.panel.together, cap=cap).interval(low, high=min(cap, high)) if parts else None

    def relative(self, label: str, budget: str, capped: bool = False) -> Interval | None:
        """Mean over benchmarks of pruned / unpruned, percent (R), or of each at most 100 (R_cap)."""
        parts = list(self.ratios(label, budget).values())
        most = float(np.mean([part.most for part in parts])) if parts else np.inf  # full credit on every question
        return self._mean(parts, 100.0 if capped else np.inf, 0.0, most)

    def worst(self, label: str, budget: str) -> tuple[str, Interval] | None:
        """The benchmark that loses most: its name, and its own pruned / unpruned in percent."""
        ratios = self.ratios(label, budget)
        name = min(ratios, key=lambda b: ratios[b].value, default=None)
        return (name, ratios[name].interval(0.0, ratios[name].most)) if name is not None else None

    # --- against the model without its image -----------------------------------------------------------------------------

    @cached_property
    def visual(self) -> dict[str, tuple[float, float, Retention]]:
        """Benchmark -> unpruned, without image, and what the image contributes in between, in native units."""
        found = {}
        for benchmark in self.chapter.benchmarks:
            pair = self.beside((FULL, BLIND), "", benchmark)
            if pair:
                gap = pair[0] - pair[1]
                finite = gap.draws[np.isfinite(gap.draws)]  # a small benchmark may be missing from a draw
                ends = vars(gap.interval(-gap.most, gap.most))
                there = np.isfinite(ends["low"]) and gap.value > max(0.0, IMAGE_BOUND * float(finite.std(ddof=1)))
                found[benchmark] = pair[0].value, pair[1].value, Retention(**ends, image_bound=bool(there))
        return found

    def retained(self, label: str, budget: str, benchmark: str) -> Estimate | None:
        """Share of the image's contribution kept, percent: (pruned - blind) / (unpruned - blind); None if not image-bound."""
        trio = self.beside((label, FULL, BLIND), budget, benchmark)
        if not trio or not self.visual[benchmark][2].image_bound:
            return None
        pruned, full, blind = trio
        return (pruned - blind).percent_of(full - blind)

    def retention(self, label: str, budget: str) -> Interval | None:
        """Mean blind-corrected retention over the image-bound benchmarks, percent; may be negative."""
        return self._mean([q for b in self.visual if (q := self.retained(label, budget, b))])

    # --- one answer at a time --------------------------------------------------------------------------------------------

    @cached_property
    def _changes(self) -> pd.DataFrame:
        """Rows that the unpruned model has answered too: cell, benchmark, group, same, harm, gain."""
        rows = self.chapter.rows[["cell", "sample", "group", "parsed", "credit"]]
        benchmark = pd.Categorical(rows["cell"].astype(object).map(self.chapter.evaluated["benchmark"]))
        sample, distinct = pd.factorize(rows["sample"])
        question = benchmark.codes.astype(np.int64) * len(distinct) + sample
        parsed, right = rows["parsed"].astype("category").cat.codes.to_numpy(), rows["credit"].to_numpy(float) == 1
        full = rows["cell"].isin(self.chapter.arms.get((FULL, ""), {}).get("", {}).values()).to_numpy()
        place = np.full(question.max(initial=-1) + 1, -1)
        place[question[full]] = np.flatnonzero(full)
        known = place[question] >= 0
        theirs = place[question][known]
        return pd.DataFrame({
            "cell": rows["cell"].to_numpy()[known], "benchmark": benchmark[known],
            "group": rows["group"].to_numpy()[known], "credit": (parsed[known] == parsed[theirs]).astype(float),
            "harm": right[theirs] & ~right[known], "gain": right[known] & ~right[theirs],
        })  # fmt: skip

    @cached_property
    def _agreeing(self) -> BootstrapTable:
        return BootstrapTable(self._changes, "benchmark")

    @cached_property
    def _shares(self) -> pd.DataFrame:
        """index cell: harm, gain, and the share of whole groups that agree."""
        shares = self._changes.groupby("cell", observed=True)[["harm", "gain"]].mean()
        groups = self._changes.groupby(["cell", "group"], observed=True)["credit"].min()
        return shares.assign(whole=groups.groupby(level=0, observed=True).mean())

    def agreement(self, label: str, budget: str) -> Interval | None:
        """Share of answers, as parsed, that are the unpruned model's; percent, unweighted over benchmarks."""
        arm = self._known(label, budget)
        return self._agreeing.mean(arm) if arm else None

    def changed(self, label: str, budget: str, column: str) -> float:
        """`harm` (unpruned right, pruned wrong), `gain` (the reverse) or `whole` (groups all of whose answers agree), percent."""
        arm = self._known(label, budget)
        cells = [c for by_benchmark in arm.values() for c in by_benchmark.values()]
        if column == "whole":
            circular = {b for b, n in self.chapter.natives.items() if n.formula.whole_groups}
            cells = [c for by_benchmark in arm.values() for b, c in by_benchmark.items() if b in circular]
        return 100 * float(self._shares.loc[cells, column].mean()) if cells else float("nan")

    def _known(self, label: str, budget: str) -> Arm:
        arm = self.chapter.arms.get((label, budget), {})
        return {r: k for r, by in arm.items() if (k := {b: c for b, c in by.items() if c in self._shares.index})}

    # --- one benchmark at a time -----------------------------------------------------------------------------------------

    def tested(self, one: str, two: str, budget: str) -> dict[str, Verdict]:
        """Benchmark -> `one` - `two` in native units; the benchmarks of this budget are one family."""
        alone = any(self.chapter.one_scorer(label, budget) for label in (one, two))
        counts = self.chapter.counts(one, two, budget)
        pairs = {b: self.beside((one, two), budget, b) for b in self.chapter.benchmarks}
        found = {b: (pair[0] - pair[1]).difference() for b, pair in pairs.items() if pair}
        return judged({b: replace(difference, scorers_only=alone, counts=counts) for b, difference in found.items()})
