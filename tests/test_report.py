"""The report against recomputation from its own store. The records here are made up, for tests only."""

from __future__ import annotations

import base64
import csv
import hashlib
import html.parser
import itertools
import json
import math
import re
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from shutil import copytree
from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib.lines import Line2D

from diffprune.core import registry
from diffprune.core.benchmark import Graded
from diffprune.core.budget import Keep
from diffprune.core.cell import Cell, EvaluateSpec, MeasureSpec, SelectSpec, weights
from diffprune.core.records import Figure, KeptToken, Prediction, Timing
from diffprune.embedded.world import SPLITS
from diffprune.evaluate.main_figure import answered, main_figure
from diffprune.report import compare, index, report, summary
from diffprune.report.analysis import verdicts
from diffprune.report.analysis.comparison import Comparison, chapters
from diffprune.report.analysis.derived import Derived
from diffprune.report.analysis.records import read
from diffprune.report.analysis.scenes import Scene, scenes
from diffprune.report.render import escape, latex, svg, table
from diffprune.report.render.figures import _keep_headings
from diffprune.report.render.scenes import strips
from diffprune.report.tables.accuracy import open_note, per_budget
from diffprune.statistics import Difference, Verdict, holm
from diffprune.store import Store
from tests.records import (
    choice,
    cost,
    curve_cell,
    curve_point,
    evaluate_cell,
    heading,
    measure_cell,
    method,
    outcome,
    prediction,
    provenance,
    pruner,
    step,
    timing,
    train_cell,
    trial,
    trial_cell,
    tune_cell,
)

SOURCE = provenance(versions=json.dumps({"torch": "2.13.0"}), hardware=json.dumps({"cpu": "test", "threads": 1}))
TOTAL = 144
WORLD = {like: f"world('{like}')" for like in ("gqa", "mme", "mmbench")}
KEPT = (32, 16, 7)
LOSS = {  # chance that an answer is lost at 32, 16 and 7 tokens; only for tests
    "diffprune": (0.05, 0.2, 0.5), "gumbel_topk": (0.06, 0.22, 0.75), "gumbel_keepdrop": (0.08, 0.3, 0.55),
    "random": (0.4, 0.6, 0.75), "grid": (0.4, 0.6, 0.7), "attention": (0.15, 0.25, 0.4), "replaced": (0.12, 0.2, 0.32),
}  # fmt: skip
HOSTILE = (
    "<script>alert(1)</script>",
    "</td></table><img src=x onerror=alert(1)>",
    '=HYPERLINK("http://example.org","x")',
    "\x1b[31mred\x1b[0m \x1b]0;t\x07",
    "| a | b |\n# x",
    r"\input{/etc/passwd} $x$ 100%",
    "javascript:alert(1)",
    "@SUM(1)",
    "x" * 100_000,
)


