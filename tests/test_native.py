"""Intervals of figures in native units against the benchmark's own aggregate of pictures drawn one by one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from diffprune.benchmarks.mmbench import Mmbench
from diffprune.benchmarks.mme import Mme
from diffprune.benchmarks.pope import Pope
from diffprune.benchmarks.seed import Seed
from diffprune.benchmarks.world import LIKES, World
from diffprune.core import registry
from diffprune.core.benchmark import Benchmark, Formula, Graded
from diffprune.report.analysis.native_metrics import Native

Rows = list[Graded]


def yes_no(rng: np.random.Generator, right: float) -> Rows:
    """40 pictures, three questions each, one of every category."""
    rows = []
    for i in range(40):
        for category in ("adversarial", "popular", "random"):
            target = "yes" if rng.random() < 0.5 else "no"
            parsed = target if rng.random() < right else {"yes": "no", "no": "yes"}[target]
            rows.append(Graded(f"p{i}", category, float(parsed == target), parsed, target))
    return rows


def partly_read(rng: np.random.Generator, right: float) -> Rows:
    """`yes_no` of which every fifth answer was not read, by either rule."""
    words = ("unknown", "neither")
    return [replace(r, parsed=words[i // 5 % 2], credit=0.0) if i % 5 == 0 else r for i, r in enumerate(yes_no(rng, right))]


def in_turn(rng: np.random.Generator, right: float) -> Rows:
    """40 pictures, each with the two questions of one category."""
    return [r for i, r in enumerate(yes_no(rng, right)) for _ in range(2) if i % 3 == i // 3 % 3]


def pairs(rng: np.random.Generator, right: float) -> Rows:
    """Pairs: 20 pictures of color, 10 of count, 10 of code_reasoning, which is no perception."""
    kinds = ["color"] * 20 + ["count"] * 10 + ["code_reasoning"] * 10
    return [Graded(f"p{i}", kind, float(rng.random() < right), "yes", "yes") for i, kind in enumerate(kinds) for _ in range(2)]


def rotations(rng: np.random.Generator, right: float) -> Rows:
    """30 questions under four rotations."""
    return [Graded(f"{i}x4", "color", float(rng.random() < right), "A", "A") for i in range(30) for _ in range(4)]


def native(benchmark: Benchmark, figure: str, arms: dict[str, Rows]) -> Native:
    frame = pd.concat([pd.DataFrame([vars(r) for r in rows]).assign(cell=cell) for cell, rows in arms.items()])
    printed = {cell: benchmark.aggregate(rows)[figure] for cell, rows in arms.items()}
    return Native("some", frame, benchmark.formula(figure), printed)


def drawn_one_by_one(benchmark: Benchmark, figure: str, arms: dict[str, Rows], strata: bool, draws: int = 300) -> np.ndarray:
    """The benchmark's own figure [draws, arms] of pictures drawn one by one, within their category if `strata`."""
    rng = np.random.default_rng(1)
    layers: dict[str, list[str]] = {}
    for row in next(iter(arms.values())):
        names = layers.setdefault(row.category if strata else "", [])
        names += [row.group] if row.group not in names else []
    by_group = {cell: {g: [r for r in rows if r.group == g] for g in {r.group for r in rows}} for cell, rows in arms.items()}

    def again(groups: dict[str, Rows], drawn: Sequence[str]) -> Rows:
        return [replace(r, group=f"{i}x{len(groups[g])}") for i, g in enumerate(drawn) for r in groups[g]]

    found = []
    for _ in range(draws):
        drawn = [g for names in layers.values() for g in rng.choice(names, len(names))]
        found.append([benchmark.aggregate(again(groups, drawn))[figure] for groups in by_group.values()])
    return np.array(found)


FIGURES = pytest.mark.parametrize(
    ("benchmark", "figure", "make", "strata"),
    [(Pope(), "f1_mean", yes_no, False), (Pope(), "f1_mean", in_turn, False), (Pope(), "f1_mean", partly_read, False),
     (Mme(), "mme_perception", pairs, True), (Mme(), "mme_cognition", pairs, True),
     (Mme(), "mme_total", pairs, True), (Mmbench(), "circular_accuracy", rotations, False), (Seed(), "seed_image", yes_no, False),
     (World("pope"), "f1_mean", yes_no, False), (World("mme"), "mme_total", pairs, True)],
)  # fmt: skip


