"""Timings of a comparison by method, budget and batch: medians of times and of their ratios."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pandas as pd

from diffprune.report.analysis.comparison import FULL, Comparison
from diffprune.report.analysis.records import Records
from diffprune.statistics import Interval, speedup
from diffprune.timing.machine import FEW

SLOW = ("ttft", "decode")  # timed fewer times, flagged apart


@dataclass(frozen=True)
class Spread:
    """Median, 10th and 90th percentile in ms over n repetitions."""

    median: float
    p10: float
    p90: float
    repeats: int


@dataclass(frozen=True)
class Speed:
    """What was timed for one method at one budget and batch size, pooled over its seeds and over sessions.

    spans: (arm, span) -> Spread. net, encoded (net, with the encoder in both arms), prefill, ttft, native: the ratios of
    `statistics.speedup`, None where a span was not timed; their `num_groups` says in how many sessions it was.
    flags: of encoder, overhead and prefill; slow_flags: of TTFT and decode.
    """

    label: str
    budget: str
    batch: int
    mode: str
    kept: float
    sequence: float
    spans: dict[tuple[str, str], Spread]
    net: Interval | None
    encoded: Interval | None
    prefill: Interval | None
    ttft: Interval | None
    native: Interval | None
    flags: tuple[str, ...]
    slow_flags: tuple[str, ...]


def _spread(parts: list[pd.Series]) -> Spread:
    values = np.concatenate(parts)
    p10, median, p90 = np.percentile(values, [10, 50, 90])
    return Spread(float(median), float(p10), float(p90), min(map(len, parts)))


def _encoded(cell: speedup.Rounds) -> speedup.Rounds:
    """Times of a cell with the unpruned arm's encoder in both arms: what a method asks of it beyond that is in its overhead."""
    found = [cell[arm, "encoder"] for arm in ("full", "pruned") if (arm, "encoder") in cell]
    return {**cell, ("full", "encoder"): found[0], ("pruned", "encoder"): found[0]} if found else cell


def _flags(rows: pd.DataFrame) -> tuple[str, ...]:
    """Flags of the rows, and `few_repeats` where all sessions together have fewer, whatever was said of one."""
    found = {word for text in rows["flags"].astype(str).unique() for word in text.split()} - {"few_repeats"}
    counts = rows.groupby(["scorer_seed", "arm", "span"], observed=True, dropna=False).size()
    return tuple(sorted(found | ({"few_repeats"} if (counts < FEW).any() else set())))


def speeds(records: Records, cells: pd.DataFrame) -> list[Speed]:
    """One `Speed` per method, budget, batch and mode of `cells`, in that order."""
    rows = records.of("timings", cells)
    if rows.empty:
        return []
    about = cells[["label", "budget", "batch", "mode", "scorer_seed"]]
    rows = rows.join(about, on="cell")
    found = []
    for (label, budget, batch, mode), part in rows.groupby(["label", "budget", "batch", "mode"], sort=True, observed=True):
        each = [speedup.rounds(p) for _, p in part.groupby("cell", observed=True, sort=True)]
        spans = {key: _spread([c[key] for c in each if key in c]) for key in sorted({k for c in each for k in c})}
        slow = part["span"].isin(SLOW)
        flags = _flags(part[~slow])
        pruned = part[part["arm"] == "pruned"]
        charged = "overhead_excluded" not in flags  # else the net figure would leave out what the method costs
        found.append(
            Speed(
                label=str(label), budget=str(budget), batch=int(batch), mode=str(mode), spans=spans, flags=flags,
                slow_flags=_flags(part[slow]),
                kept=float(pruned["visual_kept"].mean()), sequence=float(pruned["sequence"].mean()),
                net=speedup.pooled(speedup.prefill_speedup_net, each) if charged else None,
                encoded=speedup.pooled(speedup.encoded_speedup_net, list(map(_encoded, each))) if charged else None,
                prefill=speedup.pooled(speedup.prefill_speedup, each),
                ttft=speedup.pooled(speedup.ttft_speedup, each),
                native=speedup.pooled(speedup.native_ratio, each) if charged else None,
            )
        )  # fmt: skip
    return found


def common_flags(found: list[Speed]) -> set[str]:
    """Flags that every timing has: said once, not beside each number."""
    return set.intersection(*(set(s.flags) for s in found)) if found else set()


def own_flags(flags: tuple[str, ...], common: set[str]) -> str:
    """Flags to print beside one number."""
    return said(f for f in flags if f not in common)


def said(flags: Iterable[str]) -> str:
    """Flags in words, as on the page's chips: "clock drift, few repeats"."""
    return ", ".join(sorted(flag.replace("_", " ") for flag in flags))


class Headline(NamedTuple):
    """What the first figures of a page were timed with. batch: rows per request; modes: how many there are on the page."""

    batch: int
    mode: str
    modes: int = 1

    def holds(self, one: Speed) -> bool:
        """Whether a speed was timed with it."""
        return (one.batch, one.mode) == (self.batch, self.mode)

    def __str__(self) -> str:
        return f"batch {self.batch}" + (f", mode {self.mode}" if self.modes > 1 else "")


def headline(timed: Iterable[tuple[int, str, bool]]) -> Headline | None:
    """The batch size at which most net speedups were measured, the larger of equals, and of its modes the one in which most were,
    of equals eager, as users' own calls run. None where nothing was timed.

    timed: batch, mode and whether there is a net speedup, of every method at every budget.
    """
    sizes, modes = Counter[int](), Counter[tuple[int, str]]()
    for batch, mode, counts in timed:
        sizes[batch] += counts
        modes[batch, mode] += counts
    if not sizes:
        return None
    batch = max(sizes, key=lambda size: (sizes[size], size))
    mode = max((mode for size, mode in modes if size == batch), key=lambda mode: (modes[batch, mode], mode == "eager"))
    return Headline(batch, mode, len({mode for _, mode in modes}))


def of(chapter: Comparison) -> tuple[list[Speed], dict[tuple[str, str], Speed], Headline | None]:
    """All speeds of a chapter, those at the headline's batch size and mode by (method, budget), and that headline."""
    found = speeds(chapter.records, chapter.measured)
    first = headline((s.batch, s.mode, s.net is not None) for s in found)
    return found, {(s.label, s.budget): s for s in found if first and first.holds(s) and s.label != FULL}, first
