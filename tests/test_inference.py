"""What the report says of comparisons: one scorer seed, the best rule, ranges, training's last steps, the tuner's accuracies."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diffprune.core.budget import Keep
from diffprune.core.cell import CalibrateSpec, Cell, EvaluateSpec
from diffprune.report import report, summary
from diffprune.report.analysis import speed, verdicts
from diffprune.report.analysis.comparison import Comparison, chapters
from diffprune.report.analysis.records import read
from diffprune.report.render.table import Number, Table
from diffprune.report.tables import accuracy as accuracy_tables
from diffprune.report.tables import speed as speed_tables
from diffprune.report.tables import verdict
from diffprune.store import Store
from diffprune.tune import probes
from tests.records import (
    choice,
    evaluate_cell,
    measure_cell,
    prediction,
    provenance,
    step,
    timing,
    train_cell,
    trial,
    trial_cell,
    tune_cell,
)

RIGHT = {"unpruned": 1.0, "diffprune": 0.95, "gumbel_topk": 0.6, "grid": 0.5, "attention": 0.7}  # chance of a right answer


def put(store: Store, cell: Cell, **tables: Iterable[Any]) -> None:
    store.publish({name: list(rows) for name, rows in tables.items()}, cell=cell, provenance=provenance())


def answered(store: Store, seeds: int, right: dict[str, float] = RIGHT, kept: tuple[int, ...] = (16, 32), num: int = 60) -> None:
    """Answers of two trained methods with scorer seeds, of rules, and of the unpruned model, about `num` pictures."""
    for name, chance in right.items():
        trained = name in ("diffprune", "gumbel_topk")
        for seed in range(seeds if trained else 1):
            about = {"weights": f"{name}{seed}", "recipe": name, "seed": seed} if trained else {}
            for tokens in (144,) if name == "unpruned" else kept:
                rng = np.random.default_rng([seed, len(name), tokens])
                rows = [prediction(i, float(rng.random() < chance), visual_kept=tokens) for i in range(num)]
                put(store, evaluate_cell(name, f"Keep({tokens})", **about), predictions=rows)


def chapter(store: Path) -> Comparison:
    (found,) = chapters(read(store))
    return found


def numbers(table: Table) -> list[Number]:
    return [entry for row in table.rows for entry in row if isinstance(entry, Number)]


# --- scorer seeds ------------------------------------------------------------------------------------------------------------


def test_with_one_seed_nothing_is_said_of_methods(tmp_path: Path) -> None:
    answered(Store(tmp_path), seeds=1)
    found = chapter(tmp_path)
    judged = [one.verdict for one in verdicts.of(found).values()]
    assert len(judged) == 6 and all(v.word == "" and v.found.scorers_only and v.found.low < v.found.high for v in judged)
    table = accuracy_tables.differences(found, 2000)
    assert all(accuracy_tables.SCORERS in n.note for n in numbers(table) if math.isfinite(n.low))
    assert "as replicates" not in table.notes[0] and "one scorer seed" in table.notes[0]
    assert not any(n.best for b in found.budgets for n in numbers(accuracy_tables.per_budget(found, b)))
    assert verdict.short(found) == (
        "DiffPrune against the other trained methods, 2 comparisons: no verdict in 2, which hold for these scorers only (one seed)."
    )
    said = " ".join(verdict.headline(found, {}, None))
    assert "no verdict as a method, for want of seeds; the difference of these scorers is, with" in said
    assert "better" not in said and "worse" not in said
    assert verdict.short(found) in summary(tmp_path)


def test_with_several_seeds_methods_are_judged_and_set_in_bold(tmp_path: Path) -> None:
    answered(Store(tmp_path), seeds=4)
    found = chapter(tmp_path)
    assert all(one.verdict.word == "better" for (against, _), one in verdicts.of(found).items() if against == "Gumbel top-K")
    assert "as replicates" in accuracy_tables.differences(found, 2000).notes[0]
    rows = accuracy_tables.per_budget(found, found.budgets[0]).rows
    bold = {row[0] for row in rows for entry in row if isinstance(entry, Number) and entry.best}
    assert bold == {"DiffPrune"} and verdict.short(found).endswith("2 comparisons: better in 2.")


def test_a_rival_with_one_seed_is_enough_to_withhold_its_verdict(tmp_path: Path) -> None:
    store = Store(tmp_path)
    answered(store, seeds=4, right={x: RIGHT[x] for x in ("unpruned", "diffprune", "grid")})
    answered(store, seeds=1, right={"gumbel_topk": 0.6})
    words = {key: one.verdict.word for key, one in verdicts.of(chapter(tmp_path)).items()}
    assert words["Gumbel top-K", "Keep(16)"] == "" and words[verdicts.RULE, "Keep(16)"] == "better"


def test_nothing_is_called_a_tie(tmp_path: Path) -> None:
    answered(Store(tmp_path / "store"), seeds=3, right=RIGHT | {"gumbel_topk": 0.95})
    made = report(tmp_path / "store", tmp_path / "out")
    for form in ("html", "markdown", "latex"):
        text = made[form].read_text("utf-8")
        assert not re.search(r"\btie[sd]?\b", text) and "cannot tell" in text and "would show" in text


# --- the best rule -----------------------------------------------------------------------------------------------------------


def test_the_best_rule_is_chosen_where_it_is_not_compared(tmp_path: Path) -> None:
    right = {"unpruned": 1.0, "diffprune": 0.9}
    answered(Store(tmp_path / "one"), 1, right | {"grid": 0.3, "attention": 0.8}, kept=(16,))
    assert verdicts.best_rule(chapter(tmp_path / "one"), "Keep(16)") == verdicts.BestRule("Attention", verdicts.ON_THESE)

    several = Store(tmp_path / "two")  # the grid is better with 32 tokens, attention with 16: each is judged where it is worse
    answered(several, 1, right | {"grid": 0.3, "attention": 0.8}, kept=(16,))
    answered(several, 1, {"grid": 0.8, "attention": 0.3, "diffprune": 0.9}, kept=(32,))
    found = chapter(tmp_path / "two")
    chosen = {b.spelling: verdicts.best_rule(found, b.spelling) for b in found.budgets}
    assert chosen["Keep(16)"] == verdicts.BestRule("Grid", verdicts.ON_OTHERS) and chosen["Keep(32)"].label == "Attention"
    assert verdicts.of(found)[verdicts.RULE, "Keep(16)"].other == "Grid"
    assert accuracy_tables.differences(found, 2000).notes[-1] == f"The best rule of a budget is chosen {verdicts.ON_OTHERS}."

    for rule, accuracy in (("grid", 0.2), ("attention", 0.6)):  # tuning asked the calibration split
        asked = tune_cell(rule, "count")
        put(several, trial_cell(asked, "Keep(17)"), trials=[trial(17, 17.0, 2.0, accuracy=accuracy)])
        put(several, trial_cell(asked, "Keep(60)"), trials=[trial(60, 60.0, 1.5, accuracy=1 - accuracy)])
    found = chapter(tmp_path / "two")
    assert verdicts.best_rule(found, "Keep(16)") == verdicts.BestRule("Attention", verdicts.ON_CALIBRATION)
    assert verdicts.best_rule(found, "Keep(32)").chosen == verdicts.ON_OTHERS


# --- speed, training, tuning -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rounds", "note"), [(3, "range of 3 rounds"), (12, "")])
def test_a_speedup_of_few_rounds_is_printed_as_a_range(rounds: int, note: str, tmp_path: Path) -> None:
    spans = (("full", "ttft", 50.0), ("pruned", "ttft", 20.0), ("full", "prefill", 40.0), ("pruned", "prefill", 9.0))
    rows = [
        timing(ms + turn, span=span, arm=arm, repetition=turn) for turn in range(rounds)
        for arm, span, ms in (*spans, ("pruned", "overhead", 1.0))
    ]  # fmt: skip
    put(Store(tmp_path), measure_cell("grid"), timings=rows)
    found = chapter(tmp_path)
    table = speed_tables.answer_times(found, speed.of(found)[0])
    assert table is not None
    ratio = next(n for n in numbers(table) if n.unit == "×")
    assert ratio.note == note
    if rounds == 3:
        assert (ratio.low, ratio.high) == (pytest.approx(52 / 22), pytest.approx(50 / 20))


def test_trainings_last_tenth_and_each_seeds_last_validation(tmp_path: Path) -> None:
    store = Store(tmp_path)
    for seed, level in enumerate((0.0, 2.2)):
        rows = [
            step(
                i, 1.0 if i >= 90 else 5.0, validation_soft=level if i == 99 - 40 * seed else 7.0 if i == 20 else math.nan,
                validation_hard=level if i in (30, 60) else math.nan,
            )
            for i in range(100)
        ]  # fmt: skip
        rows[90] = step(90, 11.0)  # the first of the last ten
        put(store, train_cell("diffprune", "recipe", seed), steps=rows)
    table = speed_tables.training(read(tmp_path))
    assert table is not None
    row = dict(zip(table.columns, table.rows[0], strict=True))
    values = {name: entry.value for name, entry in row.items() if isinstance(entry, Number)}
    assert values["loss"] == pytest.approx((11 + 9) / 10)
    assert values["validation soft"] == pytest.approx(1.1) and values["validation hard"] == pytest.approx(1.1)


def test_the_tuner_says_where_its_order_cannot_be_told(tmp_path: Path) -> None:
    """Three methods on the same 40 calibration pictures: one answer apart cannot be told, fifteen can."""
    store, scores = Store(tmp_path), {"attention": 30, "grid": 29, "random": 15}
    for asked, right in scores.items():
        tune = tune_cell(asked, "count")
        put(store, tune, choices=[choice(chosen_budget="Keep(16)", accuracy=right / 40)])
        cell = evaluate_cell(asked, split="calibration")
        assert isinstance(cell.subject, EvaluateSpec)
        cell = replace(cell, subject=CalibrateSpec(cell.subject.pruner, Keep(16), cell.subject.questions))
        put(store, cell, predictions=[prediction(i, float(i < right)) for i in range(40)])
    table = speed_tables.tuned(read(tmp_path))
    assert table is not None
    found = {row[1]: dict(zip(table.columns, row, strict=True))["minus the best, points"] for row in table.rows}
    assert found["Attention"] == "most accurate"
    assert isinstance(found["Grid"], Number) and (found["Grid"].word, found["Grid"].value) == ("cannot tell", pytest.approx(-2.5))
    assert isinstance(found["Random"], Number) and (found["Random"].word, found["Random"].value) == ("worse", pytest.approx(-37.5))
    assert found["Grid"].low < 0 < found["Grid"].high and found["Random"].high < 0


def test_the_tuners_accuracies_have_intervals_over_pictures(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    rows = [prediction(i, float(right), group=f"g{i // 4}") for i, right in enumerate(np.repeat(rng.random(30) < 0.6, 4))]
    found = probes.accuracy(rows)
    alone = probes.accuracy([prediction(i, row.credit) for i, row in enumerate(rows)])
    assert found.mean == alone.mean == pytest.approx(np.mean([row.credit for row in rows]))
    assert 0 <= found.low < found.mean < found.high <= 1
    assert found.high - found.low == pytest.approx(2 * (alone.high - alone.low), rel=0.15), "thirty pictures, not 120 questions"
    put(Store(tmp_path), tune_cell(), choices=[choice(accuracy=0.5, accuracy_low=0.4, accuracy_high=0.6)])
    table = speed_tables.tuned(read(tmp_path))
    assert table is not None and "50.0 [40.0, 60.0]" in [str(n) for n in numbers(table)]
