"""The bootstrap against loops that draw groups one by one; spreads and verdicts against scipy; coverage of known truths."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import astuple, replace
from importlib import util
from itertools import pairwise
from pathlib import Path
from types import ModuleType

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from diffprune import statistics as st
from diffprune.statistics import bootstrap, speedup
from diffprune.statistics.spread import Part, Spread

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


def drawn_one_by_one(figure: Callable[[Array], float], credits: Array, groups: Array, draws: int = 3000) -> Array:
    """Replicates of a figure of credits [arms, seeds, R]: whole groups drawn in a loop, seeds as they are."""
    rng = np.random.default_rng(1)
    rows_of = [np.flatnonzero(groups == g) for g in np.unique(groups)]
    drawn = (np.concatenate([rows_of[g] for g in rng.integers(0, len(rows_of), len(rows_of))]) for _ in range(draws))
    return np.array([figure(credits[..., rows].mean(1)) for rows in drawn])


def ends(draws: Array) -> tuple[float, float]:
    return tuple(np.quantile(draws, (0.025, 0.975)))  # type: ignore[return-value]


@pytest.mark.parametrize("seeds", [1, 3])
def test_means_differences_and_ratios_are_those_of_groups_drawn_one_by_one(seeds: int) -> None:
    rng = np.random.default_rng(seeds)
    credits, groups = clustered(rng, seeds + 1)
    credits[:seeds] = np.where(rng.random(credits[:seeds].shape) < 0.3, 0, credits[:seeds])
    a, b = means(credits, groups).estimates([range(seeds), [seeds]])
    arms = np.stack([credits[:seeds], np.repeat(credits[seeds:], seeds, 0)])
    for found, figure in (
        (a, lambda arms: 100 * arms[0].mean()),
        (a - b, lambda arms: 100 * (arms[0].mean() - arms[1].mean())),
        (a.percent_of(b), lambda arms: 100 * arms[0].mean() / arms[1].mean()),
    ):
        assert found.value == pytest.approx(figure(arms.mean(1)))
        low, high = ends(drawn_one_by_one(figure, arms, groups))
        stretched = [found.value + (end - found.value) * (60 / 59) ** 0.5 for end in (low, high)]
        assert ends(found.draws) == pytest.approx(stretched, abs=0.1 * (high - low))
        assert (found.num_rows, found.num_groups, found.num_seeds, found.df) == (len(groups), 60, seeds, 59)


def test_resampled_sums_are_multinomial_sums_of_whole_groups() -> None:
    sums = np.array([[1.0, 2.0], [1.0, 2.0], [0.0, 3.0]])
    drawn = st.resampled(sums, draws=20_000)
    assert set(np.unique(drawn[:, 1])) == {6.0, 7.0, 8.0, 9.0}  # 3 groups of 2 or 3 rows
    assert drawn.mean(0) == pytest.approx(sums.sum(0), abs=0.05)
    assert drawn[:, 0].var() == pytest.approx(3 * sums[:, 0].var(), abs=0.05)
    assert drawn[:, 0] == pytest.approx(3 - (drawn[:, 1] - 6))  # columns move together


def test_draws_of_few_groups_spread_as_a_mean_of_so_many_does() -> None:
    """s^2 / G with the unbiased s^2: drawn anew, G groups show (G - 1) / G of it."""
    for num in (5, 8):
        credit = np.random.default_rng(num).random(num)
        (found,) = means(credit[None], np.arange(num)).estimates([[0]])
        assert found.draws.var() == pytest.approx(np.var(100 * credit, ddof=1) / num, rel=0.1)


def test_strata_keep_their_number_of_groups() -> None:
    sums = np.array([[1.0, 0], [1, 0], [0, 1], [0, 1], [0, 1]])
    assert (st.resampled(sums, strata=np.array([0, 0, 1, 1, 1])) == [2, 3]).all()
    assert not (st.resampled(sums) == [2, 3]).all()


def test_one_row_per_group_agrees_with_students_t() -> None:
    x = np.random.default_rng(5).random(80)
    (found,) = means(x[None], np.arange(80), full=0.0).estimates([[0]])  # without unseen changes
    theirs = stats.ttest_1samp(100 * x, 0).confidence_interval()
    assert (found.interval().low, found.interval().high) == pytest.approx((theirs.low, theirs.high), abs=0.5)


# --- scorer seeds ------------------------------------------------------------------------------------------------------------


def of_seeds(*arms: list[float]) -> list[st.Estimate]:
    """Arms whose seeds answer every picture alike, so that only seeds vary."""
    columns = [value for arm in arms for value in arm]
    starts = np.cumsum([0, *map(len, arms)])
    made = means(np.repeat([[value] for value in columns], 50, axis=1), np.arange(50), full=0.0)
    return made.estimates([list(range(i, j)) for i, j in pairwise(starts)])


def test_seeds_that_alone_vary_are_tested_as_in_the_textbook() -> None:
    one, two, three = [0.2, 0.5, 0.8], [0.1, 0.5, 0.6], [0.3, 0.35, 0.5, 0.25, 0.4]
    a, b, c = of_seeds(one, two, three)
    for found, theirs in (
        (a, stats.ttest_1samp(one, 0)),
        (a - b, stats.ttest_rel(one, two)),  # seed by seed
        (a - c, stats.ttest_ind(one, three, equal_var=False)),
    ):
        low, high = theirs.confidence_interval()
        assert found.interval().high - found.interval().low == pytest.approx(100 * (high - low), rel=0.01)
        assert found.difference().p == pytest.approx(theirs.pvalue, rel=0.02)


def test_an_arm_without_seeds_adds_none() -> None:
    a, rule = of_seeds([0.2, 0.5, 0.8], [0.4])
    assert (a - rule).seeds == a.seeds and (a - rule).num_seeds == 3 and rule.seeds == () and (rule - rule).seeds == ()
    assert (rule - a).interval().high == pytest.approx(-(a - rule).interval().low)
    share = a.percent_of(rule)
    assert share.value == pytest.approx(125)
    assert share.interval().high - share.value == pytest.approx((a.interval().high - a.value) / 0.4)


def test_a_share_of_a_bound_that_is_sure_has_the_spread_of_what_is_shared_in_its_units() -> None:
    """Of a bound that answers everything alike on all pictures, halves: percent of it are twice the points, unseen changes too."""
    rng = np.random.default_rng(0)
    credits, groups = clustered(rng, 1, 60)
    arm, bound = means(np.stack([credits[0], np.full(credits.shape[1], 0.5)]), groups).estimates([[0], [1]])
    share = arm.percent_of(bound)
    assert share.unseen == pytest.approx(4 * arm.unseen) and arm.unseen > 0
    assert share.spread.interval() == pytest.approx([2 * end for end in arm.spread.interval()])


def test_the_variance_of_seeds_is_told_from_how_seeds_fare_on_these_pictures() -> None:
    """Two-way layout of known variances, group x seed: seeds 4, their interaction with 40 groups 40 (1 in a mean)."""
    rng, found = np.random.default_rng(0), []
    for _ in range(300):
        table = rng.normal(0, 2, (4, 1)) + rng.normal(0, 3, 40) + rng.normal(0, 40**0.5, (4, 40))
        made = st.ClusterBootstrap(
            np.stack([table.T, np.ones((40, 4))], -1), np.ones((40, 4)), st.ratio_of_sums(), full=0.0, draws=200
        )
        (arm,) = made.estimates([range(4)])
        found.append(astuple(arm.seeds[0].part))
    whole, interaction, df = np.mean(found, axis=0)
    assert (whole - interaction) * 4 == pytest.approx(4, abs=0.6) and interaction * 4 == pytest.approx(1, abs=0.1) and df == 3


def test_seeds_of_a_mean_over_benchmarks_vary_together() -> None:
    parts = [of_seeds([0.2, 0.5, 0.8])[0], of_seeds([0.3, 0.6, 0.9])[0]]
    same = st.average(parts, together=False)
    assert same.interval().high - same.value == pytest.approx(parts[0].interval().high - parts[0].value)
    uneven = st.average([parts[0], of_seeds([0.4, 0.7])[0]], together=False)  # a seed missing: 30² / 3 and 450 / 2, as if together
    assert sum(seeds.part.variance for seeds in uneven.seeds) == pytest.approx((300 + 225) / 2) and uneven.num_seeds == 3
    capped = st.average([replace(part, value=120.0) for part in parts], together=False, cap=100.0)
    assert capped.value == 100 and all((one.values == 0).all() for one in capped.seeds)


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
    lost = np.flatnonzero(groups == 30)[0]  # one of several questions about a picture: all of them are left out
    assert (groups == 30).sum() > 1
    missing[1, lost] = True
    a, b = means(credits, groups, missing).estimates([[0], [1]])
    there = (groups >= 10) & (groups != 30)
    assert (a.value, b.value) == pytest.approx(tuple(100 * credits[:, there].mean(1)))
    assert (a.num_groups, a.num_rows) == (49, there.sum())
    missing[1, lost] = False
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
    assert st.average(parts, together=True).df == 49
    overlapping = [replace(part, used=used) for part, used in zip(parts, (groups < 30, groups >= 20), strict=True)]
    assert st.average(overlapping, together=True).num_groups == 50
    few, many = means(np.ones((1, 1)), np.zeros(1, int)), means(np.zeros((1, 3)), np.arange(3))
    parts = [few.estimates([[0]])[0], many.estimates([[0]])[0]]
    assert st.average(parts, together=False).value == 50 and st.average(parts, together=False, cap=60).value == 30


def test_a_benchmark_of_few_pictures_makes_the_spread_of_a_mean_little_known() -> None:
    """Oracle: how often intervals hold the truth; by the degrees of freedom of all pictures together it was 89 of 100."""
    rng, held = np.random.default_rng(0), []
    for _ in range(300):
        level = [rng.beta(2, 1, num) for num in (6, 200)]
        parts = [
            means((rng.random((1, 4 * len(one))) < np.repeat(one, 4)).astype(float), np.repeat(np.arange(len(one)), 4), draws=400)
            for one in level
        ]
        found = st.average([part.estimates([[0]])[0] for part in parts], together=False).interval()
        held.append(found.low <= 100 * 2 / 3 <= found.high)
    assert 0.92 < np.mean(held) < 0.98
    one, many = (means(np.arange(num)[None] % 2.0, np.arange(num)).estimates([[0]])[0] for num in (1, 40))
    assert math.isnan(st.average([one, many], together=False).interval().low), "of one picture no spread is known"
    assert math.isnan(many.apart(one).difference().low)


def test_a_difference_is_known_as_little_as_the_benchmark_that_it_rests_on() -> None:
    """Two arms fare alike on 100 pictures and differ on eight, on which one never varies: Student's t of the eight."""
    few, many = np.random.default_rng(3).random(8), np.random.default_rng(4).random(100)
    pairs = ((few, np.full(8, 0.5)), (many, many))
    each = [means(np.stack(p), np.arange(len(p[0])), full=0.0, name=str(len(p[0]))).estimates([[0], [1]]) for p in pairs]
    one, other = (st.average(parts, together=False) for parts in zip(*each, strict=True))
    theirs = stats.ttest_1samp(100 * (few - 0.5) / 2, 0).confidence_interval()
    for found in (one - other, other - one):
        assert found.interval().high - found.interval().low == pytest.approx(theirs.high - theirs.low, rel=0.1)