@FIGURES
def test_a_figure_of_any_pictures_is_the_aggregate_of_their_rows(benchmark, figure: str, make, strata: bool) -> None:
    rng = np.random.default_rng(0)
    rows = make(rng, 0.8)
    found = native(benchmark, figure, {"a": rows})
    kept = [r for r in rows if r.category in benchmark.formula(figure).categories or not benchmark.formula(figure).categories]
    groups = np.array(sorted({r.group for r in kept}))  # as the sums are ordered
    for size in (1, 1, 2, 2, 3, 5, 8, len(groups)):  # of few pictures some lack a category
        drawn = rng.choice(len(groups), size, replace=False)
        mine = found.figure(found.sums[drawn].sum(0))[0]
        assert mine == pytest.approx(benchmark.aggregate([r for r in kept if r.group in groups[drawn]])[figure])


@FIGURES
def test_draws_of_a_figure_are_the_aggregates_of_drawn_pictures(benchmark, figure: str, make, strata: bool) -> None:
    arms = {"a": make(np.random.default_rng(0), 0.8), "b": make(np.random.default_rng(1), 0.7)}
    values, mine, _ = native(benchmark, figure, arms).compared([0, 1])
    assert values.tolist() == [benchmark.aggregate(rows)[figure] for rows in arms.values()]
    theirs = drawn_one_by_one(benchmark, figure, arms, strata)
    for one, other in ((mine[:, 0], theirs[:, 0]), (mine[:, 0] - mine[:, 1], theirs[:, 0] - theirs[:, 1])):
        assert one.mean() == pytest.approx(other.mean(), abs=0.25 * other.std())
        assert one.std() == pytest.approx(other.std(), rel=0.15)


def test_cells_that_lack_questions_are_compared_on_those_both_have() -> None:
    rows = yes_no(np.random.default_rng(0), 0.8)
    short = [r for r in rows if r.group not in ("p0", "p1")]
    found = native(Pope(), "f1_mean", {"short": short, "whole": rows})
    value, drawn, used = found.compared([0, 1])
    assert value[0] == value[1] == pytest.approx(Pope().aggregate(short)["f1_mean"]) and used.sum() == 38
    assert (drawn[:, 0] == drawn[:, 1]).all() and drawn[:, 0].std() > 0


class Captions(Seed):
    """A plug-in from elsewhere, with a figure of its own and one that no sums give."""

    formulas = {"yes_f1": Formula("f1_mean")}

    def aggregate(self, rows: Sequence[Graded]) -> dict[str, float]:
        """A corpus figure and an F1."""
        return {"cider": 113.0, "yes_f1": Pope().aggregate(rows)["f1_mean"]}


def test_a_plugins_own_figure_has_an_interval_if_its_formula_reproduces_it() -> None:
    arms = {"a": yes_no(np.random.default_rng(0), 0.8)}
    (declared,), (undeclared,) = (native(Captions(), figure, arms).estimates([[0]]) for figure in ("yes_f1", "cider"))
    assert declared.interval().low < declared.value < declared.interval().high
    assert undeclared.value == 113 and np.isnan(undeclared.draws).all() and np.isnan(undeclared.interval().low)


def test_a_figure_of_categories_that_do_not_occur_has_no_interval() -> None:
    rows = [r for r in pairs(np.random.default_rng(0), 0.7) if r.category != "code_reasoning"]
    (found,) = native(Mme(), "mme_cognition", {"a": rows}).estimates([[0]])
    assert found.value == 0 and np.isnan(found.draws).all()


def test_labels_and_formulas_are_told_by_the_plugin() -> None:
    assert {like: World(like).label for like in LIKES} == {like: registry.find("benchmarks", like).label for like in LIKES}
    assert World("mmbench_cn").label == "MMBench-CN" and World("mmbench").formula("circular_accuracy").whole_groups
    shop = registry.load("benchmarks", "custom('data/shop.csv', grader='yes_no')")
    assert shop.label == "shop" and shop.formula("f1_mean").kind == "f1_mean" and shop.formula("accuracy") == Formula()
    assert Captions().label == "SEED"


def test_pairs_are_drawn_within_their_category() -> None:
    rows = [r for r in pairs(np.random.default_rng(0), 0.7) if r.category == "color" or r.group == "p20"]
    (found,) = native(Mme(), "mme_perception", {"a": rows}).estimates([[0]])
    assert np.isfinite(found.draws).all(), "the only picture of count is in every draw"
