"""What the report says of comparisons: one scorer seed, the best rule, ranges, training's last steps, the tuner's accuracies."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diffprune.core.budget import Keep
from diffprune.core.cell import CalibrateSpec, Cell, EvaluateSpec
from diffprune.report import report, summary
from diffprune.report.analysis import comparison, speed, verdicts
from diffprune.report.analysis.comparison import Comparison, chapters
from diffprune.report.analysis.derived import Derived
from diffprune.report.analysis.records import read
from diffprune.report.analysis.seeds import failed
from diffprune.report.render import figures
from diffprune.report.render.table import Number, Table
from diffprune.report.tables import accuracy as accuracy_tables
from diffprune.report.tables import catalogue, verdict
from diffprune.report.tables import speed as speed_tables
from diffprune.report.tables.caveats import caveats
from diffprune.statistics import judged
from diffprune.store import Store
from diffprune.tune import probes
from diffprune.verify import verify
from tests.records import (
    GQA,
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

DYNAMIC = "Dynamic-LLaVA (image part)"
RIGHT = {"unpruned": 1.0, "diffprune": 0.95, "gumbel_topk": 0.6, "grid": 0.5, "attention": 0.7}  # chance of a right answer


def put(store: Store, cell: Cell, **tables: Iterable[Any]) -> None:
    store.publish({name: list(rows) for name, rows in tables.items()}, cell=cell, provenance=provenance())


def answered(store: Store, seeds: int, right: dict[str, float] = RIGHT, kept: tuple[int, ...] = (16, 32), num: int = 60) -> None:
    """Answers of two trained methods with scorer seeds, of rules, and of the unpruned model, about `num` pictures."""
    for name, chance in right.items():
        trained = name in ("diffprune", "gumbel_topk", "dynamic_llava")
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


# --- what may be compared, and is said to be best ----------------------------------------------------------------------------


def asked(
    store: Store, name: str, right: Sequence[Sequence[float]], budget: str = "Keep(16)", kept: float | None = None,
    benchmark: str = GQA,
) -> None:  # fmt: skip
    """Answers of each seed of a trained method, or of a rule: right[seed][picture]. kept: tokens, where not those of the budget."""
    for seed, credits in enumerate(right):
        trained = len(right) > 1
        about = {"weights": f"{name}{seed}", "recipe": name, "seed": seed} if trained else {}
        tokens = 144 if name == "unpruned" else int(kept or budget[5:-1])
        of = "g" if benchmark == GQA else benchmark  # pictures of its own
        rows = [prediction(i, float(c), visual_kept=tokens, group=f"{of}{i}") for i, c in enumerate(credits)]
        put(store, evaluate_cell(name, budget, benchmark, **about), predictions=rows)


def but(wrong: Iterable[int], num: int = 60) -> list[list[float]]:
    """Three seeds that have all of `num` pictures right but these."""
    return [[0.0 if i in set(wrong) else 1.0 for i in range(num)]] * 3


def test_methods_that_keep_other_counts_are_shown_with_their_own_and_get_no_verdict(tmp_path: Path) -> None:
    store, adaptive = Store(tmp_path / "store"), "gumbel_keepdrop"
    asked(store, "unpruned", [[1.0] * 60])
    asked(store, "diffprune", but(range(2)))
    asked(store, adaptive, but(range(30)), kept=24)
    found = chapter(tmp_path / "store")
    assert [b.short for b in found.budgets] == ["16 tokens"]  # of two counts the one that was asked
    asked(store, "gumbel_topk", but(range(30)))
    found = chapter(tmp_path / "store")
    assert found.off("Gumbel keep/drop", "Keep(16)") and not found.off("DiffPrune", "Keep(16)")
    every = {against: one.verdict for (against, _), one in verdicts.of(found).items()}
    assert (every["Gumbel keep/drop"].word, every["Gumbel keep/drop"].found.counts) == ("", (16.0, 24.0))
    alone = judged({key: v.found for key, v in every.items() if key != "Gumbel keep/drop"})  # no part of the family
    assert every["Gumbel top-K"].word == "better" and every["Gumbel top-K"].p == alone["Gumbel top-K"].p

    made = report(tmp_path / "store", tmp_path / "out")
    text = made["markdown"].read_text("utf-8")
    assert "| Gumbel keep/drop | 24.0 (asked 16) |" in text and "| DiffPrune | 16 |" in text
    assert "Against Gumbel keep/drop, DiffPrune gets no verdict, as the two keep other counts, with 16 tokens" in text
    assert "better in 1 and no verdict in 1, where the two keep other counts" in text
    assert "Gumbel keep/drop 50.0 at 24 to 50.0 at 24" in text  # the figure's words
    (table,) = [t for b in found.budgets for t in [accuracy_tables.per_budget(found, b)]]
    notes = {row[0]: row[-2].note for row in table.rows if isinstance(row[-2], Number)}
    assert notes == {"Unpruned": "", "DiffPrune": "", "Gumbel keep/drop": "24 kept", "Gumbel top-K": ""}
    measured = catalogue.Measured.of(found)
    assert measured is not None and [str(n) for n in measured.row("gumbel_keepdrop")] == ["50.0 (24 kept)"]
    assert [str(n) for n in measured.row("diffprune")] == ["96.7"] and "16 of 144" in measured.note


def test_a_budget_is_named_by_what_most_keep_and_else_by_what_was_asked() -> None:
    assert comparison._met("Keep(16)", 144, [16.0, 10.0]) == comparison._met("Keep(16)", 144, [24.0, 16.0]) == 16
    assert comparison._met("Share(0.5)", 144, [97.3, 72.0]) == 72 and comparison._met("Keep(200)", 144, [144.0, 100.0]) == 144
    assert comparison._met("Keep(64)", 1152, [128.0, 128.0, 70.0]) == 128  # of two pictures in a question
    assert comparison.same_count(48, 48.9) and not comparison.same_count(48, 49) and comparison.same_count(math.nan, 48)


def test_bold_is_what_the_verdicts_of_the_page_say(tmp_path: Path) -> None:
    """A difference that holds in its column, and not in the family of all budgets."""
    store = Store(tmp_path)
    for budget, wrong in (("Keep(16)", range(6)), *((f"Keep({n})", ()) for n in (20, 24, 32, 48))):
        asked(store, "diffprune", but(()), budget)
        asked(store, "gumbel_topk", but(wrong), budget)
    found = chapter(tmp_path)
    one = verdicts.of(found)["Gumbel top-K", "Keep(16)"].verdict
    assert one.found.p < 0.05 < one.p and one.word == "cannot tell"
    assert not any(n.best for b in found.budgets for n in numbers(accuracy_tables.per_budget(found, b)))

    for seed in range(3):  # so many wrong answers that the family says so, of another than DiffPrune
        rows = [prediction(i, float(i >= 30), visual_kept=12) for i in range(60)]
        put(store, evaluate_cell("diffprune", "Keep(12)", weights=f"diffprune{seed}", recipe="diffprune", seed=seed),
            predictions=rows)  # fmt: skip
    asked(store, "gumbel_topk", but(range(2)), "Keep(12)")
    found = chapter(tmp_path)
    rows = accuracy_tables.per_budget(found, found.budgets[-1]).rows
    assert verdicts.of(found)["Gumbel top-K", "Keep(12)"].verdict.word == "worse"
    bold = {(row[0], i) for row in rows for i, entry in enumerate(row) if isinstance(entry, Number) and entry.best}
    assert bold == {("Gumbel top-K", 3), ("Gumbel top-K", 4)}  # mean credit and avg %, no single benchmark


def test_seeds_that_fail_are_counted_beside_the_mean_and_in_the_sentence(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    asked(store, "diffprune", [[1.0] * 60] * 5)
    asked(store, "gumbel_topk", [*[[1.0] * 59 + [0.0]] * 4, [1.0] * 20 + [0.0] * 40])
    found = chapter(tmp_path / "store")
    assert failed(found, "Gumbel top-K", "Keep(16)") == (1, 5) and failed(found, "DiffPrune", "Keep(16)") == (0, 5)
    text = report(tmp_path / "store", tmp_path / "out")["markdown"].read_text("utf-8")
    assert re.search(r"\| Gumbel top-K \| 16 \| 85\.3 [^|]*\(1 of 5 seeds failed\)", text)
    assert "But 1 of 5 seeds of Gumbel top-K with 16 tokens failed (more than 10 points below the median" in text


@pytest.mark.parametrize(("num", "told"), [(2, True), (4, True), (5, False)])
def test_of_fewer_than_five_pictures_no_interval_is_given(num: int, told: bool, tmp_path: Path) -> None:
    store = Store(tmp_path)
    asked(store, "unpruned", [[1.0] * num])
    asked(store, "diffprune", but((), num))
    asked(store, "gumbel_topk", but((0,), num))
    found = chapter(tmp_path)
    one = verdicts.of(found)["Gumbel top-K", "Keep(16)"].verdict
    assert math.isnan(one.found.low) == told
    said = " ".join(verdict.headline(found, {}, None))
    assert ("gets no verdict, for want of pictures, with 16 tokens" in said) == told
    assert ("for want of pictures" in verdict.short(found)) == told
    entry = accuracy_tables.shown(found.accuracy("Gumbel top-K", "Keep(16)"))
    assert entry is not None and entry.note == (f"no interval: {num} pictures" if told else "")
    relative = Derived(found).relative("Gumbel top-K", "Keep(16)")
    assert relative is not None and (told or 0 <= relative.low < relative.high <= 100)  # the unpruned model has all right


def test_benchmarks_that_name_their_questions_alike_are_told_apart(tmp_path: Path) -> None:
    """Ten pictures, of which two benchmarks ask; of the second the first question alone is lost."""
    store = Store(tmp_path)
    for benchmark, lost in ((GQA, ()), ("world('pope')", (0,))):
        for name, wrong in (("unpruned", ()), ("diffprune", lost), ("gumbel_topk", lost)):
            for seed in range(1 if name == "unpruned" else 3):
                about = {} if name == "unpruned" else {"weights": f"{name}{seed}", "recipe": name, "seed": seed}
                rows = [
                    prediction(i, float(i not in wrong), question=f"{benchmark} {i}?", answer=f"{name} says {i}") for i in range(10)
                ]
                put(store, evaluate_cell(name, "Keep(16)", benchmark, **about), predictions=rows)
    found = chapter(tmp_path)
    assert found.asked == (20, 10) and "of 2 benchmarks" in " ".join(verdict.headline(found, {}, None))
    text = report(tmp_path, tmp_path / "out")["markdown"].read_text("utf-8")
    (row,) = [line for line in text.splitlines() if line.startswith("| all of these pruned wrong")]
    assert "world('pope') 0?" in row.replace("\\", "") and "diffprune says 0" in row and "With 16 tokens" in text


def test_several_settings_of_a_page_are_told_apart_in_every_title(tmp_path: Path) -> None:
    store = Store(tmp_path)
    for limit in (40, 60):
        for name in ("unpruned", "grid"):
            rows = [prediction(i, float(i % 3 > 0)) for i in range(limit)]
            put(store, evaluate_cell(name, "Keep(16)", GQA, limit=limit), predictions=rows)
    made = report(tmp_path, tmp_path / "out")
    titles = [line for line in made["markdown"].read_text("utf-8").splitlines() if line.startswith("### Accuracy and")]
    assert sorted(title.partition("(")[2] for title in titles) == ["limit 40)", "limit 60)"]
    assert "limit 40" in made["html"].read_text("utf-8") and "limit 60" in made["latex"].read_text("utf-8")


def test_a_benchmark_of_one_picture_beside_others_is_why_there_is_no_verdict(tmp_path: Path) -> None:
    store = Store(tmp_path)
    for benchmark, num in ((GQA, 60), ("world('mme')", 1)):
        asked(store, "unpruned", [[1.0] * num], benchmark=benchmark)
        for name in ("diffprune", "gumbel_topk"):
            asked(store, name, but((), num), benchmark=benchmark)
    said = " ".join(verdict.headline(chapter(tmp_path), {}, None))
    assert "gets no verdict, as a benchmark has too few pictures, with 16 tokens" in said and "want of pictures" not in said


def test_a_benchmark_that_the_subject_lacks_is_why_it_is_compared_with_none(tmp_path: Path) -> None:
    """As after cells that failed: its mean would be of other questions than that of the others."""
    store = Store(tmp_path)
    for name, benchmarks in (("unpruned", (GQA, "world('pope')")), ("diffprune", (GQA,)), ("gumbel_topk", (GQA, "world('pope')"))):
        for benchmark in benchmarks:
            asked(store, name, [[1.0] * 60] if name == "unpruned" else but((), 60), benchmark=benchmark)
    found = chapter(tmp_path)
    lacking = "as answers are missing: DiffPrune with 16 tokens without POPE."
    assert verdict.short(found) == f"No comparison with another trained method in this store, {lacking}"
    assert f"Against Gumbel top-K nothing was compared, {lacking}" in verdict.headline(found, {}, None)


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
        tune = tune_cell(rule, "count")
        put(several, trial_cell(tune, "Keep(17)"), trials=[trial(17, 17.0, 2.0, accuracy=accuracy)])
        put(several, trial_cell(tune, "Keep(60)"), trials=[trial(60, 60.0, 1.5, accuracy=1 - accuracy)])
        if rule == "grid":  # and of the other rule nothing is known there yet
            assert verdicts.best_rule(chapter(tmp_path / "two"), "Keep(16)").chosen == verdicts.ON_OTHERS
    found = chapter(tmp_path / "two")
    assert verdicts.best_rule(found, "Keep(16)") == verdicts.BestRule("Attention", verdicts.ON_CALIBRATION)
    assert verdicts.best_rule(found, "Keep(32)").chosen == verdicts.ON_OTHERS

    for day, told in (("02", (0.9, 0.1)), ("03", (0.1, 0.9)), ("01", (0.9, 0.1))):  # tuned again with other numbers of questions
        for rule, accuracy in zip(("grid", "attention"), told, strict=True):
            cell = trial_cell(tune_cell(rule, "count", calibration=int(day)), "Keep(16)")
            made = provenance(started=f"2026-02-{day}T00:00:00+00:00")
            several.publish({"trials": [trial(16, 16.0, 2.0, accuracy=accuracy)]}, cell=cell, provenance=made)
        assert verdicts.best_rule(chapter(tmp_path / "two"), "Keep(16)") == verdicts.BestRule(
            "Grid" if day == "02" else "Attention", verdicts.ON_CALIBRATION
        ), "the newest says it"

    more = Store(tmp_path / "more")
    for rule, wrong, kept in (("grid", 30, 16), ("random", 30, 16), ("attention", 1, 24)):
        asked(more, rule, but(range(wrong))[:1], kept=kept)
    best = verdicts.best_rule(chapter(tmp_path / "more"), "Keep(16)")
    assert best is not None and best.label in ("Grid", "Random"), "the best one kept more than the budget"


@pytest.mark.slow
def test_methods_that_read_the_question_are_judged_in_a_family_of_their_own(tmp_path: Path) -> None:
    answered(Store(tmp_path / "peers"), seeds=4)
    both = Store(tmp_path / "both" / "store")
    answered(both, seeds=4)
    answered(both, seeds=4, right={"dynamic_llava": 0.93})
    answered(both, seeds=1, right={"fastv": 0.3, "sparsevlm": 0.5})
    peers, found = chapter(tmp_path / "peers"), chapter(tmp_path / "both" / "store")
    assert verdicts.of(found) == verdicts.of(peers) and not verdicts.with_question(peers)
    aware = verdicts.with_question(found)
    assert {key: one.other for key, one in aware.items()} == {
        (name, f"Keep({tokens})"): other for tokens in (16, 32)
        for name, other in ((DYNAMIC, DYNAMIC), (verdicts.QUESTION_RULE, "SparseVLM"))
    }  # fmt: skip
    family = {key: found.difference("DiffPrune", one.other, key[1]) for key, one in aware.items()}
    assert {key: one.verdict for key, one in aware.items()} == judged(family)
    table = accuracy_tables.differences(found, 2000)
    names = [row[0] for row in table.rows]
    assert names == ["Gumbel top-K", verdicts.RULE, "Unpruned", DYNAMIC, verdicts.QUESTION_RULE]
    assert table.rule_before == {3} and not accuracy_tables.differences(peers, 2000).rule_before
    assert any("for all below it: methods that also read the question" in note for note in table.notes)
    top = verdict.lead(found, {}, None)
    given = verdict.counts([one.verdict for (against, _), one in aware.items() if against == DYNAMIC])
    assert top[1] == f"Against trained methods that also read the question, 2 comparisons: {given}."
    assert not any("read the question" in sentence for sentence in verdict.lead(peers, {}, None))
    said = " ".join(verdict.headline(found, {}, None))
    assert f"Against {DYNAMIC}, which also reads the question, DiffPrune " in said
    assert "that also read the question, chosen by its mean accuracy at the other budgets, DiffPrune is better with" in said
    made = report(tmp_path / "both" / "store", tmp_path / "both")
    assert "minus Dynamic-LLaVA" in made["markdown"].read_text("utf-8") and made["svg/forest"].stat().st_size
    assert not [one for one in verify(tmp_path / "both").differences if one.startswith("differences")]


@pytest.mark.slow
def test_a_mean_without_a_benchmark_that_others_have_is_no_mean(tmp_path: Path) -> None:
    """Of a method, of one seed of another, and of the rule that would have been the best: nowhere a figure of fewer benchmarks."""
    store = Store(tmp_path / "store")
    answered(store, seeds=3, right={"unpruned": 1.0, "diffprune": 0.9, "gumbel_topk": 0.9, "grid": 0.5, "attention": 0.99})
    for name, seeds in (("unpruned", (None,)), ("diffprune", (0, 1, 2)), ("gumbel_topk", (0, 1)), ("grid", (None,))):
        for seed in seeds:
            about = {} if seed is None else {"weights": f"{name}{seed}", "recipe": name, "seed": seed}
            for tokens in (144,) if name == "unpruned" else (16, 32):
                rows = [prediction(i, float(i % 3 > 0), visual_kept=tokens, question_type="new") for i in range(60)]
                put(store, evaluate_cell(name, f"Keep({tokens})", "world('pope')", **about), predictions=rows)
    found = chapter(tmp_path / "store")
    whole, partial = ("DiffPrune", "Grid"), ("Gumbel top-K", "Attention")
    (missing,) = found.missing("Attention", "Keep(16)")
    for label in (*whole, *partial):
        known = label in whole
        assert (found.accuracy(label, "Keep(16)") is not None) == known == math.isfinite(found.estimate(label, "Keep(16)"))
        assert (found.difference("DiffPrune", label, "Keep(16)") is not None) == known
        assert found.without(label, "Keep(16)") == ("" if known else f"without {found.heading(missing)}")
        assert (Derived(found).relative(label, "Keep(16)") is not None) == known == math.isfinite(found.relative(label, "Keep(16)"))
    assert verdicts.best_rule(found, "Keep(16)") == verdicts.BestRule("Grid", verdicts.THE_ONLY)
    assert {label for _, label in accuracy_tables.kind_curves(found)} == {"DiffPrune", "Grid", "Unpruned"}
    for table in (accuracy_tables.headline(found, {}), accuracy_tables.per_budget(found, found.budgets[0])):
        by = {row[0]: next(n for n in row[1:] if isinstance(n, Number) and (n.note or math.isfinite(n.low))) for row in table.rows}
        assert {label: math.isfinite(n.value) for label, n in by.items()} == {"Unpruned": True} | {
            label: label in whole for label in (*whole, *partial)
        }
    report(tmp_path / "store", tmp_path)
    assert not verify(tmp_path).differences
    assert f"– (without {found.heading(missing)})" in summary(tmp_path / "store")


def test_a_benchmark_of_which_the_unpruned_model_knows_nothing_is_named(tmp_path: Path) -> None:
    store = Store(tmp_path)
    answered(store, seeds=1)
    for name, tokens in (("unpruned", 144), ("grid", 16)):
        rows = [prediction(i, 0.0, visual_kept=tokens, parsed="no") for i in range(20)]
        put(store, evaluate_cell(name, f"Keep({tokens})", "world('pope')"), predictions=rows)
    (says,) = [says for flag, says in caveats(chapter(tmp_path)) if flag == "none_right"]
    assert says.startswith("The unpruned model has no credit here") and says.endswith("leaves these benchmarks out: POPE.")


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


def test_a_speed_is_of_all_rounds_of_its_sessions(tmp_path: Path) -> None:
    """Percentiles, repeats and flags by hand; no net figure where what the method costs was not timed in full."""
    rng, ms = np.random.default_rng(0), dict[tuple[str, str], list[float]]()
    sessions = ((0, 20, ("prefill", "overhead", "ttft"), ""), (1, 15, ("prefill", "overhead"), ""))
    cut = (2, 40, ("prefill", "overhead", "encoder"), "overhead_excluded")
    for name, timed in (("grid", sessions), ("attention", (cut,))):
        for session, rounds, spans, flag in timed:
            rows = [
                timing(rng.uniform(1, 9), span=span, arm=arm, repetition=turn, flags=f"few_repeats cpu_only {flag}")
                for turn in range(rounds) for arm in ("full", "pruned", "native") for span in spans
            ]  # fmt: skip
            put(Store(tmp_path), measure_cell(name, session=session), timings=rows)
            for row in rows:
                ms.setdefault((name, row.span), []).extend([row.value_ms] * (row.arm == "pruned"))
    found = {one.label: one for one in speed.of(chapter(tmp_path))[0]}
    every, first = sorted(ms["grid", "prefill"]), found["Grid"].spans["pruned", "prefill"]
    ends = [every[3] + 0.4 * (every[4] - every[3]), every[17], every[30] + 0.6 * (every[31] - every[30])]  # a tenth of 34: 3.4
    assert [first.p10, first.median, first.p90] == pytest.approx(ends)
    assert (first.repeats, found["Grid"].spans["pruned", "ttft"].repeats) == (15, 20)
    assert found["Grid"].flags == ("cpu_only",) and found["Grid"].slow_flags == ("cpu_only", "few_repeats")
    attention = found["Attention"]
    assert attention.flags == ("cpu_only", "overhead_excluded") and attention.prefill is not None
    assert attention.net is attention.encoded is attention.native is None and found["Grid"].net is not None
    assert speed.common_flags(list(found.values())) == {"cpu_only"}


def of_modes(store: Store, *modes: str, rounds: int = 8) -> None:
    """Answers of three methods and their timings in modes that are not equally fast."""
    about = {"diffprune": {"weights": "w", "recipe": "r", "seed": 0}}
    for name in ("unpruned", "diffprune", "grid"):
        put(store, evaluate_cell(name, **about.get(name, {})), predictions=[prediction(number) for number in range(6)])
    for name, mode in ((name, mode) for name in ("diffprune", "grid") for mode in modes):
        spans = {("full", "prefill"): 40.0 if mode == "eager" else 12.0, ("pruned", "prefill"): 9.0, ("pruned", "overhead"): 1.0}
        rows = [
            timing(ms * (1 + 0.01 * turn), span=span, arm=arm, repetition=turn)
            for turn in range(rounds) for (arm, span), ms in spans.items()
        ]  # fmt: skip
        put(store, measure_cell(name, mode=mode, **about.get(name, {})), timings=rows)


@pytest.mark.slow
@pytest.mark.parametrize("modes", [("eager",), ("eager", "graph")])
def test_modes_are_not_mixed_and_named_where_there_are_several(modes: tuple[str, ...], tmp_path: Path) -> None:
    of_modes(Store(tmp_path / "store"), *modes)
    found = chapter(tmp_path / "store")
    every, fast, timed = speed.of(found)
    named = "batch 8, mode eager" if len(modes) > 1 else "batch 8"
    assert str(timed) == named and len(every) == 2 * len(modes) and len(fast) == 2
    assert [one.net.estimate for one in fast.values() if one.net] == pytest.approx([4.0, 4.0])
    assert f"own overhead, {named}, one timing session each: 4.00×" in verdict._speed(found, fast, timed)[0]
    table = speed_tables.latency(found, every)
    assert ("mode" in table.columns) == (len(modes) > 1)
    assert len({tuple(str(entry) for entry in row[:4]) for row in table.rows}) == len(table.rows), "no row passes for another"
    drawn = figures.breakdown(found, every, timed)
    assert drawn is not None and f"({named}, DiffPrune): unpruned 41.4; " in drawn.alt
    assert f"prefill at {named}" in summary(tmp_path / "store")
    report(tmp_path / "store", tmp_path)
    assert not verify(tmp_path).differences


def test_the_headline_has_most_speedups_then_more_rows_then_mode_eager() -> None:
    assert speed.headline([]) is None
    assert speed.headline([(1, "eager", True), (8, "eager", True)]) == (8, "eager", 1)
    assert speed.headline([(1, "eager", True), (1, "eager", True), (8, "eager", True), (8, "eager", False)]) == (1, "eager", 1)
    assert speed.headline([(8, "graph", True), (8, "eager", True)]) == (8, "eager", 2)
    assert speed.headline([(8, "graph", True), (8, "graph", True), (8, "eager", True)]) == (8, "graph", 2)


@pytest.mark.parametrize("rounds", [3, 9])
def test_a_range_is_called_one_in_the_sentence_the_terminal_and_under_the_figure(rounds: int, tmp_path: Path) -> None:
    of_modes(Store(tmp_path / "store"), "eager", rounds=rounds)
    found = chapter(tmp_path / "store")
    (said,) = verdict._speed(found, *speed.of(found)[1:])
    assert (" with 16 tokens (range of 3 rounds)." in said) == (rounds == 3)
    lines = [line for line in summary(tmp_path / "store").splitlines() if line.startswith("DiffPrune ")]
    assert ("4.00× [4.00, 4.00] (range of 3 rounds) " in lines[0]) == (rounds == 3) and "few repeats" not in lines[0]
    page = report(tmp_path / "store", tmp_path)["html"].read_text("utf-8")
    bars = "95 % intervals, those of speedups the range of 3 rounds" if rounds == 3 else "95 % intervals"
    assert f"bars are {bars}, the star is" in page and ("range of" in page) == (rounds == 3)


def test_the_sentence_on_speed_names_batch_encoder_and_flags(tmp_path: Path) -> None:
    spans = (("full", "encoder", 20.0), ("pruned", "encoder", 26.0), ("full", "prefill", 40.0), ("pruned", "prefill", 9.0),
             ("pruned", "overhead", 1.0))  # fmt: skip
    for name, kept, flags in (
        ("diffprune", 16, "cpu_only shared_device"),
        ("diffprune", 32, "cpu_only parts_differ shared_device"),
    ):
        rows = [
            timing(ms + turn, span=span, arm=arm, repetition=turn, visual_kept=float(kept), flags=flags)
            for turn in range(9) for arm, span, ms in spans
        ]  # fmt: skip
        put(Store(tmp_path), measure_cell(name, f"Keep({kept})", weights="w", recipe="r", seed=0), timings=rows)
    found = chapter(tmp_path)
    (said,) = verdict._speed(found, *speed.of(found)[1:])
    encoded = float(np.median([(60 + 2 * turn) / (30 + 3 * turn) for turn in range(9)]))  # the unpruned arm's encoder in both
    net = float(np.median([(40 + turn) / (10 + 2 * turn) for turn in range(9)]))
    assert "batch 8, one timing session each: " in said and said.endswith("All of these timings are flagged: shared device.")
    assert f" with 32 tokens (encoder included {encoded:.2f}×; parts differ) and " in said and f"{net:.2f}× [" in said
    assert f" with 16 tokens (encoder included {encoded:.2f}×). " in said


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


def test_of_equally_accurate_answers_none_is_said_to_be_the_most_accurate_alone(tmp_path: Path) -> None:
    store = Store(tmp_path)
    for asked in ("attention", "grid"):
        put(store, tune_cell(asked, "count"), choices=[choice(chosen_budget="Keep(16)", accuracy=0.5)])
        cell = evaluate_cell(asked, split="calibration")
        assert isinstance(cell.subject, EvaluateSpec)
        cell = replace(cell, subject=CalibrateSpec(cell.subject.pruner, Keep(16), cell.subject.questions))
        put(store, cell, predictions=[prediction(i, float(i % 2 == (asked == "grid"))) for i in range(40)])
    table = speed_tables.tuned(read(tmp_path))
    assert table is not None
    first, second = (dict(zip(table.columns, row, strict=True))["minus the best, points"] for row in table.rows)
    assert first == "most accurate, as another is" and isinstance(second, Number) and second.value == 0


def test_an_answer_is_held_against_the_best_on_the_questions_of_its_own_tuning(tmp_path: Path) -> None:
    """Tuned first on 40 questions of one benchmark, then on 80 of each of two: those of before belong to no answer of now."""
    store, pope, right = Store(tmp_path / "store"), "world('pope')", {"attention": 2, "grid": 4}
    for day, limit, benchmarks, methods in ((1, 40, (GQA,), ("attention",)), (2, 80, (GQA, pope), ("attention", "grid"))):
        made = provenance(started=f"2026-01-0{day}T00:00:00+00:00")
        for asked in methods:
            every, of = [float(i >= 40 and i % right[asked] == 0) for i in range(limit)], []
            for benchmark in benchmarks:
                cell = evaluate_cell(asked, "Keep(16)", benchmark, split="calibration", limit=limit)
                assert isinstance(cell.subject, EvaluateSpec)
                of.append(cell.subject.questions)
                rows = [prediction(i, credit, group=f"{benchmark} {i}") for i, credit in enumerate(every)]
                cell = replace(cell, subject=CalibrateSpec(cell.subject.pruner, Keep(16), cell.subject.questions))
                store.publish({"predictions": rows}, cell=cell, provenance=made)
            answer = choice(chosen_budget="Keep(16)", accuracy=float(np.mean(every)))
            store.publish({"choices": [answer]}, cell=tune_cell(asked, "count", questions=tuple(of)), provenance=made)
    table = speed_tables.tuned(read(tmp_path / "store"))
    assert table is not None
    found = {row[1]: row[table.columns.index("minus the best, points")] for row in table.rows}
    assert found["Attention"] == "most accurate"
    assert isinstance(found["Grid"], Number) and found["Grid"].value == pytest.approx(100 * (10 - 20) / 80)
    report(tmp_path / "store", tmp_path)
    accuracies = [said for said in verify(tmp_path).differences if "accuracy %" in said or "minus the best" in said]
    assert not accuracies, accuracies


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