@pytest.mark.parametrize("num", [1, 2, 4, 5, 6])
def test_differences_stay_possible_and_few_pictures_have_no_interval(num: int) -> None:
    credits = np.array([np.ones(num), np.arange(num) % 2 == 0, np.zeros(num)], float)
    arms = means(credits, np.arange(num)).estimates([[0], [1], [2]])
    for one, other in ((0, 0), (0, 1), (0, 2), (2, 0)):
        found = (arms[one] - arms[other]).difference()
        assert math.isfinite(found.low) == math.isfinite(found.p) == (num >= st.LEAST_GROUPS)
        assert num < st.LEAST_GROUPS or -100 <= found.low <= found.estimate <= found.high <= 100
    assert arms[0].percent_of(arms[1]).most == pytest.approx(100 * 100 / arms[1].value)


# --- spreads -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("df", [1.0, 2.0, 5.0, 30.0])
def test_one_variance_is_students_t(df: float) -> None:
    found = Spread.of(3.0, 4.0, 1.0, df)
    low, high = 3 - 2 * stats.t.ppf(0.975, df), 3 + stats.t.ppf(0.975, df)
    assert found.interval() == pytest.approx((low, high), rel=0.01)
    assert found.p() == pytest.approx(2 * stats.t.sf(1.5, df), rel=0.01)
    assert found.p(null=5.0) == pytest.approx(2 * stats.t.sf(2, df), rel=0.02)
    assert found.detectable() == pytest.approx(2 * (stats.t.ppf(0.975, df) + stats.t.ppf(0.8, df)), rel=0.01)


