"""Arms compared on the same questions: means, paired differences, relative accuracy, retention, agreement, harm and gain."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from diffprune.statistics.bootstrap import (
    DRAWS,
    NO_LIMITS,
    Array,
    Interval,
    Statistic,
    bounds,
    codes_of,
    group_sums,
    resampled,
    two_sided_p,
)


@dataclass(frozen=True)
class Difference(Interval):
    """a - b, with its two-sided bootstrap p."""

    p: float = 1.0

    @property
    def verdict(self) -> str:
        """On a: `better`, `worse`, `tie` where the interval holds 0, "" where there is no interval."""
        if self.low > 0:
            return "better"
        if self.high < 0:
            return "worse"
        return "tie" if self.low <= 0 <= self.high else ""


@dataclass(frozen=True)
class Retention(Interval):
    """Blind-corrected retention. `image_bound` is false where full - blind does not exceed 3 standard errors: then there is no
    visual contribution to keep, and the figure means nothing."""

    image_bound: bool = True


def _part_sums(arms: Sequence[Array], groups: Any, parts: Any | None) -> tuple[Array, Array | None]:
    """Sums float [G, P, columns + 1] of every seed of every arm in each part, and the strata of the groups."""
    credits = np.concatenate(arms)
    whole = group_sums(list(credits), groups)  # also checks lengths and values
    if parts is None:
        return whole[:, None], None
    group, num_groups = codes_of(groups)
    part, num_parts = codes_of(parts)
    if part.shape != group.shape:
        raise ValueError(f"{len(part)} part labels for {len(group)} rows: every row needs one")
    cell = group * num_parts + part
    sums = [np.bincount(cell, column, num_groups * num_parts) for column in [*credits, np.ones(len(cell))]]
    table = np.stack(sums, axis=1).round(9).reshape(num_groups, num_parts, -1)
    present = table[..., -1] > 0
    return table, None if (present.sum(1) > 1).any() else present.argmax(1)


def _seed_shares(rng: np.random.Generator, num: int, draws: int) -> Array:
    """Share of each seed in a replicate, float [draws, num]: num - 1 seeds drawn with replacement (one seed: always it)."""
    if num == 1:
        return np.ones((draws, 1))
    return rng.multinomial(num - 1, np.full(num, 1 / num), size=draws) / (num - 1)


def _figure(
    statistic: Statistic,
    arms: Sequence[Any],
    groups: Any,
    parts: Any | None,
    *,
    draws: int,
    seed: int,
    paired_seeds: bool = True,
    unit: float = 1.0,
    limits: tuple[float, float] = NO_LIMITS,
) -> tuple[dict[str, Any], Array]:
    """Fields of an Interval, and replicates [draws], of a figure of the arms' mean credits.

    statistic: one array [..., P] per arm, its mean credit in each part averaged over seeds -> [..., P].
    """
    rows = [np.atleast_2d(np.asarray(arm, float)) for arm in arms]
    table, strata = _part_sums(rows, groups, parts)
    drawn = resampled(table.reshape(len(table), -1), draws, seed, strata).reshape(draws, *table.shape[1:])
    rng = np.random.default_rng([seed, 1])
    shares: dict[int, Array] = {}
    observed, replicated, start = [], [], 0
    with np.errstate(divide="ignore", invalid="ignore"):
        for arm in rows:
            num = len(arm)
            if num not in shares or not paired_seeds:
                shares[num] = _seed_shares(rng, num, draws)
            columns = slice(start, start + num)
            start += num
            total = table.sum(0)
            observed.append(total[:, columns].mean(1) / total[:, -1])
            replicated.append(np.einsum("dps,ds->dp", drawn[..., columns], shares[num]) / drawn[..., -1])
        estimate = float(np.mean(statistic(*observed)))
        replicates = np.asarray(statistic(*replicated), float).mean(-1)
    fields = {"num_rows": int(table[..., -1].sum()), "num_groups": len(table), "num_seeds": max(map(len, rows))}
    return fields | {"estimate": estimate} | bounds(replicates, estimate, len(table), unit, limits), replicates


def mean_interval(credits: Any, groups: Any, parts: Any | None = None, *, draws: int = DRAWS, seed: int = 0) -> Interval:
    """Mean credit (over parts, and over seeds) with its cluster-bootstrap interval."""
    return Interval(**_figure(lambda a: a, [credits], groups, parts, draws=draws, seed=seed, limits=(0.0, 1.0))[0])


def paired_difference(
    a: Any, b: Any, groups: Any, parts: Any | None = None, *, paired_seeds: bool = True, draws: int = DRAWS, seed: int = 0
) -> Difference:
    """Mean credit of arm a minus that of arm b on the same rows.

    paired_seeds: seed s of a and of b belong together (same initial weights and data order), so that one draw of seeds serves
    both. Arms with unequal numbers of seeds are drawn apart; an arm with one seed (a rule that learns nothing) just stays.
    """
    fields, replicates = _figure(
        lambda x, y: x - y, [a, b], groups, parts, draws=draws, seed=seed, paired_seeds=paired_seeds, limits=(-1.0, 1.0)
    )
    return Difference(**fields, p=two_sided_p(replicates))


def relative_accuracy(
    pruned: Any, full: Any, groups: Any, parts: Any | None = None, *, capped: bool = False, draws: int = DRAWS, seed: int = 0
) -> Interval:
    """Ratio of means M / F on the same rows, mean over parts (R); `capped` at 1 in each part (R_cap); nan where F is 0."""
    base = float(np.mean(np.asarray(full, float))) if np.size(full) else 0.0

    def ratio(m: Array, f: Array) -> Array:
        return np.minimum(m / f, 1.0) if capped else m / f

    limits = (0.0, 1.0 if capped else np.inf)
    unit = 1 / base if base else 1.0
    return Interval(**_figure(ratio, [pruned, full], groups, parts, draws=draws, seed=seed, unit=unit, limits=limits)[0])


def blind_corrected(pruned: Any, full: Any, blind: Any, groups: Any, *, draws: int = DRAWS, seed: int = 0) -> Retention:
    """Share of the visual contribution kept on one benchmark: (M - B) / (F - B), B = the same model without the image. May be
    negative. Average only benchmarks that are `image_bound`."""
    gap, gaps = _figure(lambda f, b: f - b, [full, blind], groups, None, draws=draws, seed=seed)
    bound = gap["estimate"] > 3 * float(gaps.std(ddof=1)) if len(gaps) > 1 else False
    unit = 1 / gap["estimate"] if gap["estimate"] > 0 else 1.0
    fields, _ = _figure(lambda m, f, b: (m - b) / (f - b), [pruned, full, blind], groups, None, draws=draws, seed=seed, unit=unit)
    return Retention(**fields, image_bound=bool(bound))


def agreement(
    parsed: Any, parsed_full: Any, groups: Any, *, whole_groups: bool = False, draws: int = DRAWS, seed: int = 0
) -> Interval:
    """Share of rows whose parsed answer equals the full model's; `whole_groups` (MMBench, MME): of groups where all rows do."""
    same = pd.Series([float(one == other) for one, other in zip(parsed, parsed_full, strict=True)])
    if not whole_groups:
        return mean_interval(same.to_numpy(), groups, draws=draws, seed=seed)
    every = same.groupby(np.asarray(groups)).min()
    return mean_interval(every.to_numpy(), every.index.to_numpy(), draws=draws, seed=seed)


