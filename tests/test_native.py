"""Intervals of F1 and MME points against the benchmark's own aggregate on pictures drawn one by one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from diffprune.benchmarks import _aggregate
from diffprune.core.benchmark import Graded
from diffprune.report.analysis.native_metrics import Native

Rows = list[Graded]


def _pope(rng: np.random.Generator, right: float) -> Rows:
    """40 pictures, three questions each, one of every category."""
    rows = []
    for i in range(40):
        for category in ("adversarial", "popular", "random"):
            target = "yes" if rng.random() < 0.5 else "no"
            parsed = target if rng.random() < right else {"yes": "no", "no": "yes"}[target]
            rows.append(Graded(f"p{i}", category, float(parsed == target), parsed, target))
    return rows


def _mme(rng: np.random.Generator, right: float) -> Rows:
    """Pairs: 20 pictures of color, 10 of count, 10 of code_reasoning, which is no perception."""
    kinds = ["color"] * 20 + ["count"] * 10 + ["code_reasoning"] * 10
    return [Graded(f"p{i}", kind, float(rng.random() < right), "yes", "yes") for i, kind in enumerate(kinds) for _ in range(2)]


def _native(name: str, figure: str, arms: dict[str, Rows], aggregate: Callable[[Sequence[Graded]], dict[str, float]]) -> Native:
    frame = pd.concat([pd.DataFrame([vars(r) for r in rows]).assign(cell=cell) for cell, rows in arms.items()])
    return Native(name, frame, figure, {cell: aggregate(rows)[figure] for cell, rows in arms.items()}, None)


def _naive(arms: dict[str, Rows], figure: Callable[[Rows], float], strata: bool, draws: int = 300) -> np.ndarray:
    """Draws of the figure [draws, arms]: groups one by one, within their category if `strata`."""
    rng = np.random.default_rng(1)
    first = next(iter(arms.values()))
    layers: dict[str, list[str]] = {}
    for row in first:
        names = layers.setdefault(row.category if strata else "", [])
        names += [row.group] if row.group not in names else []
    by_group = {cell: {g: [r for r in rows if r.group == g] for g in {r.group for r in rows}} for cell, rows in arms.items()}
    found = []
    for _ in range(draws):
        drawn = [g for names in layers.values() for g in rng.choice(names, len(names))]
        found.append([
            figure([replace(r, group=str(i)) for i, g in enumerate(drawn) for r in groups[g]]) for groups in by_group.values()
        ])  # fmt: skip
    return np.array(found)


@pytest.mark.parametrize(
    ("make", "aggregate", "figure", "strata"),
    [(_pope, _aggregate.pope, "f1_mean", False), (_mme, _aggregate.mme, "mme_perception", True),
     (_mme, _aggregate.mme, "mme_total", True)],
)  # fmt: skip
def test_draws_of_a_figure_are_the_aggregates_of_drawn_pictures(make, aggregate, figure: str, strata: bool) -> None:
    arms = {cell: make(np.random.default_rng(seed), right) for seed, (cell, right) in enumerate({"a": 0.8, "b": 0.7}.items())}
    native = _native("some", figure, arms, aggregate)
    assert native.exact and (native.strata is not None) == strata
    value, drawn = native.of(["a", "b"])
    assert value.tolist() == pytest.approx([aggregate(rows)[figure] for rows in arms.values()])
    naive = _naive(arms, lambda rows: aggregate(rows)[figure], strata)
    for mine, theirs in ((drawn[:, 0], naive[:, 0]), (drawn[:, 0] - drawn[:, 1], naive[:, 0] - naive[:, 1])):
        assert mine.mean() == pytest.approx(theirs.mean(), abs=0.25 * theirs.std())
        assert mine.std() == pytest.approx(theirs.std(), rel=0.13)


def test_cells_that_lack_questions_are_compared_on_those_both_have() -> None:
    rows = _pope(np.random.default_rng(0), 0.8)
    short = [r for r in rows if r.group not in ("p0", "p1")]
    native = _native("pope", "f1_mean", {"whole": rows, "short": short}, _aggregate.pope)
    value, drawn = native.of(["whole", "short"])
    assert value[0] == value[1] == pytest.approx(_aggregate.pope(short)["f1_mean"])
    assert (drawn[:, 0] == drawn[:, 1]).all() and drawn[:, 0].std() > 0
    outcomes, counts = native.outcomes(["whole", "short"])
    assert outcomes.shape == (38, 2) and (counts == 3).all()


def test_a_figure_that_its_sums_do_not_give_has_no_interval() -> None:
    rows = _pope(np.random.default_rng(0), 0.8)
    frame = pd.DataFrame([vars(r) for r in rows]).assign(cell="a")
    native = Native("odd", frame, "cider", {"a": 113.0}, None)
    value, drawn = native.of(["a"])
    assert not native.exact and value[0] == 113 and np.isnan(drawn).all()


def test_units_of_pairs_and_rotations_are_single_outcomes() -> None:
    rows = _mme(np.random.default_rng(2), 0.7)
    native = _native("mme", "mme_perception", {"a": rows}, _aggregate.mme)
    outcomes, counts = native.outcomes(["a"])
    pairs = [rows[i].credit * rows[i + 1].credit for i in range(0, len(rows), 2)]
    assert sorted(outcomes[:, 0]) == sorted(pairs) and (counts == 1).all()
    native = _native("mmbench", "circular_accuracy", {"a": rows}, _aggregate.circular)
    assert native.outcomes(["a"])[0].sum() == sum(pairs) and native.exact
