"""Speedups and ratios from timing rows: pure functions, so that every printed figure can be recomputed from the store.

Rows are `Timing` records or the table `timings` of *one* cell. Arms of a round ran next to each other on the same inputs, so
ratios are of medians, with an interval from rounds drawn in pairs.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from typing import Any, TypeAlias

import numpy as np
import pandas as pd

from diffprune.core.records import Timing
from diffprune.statistics import Interval, ratio_of_medians

NATIVE_LIMIT = 1.10  # pruned prefill + overhead over the prefill of a natively short sequence: the project's bound
Rows: TypeAlias = pd.DataFrame | Iterable[Timing]


def times(rows: Rows, arm: str, *spans: str) -> pd.Series[Any]:
    """ms by round of one arm: the sum of `spans`, rounds in which all of them ran.

    Raises:
        ValueError: no round has them.
    """
    table = rows if isinstance(rows, pd.DataFrame) else pd.DataFrame([asdict(row) for row in rows])
    wide = table[(table["arm"] == arm) & table["span"].isin(spans)].pivot_table("value_ms", "round", "span", aggfunc="mean")
    if set(wide.columns) != set(spans) or wide.dropna().empty:
        raise ValueError(f"no round timed {' + '.join(spans)} of arm {arm!r}: measure these spans first")
    return wide.dropna().sum(axis=1)


def ratio(top: pd.Series[Any], bottom: pd.Series[Any]) -> Interval:
    """Median of `top` over median of `bottom`, over the rounds both have."""
    rounds = top.index.intersection(bottom.index)
    return ratio_of_medians(top[rounds].to_numpy(), bottom[rounds].to_numpy())


def prefill_speedup(rows: Rows) -> Interval:
    """prefill full / prefill pruned: what others call speedup; leaves out what the method costs."""
    return ratio(times(rows, "full", "prefill"), times(rows, "pruned", "prefill"))


def prefill_speedup_net(rows: Rows) -> Interval:
    """prefill full / (prefill pruned + overhead): the headline and the target of tuning."""
    return ratio(times(rows, "full", "prefill"), times(rows, "pruned", "prefill", "overhead"))


def encoder_prefill_speedup(rows: Rows) -> Interval:
    """The same with encoder and projection on both sides."""
    shared = ("encoder", "project", "prefill")
    return ratio(times(rows, "full", *shared), times(rows, "pruned", *shared, "overhead"))


def ttft_speedup(rows: Rows) -> Interval:
    """From PIL image and text to the first token id, unpruned over pruned."""
    return ratio(times(rows, "full", "ttft"), times(rows, "pruned", "ttft"))


def native_ratio(rows: Rows) -> Interval:
    """(prefill pruned + overhead) / prefill of a sequence that was always this short; `NATIVE_LIMIT` bounds it."""
    return ratio(times(rows, "pruned", "prefill", "overhead"), times(rows, "native", "prefill"))


def summary(rows: Rows) -> pd.DataFrame:
    """One row per arm and span: repeats, median, p10 and p90 in ms, flags."""
    table = rows if isinstance(rows, pd.DataFrame) else pd.DataFrame([asdict(row) for row in rows])
    grouped = table.groupby(["arm", "span"], sort=True)
    found = grouped["value_ms"].agg(
        repeats="size", median_ms="median", p10_ms=lambda v: np.quantile(v, 0.1), p90_ms=lambda v: np.quantile(v, 0.9)
    )
    return found.join(grouped["flags"].first()).reset_index()