def test_groups_and_seeds_against_chi_squares_drawn_one_by_one() -> None:
    rng = np.random.default_rng(0)
    groups = 2 * 20 / rng.chisquare(20, 40_000)
    for part, beyond in (
        (Part(3.0, 1.0, 2.0), np.maximum(0, 3 * 2 / rng.chisquare(2, 40_000) - 1)),
        (Part(4.0, 3.0, 2.0), 0.5 * np.maximum(0, 4 * 2 / rng.chisquare(2, 40_000) - 3)),  # a quarter beyond: half is added
        (Part(0.9, 1.0, 2.0), 0.0),  # seeds that vary less than groups explain
        (Part(0.9, 1.0, 1.0), np.maximum(0, 0.9 / rng.chisquare(1, 40_000) - 1)),  # two seeds, which tell little
    ):
        found, errors = Spread.of(0.0, 2.0, 2.0, 20.0, [part]), rng.normal(size=40_000) * (groups + beyond) ** 0.5
        assert found.interval() == pytest.approx(tuple(np.quantile(errors, (0.025, 0.975))), rel=0.05)
        assert found.p(null=4.0) == pytest.approx(np.mean(np.abs(errors) > 4), rel=0.07)
        small = Spread.of(0.0, 2e-4, 2e-4, 20.0, [Part(part.variance / 1e4, part.in_groups / 1e4, part.df)])
        assert small.interval() == pytest.approx([end / 100 for end in found.interval()]), "in every unit"