def harm_and_gain(pruned: Any, full: Any) -> tuple[float, float]:
    """Shares of rows (full right, pruned wrong) and (full wrong, pruned right); right = credit 1."""
    now, before = np.asarray(pruned, float) == 1, np.asarray(full, float) == 1
    return float((before & ~now).mean()), float((now & ~before).mean())


def paired(a: pd.DataFrame, b: pd.DataFrame, on: Sequence[str] = ("sample",)) -> pd.DataFrame:
    """Rows of two runs side by side, sorted by `on`: those columns, group, credit_a, credit_b, and parsed_a, parsed_b if both
    have it. Where `a` and `b` hold several benchmarks, `on` names that column too.

    Raises:
        ValueError: a question twice in one run, or answered in one run only; the first such question is named.
    """
    keys = list(on)
    for name, frame in (("first", a), ("second", b)):
        twice = frame[frame.duplicated(keys)]
        if len(twice):
            raise ValueError(f"{twice.iloc[0][keys].to_dict()} is in the {name} run more than once: de-duplicate by {keys}")
    values = [c for c in ("credit", "parsed") if c in a.columns and c in b.columns]
    joined = a[[*keys, "group", *values]].merge(
        b[[*keys, *values]], on=keys, how="outer", suffixes=("_a", "_b"), indicator=True, validate="1:1"
    )
    alone = joined[joined["_merge"] != "both"]
    if len(alone):
        which = "first" if alone.iloc[0]["_merge"] == "left_only" else "second"
        raise ValueError(f"{alone.iloc[0][keys].to_dict()} is in the {which} run only: paired figures need the same questions")
    return joined.drop(columns="_merge").sort_values(keys, ignore_index=True)
