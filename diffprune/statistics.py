"""How sure we are: intervals of means, paired differences, ratios and retention, all by one bootstrap over groups.

What is drawn is always the *group* (picture, MME pair, rotations of one question), never the row: rows of a group are not
independent. A figure is a function of sums over rows, so a replicate needs only each group's sums; arms that are compared go into
the same sums and therefore see the same draw.

An *arm* is the credits of one method: [rows], or [S, rows] over S scorer seeds (row i the same question in all). With seeds, a
replicate draws groups *and* seeds, independently of each other (a crossed design; Owen 2007, "The pigeonhole bootstrap"), all
seeds on the same groups, and averages over the seeds drawn. Of S seeds it draws S - 1, because S of S would understate the
variance between seeds by the factor (S - 1) / S (Rao and Wu 1988). Three seeds remain three: where seeds differ more than
pictures do, the interval is too short (simulated: 89 to 96 % held the truth with three seeds), so show the seeds themselves too.

*parts* (one label per row: the benchmark) makes every figure the mean over benchmarks of the benchmark's own figure. Benchmarks
that share pictures must share group keys, and are then drawn together; where no group occurs in two parts, each part is drawn by
itself. So keys of unrelated benchmarks must not collide.

Credits are in [0, 1] and so are the results; ratios are bare numbers. A shuffled table gives the same result to the last digit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

DRAWS = 10_000
Array = np.ndarray[Any, np.dtype[Any]]
Statistic = Callable[..., Array]


@dataclass(frozen=True)
class Interval:
    """An estimate with its 95 % bootstrap interval. `note` says so where the interval is a rule-of-three bound instead."""

    estimate: float
    low: float
    high: float
    num_rows: int
    num_groups: int
    num_seeds: int = 1
    note: str = ""


@dataclass(frozen=True)
class Difference(Interval):
    """a - b: two-sided bootstrap p, and the verdict on a: `better`, `worse`, or `tie` where the interval holds 0."""

    p: float = 1.0
    verdict: str = "tie"


@dataclass(frozen=True)
class Retention(Interval):
    """Blind-corrected retention. `image_bound` is false where full - blind does not exceed 3 standard errors: then there is no
    visual contribution to keep, and the figure means nothing."""

    image_bound: bool = True


@dataclass(frozen=True)
class McNemar:
    """p: mid-p, the default. `difference` is (c - b) / n, in [-1, 1], with its standard error."""

    p: float
    exact: float
    chi2: float
    chi2_p: float
    difference: float
    standard_error: float


# --- the bootstrap ---------------------------------------------------------------------------------------------------


def group_sums(columns: Sequence[Any], groups: Any) -> Array:
    """Sums per group, float [G, len(columns) + 1]; the last column counts rows. Groups in the order of their keys.

    Raises:
        ValueError: no rows, columns of unequal length, or a value that is not finite.
    """
    codes, num = _codes(groups)
    values = [np.asarray(column, float) for column in columns]
    for column in values:
        if column.shape != codes.shape:
            raise ValueError(f"{len(column)} credits for {len(codes)} group keys: every row needs both")
        if not np.isfinite(column).all():
            raise ValueError("a credit is nan or infinite: leave rows that failed out and report their number")
    sums = [np.bincount(codes, column, num) for column in [*values, np.ones(len(codes))]]
    return np.stack(sums, axis=1).round(9)  # rounded, so that the order of rows cannot show in the last digits


def _codes(keys: Any) -> tuple[Array, int]:
    codes, known = pd.factorize(np.asarray(keys), sort=True)
    if not len(codes):
        raise ValueError("no rows to draw from: an interval needs at least one graded row")
    if (codes < 0).any():
        raise ValueError("a group key is missing: every row needs one")
    return np.asarray(codes), len(known)


def resampled(sums: Array, draws: int = DRAWS, seed: int = 0, strata: Any | None = None) -> Array:
    """Sums over G groups drawn with replacement, float [draws, M]; within each stratum (MME: category) if given.

    sums: float [G, M]; strata: a label per group. Each draw is kept as how often every group came, so its cost is one count and
    one product, whatever the number of rows.
    """
    rng = np.random.default_rng(seed)
    labels, num_labels = (np.zeros(len(sums), int), 1) if strata is None else _codes(strata)
    total = np.zeros((draws, sums.shape[1]))
    for label in range(num_labels):
        part = sums[labels == label]
        num = len(part)
        step = min(draws, max(1, 200_000 // num))  # counts of one step stay in the cache
        for start in range(0, draws, step):
            some = min(step, draws - start)
            drawn = rng.integers(0, num, (some, num)) + num * np.arange(some)[:, None]
            counts = np.bincount(drawn.ravel(), minlength=some * num).reshape(some, num)
            total[start : start + some] += counts.astype(float) @ part
    return total


def two_sided_p(replicates: Array, null: float = 0.0) -> float:
    """2 min(1 + #{T <= null}, 1 + #{T >= null}) / (draws + 1), at most 1."""
    values = replicates[np.isfinite(replicates)]
    tail = min(int((values <= null).sum()), int((values >= null).sum()))
    return min(1.0, 2 * (1 + tail) / (len(values) + 1))


def _bounds(replicates: Array, estimate: float, num_groups: int, unit: float, limits: tuple[float, float]) -> dict[str, Any]:
    """The middle 95 % of the finite replicates; where all agree, the rule of three: the estimate +- 3 / G units of credit."""
    values = replicates[np.isfinite(replicates)]
    if not len(values) or not np.isfinite(estimate):
        return {"low": float("nan"), "high": float("nan"), "note": "undefined"}
    low, high = (float(bound) for bound in np.quantile(values, (0.025, 0.975)))
    if np.ptp(values) > 1e-12:
        return {"low": low, "high": high}
    reach = min(1.0, 3 / num_groups) * unit
    note = f"rule of three: all draws of {num_groups} groups agree"
    return {"low": max(limits[0], estimate - reach), "high": min(limits[1], estimate + reach), "note": note}


NO_LIMITS = (-np.inf, np.inf)


def interval_of(
    statistic: Statistic,
    sums: Array,
    *,
    draws: int = DRAWS,
    seed: int = 0,
    strata: Any | None = None,
    unit: float = 1.0,
    limits: tuple[float, float] = NO_LIMITS,
) -> tuple[Interval, Array]:
    """Interval of any figure that is a function of sums over rows (F1, MME points, their differences), and its replicates.

    statistic: sums float [..., M] -> [...]; sums: of each group, as `group_sums` gives them (last column = rows);
    unit, limits: what one full credit is worth in the figure, and its range, for the rule of three.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        estimate = float(statistic(sums.sum(0)))
        replicates = np.asarray(statistic(resampled(sums, draws, seed, strata)), float)
    bounds = _bounds(replicates, estimate, len(sums), unit, limits)
    return Interval(estimate, num_rows=int(sums[:, -1].sum()), num_groups=len(sums), **bounds), replicates


# --- arms ------------------------------------------------------------------------------------------------------------


def _part_sums(arms: Sequence[Array], groups: Any, parts: Any | None) -> tuple[Array, Array | None]:
    """Sums float [G, P, columns + 1] of every seed of every arm in each part, and the strata of the groups."""
    credits = np.concatenate(arms)
    whole = group_sums(list(credits), groups)  # also checks lengths and values
    if parts is None:
        return whole[:, None], None
    group, num_groups = _codes(groups)
    part, num_parts = _codes(parts)
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
    return fields | {"estimate": estimate} | _bounds(replicates, estimate, len(table), unit, limits), replicates


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
    verdict = "better" if fields["low"] > 0 else "worse" if fields["high"] < 0 else "tie"
    return Difference(**fields, p=two_sided_p(replicates), verdict=verdict)


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


# --- tests and timings -----------------------------------------------------------------------------------------------


def mcnemar(b: int, c: int, num_rows: int | None = None) -> McNemar:
    """McNemar's test on 0/1 outcomes of *independent* units (ScienceQA rows, MMBench groups, MME pairs); p = 1 if b + c = 0.

    b: only the full model is right, c: only the pruned one; num_rows: all pairs, discordant or not (default b + c).
    """
    if b < 0 or c < 0:
        raise ValueError(f"counts of discordant pairs are at least 0, got b={b}, c={c}")
    discordant, least = b + c, min(b, c)
    n = discordant if num_rows is None else num_rows
    if n < discordant:
        raise ValueError(f"{n} pairs cannot hold b + c = {discordant} discordant ones")
    if not discordant:
        return McNemar(1.0, 1.0, 0.0, 1.0, 0.0, 0.0)
    mid = 2 * (stats.binom.cdf(least, discordant, 0.5) - stats.binom.pmf(least, discordant, 0.5) / 2)
    exact = stats.binomtest(least, discordant, 0.5).pvalue
    chi2 = (abs(b - c) - 1) ** 2 / discordant
    error = max(0.0, discordant - (b - c) ** 2 / n) ** 0.5 / n
    return McNemar(min(1.0, float(mid)), float(exact), chi2, float(stats.chi2.sf(chi2, 1)), (c - b) / n, error)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjusted p values, in the order given."""
    p = np.asarray(p_values, float)
    order = np.argsort(p, kind="stable")
    adjusted = np.empty(len(p))
    adjusted[order] = np.minimum(np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)), 1) if len(p) else []
    return [float(value) for value in adjusted]


def ratio_of_medians(numerator_ms: Any, denominator_ms: Any, *, draws: int = DRAWS, seed: int = 0) -> Interval:
    """Speedup median(full) / median(pruned) of timings; position i of both is round i, and rounds are drawn as pairs.

    Raises:
        ValueError: fewer than two rounds, unequal numbers of them, or a time that is not positive.
    """
    top, bottom = np.asarray(numerator_ms, float), np.asarray(denominator_ms, float)
    if top.shape != bottom.shape or top.ndim != 1 or len(top) < 2:
        raise ValueError(f"timings are compared round by round, got {top.shape} and {bottom.shape}: at least 2 rounds of each")
    if not (np.isfinite(top) & np.isfinite(bottom) & (top > 0) & (bottom > 0)).all():
        raise ValueError("a timing is zero, negative, infinite or nan: leave rounds that did not run out of both")

    def ratio(x: Array, y: Array, axis: int = -1) -> Any:
        return np.median(x, axis=axis) / np.median(y, axis=axis)

    found = stats.bootstrap(
        (top, bottom), ratio, paired=True, vectorized=True, n_resamples=draws, batch=1000, method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval  # fmt: skip
    return Interval(float(ratio(top, bottom)), float(found.low), float(found.high), len(top), len(top))