def test_intervals_and_p_values_never_contradict() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        below, above = rng.uniform(0.1, 3, 2)
        found = Spread.of(rng.normal(0, 3), below, above, 10.0, [Part(rng.uniform(0, 4), 0.2, 2.0)])
        for level in (0.9, 0.95, 0.99):
            low, high = found.interval(level)
            assert (found.p() < 1 - level) == (not low <= 0 <= high)
        low, high = found.interval(0.9)
        assert (found.p_outside(3.0) < 0.05) == (low > -3 and high < 3)


def test_what_is_not_known_is_not_said() -> None:
    for spread in (Spread.of(1.0, 1.0, 1.0, 0.0), Spread.of(float("nan"), 1.0, 1.0, 5.0)):
        assert np.isnan([*spread.interval(), spread.p(), spread.p_outside(1.0), spread.detectable()]).all()
    certain = Spread.of(1.0, 0.0, 0.0, 5.0)
    assert certain.interval() == (1, 1) and certain.p() == 0 and certain.p(null=1.0) == 1 and certain.detectable() == 0


def changed(harm: int, gain: int = 0, num: int = 200) -> st.Difference:
    """Of `num` answers `harm` are lost and `gain` won."""
    right = np.arange(num) % 2
    pruned = right.copy()
    pruned[1 : 2 * harm : 2], pruned[0 : 2 * gain : 2] = 0, 1
    a, b = means(np.stack([pruned, right]).astype(float), np.arange(num)).estimates([[0], [1]])
    return (a - b).difference()


def test_no_answer_changed_never_gives_a_wider_interval_than_one_changed() -> None:
    found = [changed(k) for k in range(8)]
    widths = [one.high - one.low for one in found]
    assert widths[0] > 0 and found[0].p == 1 and all(more > 0.995 * less for less, more in pairwise(widths))
    assert found[0].high == pytest.approx(1.97 * 2**0.5 / 2, rel=0.02)  # of 200 answers, one lost and one won unseen


@pytest.mark.parametrize("answers", [1, 4, 10])
def test_a_change_that_was_not_seen_may_be_of_all_answers_about_a_picture(answers: int) -> None:
    widths = []
    for lost in range(4):  # answers, each of another picture
        right = np.ones(40 * answers)
        pruned = right.copy()
        pruned[answers * np.arange(lost)] = 0
        a, b = means(np.stack([pruned, right]), np.repeat(np.arange(40), answers)).estimates([[0], [1]])
        found = (a - b).difference()
        widths.append(found.high - found.low)
    assert widths == sorted(widths)
    deviation = 100 * (2 * answers) ** 0.5 / len(right)  # two pictures, as if their answers changed in turn
    assert widths[0] == pytest.approx(2 * stats.t.ppf(0.975, 39) * deviation, rel=0.02)