def digest(*parts: object) -> np.random.Generator:
    return np.random.default_rng(int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big"))


def scorer(asked: str, seed: int) -> dict[str, Any]:
    """A trained method: weights, recipe and seed as builders of cells take them."""
    recipe = hashlib.sha256(asked.encode()).hexdigest()[:20]
    return {"asked": asked, "recipe": recipe, "seed": seed, "weights": hashlib.sha256(f"{asked} {seed}".encode()).hexdigest()[:20]}


def methods(seeds: int = 3) -> list[dict[str, Any]]:
    """Arguments of `evaluate_cell` of everything that prunes."""
    learnt = [scorer(name, seed) for name in ("diffprune", "gumbel_topk", "gumbel_keepdrop") for seed in range(seeds)]
    learnt += [scorer("diffprune(question_aware=True)", seed) for seed in range(min(seeds, 2))]
    return [*learnt, *({"asked": rule} for rule in ("random", "random(seed=1)", "grid", "attention", "replaced(attention)"))]


@cache
def asked(benchmark: str, limit: int) -> tuple[Any, list[Any]]:
    bench = registry.load("benchmarks", benchmark)
    return bench, bench.samples("test", limit)


def predictions(cell: Cell, limit: int) -> Iterator[Prediction]:
    """Answers of which some are wrong: those a bound gets wrong, too, and as many more as the method loses."""
    assert isinstance(cell.subject, EvaluateSpec)
    spec, budget = cell.subject.pruner, cell.subject.budget
    bench, samples = asked(str(cell.subject.questions.benchmark), limit)
    kept = 0 if cell.subject.blind else budget.num if isinstance(budget, Keep) else TOTAL
    if spec.name == "unpruned":
        lost = 0.0 if not cell.subject.blind or "mmbench" in cell.benchmark_label.lower() else 0.7  # MMBench needs no picture here
    else:
        lost = LOSS[spec.name][KEPT.index(kept)] * (0.55 if cell.method.reads_question else 1.0)
    for sample in samples:
        hard = digest(sample.id).random() < 0.07
        own = digest(sample.id, str(spec), cell.method.scorer_seed, str(budget), cell.subject.blind)
        wrong = hard or 0.6 * digest(sample.id, "shared").random() + 0.4 * own.random() < 0.8 * lost
        right = sample.row["answer"]
        answer = {"yes": "no", "no": "yes", "A": "B", "B": "C"}.get(right, "A") if wrong else right
        grade = bench.grade(sample, answer)
        yield prediction(
            credit=grade.credit, sample=sample.id, group=sample.group, category=sample.category, visual_kept=kept,
            question_type=sample.question_type, question=sample.question, answer=answer, parsed=grade.parsed, target=grade.target,
        )  # fmt: skip


def publish(store: Store, cell: Cell, **tables: Any) -> None:
    store.publish({name: list(rows) for name, rows in tables.items()}, cell=cell, provenance=SOURCE)


def timings(cell: Cell, kept: int, rounds: int) -> list[Timing]:
    assert isinstance(cell.subject, MeasureSpec)
    base = {("full", "prefill"): 40.0, ("pruned", "prefill"): 6 + 34 * kept / TOTAL, ("native", "prefill"): 6 + 33 * kept / TOTAL,
            ("pruned", "overhead"): 1.2, ("full", "encoder"): 9.0, ("pruned", "encoder"): 9.0, ("full", "ttft"): 52.0,
            ("pruned", "ttft"): 19 + 34 * kept / TOTAL, ("full", "decode"): 2.4, ("pruned", "decode"): 2.1}  # fmt: skip
    session = cell.subject.seed
    shared, own = digest("time", session), digest("time", str(cell.pruner), weights(cell.subject.pruner), kept, session)
    return [
        timing(ms * float(np.exp(0.05 * (shared if arm == "full" else own).standard_normal())), span=span, arm=arm,
               repetition=turn, sequence=30 + kept, visual_kept=float(kept if arm != "full" else TOTAL), flags="cpu_only")
        for turn in range(rounds) for (arm, span), ms in base.items()
    ]  # fmt: skip


def blinded(store: Store, limit: int = 40) -> None:
    for benchmark in WORLD.values():
        cell = evaluate_cell(benchmark=benchmark, blind=True)
        rows = list(predictions(cell, limit))
        publish(store, cell, predictions=rows, figures=figures(cell, rows))


def figures(cell: Cell, rows: list[Prediction]) -> list[Figure]:
    assert isinstance(cell.subject, EvaluateSpec)
    return [main_figure(cell.subject.questions, answered(rows))]


def evaluated(store: Store, limit: int = 40, likes: tuple[str, ...] = tuple(WORLD), seeds: int = 3) -> None:
    for like in likes:
        cells = [evaluate_cell(budget=f"Keep({kept})", benchmark=WORLD[like], **m) for m in methods(seeds) for kept in KEPT]
        for cell in [evaluate_cell("unpruned", benchmark=WORLD[like]), *cells]:
            rows = list(predictions(cell, limit))
            publish(store, cell, predictions=rows, figures=figures(cell, rows), outcomes=[outcome(len(rows))])


def timed(store: Store, rounds: int = 35, seeds: int = 1, sessions: int = 1) -> None:
    for asked, session in itertools.product(methods(seeds), range(sessions)):
        if asked["asked"] not in ("random(seed=1)", "replaced(attention)"):
            for kept in KEPT:
                cell = measure_cell(budget=f"Keep({kept})", session=session, **asked)
                costs = [
                    cost(arm=arm, visual_kept=float(k), prefill_flops=1e7 * (k + 20), counted_flops=1e7 * (k + 20),
                         kv_bytes=2048.0 * (k + 20), kv_measured_bytes=2048.0 * (k + 20))
                    for arm, k in (("full", TOTAL), ("pruned", kept))
                ]  # fmt: skip
                publish(store, cell, timings=timings(cell, kept, rounds), costs=costs)


def trained(store: Store, steps: int = 120) -> None:
    for asked, ms in (("diffprune", 210), ("gumbel_topk", 220), ("gumbel_keepdrop", 430), ("diffprune(question_aware=True)", 230)):
        for seed in range(3):
            random, about = digest(asked, seed), scorer(asked, seed)
            rows = [
                step(
                    i, 0.4 + 1.2 * math.exp(-i / 25) + 0.05 * random.standard_normal(), temperature=0.05 ** (i / steps),
                    kept=7.0 + i % 40, step_ms=ms * (1 + 0.05 * random.random()), grad_cosine=0.2 if i % 20 == 0 else math.nan,
                    validation_soft=0.5 + math.exp(-i / 30) if i % 30 == 0 else math.nan,
                    validation_hard=0.6 + 1.4 * math.exp(-i / 30) if i % 30 == 0 else math.nan,
                )
                for i in range(steps)
            ]  # fmt: skip
            publish(store, train_cell(asked, about["recipe"], seed), steps=rows)


def tuned(store: Store) -> None:
    def speedup(kept: float) -> float:
        return 40 / (7.2 + 34 * kept / TOTAL)

    points = [curve_point(k, 6 + 34 * k / TOTAL + 0.3 * (k % 3)) for k in (1, 4, 8, 16, 24, 32, 48, 72, 96, 120, 144)]
    publish(store, curve_cell(), curve=points)
    for asked, bias in ((scorer("diffprune", 0), 1.0), (scorer("gumbel_topk", 0), 1.15), ({"asked": "attention"}, 0.8)):
        grid = [(v, TOTAL / (1 + math.exp(2 * bias * v))) for v in np.linspace(-1, 3, 25).tolist()]
        for value, kept in grid:
            cell = trial_cell(tune_cell(target=2.0, **asked), f"Above({value:.6g})")
            publish(store, cell, trials=[trial(value, kept, speedup(kept))])
        for target in (1.5, 2.0, 2.85, 9.0):
            value, kept = min(grid, key=lambda g: abs(speedup(g[1]) - target)) if target < 5 else grid[-1]
            found = speedup(kept)
            reached = choice(
                chosen_budget=f"Above({value:.6g})", verdict="reached" if found >= target else "missed", value=value, kept=kept,
                predicted_speedup=found, measured_speedup=0.99 * found, measured_low=0.97 * found, measured_high=1.01 * found,
            )  # fmt: skip
            none = choice(verdict="unreachable", chosen_budget="", measured_speedup=math.nan, best_speedup=speedup(1))
            publish(store, tune_cell(target=target, **asked), choices=[reached if target < 5 else none])


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with every table."""
    root = tmp_path_factory.mktemp("store")
    for fill in (evaluated, blinded, timed, trained, tuned, pictured):
        fill(Store(root))
    return root


@pytest.fixture(scope="module")
def made(full: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Its report."""
    return report(full, tmp_path_factory.mktemp("report"), title="Test report")


@pytest.fixture(scope="module")
def chapter(full: Path) -> Comparison:
    return next(chapters(read(full)))


def pictured(store: Store) -> None:
    names = tuple(str(SPLITS["test"].start + i) for i in range(3))
    for about in (scorer("diffprune", 0), scorer("gumbel_topk", 0)):
        rows = [
            KeptToken(name, token, bool(kept))
            for name in names for token, kept in enumerate(digest(name, about["asked"]).random(TOTAL) < 0.2)
        ]  # fmt: skip
        cell = evaluate_cell(**about)
        assert isinstance(cell.subject, EvaluateSpec)
        cell = replace(cell, subject=SelectSpec(cell.subject.pruner, Keep(16), names, "1"), benchmark_label="")
        publish(store, cell, kept_tokens=rows)


# --- numbers ---------------------------------------------------------------------------------------------------------


def rows_of(path: Path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def answers(root: Path) -> pd.DataFrame:
    """Predictions as the store has them; diagnostics left out."""
    frame = Store(root).read("predictions")
    frame = frame.astype({name: str for name in ("method", "budget", "benchmark", "sample", "group")})
    return frame[frame["method_kind"] != "diagnostic"]


def native(frame: pd.DataFrame) -> float:
    """One benchmark's main figure by its own plug-in, mean over seeds."""
    bench = registry.load("benchmarks", frame["benchmark"].iloc[0])
    found = []
    for _, part in frame.groupby("cell"):
        graded = [Graded(r.group, r.category, r.credit, r.parsed, r.target) for r in part.itertuples()]
        found.append(next(iter(bench.aggregate(graded).values())))
    return float(np.mean(found))


def test_the_table_per_budget_is_what_the_benchmarks_say(full: Path, made: dict[str, Path]) -> None:
    frame = answers(full)
    found = {r["Method"]: r for r in rows_of(made["csv/budget_keep_16"])}
    assert list(found)[:4] == ["Unpruned", "DiffPrune", "Gumbel keep/drop", "Gumbel top-K"]
    for label in ("DiffPrune", "Gumbel keep/drop", "Random"):
        mine = {like: credits(frame, label, "Keep(16)", like) for like in WORLD}
        shares = [native(rows) / native(credits(frame, "Unpruned", "", like)) for like, rows in mine.items()]
        for like, rows in mine.items():
            assert float(found[label][heading(WORLD[like])]) == pytest.approx(native(rows))
        mean = 100 * np.mean([rows["credit"].mean() for rows in mine.values()])
        assert float(found[label]["avg %"]) == pytest.approx(100 * np.mean(shares))
        assert float(found[label]["mean credit"]) == pytest.approx(mean)
        assert float(found[label]["mean credit low"]) < mean < float(found[label]["mean credit high"])
    assert [found[label]["seeds"] for label in ("DiffPrune", "DiffPrune, question-aware", "Random", "Grid")] == [
        "3.0",
        "2.0",
        "2.0",
        "1.0",
    ]


def test_paired_differences_agree_with_pictures_drawn_one_by_one_and_seeds_as_replicates(full: Path, made: dict[str, Path]) -> None:
    frame, rng = answers(full), np.random.default_rng(0)
    row = next(r for r in rows_of(made["csv/differences"]) if r["DiffPrune minus"] == "Gumbel top-K")
    for budget, column in (("Keep(7)", "7 tokens"), ("Keep(32)", "32 tokens")):
        arms = []
        for label in ("DiffPrune", "Gumbel top-K"):
            part = frame[(frame["method"] == label) & (frame["budget"] == budget)]
            arms.append(part.pivot(index=["benchmark", "group", "sample"], columns="scorer_seed", values="credit").sort_index())
        gap = pd.DataFrame(100 * (arms[0].to_numpy() - arms[1].to_numpy()), arms[0].index)  # one column per scorer seed
        by_seed = gap.groupby("benchmark").mean().mean()
        assert float(row[column]) == pytest.approx(by_seed.mean())
        pictures = gap.index.unique("group")
        of_picture = [np.flatnonzero(gap.index.get_level_values("group") == g) for g in pictures]
        benchmark, points, found = gap.index.get_level_values("benchmark"), gap.to_numpy(), []
        for _ in range(400):
            rows = np.concatenate([of_picture[g] for g in rng.integers(0, len(of_picture), len(of_picture))])
            found.append(np.mean([points[rows][benchmark[rows] == b].mean(0) for b in benchmark.unique()], axis=0))
        drawn = np.array(found)
        interaction = (drawn - drawn.mean(1, keepdims=True)).var(0).sum() / 2 / 3  # of the mean over three seeds
        sizes = benchmark.value_counts()
        size = (sizes * (100 / sizes) ** 2).sum() / sizes.sum() / len(sizes) ** 2  # of one answer,
        size *= len(gap) / len(pictures)  # for each answer of a picture
        about = (gap - gap.groupby("benchmark").transform("mean")).mean(axis=1) / benchmark.map(sizes).to_numpy() / len(sizes)
        part = about.groupby("group").sum().to_numpy()  # of each picture in the error
        seen = (part**2).sum() ** 2 / (part**4).sum()
        presumed = min(1, 6 / seen)  # where more than six changed, what they changed by says the rest
        unseen = 2 * (presumed * size + (1 - presumed) * (part**2).sum() / seen)
        pooled = np.quantile(drawn.mean(1), (0.025, 0.975)) - by_seed.mean()
        groups = (pooled / 1.96) ** 2 * len(pictures) / (len(pictures) - 1) + unseen
        spread = 1 / rng.chisquare(len(pictures) - 1, 20_000) * (len(pictures) - 1)
        whole = by_seed.var() / 3
        beyond = np.maximum(0, whole * 2 / rng.chisquare(2, 20_000) - interaction) * min(1, max(0, 2 * (1 - interaction / whole)))
        errors = rng.standard_normal(20_000)
        for i, name in enumerate(("low", "high")):
            own = groups[i] * spread + beyond
            end = by_seed.mean() + np.quantile(errors * own**0.5, (0.025, 0.975)[i])
            assert float(row[f"{column} {name}"]) == pytest.approx(end, abs=0.15 * (end - by_seed.mean()) * (2 * i - 1))


def credits(frame: pd.DataFrame, label: str, budget: str, like: str) -> pd.DataFrame:
    """Rows of one method on one benchmark; bounds have the budget ""."""
    mine = frame[(frame["method"] == label) & (frame["benchmark"] == f"world(like='{like}')")]
    return mine[mine["budget"] == budget] if budget else mine


def test_relative_accuracy_and_its_companions_are_recomputed_from_the_rows(full: Path, made: dict[str, Path]) -> None:
    frame = answers(full)
    tables = {n: {(r["Method"], r["kept"]): r for r in rows_of(made[f"csv/{n}"])} for n in ("relative", "changed")}
    about = {r["Benchmark"]: r["the image's part note"] for r in rows_of(made["csv/blind"])}
    needed = [like for like in WORLD if not about[heading(WORLD[like])]]
    assert needed == ["gqa", "mme"]
    for label in ("DiffPrune", "Attention"):
        row, other = tables["relative"][label, "7.0"], tables["changed"][label, "7.0"]
        ratios, agree, harm, gain, kept = {}, [], [], [], []
        for like in WORLD:
            pruned, bound, none = (credits(frame, *k, like) for k in ((label, "Keep(7)"), ("Unpruned", ""), ("No image", "")))
            ratios[like] = native(pruned) / native(bound)
            joined = pruned.merge(bound, on="sample", suffixes=("", "_full"))
            agree.append((joined["parsed"] == joined["parsed_full"]).mean())
            harm.append(((joined["credit_full"] == 1) & (joined["credit"] != 1)).mean())
            gain.append(((joined["credit_full"] != 1) & (joined["credit"] == 1)).mean())
            if like in needed:
                kept.append((native(pruned) - native(none)) / (native(bound) - native(none)))
        worst = min(ratios, key=ratios.__getitem__)
        expected = {
            "relative accuracy %": np.mean(list(ratios.values())),
            "each capped at 100 %": np.mean([min(r, 1) for r in ratios.values()]),
            "worst benchmark %": ratios[worst], "blind-corrected %": np.mean(kept),
        }  # fmt: skip
        for column, value in expected.items():
            assert float(row[column]) == pytest.approx(100 * value), column
            assert float(row[f"{column} low"]) < 100 * value < float(row[f"{column} high"]), column
        assert row["worst benchmark % note"] == heading(WORLD[worst])
        for column, value in (("agreement %", agree), ("harm %", harm), ("gain %", gain)):
            assert float(other[column]) == pytest.approx(100 * np.mean(value)), column


def test_the_interval_of_relative_accuracy_agrees_with_resampled_pictures(full: Path, made: dict[str, Path]) -> None:
    frame = answers(full)
    rng = np.random.default_rng(0)
    parts = {like: [by_picture(credits(frame, *k, like)) for k in (("Attention", "Keep(7)"), ("Unpruned", ""))] for like in WORLD}
    pictures = sorted({g for arms in parts.values() for g in arms[0]})
    found = []
    for _ in range(200):
        drawn = rng.choice(pictures, len(pictures))
        pairs = [[again(like, arm, drawn) for arm in arms] for like, arms in parts.items()]
        found += [np.mean([m / f for m, f in pairs])] if all(f for _, f in pairs) else []
    row = next(r for r in rows_of(made["csv/relative"]) if r["Method"] == "Attention" and r["kept"] == "7.0")
    low, high = 100 * np.quantile(found, (0.025, 0.975))
    apart = 0.2 * (high - low)
    assert float(row["relative accuracy % low"]) == pytest.approx(low, abs=apart)
    assert float(row["relative accuracy % high"]) == pytest.approx(high, abs=apart)


def by_picture(frame: pd.DataFrame) -> dict[str, list[Graded]]:
    found: dict[str, list[Graded]] = {}
    for r in frame.itertuples():
        found.setdefault(r.group, []).append(Graded(r.group, r.category, r.credit, r.parsed, r.target))
    return found


def again(like: str, arm: dict[str, list[Graded]], drawn: np.ndarray) -> float:
    """The benchmark's own figure of the pictures drawn, each under a name of its own; 0 where it has none of them."""
    rows = [replace(row, group=str(i)) for i, picture in enumerate(drawn) for row in arm.get(picture, ())]
    return next(iter(registry.load("benchmarks", WORLD[like]).aggregate(rows).values())) if rows else 0.0


def test_a_benchmark_that_needs_no_picture_is_called_so(made: dict[str, Path]) -> None:
    rows = {r["Benchmark"]: r for r in rows_of(made["csv/blind"])}
    assert rows["MMBench"]["the image's part note"] == "not image-bound" and not rows["MMBench"]["DiffPrune, 7 tokens: % kept"]
    assert rows["GQA"]["the image's part note"] == "" and float(rows["GQA"]["DiffPrune, 7 tokens: % kept"]) < 100
    assert float(rows["GQA"]["the image's part"]) == pytest.approx(float(rows["GQA"]["Unpruned"]) - float(rows["GQA"]["No image"]))
    assert not any("No image" in r["Method"] for r in rows_of(made["csv/headline"]))


def test_benchmarks_of_a_column_are_one_family(chapter: Comparison, made: dict[str, Path]) -> None:
    found = Derived(chapter).tested("DiffPrune", "Unpruned", "Keep(7)")
    assert [t.p for t in found.values()] == holm([t.found.p for t in found.values()])
    rows = {r["Benchmark"]: r for r in rows_of(made["csv/benchmarks_unpruned"])}
    for benchmark, t in found.items():
        row = rows[heading(benchmark)]
        assert float(row["7 tokens"]) == pytest.approx(t.found.estimate) and row["7 tokens verdict"] == t.word
        assert (t.word == "worse") == (t.p < 0.05)


def test_verdicts_are_those_of_the_corrected_family(chapter: Comparison, made: dict[str, Path]) -> None:
    judged = verdicts.of(chapter)
    differs, alike = (holm([getattr(one.verdict.found, p) for one in judged.values()]) for p in ("p", "p_outside"))
    rows = {r["DiffPrune minus"]: r for r in rows_of(made["csv/differences"])}
    assert set(rows) == {"Gumbel keep/drop", "Gumbel top-K", "best training-free rule", "Unpruned"}
    for ((against, budget), one), p, p_outside in zip(judged.items(), differs, alike, strict=True):
        row, column = rows[against], f"{budget[5:-1]} tokens"
        low, high, word = float(row[f"{column} low"]), float(row[f"{column} high"]), row[f"{column} verdict"]
        assert (one.verdict.found.p < 0.05) == (not low <= 0 <= high), "interval and p never contradict"
        sign = "better" if one.verdict.found.estimate > 0 else "worse"
        assert word == (sign if p < 0.05 else "equivalent" if p_outside < 0.05 else "cannot tell")
        why = "after Holm" if one.verdict.found.p < 0.05 else "would show"
        assert (why in row[f"{column} note"]) == (word == "cannot tell")
    assert {one.verdict.word for one in judged.values()} >= {"better", "worse", "cannot tell"}
    assert {r["pictures"] for r in rows.values()} == {str(float(answers_pictures(chapter)))}


@pytest.mark.parametrize(
    ("corrected", "says"),
    [(0.2, "p 0.20 after Holm"), (0.0612, "p 0.061 after Holm"), (0.0501, "p just above 0.05 after Holm")],
)
def test_a_p_that_rounds_to_its_limit_does_not_contradict_the_verdict(corrected: float, says: str) -> None:
    found = Difference(1.0, 0.1, 1.9, 40, 20, p=0.03, detectable=1.3)
    assert open_note(Verdict(found, "cannot tell", corrected)) == says


def answers_pictures(chapter: Comparison) -> int:
    return int(chapter.rows["group"].nunique())


def test_bold_means_a_difference_that_excludes_zero(chapter: Comparison) -> None:
    bold = 0
    for budget in chapter.budgets:
        for row in per_budget(chapter, budget).rows:
            number = row[-2]
            if isinstance(number, table.Number) and number.best:
                bold += 1
                others = [x for x in chapter.methods if x != row[0] and not chapter.methods[x].reads_question]
                assert all(chapter.difference(row[0], x, budget.spelling).low > 0 for x in others)
    assert bold < len(chapter.budgets)


def test_speedup_is_the_median_of_the_rounds_ratios_with_overhead_charged(full: Path, made: dict[str, Path]) -> None:
    frame = Store(full).read("timings")
    frame = frame[(frame["method"] == "Gumbel top-K") & (frame["budget"] == "Keep(16)")]
    ms = frame.astype({"arm": str, "span": str}).set_index(["arm", "span", "repetition"])["value_ms"].sort_index()
    charged = ms["pruned", "prefill"] + ms["pruned", "overhead"]
    net, native = ((a / b).median() for a, b in ((ms["full", "prefill"], charged), (charged, ms["native", "prefill"])))
    row = next(r for r in rows_of(made["csv/latency"]) if r["Method"] == "Gumbel top-K" and float(r["kept"]) == 16)
    assert float(row["net speedup"]) == pytest.approx(net)
    assert float(row["net speedup low"]) < net < float(row["net speedup high"])
    assert float(row["to native"]) == pytest.approx(native)
    assert "All timings: cpu only" in made["html"].read_text("utf-8")


def test_ticks_of_a_logarithmic_axis_are_powers_in_words(made: dict[str, Path]) -> None:
    assert [svg.power_of_ten(10.0**e) for e in (-12, 0, 4)] == ["10⁻¹²", "10⁰", "10⁴"] and svg.power_of_ten(20) == "20"
    page = made["html"].read_text("utf-8")
    assert "mathdefault" not in page and "10⁰</text>" in page


def test_the_words_say_what_the_table_says(made: dict[str, Path]) -> None:
    page = made["html"].read_text("utf-8")
    row = next(r for r in rows_of(made["csv/differences"]) if r["DiffPrune minus"] == "Gumbel top-K")
    given = {k.removesuffix(" verdict"): v for k, v in row.items() if k.endswith("verdict")}
    sentence = re.search(r"Against Gumbel top-K, DiffPrune ([^<]*)", page)
    assert sentence
    words = {"is better": "better", "is equivalent": "equivalent", "cannot be": "cannot tell", "is worse": "worse"}
    for part in re.split(r"; (?=is|cannot)", sentence[1]):
        word = words[" ".join(part.split()[:2])]
        assert set(re.findall(r"(?:^|with|and|,) (\d+) tokens", part)) == {c.split()[0] for c, v in given.items() if v == word}


# --- the page --------------------------------------------------------------------------------------------------------


class Inspector(html.parser.HTMLParser):
    """Everything in a page that could run or fetch."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.bad: list[str] = []
        self.tags: set[str] = set()
        self.scripts: list[str] = []
        self._inside = False

    def handle_data(self, data: str) -> None:
        if self._inside:
            self.scripts.append(data)
            self._inside = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self._inside = tag == "script"
        if tag in {"iframe", "object", "embed", "link", "base", "form"}:
            self.bad.append(tag)
        for key, value in attrs:
            local = key.split(":")[-1]
            if key.startswith("on") or (
                (local in {"src", "href", "action", "srcset"} and not (value or "").startswith(("#", "data:image/png")))
                and not (tag == "a" and (value or "").startswith("data:text/csv;base64,"))
            ):
                self.bad.append(f"{tag} {key}={value!r:.60}")
            if key == "style" and "url(" in (value or "") and "url(#" not in (value or ""):
                self.bad.append(f"{tag} {key}={value!r:.60}")


def inspected(page: str) -> Inspector:
    found = Inspector()
    found.feed(page)
    assert not found.bad
    assert "Content-Security-Policy" in page and "default-src 'none'" in page
    (script,) = found.scripts  # the one the policy names by its digest
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert re.findall(r"script-src ([^;]*);", page) == [f"'sha256-{digest}'"]
    assert "@import" not in page and not re.search(r"url\((?!#)", page)
    return found


def test_the_page_is_whole_and_asks_nobody_for_anything(made: dict[str, Path]) -> None:
    page = made["html"].read_text("utf-8")
    assert {"svg", "table", "image"} <= inspected(page).tags
    for section in (
        "Every method at every budget",
        "Tables per budget",
        "Tuning to a target speedup",
        "Training",
        "Provenance",
        "scene 2000000000",
    ):
        assert section in page
    assert "unreachable here, best is" in page and "no fused attention" in page
    assert len(page) < 800_000


@pytest.mark.slow
def test_the_same_records_give_the_same_bytes(full: Path, made: dict[str, Path], tmp_path: Path) -> None:
    again = report(full, tmp_path, title="Test report")
    assert set(again) == set(made)
    for name, path in again.items():
        assert path.read_bytes() == made[name].read_bytes(), name


def test_an_empty_store_gives_a_page_that_says_so(tmp_path: Path) -> None:
    made = report(tmp_path / "nothing", tmp_path / "out")
    page = made["html"].read_text("utf-8")
    inspected(page)
    assert "holds no evaluated and no timed cells yet" in page
    assert "No training steps in this store" in page
    assert "holds no results yet" in summary(tmp_path / "nothing")


def test_thresholds_beside_the_unpruned_model_and_a_model_that_is_always_wrong_give_a_page(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    for cell in (evaluate_cell("unpruned"), evaluate_cell("attention", "Above(0.5)")):
        publish(store, cell, predictions=[prediction(number, 0.0) for number in range(6)])
    made = report(tmp_path / "store", tmp_path / "out")
    inspected(made["html"].read_text("utf-8"))
    assert "| Unpruned | 144 | 0.0 " in (told := made["markdown"].read_text("utf-8"))
    assert "| 100.0 | 1.00× |" not in told, "no share of nothing is 100 %"


@pytest.mark.parametrize("only", ["answers", "times", "steps", "tuning"])
def test_missing_parts_are_named_in_their_place(only: str, tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    {
        "answers": lambda s: evaluated(s, 4, ("gqa",), 1),
        "times": lambda s: timed(s, 5),
        "steps": lambda s: trained(s, 5),
        "tuning": tuned,
    }[only](store)
    made = report(tmp_path / "store", tmp_path / "out")
    page = made["html"].read_text("utf-8")
    inspected(page)
    assert ("No training steps in this store" in page) == (only != "steps")
    assert ("The tuner has given no answer" in page) == (only != "tuning")
    if only == "answers":
        assert "no figure of accuracy against speed" in page and "was not timed, so there is no speedup" in page
    if only == "times":
        assert "few repeats" in page and "no verdict" in page


# --- what others wrote -----------------------------------------------------------------------------------------------


def test_hostile_text_is_inert_everywhere(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    made_by = replace(SOURCE, versions=HOSTILE[0], hardware=HOSTILE[1])
    for asked, right in (("unpruned", True), ("diffprune", False), ("gumbel_topk", False)):
        cell = evaluate_cell(asked)
        cell = (
            cell if right else replace(cell, method=replace(cell.method, label=f"{asked} {HOSTILE[0]}"), benchmark_label=HOSTILE[1])
        )
        rows = [
            prediction(i, float(right), question_type=evil[:30], question=evil, answer=evil, parsed=evil, target=evil,
                       error=evil if i == 3 and not right else "")
            for i, evil in enumerate(HOSTILE)
        ]  # fmt: skip
        store.publish({"predictions": rows}, cell=cell, provenance=made_by)
    publish(store, evaluate_cell("grid"), outcomes=[outcome(0, "failed", HOSTILE[2])])
    tune = tune_cell()
    tune = replace(tune, method=replace(tune.method, label=HOSTILE[1]))
    publish(store, tune, choices=[choice(verdict=HOSTILE[0], chosen_budget=HOSTILE[2], note=HOSTILE[2])])
    made = report(tmp_path / "store", tmp_path / "out", title=HOSTILE[0], command=HOSTILE[1])
    page = made["html"].read_text("utf-8")
    assert "img" not in inspected(page).tags
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page, "shown as text"
    for name, path in made.items():
        content = path.read_text("utf-8")
        assert "\x1b" not in content and "x" * 2000 not in content, name
        if name.startswith("csv/"):
            cells = [c for row in csv.reader(content.splitlines()) for c in row if c]
            assert not any(c[0] in "=@+|%" or (c[0] == "-" and not re.fullmatch(r"-[\d.e+-]+", c)) for c in cells), name
    assert "<script" not in made["markdown"].read_text("utf-8") and "<img" not in made["markdown"].read_text("utf-8")
    assert r"\input" not in made["latex"].read_text("utf-8")
    assert "\x1b" not in summary(tmp_path / "store")


@pytest.mark.parametrize("evil", HOSTILE)
def test_each_form_of_text_keeps_the_words_and_drops_the_power(evil: str) -> None:
    assert "\x1b" not in escape.plain(evil) and len(escape.plain(evil)) <= 160
    assert "<" not in escape.markdown(evil) and not re.search(r"(?<!\\)\|", escape.markdown(evil))
    assert escape.csv(evil)[0] not in "=+-@|"
    assert not re.search(r"\\(input|write|def)", escape.latex(evil))


def test_failures_are_listed_and_never_wrong_answers(tmp_path: Path) -> None:
    rows = [prediction(i, 1.0 if i else 0.0, error="" if i else "OutOfMemory: too big") for i in range(10)]
    publish(Store(tmp_path / "store"), evaluate_cell("diffprune"), predictions=rows, outcomes=[outcome(10, "failed", "one failed")])
    made = report(tmp_path / "store", tmp_path / "out")
    assert {r["reason"] for r in rows_of(made["csv/failures"])} >= {"one failed", "OutOfMemory: too big"}
    (row,) = rows_of(made["csv/headline"])
    assert (float(row["accuracy %"]), row["accuracy % flags"]) == (100, "error_rows")
    assert "error_rows" in made["html"].read_text("utf-8")
    (row,) = rows_of(made["csv/errors"])
    assert (row["class"], row["Method"], float(row["rows"]), float(row["share of rows %"])) == ("OutOfMemory", "DiffPrune", 1, 10)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kept", "rounds", "note"), [(99, 8, "timed with 99 kept"), (48, 8, ""), (99, 3, "timed with 99 kept; range of 3 rounds")]
)
def test_a_speed_says_the_tokens_that_were_timed_where_the_answers_kept_others(
    kept: int, rounds: int, note: str, tmp_path: Path
) -> None:
    store = Store(tmp_path / "one" / "store")
    for seed, own in enumerate((kept, 48)):  # of which the first seed alone is timed
        for budget in ("Keep(48)", "Above(0.5)"):
            cell = evaluate_cell(budget=budget, **scorer("atp", seed))
            publish(store, cell, predictions=[prediction(number, visual_kept=own) for number in range(6)])
    for budget in ("Keep(48)", "Above(0.5)"):
        cell = measure_cell(budget=budget, **scorer("atp", 0))
        publish(store, cell, timings=[replace(one, flags="outlier") for one in timings(cell, kept, rounds)])
    made = report(tmp_path / "one" / "store", tmp_path / "out")
    for name in ("headline", "thresholds"):
        (row,) = rows_of(made[f"csv/{name}"])
        assert row.get("net prefill speedup note", "") == note, name
    assert (f"({note})" in summary(tmp_path / "one" / "store")) == bool(note), "flags are on the page alone"
    assert ("timed with N kept" in made["markdown"].read_text("utf-8")) == bool(note)
    assert (f"timed with {kept} kept" in index(tmp_path).read_text("utf-8")) == bool(note)
    copytree(tmp_path / "one", tmp_path / "two")
    beside, _ = compare(tmp_path / "one", tmp_path / "two", tmp_path / "compared")
    row = next(row for row in rows_of(beside["csv/compared"]) if row["Method"] == "ATP-LLaVA")
    assert [row.get(f"{name}: net speedup note", "") for name in ("one", "two")] == [note, note]


def scored(root: Path, cells: dict[Cell, float]) -> list[dict[str, str]]:
    """The headline of cells whose answers all have one credit; later cells are newer."""
    for day, (cell, credit) in enumerate(cells.items(), 1):
        rows = [prediction(i, credit) for i in range(5)]
        made_by = replace(SOURCE, started=f"2026-01-0{day}T00:00:00+00:00")
        Store(root).publish({"predictions": rows}, cell=cell, provenance=made_by)
    return rows_of(report(root, root / "out")["csv/headline"])


def test_a_scorer_trained_again_replaces_the_old_one(tmp_path: Path) -> None:
    about = scorer("diffprune", 0)
    (row,) = scored(tmp_path, {evaluate_cell(**about | {"weights": sha * 20}): credit for sha, credit in (("a", 0.0), ("b", 1.0))})
    assert float(row["accuracy %"]) == 100
    assert "weights, data or code changed under the same name" in (tmp_path / "out" / "report.html").read_text("utf-8")


@pytest.mark.parametrize("recipe", ["of its own", "unknown"])
def test_scorers_of_two_recipes_or_of_none_that_is_known_are_two_methods(recipe: str, tmp_path: Path) -> None:
    made = {"a": 0.0, "b": 1.0}
    cells = {
        evaluate_cell("diffprune", weights=x * 20, recipe="" if recipe == "unknown" else x * 20, seed=0): credit
        for x, credit in made.items()
    }
    found = {row["Method"]: float(row["accuracy %"]) for row in scored(tmp_path, cells)}
    assert found == {f"DiffPrune (recipe {x * 6})": 100 * credit for x, credit in made.items()}


@pytest.mark.parametrize("plain", [False, True])
def test_a_method_that_is_there_with_options_alone_is_a_rival(plain: bool, tmp_path: Path) -> None:
    won = "learnpruner(diversity=0.2)"
    for name in ("diffprune", won, *(["learnpruner"] if plain else [])):
        for seed in range(3):
            cell = evaluate_cell(name, weights=str(seed) * 20, recipe=name, seed=seed)
            publish(Store(tmp_path), cell, predictions=[prediction(n, 0.5) for n in range(4)])
    (chapter,) = chapters(read(tmp_path))
    stands, varied = "LearnPruner (stage 1)", "LearnPruner (stage 1), diversity 0.2"
    assert verdicts.rivals(chapter) == ([stands, varied] if plain else [varied])  # a variant of a rival is one, too
    assert {label for label, _ in verdicts.of(chapter)} == {*verdicts.rivals(chapter)}
    assert {label for label, _ in verdicts.variants(chapter)} == ({varied} if plain else set())


def test_answers_of_different_length_or_batch_are_different_chapters(tmp_path: Path) -> None:
    store = Store(tmp_path)
    for changed in ({}, {"answer_tokens": 2}, {"limit": 5}, {"batch": 8}):
        publish(store, evaluate_cell("unpruned", **changed), predictions=[prediction()])
    found = list(chapters(read(tmp_path)))
    assert sorted((c.setting["answer_tokens"], c.setting["limit"], c.setting["batch"]) for c in found) == [
        ("2", "all", 64), ("all", "5", 64), ("all", "all", 8), ("all", "all", 64),
    ]  # fmt: skip
    assert "answers are cut at 2 tokens" in report(tmp_path, tmp_path / "out")["html"].read_text("utf-8")


# --- names and tables ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spelling", "label"),
    [
        ("unpruned", "Unpruned"),
        ("diffprune(question_aware=True)", "DiffPrune, question-aware"),
        ("diffprune(denoiser=False)", "DiffPrune, without denoiser"),
        ("diffprune(attention=False)", "DiffPrune, without self-attention"),
        ("diffprune(depth=1, denoiser=False)", "DiffPrune, without denoiser, depth 1"),
        ("gumbel_keepdrop", "Gumbel keep/drop"),
        ("random(seed=2)", "Random"),
        ("replaced(diffprune(denoiser=False))", "DiffPrune, without denoiser"),
    ],
)
def test_labels(spelling: str, label: str) -> None:
    assert method(pruner(spelling)).label == label


def test_scenes_refuse_what_is_no_mask() -> None:
    with pytest.raises(ValueError, match="must be bool"):
        strips([Scene(SPLITS["test"].start, {"grid": np.zeros(144)})])
    with pytest.raises(ValueError, match="no square"):
        strips([Scene(SPLITS["test"].start, {"grid": np.zeros(143, bool)})])


@pytest.mark.parametrize("budget", ["Keep(16)", "Keep(32)"])
def test_a_picture_of_another_budget_than_the_chapters_has_no_question(budget: str, tmp_path: Path) -> None:
    """As where another budget and a limit were set under the same name: the newest selection is of the second run."""
    store = Store(tmp_path / "store")
    pictured(store)  # at 16 tokens
    name = str(SPLITS["test"].start)
    for cell in (evaluate_cell("unpruned"), evaluate_cell(budget=budget, **scorer("diffprune", 0))):
        publish(store, cell, predictions=[prediction(0, group=name)])
    found = read(tmp_path / "store")
    asked = {one.seed: one.asked for one in scenes(found, list(chapters(found)))}
    assert len(asked) == 3 and [seed for seed, one in asked.items() if one] == ([int(name)] if budget == "Keep(16)" else [])
    inspected(report(tmp_path / "store", tmp_path / "out")["html"].read_text("utf-8"))


def test_summary_is_a_plain_table(full: Path) -> None:
    lines = summary(full).splitlines()
    assert any(line.startswith("DiffPrune ") and "×" in line and "[" in line for line in lines)
    assert max(len(line) for line in lines[: lines.index("", 2)]) <= 120


def test_the_figure_of_variants_draws_the_table_of_variants(made: dict[str, Path]) -> None:
    (row,) = rows_of(made["csv/variants"])
    assert (row["variant"], row["minus"]) == ("DiffPrune, question-aware", "DiffPrune")
    told = re.search("<title>(.*?)</title>", made["svg/variants"].read_text(encoding="utf-8"))
    assert told is not None
    drawn = re.findall(r"question-aware with (\d+) tokens ([+−]?[\d.]+) ([a-z ]+)", told.group(1))
    assert len(drawn) == len(KEPT)
    for tokens, points, verdict in drawn:
        assert float(row[f"{tokens} tokens"]) == pytest.approx(float(points.replace("−", "-")), abs=0.051)
        assert row[f"{tokens} tokens verdict"] == verdict


def test_no_column_of_a_legend_ends_with_a_heading() -> None:
    names = ["a", "one:", *"bcdefgh", "two:", *"ij", "three:", *"klmnopqrstu", "four:", "v"]
    for columns in (1, 2, 3, 4):
        handles = [Line2D([], [], label=name) for name in names]
        _keep_headings(handles, columns)
        told = [str(handle.get_label()) for handle in handles]
        assert [name for name in told if name.strip()] == names
        parts = np.array_split(np.array(told), columns)  # as matplotlib does it
        assert not any(part[-1].endswith(":") for part in parts)


@pytest.mark.parametrize(("value", "text"), [(-0.04, "0.0"), (0.04, "0.0"), (0.0, "0.0"), (-0.06, "−0.1"), (0.06, "+0.1")])
def test_what_rounds_to_nothing_has_no_sign(value: float, text: str) -> None:
    assert table.Number(value, signed=True).main == text


def test_an_interval_in_a_paper_breaks_nowhere() -> None:
    rows = ((table.Number(94.96, 93.8, 96.04, note="p 0.05"),),)
    assert r"95.0\linebreak{} [93.8,\,96.0] (p 0.05)" in latex.document("d", [table.Table("t", "T", ("mean credit",), rows)])


def test_a_text_is_cut_where_its_table_says() -> None:
    text = " ".join(["word"] * 60)
    for longest, whole in ((160, False), (400, True)):
        one = table.Table("t", "T", ("a",), ((text,),), longest=longest)
        assert (text in table.markdown(one)) == whole
        assert (text in " ".join(latex.document("d", [one]).replace(r"\allowbreak{}", "").split())) == whole


def test_groups_are_closed_as_often_as_they_are_opened() -> None:
    """Also beside empty ones, in which matplotlib draws nothing."""
    text = '<svg><g id="a"><g><g/><path d="M 0 0"/></g><g clip-path="b"/><g><g>\n</g></g></g></svg>'
    assert svg._compact(text) == '<svg><g id="a"><path d="M 0 0"/><g clip-path="b"/></g></svg>'
