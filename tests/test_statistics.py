"""The bootstrap against loops that draw groups and seeds one by one; tests against scipy; coverage of known truths."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import util
from pathlib import Path
from types import ModuleType

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from diffprune import statistics as st
from diffprune.statistics import bootstrap, speedup

Array = np.ndarray


@pytest.fixture(scope="module")
def coverage() -> ModuleType:
    """The study itself, run small."""
    path = Path(__file__).parent.parent / "jobs" / "studies" / "coverage.py"
    spec = util.spec_from_file_location("study_of_coverage", path)
    assert spec and spec.loader
    made = util.module_from_spec(spec)
    sys.modules[spec.name] = made  # dataclasses look their module up
    spec.loader.exec_module(made)
    return made


# --- the bootstrap over groups ----------------------------------------------------------------------------------------------


def clustered(rng: np.random.Generator, columns: int, num_groups: int = 60) -> tuple[Array, Array]:
    """0/1 credits [columns, R] of 1-4 rows per group that mostly agree within a group, and the groups [R]."""
    groups = np.repeat(np.arange(num_groups), rng.integers(1, 5, num_groups))
    level = np.clip(0.6 + 0.3 * rng.choice([-1, 1], num_groups), 0, 1)
    return (rng.random((columns, len(groups))) < level[groups]).astype(float), groups


def means(credits: Array, groups: Array, missing: Array | None = None, **more: object) -> st.ClusterBootstrap:
    """Mean credit in percent of every column; missing: bool [columns, R], rows a column has not answered."""
    there = np.ones(credits.shape, bool) if missing is None else ~missing
    shape = (int(groups.max()) + 1, len(credits))
    columns, rows = np.nonzero(there)
    count = st.totals(np.ones(len(rows)), (groups[rows], columns), shape)
    credit = st.totals(credits[columns, rows], (groups[rows], columns), shape)
    return st.ClusterBootstrap(np.stack([credit, count], -1), count, st.ratio_of_sums(100), **more)  # type: ignore[arg-type]


def drawn_one_by_one(figure: Callable[[Array], float], credits: Array, groups: Array, seeds: int = 1, draws: int = 3000) -> Array:
    """Replicates of a figure of credits [arms * seeds, R]: whole groups, and seeds - 1 seeds, drawn in a loop."""
    rng = np.random.default_rng(1)
    rows_of = [np.flatnonzero(groups == g) for g in np.unique(groups)]
    found = []
    for _ in range(draws):
        rows = np.concatenate([rows_of[g] for g in rng.integers(0, len(rows_of), len(rows_of))])
        picked = rng.integers(0, seeds, seeds - 1) if seeds > 1 else [0]
        found.append(figure(credits.reshape(-1, seeds, credits.shape[1])[:, picked][..., rows].mean(1)))
    return np.array(found)


def ends(draws: Array) -> tuple[float, float]:
    return tuple(np.quantile(draws, (0.025, 0.975)))  # type: ignore[return-value]


@pytest.mark.parametrize("seeds", [1, 3, 5])
def test_means_differences_and_ratios_are_those_of_groups_and_seeds_drawn_one_by_one(seeds: int) -> None:
    rng = np.random.default_rng(seeds)
    credits, groups = clustered(rng, 2 * seeds)
    credits[seeds:] = np.where(rng.random(credits[seeds:].shape) < 0.3, 0, credits[seeds:])
    made = means(credits, groups)
    a, b = made.estimates([range(seeds), range(seeds, 2 * seeds)])
    for found, figure in (
        (a.interval(), lambda arms: 100 * arms[0].mean()),
        ((a - b).difference(), lambda arms: 100 * (arms[0].mean() - arms[1].mean())),
        (b.percent_of(a).interval(), lambda arms: 100 * arms[1].mean() / arms[0].mean()),
    ):
        low, high = ends(drawn_one_by_one(figure, credits, groups, seeds))
        assert found.estimate == pytest.approx(figure(credits.reshape(2, seeds, -1).mean(1)))
        assert (found.low, found.high) == pytest.approx((low, high), abs=0.1 * (high - low))
        assert (found.num_rows, found.num_groups, found.num_seeds) == (len(groups), 60, seeds)


def test_resampled_sums_are_multinomial_sums_of_whole_groups() -> None:
    sums = np.array([[1.0, 2.0], [1.0, 2.0], [0.0, 3.0]])
    drawn = st.resampled(sums, draws=20_000)
    assert set(np.unique(drawn[:, 1])) == {6.0, 7.0, 8.0, 9.0}  # 3 groups of 2 or 3 rows
    assert drawn.mean(0) == pytest.approx(sums.sum(0), abs=0.05)
    assert drawn[:, 0].var() == pytest.approx(3 * sums[:, 0].var(), abs=0.05)
    assert drawn[:, 0] == pytest.approx(3 - (drawn[:, 1] - 6))  # columns move together


def test_strata_keep_their_number_of_groups() -> None:
    sums = np.array([[1.0, 0], [1, 0], [0, 1], [0, 1], [0, 1]])
    assert (st.resampled(sums, strata=np.array([0, 0, 1, 1, 1])) == [2, 3]).all()
    assert not (st.resampled(sums) == [2, 3]).all()


def test_one_row_per_group_agrees_with_scipys_bootstrap() -> None:
    x = np.random.default_rng(5).random(80)
    (found,) = means(x[None], np.arange(80)).estimates([[0]])
    theirs = stats.bootstrap((100 * x,), np.mean, method="percentile", rng=np.random.default_rng(1)).confidence_interval
    assert (found.interval().low, found.interval().high) == pytest.approx((theirs.low, theirs.high), abs=0.5)


def test_of_s_seeds_s_minus_1_are_drawn_which_makes_the_variance_of_their_mean_unbiased() -> None:
    a = np.array([0.2, 0.5, 0.8, 0.9])
    assert (st.seed_shares(4, 50_000) @ a).var() == pytest.approx(a.var(ddof=1) / 4, rel=0.03)
    assert (st.seed_shares(1, 5) == 1).all()


def test_seeds_of_two_arms_are_paired() -> None:
    credits = np.repeat([[0.2], [0.5], [0.8], [0.1], [0.4], [0.7]], 50, axis=1)  # the same gap in every seed
    a, b = means(credits, np.arange(50)).estimates([[0, 1, 2], [3, 4, 5]])
    assert np.ptp((a - b).draws) == pytest.approx(0) and (a.interval().low, a.interval().high) == pytest.approx((20, 80))


def test_the_order_of_rows_does_not_show() -> None:
    rng = np.random.default_rng(4)
    credits, groups = clustered(rng, 2, 20)
    credits = credits * rng.choice([0.3, 0.6, 0.9, 1], credits.shape)  # whose sums depend on their order in the last digits
    order = rng.permutation(len(groups))
    one, other = means(credits, groups), means(credits[:, order], groups[order])
    assert (one.compared([0, 1])[1] == other.compared([0, 1])[1]).all()


def test_columns_are_compared_on_the_groups_all_have_answered() -> None:
    credits, groups = clustered(np.random.default_rng(0), 2)
    missing = np.zeros(credits.shape, bool)
    missing[1, groups < 10] = True
    a, b = means(credits, groups, missing).estimates([[0], [1]])
    later = means(credits[:, groups >= 10], groups[groups >= 10] - 10)
    assert (a.value, b.value) == pytest.approx(tuple(later.value)) and a.num_groups == 50
    assert means(credits, groups, missing).estimates([[0]])[0].value == pytest.approx(100 * credits[0].mean())
    missing[1] = True
    nothing, _ = means(credits, groups, missing).estimates([[0], [1]])
    assert np.isnan(nothing.value) and np.isnan(nothing.interval().low) and nothing.num_rows == 0


def test_many_groups_are_joined_without_losing_a_row() -> None:
    sums = np.random.default_rng(0).random((2 * bootstrap.BLOCKS + 7, 3))
    assert bootstrap.joined(sums).sum(0) == pytest.approx(sums.sum(0))
    assert bootstrap.joined(sums).shape == (bootstrap.BLOCKS, 3)
    x = np.random.default_rng(1).random(5000)
    (found,) = means(x[None], np.arange(5000)).estimates([[0]])
    assert found.draws.std() == pytest.approx(100 * x.std() / 5000**0.5, rel=0.1)


def test_a_mean_over_benchmarks_counts_each_once_and_draws_shared_pictures_together() -> None:
    groups, right = np.arange(50), (np.arange(50) % 2).astype(float)
    one, two = right[None], 1 - right[None]  # what one benchmark gains on a picture the other loses
    for name, spread in (("all", 0.0), ("", 5.0)):
        parts = [means(c, groups, name=name or str(i)).estimates([[0]])[0] for i, c in enumerate((one, two))]
        assert st.average(parts, together=name == "all").draws.std() == pytest.approx(spread, abs=0.5)
    assert st.average(parts, together=True).num_groups == 50 and st.average(parts, together=False).num_groups == 100
    few, many = means(np.ones((1, 1)), np.zeros(1, int)), means(np.zeros((1, 3)), np.arange(3))
    parts = [few.estimates([[0]])[0], many.estimates([[0]])[0]]
    assert st.average(parts, together=False).value == 50 and st.average(parts, together=False, cap=60).value == 30


# --- intervals ---------------------------------------------------------------------------------------------------------------


def test_rule_of_three_where_every_draw_agrees() -> None:
    a, b = means(np.ones((2, 60)), np.arange(60) // 2).estimates([[0], [1]])
    assert (a.interval(0, 100).low, a.interval(0, 100).high) == pytest.approx((90, 100))  # 100 - 3 / 30
    same = (a - b).difference()
    assert (same.low, same.high, same.verdict, same.p) == (pytest.approx(-10), pytest.approx(10), "tie", 1)
    exact = 100 * (1 - 0.05 ** (1 / 30))  # one-sided 95 % bound of 0 in 30, Clopper and Pearson
    assert exact == pytest.approx(10, abs=0.6)


def test_two_sided_p_counts_by_hand() -> None:
    assert st.two_sided_p(np.array([-1.0, 1, 2, 3])) == pytest.approx(2 * 2 / 5)
    assert st.two_sided_p(np.array([0.0, 0.0])) == 1
    assert st.two_sided_p(np.array([0.9, 0.95, 1.2]), null=1.0) == pytest.approx(1.0)
    assert st.two_sided_p(np.arange(1.0, 100)) == pytest.approx(2 / 100)


def test_a_difference_without_an_interval_is_no_tie() -> None:
    def verdict(low: float, high: float) -> str:
        return st.Difference((low + high) / 2, low, high, 1, 1).verdict

    assert [verdict(1, 2), verdict(-2, -1), verdict(-1, 1), verdict(0, 1)] == ["better", "worse", "tie", "tie"]
    assert verdict(float("nan"), float("nan")) == ""


# Found by `jobs/studies/coverage.py`, 2,000 simulations of 2,000 draws. Few seeds that differ much: too short. Seeds that hardly
# differ: too long, because what is left of chance in each answer is drawn with the group and again with the seed (Owen 2007).
COVERAGE = {
    "fixed scorers, 10 benchmarks of 100 groups": 0.955,
    "fixed scorers, 1 benchmark of 20 groups": 0.922,
    "3 seeds, seed SD 0.5 points": 0.991,
    "3 seeds, seed SD 5 points": 0.840,
    "5 seeds, seed SD 0.5 points": 0.982,
    "5 seeds, seed SD 5 points": 0.905,
    "5 seeds, seed SD 5 points, against a rule": 0.920,
    "ratio of medians, 30 rounds": 0.987,
}


@pytest.mark.parametrize("case", COVERAGE)
def test_intervals_of_95_percent_hold_the_truth_as_often_as_stated(coverage: ModuleType, case: str) -> None:
    num, stated = 250, COVERAGE[case]
    found = coverage.simulated(coverage.CASES[case], num, draws=300)
    error = 3 * (stated * (1 - stated) / num) ** 0.5
    assert abs(found.held - stated) <= error, f"{case}: {found.held:.1%} of {num} intervals held the truth, stated {stated:.1%}"
    assert set(coverage.CASES) == set(COVERAGE)


# --- paired tests --------------------------------------------------------------------------------------------------------------


def test_mcnemars_mid_p_is_the_exact_binomial_without_half_of_what_was_observed() -> None:
    assert st.mcnemar(10, 2) == pytest.approx(stats.binomtest(2, 12).pvalue - stats.binom.pmf(2, 12, 0.5))
    assert round(st.mcnemar(10, 2), 4) == 0.0225 and st.mcnemar(2, 10) == st.mcnemar(10, 2)
    assert st.mcnemar(0, 0) == st.mcnemar(7, 7) == 1 and st.mcnemar(6, 0) == pytest.approx(1 / 64)


def test_holm_against_the_definition() -> None:
    p = [0.01, 0.04, 0.03, 0.005, 0.9]
    ranked = sorted(p)
    expected = {value: min(1, max(ranked[j] * (len(p) - j) for j in range(i + 1))) for i, value in enumerate(ranked)}
    assert st.holm(p) == pytest.approx([expected[value] for value in p])
    assert st.holm(p) == pytest.approx([0.04, 0.09, 0.09, 0.025, 0.9])
    assert st.holm([]) == [] and st.holm([0.6, 0.7]) == [1, 1]


def test_sign_flips_against_scipy_and_by_hand() -> None:
    assert st.sign_flip([1.0, 1, 1]) == pytest.approx(2 / 8)  # all three one way: 2 of 8 patterns
    assert st.sign_flip([3.0, -1, 0, 0]) == 1  # every pattern of 3 and 1 reaches 2
    assert st.sign_flip(np.zeros(5)) == 1
    rng = np.random.default_rng(0)
    few, many = rng.normal(0.4, 1, (8, 2)), rng.normal(0.15, 1, (150, 3))
    for table, exact in ((few, True), (many, False)):
        found = st.sign_flip(table)
        for column, p in zip(table.T, found, strict=True):
            theirs = stats.permutation_test(
                (column,), np.sum, permutation_type="samples", n_resamples=np.inf if exact else 3000, vectorized=False, rng=rng
            ).pvalue
            assert p == pytest.approx(theirs, abs=1e-9 if exact else 0.03)


def test_sign_flips_see_clusters_that_mcnemar_would_take_for_many_rows() -> None:
    rng = np.random.default_rng(3)
    rejected = {"clusters": 0, "rows": 0}
    for _ in range(200):  # no effect; the ten rows of a picture flip together
        cluster = rng.choice([-1.0, 0, 1], 30)
        rejected["clusters"] += st.sign_flip(10 * cluster, flips=400) < 0.05
        rejected["rows"] += st.mcnemar(int(10 * (cluster < 0).sum()), int(10 * (cluster > 0).sum())) < 0.05
    assert rejected["clusters"] / 200 < 0.1 < 0.3 < rejected["rows"] / 200


def test_the_test_fits_the_outcomes() -> None:
    single = np.array([-1.0] * 10 + [1.0] * 2 + [0.0] * 88)
    soft = single * 0.3
    p, names = st.paired_p(np.stack([single, soft], 1), np.ones(100))
    assert names == ["McNemar, mid-p", "sign flips"]
    assert p[0] == pytest.approx(0.0225, abs=5e-5) and p[1] == pytest.approx(0.0386, abs=0.006)
    assert st.paired_p(single[:, None], np.full(100, 2))[1] == ["sign flips"]  # several rows per cluster


# --- timings --------------------------------------------------------------------------------------------------------------------


def test_a_ratio_of_medians_draws_rounds_in_pairs_as_scipy_does() -> None:
    rng = np.random.default_rng(0)
    machine = np.exp(rng.normal(0, 0.5, 40))  # slow rounds are slow for both
    found = st.ratio_of_medians(10 * machine, 4 * machine)
    assert (found.estimate, found.low, found.high) == pytest.approx((2.5, 2.5, 2.5))  # unpaired draws would spread widely
    full, pruned = 10 * machine * np.exp(rng.normal(0, 0.05, 40)), 4 * machine
    theirs = stats.bootstrap(
        (full, pruned), lambda x, y, axis: np.median(x, axis) / np.median(y, axis), paired=True, vectorized=True,
        n_resamples=st.DRAWS, method="percentile", rng=np.random.default_rng(0),
    ).confidence_interval  # fmt: skip
    found = st.ratio_of_medians(full, pruned)
    assert (found.low, found.high) == pytest.approx((theirs.low, theirs.high))


def timed(**ms: list[float]) -> speedup.Rounds:
    """Rounds of `arm_span` in ms."""
    return {tuple(name.split("_")): pd.Series(values) for name, values in ms.items()}  # type: ignore[misc]


def test_speedups_by_hand() -> None:
    cell = timed(
        full_prefill=[40, 41, 39], pruned_prefill=[8, 9, 7], pruned_overhead=[2, 2, 2], native_prefill=[8, 8, 8],
        full_ttft=[50, 50, 50], pruned_ttft=[20, 20, 20],
    )  # fmt: skip
    figures = (speedup.prefill_speedup, speedup.prefill_speedup_net, speedup.ttft_speedup, speedup.native_ratio)
    assert [f(cell).estimate for f in figures] == pytest.approx([40 / 8, 40 / 10, 2.5, 10 / 8])
    del cell["pruned", "overhead"]
    with pytest.raises(ValueError, match=r"no round timed prefill \+ overhead of arm 'pruned'"):
        speedup.prefill_speedup_net(cell)
    assert speedup.over_seeds(speedup.prefill_speedup_net, [cell]) is None


def test_seeds_timed_apart_are_independent() -> None:
    rng = np.random.default_rng(0)
    cells = [timed(full_prefill=list(20 * rng.lognormal(0, 0.1, 40)), pruned_prefill=[10.0] * 40) for _ in range(4)]
    each, pooled = [speedup.prefill_speedup(c) for c in cells], speedup.over_seeds(speedup.prefill_speedup, cells)
    assert pooled is not None and pooled.num_seeds == 4 and pooled.estimate == pytest.approx(np.mean([f.estimate for f in each]))
    assert pooled.high - pooled.low == pytest.approx(np.mean([f.high - f.low for f in each]) / 2, rel=0.15)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: st.ratio_of_medians([1, 2], [1, 2, 3]), "round by round"),
        (lambda: st.ratio_of_medians([1, 0], [1, 2]), "zero, negative"),
        (lambda: st.mcnemar(-1, 2), "at least 0"),
        (lambda: st.sign_flip([1.0, np.nan]), "nan or infinite"),
    ],
)
def test_bad_input_is_named(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