def test_an_unseen_change_in_a_mean_over_benchmarks_is_of_any_of_its_answers() -> None:
    """Oracle: each answer of 40 and of 10 turned by itself, and what that does to the mean of both benchmarks."""
    parts = [means(np.ones((1, num)), np.arange(num), name=str(num)).estimates([[0]])[0] for num in (40, 10)]
    turned = [100 / num / 2 for num in (40, 10) for _ in range(num)]
    assert st.average(parts, together=False).unseen == pytest.approx(2 * np.mean(np.square(turned)))


def test_where_many_groups_changed_unseen_changes_are_like_those_that_were_seen() -> None:
    """Of pictures with ten questions each, 30 lost one answer: by the jackknife, and two changes more of nearly that size."""
    right = np.ones(100 * 10)
    pruned = right.copy()
    pruned[10 * np.arange(30)] = 0
    a, b = means(np.stack([pruned, right]), np.repeat(np.arange(100), 10)).estimates([[0], [1]])
    found = a - b
    lost = -np.repeat((1.0, 0.0), (30, 70))  # answers of a picture
    away = 100 / 1000 * (lost - lost.mean())
    np.testing.assert_allclose(found.parts, away * (100 / 99) ** 0.5, rtol=1e-9)
    seen = (away**2).sum() ** 2 / (away**4).sum()
    presumed = 6 / seen
    size = presumed * 10 * 0.1**2 + (1 - presumed) * (away**2).sum() * 100 / 99 / seen
    assert 20 < seen < 70 and found.unseen == pytest.approx(2 * size)
    assert (a - a).unseen == pytest.approx(2 * 10 * 0.1**2), "nothing changed: two pictures, as if their answers changed in turn"
    assert found.percent_of(b).unseen == pytest.approx(found.unseen), "of 100 %"


def test_groups_parts_are_those_of_a_jackknife_one_by_one() -> None:
    rng = np.random.default_rng(4)
    group = np.repeat(np.arange(25), rng.integers(1, 5, 25))
    credit = (rng.random((4, len(group))) < 0.7).astype(float)
    one, two = means(credit, group).estimates([[0, 1], [2, 3]])
    alone = [100 * (credit[:2, group != g].mean() - credit[2:, group != g].mean()) for g in range(25)]
    found = (one - two).parts
    np.testing.assert_allclose(found, (np.mean(alone) - alone) * (24 / 25) ** 0.5, atol=1e-9)
    assert (found**2).sum() == pytest.approx((one - two).draws.var(), rel=0.15), "the variance that the bootstrap has"
    (bound,) = means(credit[:1], group).estimates([[0]])
    shares = [100 * credit[:2, group != g].mean() / credit[0, group != g].mean() for g in range(25)]
    np.testing.assert_allclose(one.percent_of(bound).parts, (np.mean(shares) - shares) * (24 / 25) ** 0.5, rtol=0.1, atol=0.05)
    mean = st.average([one, two], together=True)
    np.testing.assert_allclose(mean.parts, (one.parts + two.parts) / 2)
    assert len(st.average([one, two], together=False).parts) == len(one.apart(two).parts) == 50


def test_few_changes_are_judged_as_mcnemars_test_judges_them() -> None:
    for harm in range(9):
        mid_p = 0.5**harm if harm else 1.0  # McNemar's, of `harm` against 0
        assert (changed(harm).p < 0.05) == (mid_p < 0.05), f"{harm} answers lost, none won: mid-p {mid_p:.3f}"
    adjusted = stats.norm.ppf(0.975) * (30 + 2) ** 0.5 / 2  # Bonett and Price, on the observed difference
    assert changed(18, 12).high - changed(18, 12).estimate == pytest.approx(adjusted, rel=0.06)


# --- verdicts ----------------------------------------------------------------------------------------------------------------


def difference(estimate: float, p: float, p_outside: float = 1.0, **more: object) -> st.Difference:
    return st.Difference(estimate, estimate - 1, estimate + 1, 10, 10, p=p, p_outside=p_outside, **more)  # type: ignore[arg-type]


