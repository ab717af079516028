"""Intervals against naive loops, against scipy, and against how often they hold the truth in simulated data."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from diffprune import statistics as st
from diffprune.statistics import arms


def _clustered(rng: np.random.Generator, num_groups: int, share: float = 0.7) -> tuple[np.ndarray, np.ndarray]:
    """0/1 credits of 1-4 rows per group that mostly agree within a group."""
    groups = np.repeat(np.arange(num_groups), rng.integers(1, 5, num_groups))
    level = np.clip(share + 0.3 * rng.choice([-1, 1], num_groups), 0, 1)
    return (rng.random(len(groups)) < level[groups]).astype(float), groups


def _naive(statistic, arms, groups, draws, seed):
    """Groups drawn one by one, rows gathered, the figure recomputed: what the fast path must agree with."""
    rng = np.random.default_rng(seed)
    rows_of = [np.flatnonzero(groups == g) for g in np.unique(groups)]
    found = []
    for _ in range(draws):
        rows = np.concatenate([rows_of[g] for g in rng.integers(0, len(rows_of), len(rows_of))])
        found.append(statistic(*(np.asarray(arm)[..., rows] for arm in arms)))
    return np.quantile(found, (0.025, 0.975))


def test_mean_and_paired_difference_agree_with_the_naive_loop() -> None:
    rng = np.random.default_rng(0)
    a, groups = _clustered(rng, 60)
    b = np.where(rng.random(len(a)) < 0.2, 1 - a, a)
    mean = st.mean_interval(a, groups)
    low, high = _naive(lambda x: x.mean(), [a], groups, 3000, 1)
    assert mean.estimate == pytest.approx(a.mean())
    assert (mean.low, mean.high) == pytest.approx((low, high), abs=0.01)
    found = st.paired_difference(a, b, groups)
    low, high = _naive(lambda x, y: x.mean() - y.mean(), [a, b], groups, 3000, 1)
    assert found.estimate == pytest.approx(a.mean() - b.mean())
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.01)
    assert (found.num_rows, found.num_groups) == (len(a), 60)
    relative = st.relative_accuracy(a, b, groups)
    low, high = _naive(lambda x, y: x.mean() / y.mean(), [a, b], groups, 3000, 1)
    assert (relative.low, relative.high) == pytest.approx((low, high), abs=0.015)


def test_resampled_sums_are_multinomial_sums_of_whole_groups() -> None:
    sums = np.array([[1.0, 2.0], [1.0, 2.0], [0.0, 3.0]])
    drawn = st.resampled(sums, 20_000, seed=3)
    for _, possible in np.ndenumerate(np.unique(drawn[:, 1])):
        assert possible in {6.0, 7.0, 8.0, 9.0}  # 3 groups of 2 or 3 rows
    assert drawn.mean(0) == pytest.approx(sums.sum(0), abs=0.05)
    assert drawn[:, 0].var() == pytest.approx(3 * sums[:, 0].var(), abs=0.05)
    assert drawn[:, 0] == pytest.approx(3 - (drawn[:, 1] - 6))  # the columns move together


def test_one_row_per_group_agrees_with_scipys_bootstrap() -> None:
    rng = np.random.default_rng(5)
    x = rng.random(80)
    found = st.mean_interval(x, np.arange(80))
    theirs = stats.bootstrap((x,), np.mean, method="percentile", rng=np.random.default_rng(1)).confidence_interval
    assert (found.low, found.high) == pytest.approx((theirs.low, theirs.high), abs=0.005)


def test_intervals_hold_the_truth_about_95_times_in_100() -> None:
    rng = np.random.default_rng(11)
    held = {"clusters": 0, "rows": 0}
    for _ in range(300):
        credits, groups = _clustered(rng, 150)
        for name, keys in (("clusters", groups), ("rows", np.arange(len(groups)))):
            found = st.mean_interval(credits, keys, draws=600)
            held[name] += found.low <= _truth() <= found.high
    assert 0.91 <= held["clusters"] / 300 <= 0.985
    assert held["rows"] < held["clusters"] - 10  # taking rows for independent is overconfident


def _truth() -> float:
    return (1.0 + 0.4) / 2  # mean level of _clustered; group size is independent of it


def test_the_seed_interval_holds_the_truth_and_the_one_seed_interval_does_not() -> None:
    rng = np.random.default_rng(2)
    held_all = held_one = 0
    for _ in range(200):
        level = rng.random(100)
        seeds = 0.3 + 0.4 * level + rng.normal(0, 0.05, (6, 1)) + rng.normal(0, 0.1, (6, 100))
        base = np.full(100, 0.5)
        both = st.paired_difference(seeds, base, np.arange(100), draws=600)
        one = st.paired_difference(seeds[0], base, np.arange(100), draws=600)
        held_all += both.low <= 0 <= both.high
        held_one += one.low <= 0 <= one.high
    assert both.num_seeds == 6
    assert held_all / 200 > 0.87
    assert held_one / 200 < held_all / 200 - 0.2


def test_seeds_are_drawn_one_fewer_and_paired() -> None:
    groups = np.zeros(50, int)  # one group: only seeds vary
    a = np.repeat([[0.2], [0.5], [0.8]], 50, axis=1)
    found = st.paired_difference(a, a - 0.1, groups)
    assert found.estimate == pytest.approx(0.1) and found.note.startswith("rule of three")  # equal in every seed
    apart = st.paired_difference(a, a - 0.1, groups, paired_seeds=False)
    assert apart.low < 0 < apart.high and apart.verdict == "tie"
    alone = st.mean_interval(a, groups)
    assert (alone.low, alone.high) == pytest.approx((0.2, 0.8))  # two of three seeds: the same one twice in 1 of 9 draws
    shares = arms._seed_shares(np.random.default_rng(0), 3, 50_000)
    spread = (shares @ a[:, 0]).var()
    assert spread == pytest.approx(a[:, 0].var(ddof=1) / 3, rel=0.03)  # the unbiased variance of a mean of three


def test_verdicts_and_p() -> None:
    groups = np.arange(200)
    rng = np.random.default_rng(1)
    b = (rng.random(200) < 0.5).astype(float)
    a = np.where((b == 0) & (rng.random(200) < 0.4), 1.0, b)
    better, worse = st.paired_difference(a, b, groups), st.paired_difference(b, a, groups)
    assert (better.verdict, worse.verdict) == ("better", "worse") and better.p == worse.p == pytest.approx(2 / 10_001)
    noise = st.paired_difference((rng.random(200) < 0.5).astype(float), (rng.random(200) < 0.5).astype(float), groups)
    assert noise.verdict == "tie" and noise.low <= 0 <= noise.high and noise.p > 0.05


def test_two_sided_p_counts_by_hand() -> None:
    assert st.two_sided_p(np.array([-1.0, 1, 2, 3])) == pytest.approx(2 * 2 / 5)
    assert st.two_sided_p(np.array([0.0, 0.0])) == 1
    assert st.two_sided_p(np.array([0.9, 0.95, 1.2]), null=1.0) == pytest.approx(1.0)


def test_rule_of_three_where_every_draw_agrees() -> None:
    right = st.mean_interval(np.ones(60), np.arange(60) // 2)
    assert (right.low, right.high) == (pytest.approx(1 - 3 / 30), 1) and "30 groups" in right.note
    same = st.paired_difference(np.ones(60), np.ones(60), np.arange(60) // 2)
    assert (same.low, same.high, same.verdict, same.p) == (pytest.approx(-0.1), pytest.approx(0.1), "tie", 1)
    assert st.agreement(["a"] * 30, ["a"] * 30, range(30)).low == pytest.approx(0.9)


def test_results_do_not_depend_on_the_order_of_rows() -> None:
    rng = np.random.default_rng(4)
    a, groups = _clustered(rng, 300)
    groups //= 10  # many rows in a group, whose sum depends on their order in its last digits
    a = a * rng.choice([0.3, 0.6, 0.9, 1], len(a))
    b, parts = rng.random(len(a)), rng.integers(0, 3, len(a)).astype(str)
    order = rng.permutation(len(a))
    assert st.paired_difference(a, b, groups, parts) == st.paired_difference(a[order], b[order], groups[order], parts[order])


def test_parts_average_benchmarks_and_draw_shared_pictures_together() -> None:
    groups = np.tile(np.arange(50), 2)
    parts = np.repeat(["pope", "gqa"], 50)
    credit = np.tile((np.arange(50) % 2).astype(float), 2)
    credit[50:] = 1 - credit[50:]  # what one benchmark gains on a picture the other loses
    together = st.mean_interval(credit, groups, parts)
    assert together.estimate == 0.5 and together.note.startswith("rule of three")  # draws cancel exactly
    apart = st.mean_interval(credit, [f"{p} {g}" for p, g in zip(parts, groups, strict=True)], parts)
    assert (apart.low, apart.high) == pytest.approx((0.4, 0.6), abs=0.02) and apart.num_groups == 100
    assert arms._part_sums([credit[None]], groups, parts)[1] is None
    strata = arms._part_sums([np.array([[1.0, 0, 0, 0]])], [3, 1, 2, 0], ["b", "a", "b", "b"])[1]
    assert strata is not None and strata.tolist() == [1, 0, 1, 1]  # in the order of group keys: each part by itself
    uneven = st.mean_interval([1.0, 0, 0, 0], [0, 1, 2, 3], ["a", "b", "b", "b"])
    assert uneven.estimate == 0.5  # not 0.25: each benchmark counts once


def test_relative_accuracy_over_benchmarks_and_capped() -> None:
    full = np.array([1.0, 1, 1, 1, 1, 0, 1, 0])
    pruned = np.array([1.0, 1, 0, 0, 1, 1, 1, 0])
    parts, groups = np.repeat(["a", "b"], 4), np.arange(8)
    assert st.relative_accuracy(pruned, full, groups, parts).estimate == pytest.approx((0.5 + 1.5) / 2)
    capped = st.relative_accuracy(pruned, full, groups, parts, capped=True)
    assert capped.estimate == pytest.approx((0.5 + 1) / 2) and capped.high <= 1
    nothing = st.relative_accuracy(pruned, np.zeros(8), groups)
    assert not np.isfinite(nothing.estimate) and nothing.note == "undefined"


def test_blind_corrected_retention() -> None:
    rng = np.random.default_rng(0)
    blind = (rng.random(400) < 0.5).astype(float)
    full = np.where(rng.random(400) < 0.8, 1.0, blind)
    pruned = np.where(rng.random(400) < 0.5, full, blind)
    found = st.blind_corrected(pruned, full, blind, np.arange(400))
    assert found.image_bound and found.low < found.estimate < found.high
    assert found.estimate == pytest.approx((pruned.mean() - blind.mean()) / (full.mean() - blind.mean()))
    low, high = _naive(
        lambda m, f, b: (m.mean() - b.mean()) / (f.mean() - b.mean()), [pruned, full, blind], np.arange(400), 1500, 1
    )
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.025)
    idle = blind.copy()
    idle[0] = 1 - idle[0]
    assert not st.blind_corrected(pruned, idle, blind, np.arange(400)).image_bound


def test_agreement_by_row_and_by_group_and_harm() -> None:
    one, other, groups = ["a", "b", "c", "d"], ["a", "b", "c", "x"], ["p", "p", "q", "q"]
    assert st.agreement(one, other, groups).estimate == 0.75
    assert st.agreement(one, other, groups, whole_groups=True).estimate == 0.5
    assert st.harm_and_gain([1, 0, 0, 0.3], [1, 1, 0, 1]) == (0.5, 0)


def test_interval_of_a_figure_that_is_no_mean() -> None:
    rng = np.random.default_rng(3)
    positive, said = rng.random(200) < 0.5, rng.random(200) < 0.6
    columns = [positive & said, ~positive & said, positive & ~said]

    def f1(s: np.ndarray) -> np.ndarray:
        return 2 * s[..., 0] / (2 * s[..., 0] + s[..., 1] + s[..., 2])

    groups = np.arange(200) // 2
    found, replicates = st.interval_of(f1, st.group_sums(columns, groups))
    tp, fp, fn = (c.sum() for c in columns)
    assert found.estimate == pytest.approx(2 * tp / (2 * tp + fp + fn)) and replicates.shape == (st.DRAWS,)
    low, high = _naive(lambda p, s: 2 * (p & s).sum() / (p.sum() + s.sum()), [positive, said], groups, 2000, 1)
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.015)


def test_strata_keep_their_size() -> None:
    sums = np.array([[1.0, 0], [1, 0], [0, 1], [0, 1], [0, 1]])
    drawn = st.resampled(sums, 500, strata=["x", "x", "y", "y", "y"])
    assert (drawn == [2, 3]).all()
    assert not (st.resampled(sums, 500) == [2, 3]).all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: st.mean_interval([], []), "no rows"),
        (lambda: st.mean_interval([1.0, np.nan], [0, 1]), "nan or infinite"),
        (lambda: st.mean_interval([1.0, 1.0], [0, 1, 2]), "2 credits for 3 group keys"),
        (lambda: st.mean_interval([1.0, 1.0], ["a", None]), "group key is missing"),
        (lambda: st.mean_interval([1.0, 1.0], [0, 1], ["a"]), "1 part labels for 2 rows"),
        (lambda: st.ratio_of_medians([1, 2], [1, 2, 3]), "round by round"),
        (lambda: st.ratio_of_medians([1, 0], [1, 2]), "zero, negative"),
        (lambda: st.mcnemar(-1, 2), "at least 0"),
        (lambda: st.mcnemar(3, 2, 4), "cannot hold"),
    ],
)
def test_bad_input_is_named(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_mcnemar_check_values() -> None:
    found = st.mcnemar(10, 2, 100)
    assert (round(found.exact, 4), round(found.p, 4)) == (0.0386, 0.0225)
    assert (round(found.chi2, 3), round(found.chi2_p, 4)) == (4.083, 0.0433)
    assert found.difference == pytest.approx(-0.08)
    outcomes = np.array([-1.0] * 10 + [1.0] * 2 + [0.0] * 88)
    assert found.standard_error == pytest.approx(outcomes.std() / 10)
    assert st.mcnemar(0, 0, 50).p == 1 and st.mcnemar(7, 7).p == 1


def test_holm_against_the_definition() -> None:
    p = [0.01, 0.04, 0.03, 0.005, 0.9]
    ranked = sorted(p)
    expected = {}
    for i, value in enumerate(ranked):
        expected[value] = min(1, max(ranked[j] * (len(p) - j) for j in range(i + 1)))
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
    with pytest.raises(ValueError, match="nan or infinite"):
        st.sign_flip([1.0, np.nan])


def test_sign_flips_see_clusters_that_mcnemar_would_take_for_many_rows() -> None:
    rng = np.random.default_rng(3)
    rejected = {"clusters": 0, "rows": 0}
    for _ in range(200):  # no effect; the ten rows of a picture flip together
        cluster = rng.choice([-1.0, 0, 1], 30)
        rejected["clusters"] += st.sign_flip(10 * cluster, flips=400) < 0.05
        rejected["rows"] += st.mcnemar(int(10 * (cluster < 0).sum()), int(10 * (cluster > 0).sum())).p < 0.05
    assert rejected["clusters"] / 200 < 0.1 < 0.3 < rejected["rows"] / 200


def test_the_test_fits_the_outcomes() -> None:
    single = np.array([-1.0] * 10 + [1.0] * 2 + [0.0] * 88)
    soft = single * 0.3
    p, names = st.paired_p(np.stack([single, soft], 1), np.ones(100))
    assert names == ["McNemar, mid-p", "sign flips"]
    assert p[0] == pytest.approx(0.0225, abs=5e-5) and p[1] == pytest.approx(0.0386, abs=0.006)
    assert st.paired_p(single[:, None], np.full(100, 2))[1] == ["sign flips"]  # several rows per cluster


def test_ratio_of_medians_pairs_rounds() -> None:
    rng = np.random.default_rng(0)
    machine = np.exp(rng.normal(0, 0.5, 40))  # slow rounds are slow for both
    full, pruned = 10 * machine, 4 * machine
    found = st.ratio_of_medians(full, pruned)
    assert (found.estimate, found.low, found.high) == pytest.approx((2.5, 2.5, 2.5))  # unpaired draws would spread widely
    noisy = full * np.exp(rng.normal(0, 0.05, 40))
    found = st.ratio_of_medians(noisy, pruned)
    draws = rng.integers(0, 40, (4000, 40))
    naive = np.quantile([np.median(noisy[d]) / np.median(pruned[d]) for d in draws], (0.025, 0.975))
    assert found.low < found.estimate < found.high
    assert (found.low, found.high) == pytest.approx(tuple(naive), abs=0.03)


def test_paired_frames_need_the_same_questions() -> None:
    a = pd.DataFrame({"sample": ["1", "2"], "group": ["g", "h"], "credit": [1.0, 0.0], "parsed": ["x", "y"]})
    b = pd.DataFrame({"sample": ["2", "1"], "group": ["h", "g"], "credit": [1.0, 0.5], "parsed": ["y", "z"]})
    joined = st.paired(a, b)
    assert joined["credit_a"].tolist() == [1.0, 0.0] and joined["credit_b"].tolist() == [0.5, 1.0]
    assert joined["group"].tolist() == ["g", "h"] and joined["parsed_b"].tolist() == ["z", "y"]
    with pytest.raises(ValueError, match="'sample': '1'} is in the first run only"):
        st.paired(a, b.iloc[:1])
    with pytest.raises(ValueError, match="'sample': '3'} is in the second run only"):
        st.paired(a, pd.concat([b, b.iloc[:1].assign(sample="3")]))
    with pytest.raises(ValueError, match="in the second run more than once"):
        st.paired(a, pd.concat([b, b]))


def test_a_difference_without_an_interval_is_no_tie() -> None:
    def verdict(low: float, high: float) -> str:
        return st.Difference((low + high) / 2, low, high, 1, 1).verdict

    assert [verdict(1, 2), verdict(-2, -1), verdict(-1, 1), verdict(0, 1)] == ["better", "worse", "tie", "tie"]
    assert verdict(float("nan"), float("nan")) == ""
