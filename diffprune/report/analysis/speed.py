"""Timings as medians and ratios of medians, with intervals over rounds."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pandas as pd

from diffprune.report.analysis.comparison import FULL, Comparison
from diffprune.report.analysis.panel import DRAWS
from diffprune.report.analysis.records import Records
from diffprune.statistics import Interval, ratio_of_medians
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
    """What was timed for one method at one budget and batch size, pooled over its seeds.

    spans: (arm, span) -> Spread. net: full prefill / (pruned prefill + overhead), the headline; prefill: without overhead;
    ttft: full / pruned;
    native: (pruned prefill + overhead) / prefill of a sequence that was always this short.
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
    prefill: Interval | None
    ttft: Interval | None
    native: Interval | None
    flags: tuple[str, ...]
    slow_flags: tuple[str, ...]


Rounds = dict[tuple[str, str], pd.Series]  # (arm, span) -> ms by round


def _ratio(cells: list[Rounds], above: tuple[str, ...], below: tuple[str, ...]) -> Interval | None:
    """Median of `above` over median of `below`, each (arm, span, span ...) summed round by round as in `diffprune.speed`.

    Several cells (seeds of one method) give the mean of their ratios; their intervals are independent.
    """
    found = []
    for cell in cells:
        sides = [[cell[arm, span] for span in spans if (arm, span) in cell] for arm, *spans in (above, below)]
        if [len(side) for side in sides] != [len(above) - 1, len(below) - 1]:
            continue
        table = pd.concat({"above": sum(sides[0]), "below": sum(sides[1])}, axis=1).dropna()
        if len(table) > 1 and (table > 0).all(axis=None):
            found.append(ratio_of_medians(table["above"].to_numpy(), table["below"].to_numpy(), draws=DRAWS))
    if not found:
        return None
    value = sum(f.estimate for f in found) / len(found)
    down, up = (
        math.sqrt(sum((f.estimate - edge(f)) ** 2 for f in found)) / len(found) for edge in (lambda f: f.low, lambda f: f.high)
    )
    repeats = min(f.num_rows for f in found)
    return Interval(value, value - down, value + up, repeats, repeats, len(found))


def _rounds(rows: pd.DataFrame) -> Rounds:
    """(arm, span) -> ms by round."""
    return {
        (str(arm), str(span)): part.groupby("round")["value_ms"].mean()
        for (arm, span), part in rows.groupby(["arm", "span"], observed=True)
    }


def _spread(parts: list[pd.Series]) -> Spread:
    values = np.concatenate(parts)
    p10, median, p90 = np.percentile(values, [10, 50, 90])
    return Spread(float(median), float(p10), float(p90), min(map(len, parts)))


def _flags(rows: pd.DataFrame) -> tuple[str, ...]:
    """Flags of the rows, and `few_repeats` where the rows show it though nobody said so."""
    found = {word for text in rows["flags"].astype(str).unique() for word in text.split()}
    counts = rows.groupby(["cell", "arm", "span"], observed=True).size()
    return tuple(sorted(found | ({"few_repeats"} if (counts < FEW).any() else set())))


def speeds(records: Records, cells: pd.DataFrame) -> list[Speed]:
    """One `Speed` per method, budget, batch and mode of `cells`, in that order."""
    rows = records.of("timings", cells)
    if rows.empty:
        return []
    about = cells[["label", "budget", "mode"]]
    rows = rows.join(about, on="cell")
    found = []
    for (label, budget, batch, mode), part in rows.groupby(["label", "budget", "batch", "mode"], sort=True, observed=True):
        each = [_rounds(p) for _, p in part.groupby("cell", observed=True, sort=True)]
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
                net=_ratio(each, ("full", "prefill"), ("pruned", "prefill", "overhead")) if charged else None,
                prefill=_ratio(each, ("full", "prefill"), ("pruned", "prefill")),
                ttft=_ratio(each, ("full", "ttft"), ("pruned", "ttft")),
                native=_ratio(each, ("pruned", "prefill", "overhead"), ("native", "prefill")) if charged else None,
            )
        )  # fmt: skip
    return found


def common_flags(found: list[Speed]) -> set[str]:
    """Flags that every timing has: said once, not beside each number."""
    return set.intersection(*(set(s.flags) for s in found)) if found else set()


def own_flags(flags: tuple[str, ...], common: set[str]) -> str:
    """Flags to print beside one number."""
    return " ".join(f for f in flags if f not in common)


def headline_batch(found: list[Speed]) -> int | None:
    """The batch size at which most net speedups were measured; the larger of equals."""
    sizes: dict[int, int] = {}
    for speed in found:
        sizes[speed.batch] = sizes.get(speed.batch, 0) + (speed.net is not None)
    return max(sizes, key=lambda b: (sizes[b], b)) if sizes else None


def of(chapter: Comparison) -> tuple[list[Speed], dict[tuple[str, str], Speed], int | None]:
    """All speeds of a chapter, those at the headline batch size by (method, budget), and that batch size."""
    found = speeds(chapter.records, chapter.measured)
    batch = headline_batch(found)
    return found, {(s.label, s.budget): s for s in found if s.batch == batch and s.label != FULL}, batch