def test_the_four_words() -> None:
    family = {
        "up": difference(2, 1e-6),
        "down": difference(-2, 1e-6),
        "same": difference(0.1, 0.6, 1e-6),
        "open": difference(1, 0.3),
    }
    words = {key: verdict.word for key, verdict in st.judged(family).items()}
    assert words == {"up": "better", "down": "worse", "same": "equivalent", "open": "cannot tell"}
    assert st.counted(st.judged(family).values()) == {"better": 1, "equivalent": 1, "cannot tell": 1, "worse": 1}


def test_a_family_is_corrected_by_both_of_its_tests() -> None:
    alone, among = ({i: difference(1, 0.02, 0.02) for i in range(n)} for n in (1, 3))
    assert st.judged(alone)[0].word == "better" and {v.word for v in st.judged(among).values()} == {"cannot tell"}
    assert st.judged(among)[0].p == pytest.approx(0.06)
    alike = {0: difference(0.1, 0.5, 0.02), 1: difference(0.1, 0.5, 0.9), 2: difference(0.1, 0.5, 0.9)}
    assert st.judged(alike)[0].word == "cannot tell"


def test_nothing_is_said_of_methods_by_one_scorer_or_without_an_interval() -> None:
    nothing = st.Difference(float("nan"), float("nan"), float("nan"), 0, 0, p=float("nan"), p_outside=float("nan"))
    found = st.judged({"one": difference(5, 0.9, scorers_only=True), "none": nothing, "sure": difference(1, 0.04)})
    assert [v.word for v in found.values()] == ["", "", "better"], "what is not claimed is not corrected for"
    assert st.counted([found["one"], found["none"]]) == {}


def test_equivalence_is_the_90_percent_interval_within_one_point() -> None:
    wide, narrow = changed(3), changed(6, 6, num=4000)
    assert wide.p_outside > 0.05 and narrow.p_outside < 0.05 and st.judged({0: narrow})[0].word == "equivalent"
    some = changed(20, 20, num=2000)  # as many lost as won, standard error a third of a point
    assert some.p_outside == pytest.approx(stats.norm.sf(1 / (some.high / stats.norm.isf(0.025))), rel=0.1)


def test_the_detectable_difference_is_found_with_80_percent_power() -> None:
    rng, found = np.random.default_rng(0), []
    for _ in range(200):
        x = rng.normal(0, 1, 40)
        one = Spread.of(float(x.mean()), x.var(ddof=1) / 40, x.var(ddof=1) / 40, 39.0)
        shifted = Spread.of(float(x.mean()) + 0.4538, x.var(ddof=1) / 40, x.var(ddof=1) / 40, 39.0)
        found.append((one.detectable(), shifted.p() < 0.05))
    assert np.mean([size for size, _ in found]) == pytest.approx(0.4538, rel=0.02)
    assert np.mean([hit for _, hit in found]) == pytest.approx(0.8, abs=0.06)


def test_holm_against_the_definition() -> None:
    p = [0.01, 0.04, 0.03, 0.005, 0.9]
    ranked = sorted(p)
    expected = {value: min(1, max(ranked[j] * (len(p) - j) for j in range(i + 1))) for i, value in enumerate(ranked)}
    assert st.holm(p) == pytest.approx([expected[value] for value in p])
    assert st.holm(p) == pytest.approx([0.04, 0.09, 0.09, 0.025, 0.9])
    assert st.holm([]) == [] and st.holm([0.6, 0.7]) == [1, 1]


# --- coverage ----------------------------------------------------------------------------------------------------------------

SMALL = (  # of the cases of the study, whose table is in `reports/coverage`
    "fixed scorers, 1 benchmark of 20 groups", "3 seeds, seed SD 0", "3 seeds, seed SD 2.5", "3 seeds, seed SD 12",
    "5 seeds, seed SD 5", "10 seeds, seed SD 5, against a rule", "3 against 5 seeds, seed SD 5",
    "fixed scorers, benchmarks of 5 and 200 groups",
    "0.3 % of answers lost, 10 benchmarks of 40 groups", "1.2 % of answers lost, 1 benchmark of 400 groups",
    "median of ratios, 6 rounds", "median of ratios, 30 rounds, AR(1) 0.9",
)  # fmt: skip


