"""Two runs side by side and the index of several, against computations of their own from the rows that were published."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diffprune.cli import commands
from diffprune.report import compare, index, report
from diffprune.store import Store
from tests.records import evaluate_cell, measure_cell, model, prediction, provenance, timing
from tests.test_statistics import clustered, drawn_one_by_one, means

GQA, POPE = "world('gqa')", "world('pope')"
Credit = Callable[[str, int, int], float]  # of a method's answer: name, seed, number of the question


def answered(asked: str, seed: int, number: int) -> float:
    """The same answer to the same question in every run."""
    return float(np.random.default_rng([len(asked), seed, number]).random() < 0.7)


def run(root: Path, credit: Credit = answered, questions: range = range(60), benchmarks: tuple[str, ...] = (GQA, POPE),
        seeds: int = 3, source: dict[str, Any] | None = None, **about: Any) -> Path:  # fmt: skip
    """A run of the unpruned model, a rule and a trained method. about: of every cell."""
    made = provenance(**(source or {}))
    for benchmark in benchmarks:
        for asked, seed in (("unpruned", None), ("grid", None), *(("diffprune", seed) for seed in range(seeds))):
            learnt = {"recipe": "r" * 20, "seed": seed, "weights": f"{seed}" * 20} if seed is not None else {}
            rows = [
                prediction(n, credit(asked, seed or 0, n), group=f"{benchmark} {n // 2}", sample=f"{benchmark} {n}")
                for n in questions
            ]
            Store(root / "store").publish({"predictions": rows}, cell=evaluate_cell(asked, benchmark=benchmark, **learnt, **about),
                                          provenance=made)  # fmt: skip
    return root


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


# --- the figures ----------------------------------------------------------------------------------------------------


def test_questions_that_both_asked_are_compared_and_no_others(tmp_path: Path) -> None:
    """Oracle: the mean over benchmarks, seeds and shared questions, by hand. The second run has other questions, too."""

    def worse(asked: str, seed: int, number: int) -> float:
        return 0.0 if number >= 60 else answered(asked, seed, number) * (1.0 if asked == "unpruned" or number % 5 else 0.0)

    one = run(tmp_path / "one", questions=range(60))
    two = run(tmp_path / "two", worse, questions=range(21, 90))  # of picture 10 one question of two
    made, said = compare(one, two, tmp_path / "out")
    rows = {row["Method"]: row for row in rows_of(made["csv/compared"])}
    assert list(rows) == ["Unpruned", "DiffPrune", "Grid"]
    for label, asked, seeds in (("Unpruned", "unpruned", 1), ("DiffPrune", "diffprune", 3), ("Grid", "grid", 1)):
        both = range(21, 60)
        first, second = (100 * np.mean([credit(asked, s, n) for s in range(seeds) for n in both]) for credit in (answered, worse))
        assert float(rows[label]["one: accuracy %"]) == pytest.approx(first)
        assert float(rows[label]["two: accuracy %"]) == pytest.approx(second)
        gap = float(rows[label]["second − first, points"])
        assert gap == pytest.approx(second - first)
        assert float(rows[label]["second − first, points low"]) < gap < float(rows[label]["second − first, points high"])
    assert rows["Unpruned"]["second − first, points"] == "0.0"
    assert rows["DiffPrune"]["second − first, points verdict"] == "worse"
    assert said[0].startswith("two against one, 3 comparisons: ") and "78 questions about 40 pictures" in said[1]


def test_tokens_are_counted_on_the_questions_that_are_compared(tmp_path: Path) -> None:
    """At a threshold pictures keep what they keep: 4 to 11 of those that both asked, 40 of what one run asked beside them."""
    for name, questions, right in (("one", range(40, 140), 0), ("two", range(60), 1)):
        for asked, budget in (("unpruned", "Keep(144)"), ("attention", "Above(0.5)")):
            kept = {n: 144 if asked == "unpruned" else 40 if n >= 60 else 4 + n % 8 for n in questions}
            rows, store = [prediction(n, float(n % 3 > 0 or right), visual_kept=kept[n]) for n in questions], Store(f"{name}/store")
            store.publish({"predictions": rows}, cell=evaluate_cell(asked, budget), provenance=provenance())
    made, said = compare("one", "two", tmp_path / "out")
    row = next(row for row in rows_of(made["csv/compared"]) if row["Method"] == "Attention")
    assert float(row["kept tokens"]) == pytest.approx(np.mean([4 + n % 8 for n in range(40, 60)]))
    assert row["second − first, points verdict"] == "better" and "20 questions about 20 pictures" in said[1]


def test_a_pair_is_told_apart_by_less_than_two_samples_are(tmp_path: Path) -> None:
    """The same questions under another split are other questions: nothing is paired, variances add."""

    def better(asked: str, seed: int, number: int) -> float:
        return 1.0 if number % 10 == 0 else answered(asked, seed, number)

    one, two = run(tmp_path / "one"), run(tmp_path / "two", better)
    apart = run(tmp_path / "apart", better, split="calibration")
    paired, said = compare(one, two, tmp_path / "paired")
    other, warned = compare(one, apart, tmp_path / "other")
    widths = []
    for made in (paired, other):
        row = next(r for r in rows_of(made["csv/compared"]) if r["Method"] == "Grid")
        assert float(row["second − first, points"]) == pytest.approx(
            100 * np.mean([better("grid", 0, n) - answered("grid", 0, n) for n in range(60)])
        )
        widths.append(float(row["second − first, points high"]) - float(row["second − first, points low"]))
    assert widths[1] > 1.5 * widths[0]
    assert said[1].startswith("Paired on 120 questions") and "nothing is paired" in warned[1]


@pytest.mark.parametrize("split", ["test", "calibration"])
def test_a_method_is_compared_on_the_benchmarks_that_it_answered_in_both_runs(split: str, tmp_path: Path) -> None:
    """Paired and apart: of the rule the second run has no answers to POPE, which is the easier one."""
    for name, asked, of in (("one", ("unpruned", "grid"), "test"), ("two", ("unpruned",), split)):
        for benchmark, methods in ((GQA, ("unpruned", "grid")), (POPE, asked)):
            for method in methods:
                right = [float(n % 2 or (benchmark == POPE and n % 4 > 0)) for n in range(60)]
                rows = [prediction(n, credit, group=f"{benchmark} {n}") for n, credit in enumerate(right)]
                cell = evaluate_cell(method, benchmark=benchmark, split=of)
                Store(f"{name}/store").publish({"predictions": rows}, cell=cell, provenance=provenance())
    rows = {row["Method"]: row for row in rows_of(compare("one", "two", tmp_path / "out")[0]["csv/compared"])}
    for label, both in (("Unpruned", 62.5), ("Grid", 50.0)):
        assert [float(rows[label][f"{name}: accuracy %"]) for name in ("one", "two")] == [both, both], label
        assert float(rows[label]["second − first, points"]) == 0


def test_estimates_apart_agree_with_groups_of_both_drawn_one_by_one() -> None:
    rng = np.random.default_rng(0)
    sides = [clustered(rng, 1, 60) for _ in range(2)]  # as many groups, so that draws of one seed are the same draws
    draws = [drawn_one_by_one(lambda rows: 100 * rows.mean(-1), credits[None], groups) for credits, groups in sides]
    one, two = (means(credits, groups, name="same").estimates([[0]])[0] for credits, groups in sides)
    found = one.apart(two)
    gap = draws[0].ravel() - np.random.default_rng(1).permutation(draws[1].ravel())
    assert found.value == pytest.approx(one.value - two.value)
    assert found.draws.std() == pytest.approx(gap.std(), rel=0.06)
    assert found.num_groups == 120 and one.df < found.df < one.df + two.df
    assert abs(np.corrcoef(one.draws, found.draws - one.draws)[0, 1]) < 0.1, "independent, though of one seed"
    assert found.answer == pytest.approx(one.answer + two.answer) and one.answer > 0, "a change on either side"


def test_a_run_and_its_copy_differ_in_nothing(tmp_path: Path) -> None:
    made, said = compare(run(tmp_path / "one"), run(tmp_path / "two"), tmp_path / "out")
    assert {row["second − first, points"] for row in rows_of(made["csv/compared"])} == {"0.0"}
    assert said[2] == "The runs differ in nothing that the store records." and "csv/differs" not in made


def test_one_scorer_seed_gets_no_verdict(tmp_path: Path) -> None:
    made, said = compare(run(tmp_path / "one"), run(tmp_path / "two", seeds=1), tmp_path / "out")
    row = next(r for r in rows_of(made["csv/compared"]) if r["Method"] == "DiffPrune")
    assert not row["second − first, points verdict"] and "these scorers only" in row["second − first, points note"]
    assert "no verdict in 1" in said[0]


def test_as_many_but_other_questions_differ(tmp_path: Path) -> None:
    made, said = compare(run(tmp_path / "one"), run(tmp_path / "two", questions=range(60, 120)), tmp_path / "out")
    assert said[1].startswith("No question is common to both runs") and said[2] == "The runs differ in questions."
    (row,) = rows_of(made["csv/differs"])
    assert row["one"].startswith("120; only here world('gqa') 0, ") and row["two"].startswith("120; only here world('gqa') 100, ")


def test_what_differs_is_told_and_nothing_else(tmp_path: Path) -> None:
    versions = {"torch": "2.13.0", "numpy": "2.4"}
    one = run(tmp_path / "one", source={"commit": "a" * 40, "versions": json.dumps(versions)})
    other = {"commit": "b" * 40, "dirty": True, "versions": json.dumps(versions | {"torch": "2.14.0"})}
    two = run(tmp_path / "two", source=other, benchmarks=(GQA,), seeds=2, on=model(weights="cd" * 10), dtype="bfloat16")
    made, said = compare(one, two, tmp_path / "out")
    rows = {row["what"]: (row["one"], row["two"]) for row in rows_of(made["csv/differs"])}
    assert rows == {
        "dtype": ("float32", "bfloat16"), "weights of the model": ("ab" * 6, "cd" * 6), "benchmarks": ("GQA, POPE", "GQA"),
        "questions": ("120", "60"), "scorer seeds of DiffPrune": ("0, 1, 2", "0, 1"), "weights of DiffPrune": (
            "00000000, 11111111, 22222222", "00000000, 11111111"), "commit": ("a" * 12, "b" * 12 + " with uncommitted changes"),
        "torch": ("2.13.0", "2.14.0"),
    }  # fmt: skip
    assert said[2] == "The runs differ in dtype, weights, benchmarks, questions, scorer seeds, commit and torch."


def test_runs_without_a_method_in_common_say_so(tmp_path: Path) -> None:
    for name, asked in (("one", "grid"), ("two", "random")):
        Store(tmp_path / name / "store").publish(
            {"predictions": [prediction()]}, cell=evaluate_cell(asked), provenance=provenance()
        )
    made, said = compare(tmp_path / "one", tmp_path / "two", tmp_path / "out")
    assert "no answers can be compared" in said[0] and "csv/compared" not in made
    assert "No method at a shared budget" in made["html"].read_text("utf-8")


@pytest.mark.parametrize(
    ("second", "says"),
    [("one", "are one run"), ("nowhere", "there is no folder"), ("timed", "holds no answers to compare")],
)
def test_what_cannot_be_compared_ends_with_2_and_one_sentence(second: str, says: str, tmp_path: Path) -> None:
    run(tmp_path / "one", benchmarks=(GQA,), questions=range(4))
    Store(tmp_path / "timed" / "store").publish({"timings": [timing()]}, cell=measure_cell("grid"), provenance=provenance())
    code, sentence = commands.call(["compare", "one", second])
    assert (code, says in sentence, "\n" in sentence) == (2, True, False), sentence
    assert not Path("runs").exists()


@pytest.mark.parametrize("out", ["runs/one-two", "two", "page"])
def test_a_comparison_replaces_no_file_of_a_run_or_a_report(out: str, tmp_path: Path) -> None:
    for name in ("one", "two"):
        run(tmp_path / name, benchmarks=(GQA,), questions=range(4))
    if out == "runs/one-two":  # the default
        shutil.copytree("one", out)
    report(tmp_path / "two" / "store", tmp_path / "page")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    code, sentence = commands.call(["compare", "one", "two", *([] if out == "runs/one-two" else ["--out", out])])
    assert code == 2 and sentence.startswith(f"{out} holds a run or a report, whose files a comparison would replace"), sentence
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


# --- the index --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_index_has_a_row_and_a_link_for_every_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = tmp_path / "runs"
    run(runs / "a b#1")
    report(runs / "a b#1" / "store", runs / "a b#1" / "report")
    run(runs / "exported", benchmarks=(GQA,))
    report(runs / "exported" / "store", runs / "exported")
    (runs / "empty" / "store").mkdir(parents=True)
    (runs / "no run").mkdir()
    (runs / ".export.unfinished" / "store").mkdir(parents=True)  # as SIGKILL leaves it
    assert commands.call(["index"]) == (0, "")
    page = (runs / "index.html").read_text("utf-8")
    assert 'href="a%20b%231/report/report.html"' in page and 'href="exported/report.html"' in page
    assert page.count("<tr>") + page.count('<tr class="rule">') == 4, "a heading and three runs"
    assert "nothing was evaluated or timed; done: nothing" in page and "no run</bdi>" not in page
    assert capsys.readouterr().out.strip().endswith("index.html")
    assert index(runs).read_text("utf-8") == page, "the same records give the same bytes"
    code, sentence = commands.call(["index", "nowhere"])
    assert code == 2 and sentence.startswith("there is no folder nowhere")