@pytest.mark.parametrize("case", SMALL)
def test_intervals_of_95_percent_hold_the_truth_in_93_to_97_of_100(coverage: ModuleType, case: str) -> None:
    num = 150
    found = coverage.simulated(coverage.CASES[case], num, draws=200)
    low, high = (share + sign * 2.6 * (share * (1 - share) / num) ** 0.5 for share, sign in ((0.93, -1), (0.97, 1)))
    assert low <= found.held <= high, f"{case}: {found.held:.1%} of {num} intervals held the truth"


def test_rare_harm_to_whole_pictures_is_not_held_too_seldom(coverage: ModuleType) -> None:
    for case in (
        "0.6 % lost, half by whole pictures, 10 of 40",
        "1.2 % lost, half by whole pictures of 8 to 12 questions, 10 of 12",
    ):
        found = coverage.simulated(coverage.CASES[case], num := 150, draws=200)
        assert found.held >= 0.93 - 2.6 * (0.93 * 0.07 / num) ** 0.5, f"{case}: {found.held:.1%} of {num} intervals held the truth"


@pytest.mark.parametrize(("seeds", "most"), [(5, 0.6), (10, 0.85)])
def test_seeds_that_fail_now_and_then_are_known_not_to_be_held(coverage: ModuleType, seeds: int, most: float) -> None:
    """Of five seeds none fails in six of ten experiments, and nothing says that one might."""
    found = coverage.simulated(coverage.CASES[f"{seeds} seeds, 1 in 10 lose 60 points"], 60, draws=200)
    assert found.held < most and found.above > found.below, f"{found.held:.1%} of the intervals held the truth"


# --- timings --------------------------------------------------------------------------------------------------------------------


def test_a_speedup_is_the_median_of_the_rounds_own_ratios() -> None:
    rng = np.random.default_rng(0)
    machine = np.exp(rng.normal(0, 0.5, 40))  # slow rounds are slow for both
    found = st.median_ratio(10 * machine, 4 * machine)
    assert (found.estimate, found.low, found.high) == pytest.approx((2.5, 2.5, 2.5))  # unpaired rounds would spread widely
    full, pruned = 10 * np.exp(rng.normal(0, 0.05, 40)), np.full(40, 4.0)
    found, ratios = st.median_ratio(full, pruned), np.sort(full / pruned)
    at_least = [1 - 2 * stats.binom.cdf(k - 1, 40, 0.5) for k in (14, 15)]  # of the 14th and the 15th from either end
    assert at_least[0] > 0.95 > at_least[1] and ratios[13] <= found.low <= ratios[14] and ratios[25] <= found.high <= ratios[26]
    assert found.low <= found.estimate <= found.high and not isinstance(found, st.Range)
    slow = st.median_ratio([60, 60, 60, 60, 75, 75, 75, 75], [24, 24, 24, 30, 30, 30, 30, 30])
    assert slow.estimate == 2.5, "and not 67.5 / 30, of which one is from the slow spell and the other half from the fast"


@pytest.mark.parametrize("num", [6, 7, 10, 31, 200])
def test_the_interval_of_a_median_lies_between_order_statistics_as_interpolated_in_the_paper(num: int) -> None:
    """Hettmansperger and Sheather (1986) with whole numbers: of 1, 2, ... T the interval begins at the rank itself."""
    level = [1 - 2 * sum(math.comb(num, i) for i in range(k)) / 2**num for k in range(num)]  # from the k-th from either end
    k = max(k for k in range(1, num // 2 + 1) if level[k] >= 0.95)
    step = (level[k] - 0.95) / (level[k] - level[k + 1])
    low = k + (num - k) * step / (k + (num - 2 * k) * step)
    found = st.median_ratio(np.arange(1.0, num + 1), np.ones(num))
    assert (found.low, found.high) == pytest.approx((low, num + 1 - low), rel=1e-9)
    if num == 10:
        assert low == pytest.approx(2.6577, abs=1e-4)


def test_few_rounds_give_a_range_not_an_interval() -> None:
    for num in range(2, 8):
        full, pruned = 10.0 + np.arange(num), np.full(num, 4.0)
        found = st.median_ratio(full, pruned)
        assert isinstance(found, st.Range) == (num < 6) and found.estimate == pytest.approx(np.median(full) / 4)
        if num < 6:
            assert (found.low, found.high) == (full[0] / 4, full[-1] / 4)
        alone = speedup.pooled(speedup.prefill_speedup, [timed(full_prefill=list(full), pruned_prefill=list(pruned))])
        assert alone == replace(found, num_groups=1), "of one session what its rounds say"
    cells = [timed(full_ttft=[50, 51, 52], pruned_ttft=[20] * 3), timed(full_ttft=[40] * 8, pruned_ttft=[20] * 8)]
    pooled = speedup.pooled(speedup.ttft_speedup, cells)  # of one session: neither says of which
    assert isinstance(pooled, st.Range) and (pooled.low, pooled.high, pooled.num_rows) == (2.25, 2.3, 3)


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
    assert speedup.pooled(speedup.prefill_speedup_net, [cell]) is None


def test_the_interval_of_seeds_that_were_timed_together_covers() -> None:
    """Of 200 sessions of four scorers that share the unpruned arm, whose noise does not average out over them."""
    rng, inside = np.random.default_rng(0), 0
    for _ in range(200):
        full = 20 * rng.lognormal(0, 0.05, 31)
        cells = [timed(full_prefill=list(full), pruned_prefill=list(10 * rng.lognormal(0, 0.01, 31))) for _ in range(4)]
        pooled = speedup.pooled(speedup.prefill_speedup, cells)
        assert pooled is not None and pooled.num_seeds == 4 and pooled.num_groups == 1
        each = [speedup.prefill_speedup(cell) for cell in cells]
        assert pooled.estimate == pytest.approx(np.mean([found.estimate for found in each]))
        inside += pooled.low <= 2 <= pooled.high
    assert 0.92 < inside / 200 < 0.99


def test_the_interval_over_sessions_covers_what_differs_between_them() -> None:
    """Of 200 runs of five processes, each faster or slower by 2 % of its own, in 20 rounds of 1 %; one process alone does not."""
    rng, inside, alone = np.random.default_rng(0), 0, 0
    for _ in range(200):
        cells = []
        for own in rng.normal(0, 0.02, 5):
            full, pruned = 20 * np.exp(own + rng.normal(0, 0.01, 20)), 10 * np.exp(rng.normal(0, 0.01, 20))
            cells.append(timed(full_prefill=list(full), pruned_prefill=list(pruned)))
        pooled, first = speedup.pooled(speedup.prefill_speedup, cells), speedup.prefill_speedup(cells[0])
        assert pooled is not None and (pooled.num_groups, pooled.num_rows) == (5, 20)
        inside, alone = inside + (pooled.low <= 2 <= pooled.high), alone + (first.low <= 2 <= first.high)
    assert 0.92 < inside / 200 < 0.98 and alone / 200 < 0.5
    each = np.log([speedup.prefill_speedup(cell).estimate for cell in cells])
    low, high = np.exp(stats.t.interval(0.95, 4, np.mean(each), stats.sem(each)))
    assert pooled is not None and (pooled.low, pooled.high) == pytest.approx((low, high))


def test_few_sessions_that_disagree_give_a_wide_interval_of_speedups_that_could_be() -> None:
    cells = [timed(full_prefill=[full] * 8, pruned_prefill=[10.0] * 8) for full in (20.0, 40.0)]
    pooled = speedup.pooled(speedup.prefill_speedup, cells)
    assert pooled is not None and pooled.estimate == pytest.approx(8**0.5) and 0 < pooled.low < 0.1 and pooled.high > 80
    apart = [
        {key: rows.set_axis(range(first, first + 8)) * (times if key[0] == "pruned" else 1) for key, rows in cells[0].items()}
        for first, times in ((0, 1.0), (100, 0.5))
    ]
    assert speedup.pooled(speedup.prefill_speedup, apart) == st.Range(3, 2, 4, 0, 1, 2), "no round that both ran"
    more = [timed(full_prefill=[20.0] * 9, pruned_prefill=[10.0] * 9)] * 2  # two seeds in nine rounds, beside one seed in eight
    for uneven in ([cells[1], *more], [*more, cells[1]]):
        pooled = speedup.pooled(speedup.prefill_speedup, uneven)
        assert pooled is not None and (pooled.num_rows, pooled.num_groups, pooled.num_seeds) == (8, 2, 2)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: st.median_ratio([1, 2], [1, 2, 3]), "round by round"),
        (lambda: st.median_ratio([1, 0], [1, 2]), "zero, negative"),
    ],
)
def test_bad_input_is_named(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
