"""Answers and their grades: a changed grader grades again what is stored, whole cells at once, and asks no model."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from diffprune.cli import commands
from diffprune.core import registry
from diffprune.core.cell import Cell
from diffprune.core.records import Credited, Prediction, Provenance
from diffprune.core.spec import Spec
from diffprune.evaluate import grading
from diffprune.evaluate.evaluator import Evaluator
from diffprune.evaluate.transformers_backend import TransformersBackend
from diffprune.job import pipeline
from diffprune.report import report
from diffprune.store import Store
from diffprune.vlm.load import load
from tests.blob_stores import FailingBlobs, MemoryBlobs
from tests.records import evaluate_cell, outcome, prediction, provenance

CELL, OTHER = evaluate_cell("grid"), evaluate_cell("attention")
ROWS = [prediction(n, float(n), answer=f"it is {n}", parsed=str(n)) for n in (0, 1)]
FAILED = prediction(2, 0.0, answer="", parsed="", target="", generated_tokens=0, visual_kept=0, error="OSError: no picture")
MADE = provenance()


# --- the store -------------------------------------------------------------------------------------------------------


@pytest.fixture
def store() -> Store:
    """Two cells of three questions, one of which could not be asked."""
    store = Store(MemoryBlobs())
    for cell in (CELL, OTHER):
        store.publish({"predictions": [*ROWS, FAILED], "outcomes": [outcome(3)]}, cell=cell, provenance=MADE)
    return store


def grades(grader: str, *credits: float) -> dict[str, list[Credited]]:
    return {"grades": [Credited(f"s{n}", f"new {n}", "no", credit, "", grader) for n, credit in enumerate(credits)]}


def credits(store: Store, cell: Cell) -> list[float]:
    found: list[float] = store.read("predictions", ["credit"], cells={cell.key})["credit"].tolist()
    return found


def test_answers_and_grades_are_kept_apart_and_read_together(store: Store) -> None:
    answers, graded, both = (store.read(table, cells={CELL.key}) for table in ("answers", "grades", "predictions"))
    assert not {"credit", "parsed", "target"} & set(answers) and not {"answer", "visual_kept"} & set(graded)
    assert set(graded["grader"]) == {registry.grader(CELL.questions[0].benchmark)} == {store.graders()[CELL.key]}
    names = [name for name in Prediction.__annotations__]
    assert [Prediction(**row) for row in both[names].to_dict("records")] == [*ROWS, FAILED]
    assert store.done("predictions") == store.done() == {CELL.key, OTHER.key}


def test_new_grades_replace_those_of_their_cell_and_no_answers(store: Store) -> None:
    answers = store.read("answers")
    store.grade_again(grades("g2", 0.5, 0.25, 0), cell=CELL, provenance=MADE)
    found = store.read("predictions", cells={CELL.key})
    assert found["credit"].tolist() == [0.5, 0.25, 0] and found["parsed"].tolist() == ["new 0", "new 1", "new 2"]
    assert found["answer"].tolist() == ["it is 0", "it is 1", ""] and found["error"].tolist() == ["", "", FAILED.error]
    assert credits(store, OTHER) == [0, 1, 0] and len(store.read("grades")) == 6
    pd.testing.assert_frame_equal(store.read("answers"), answers)
    assert store.done() == {CELL.key, OTHER.key} and store.graders()[CELL.key] == "g2" != store.graders()[OTHER.key]


def test_grading_twice_writes_once_and_going_back_counts(store: Store) -> None:
    first = store.graders()[CELL.key]
    for _ in range(2):
        store.grade_again(grades("g2", 0.5, 0.5, 0), cell=CELL, provenance=MADE)
    assert len(store.blobs.list("manifests")) == 3
    store.grade_again(grades(first, 0, 1, 0), cell=CELL, provenance=MADE)
    assert credits(store, CELL) == [0, 1, 0] and store.graders()[CELL.key] == first
    store.publish({"predictions": [*ROWS, FAILED], "outcomes": [outcome(3)]}, cell=CELL, provenance=MADE)
    store.grade_again(grades("g2", 0.5, 0.5, 0), cell=CELL, provenance=MADE)
    assert credits(store, CELL) == [0.5, 0.5, 0] and len(store.blobs.list("manifests")) == 5


def test_a_clock_that_is_behind_does_not_lose_new_grades(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.time_ns", lambda: 1)
    store.grade_again(grades("g2", 0.5, 0.5, 0), cell=CELL, provenance=MADE)
    assert credits(store, CELL) == [0.5, 0.5, 0]


@pytest.mark.parametrize("point", range(2))
def test_stopped_at_any_write_the_old_grades_count(store: Store, point: int) -> None:
    with pytest.raises(KeyboardInterrupt):
        stopped = Store(FailingBlobs(store.blobs, KeyboardInterrupt(), point))
        stopped.grade_again(grades("g2", 0.5, 0.5, 0), cell=CELL, provenance=MADE)
    assert credits(Store(store.blobs), CELL) == [0, 1, 0] and Store(store.blobs).problems == []


def test_of_two_attempts_the_grades_are_those_of_the_answers_that_count(store: Store) -> None:
    (first,) = [key for key in store.blobs.list("parts/answers") if CELL.key in key]
    second = [replace(row, answer="else", credit=0.75) for row in (*ROWS, ROWS[0])]
    store.publish({"predictions": second, "outcomes": [outcome(3)]}, cell=CELL, provenance=MADE)
    assert credits(store, CELL) == [0, 1, 0]
    store.grade_again(grades("g2", 0.5, 0.5, 0), cell=CELL, provenance=MADE)
    assert credits(store, CELL) == [0.5, 0.5, 0]
    store.blobs.replace(first, b"")
    found = Store(store.blobs).read("predictions", cells={CELL.key})
    assert found["answer"].tolist() == ["else"] * 3 and found["credit"].tolist() == [0.75] * 3, (
        "those that were graded anew are gone"
    )


def test_damaged_new_grades_are_put_aside_and_the_old_ones_count(store: Store) -> None:
    before = set(store.blobs.list("parts/grades"))
    store.grade_again(grades("g2", 0.5, 0.5, 0), cell=CELL, provenance=MADE)
    (new,) = set(store.blobs.list("parts/grades")) - before
    store.blobs.replace(new, b"")
    reader = Store(store.blobs)
    assert credits(reader, CELL) == [0, 1, 0] and len(reader.problems) == 1 and reader.done() == {CELL.key, OTHER.key}


def test_grades_of_other_questions_are_damage_and_never_paired(store: Store) -> None:
    wrong = {"grades": [replace(row, sample=f"{row.sample}x") for row in grades("g2", 1, 1, 1)["grades"]]}
    store.grade_again(wrong, cell=CELL, provenance=MADE)
    assert credits(store, CELL) == [0, 1, 0] and "one grade for each answer" in store.problems[0]


def test_grades_without_answers_and_too_few_are_refused(store: Store) -> None:
    with pytest.raises(ValueError, match="has no answers that could be graded"):
        store.grade_again(grades("g2", 1.0), cell=evaluate_cell("random"), provenance=MADE)
    with pytest.raises(ValueError, match="has 3 answers, and 1 grades were given"):
        store.grade_again(grades("g2", 1.0), cell=CELL, provenance=MADE)


# --- a run -----------------------------------------------------------------------------------------------------------

BENCHMARK = """
from PIL import Image

from diffprune.core.benchmark import Benchmark, Grade, Sample

class Hues(Benchmark):
    label, revision = "Hues", "hues-1"

    def samples(self, split, limit=None, protocol="llava"):
        return [Sample(str(i), str(i), str(i), "which colour ?", {}) for i in range(limit or 4)]

    def image(self, sample):
        return Image.new("RGB", (32, 32), (20 * int(sample.image_id), 0, 0))

    def new_tokens(self, protocol="llava"):
        return 1

    def grade(self, sample, answer, protocol="llava"):
        return Grade(float(CREDIT), answer, "red")

    def aggregate(self, rows):
        return {"hue_points": sum(row.credit for row in rows) / len(rows)}
"""
JOB = """
from diffprune.job import Evaluation, Job

job = Job(name="small", model="tiny(llava)", budgets=("Keep(4)",), baselines=("grid", "random"), workers=1,
          evaluate=Evaluation(benchmarks=("hues",), limit=4))
"""
FIRST = BENCHMARK.replace("CREDIT", "0.25")


def alone(cells: list[Cell], store: Store, provenance: Provenance, *, model: Spec, **_: Any) -> None:
    """A sweep in this process."""
    evaluator = Evaluator(TransformersBackend(load(model)))
    for cell in cells:
        rows = evaluator.run(cell)
        store.publish({"predictions": rows, "outcomes": [outcome(len(rows))]}, cell=cell, provenance=provenance)


@pytest.fixture
def run(own_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """`diffprune VERB small.py` with a benchmark of this text, as a new process would find it; what it prints. asks: whether a
    model may be asked."""
    monkeypatch.setattr(pipeline.PipelineRun, "ray", lambda self: None)
    Path("small.py").write_text(JOB)

    def run(text: str, *arguments: str, asks: bool = False) -> str:
        folder = own_folder / f"plugins-{len(list(own_folder.iterdir()))}"
        (folder / "benchmarks").mkdir(parents=True)
        (folder / "benchmarks" / "hues.py").write_text(text)
        monkeypatch.setenv(registry.FOLDER, str(folder))
        monkeypatch.setattr(pipeline, "sweep", alone if asks else None)  # calling it fails
        capsys.readouterr()
        assert commands.call([*arguments, "--out", "runs"]) == (0, "")
        return capsys.readouterr().out

    return run


@pytest.mark.slow
def test_a_changed_grader_grades_again_without_the_model(run: Callable[..., str], capsys: pytest.CaptureFixture[str]) -> None:
    run(FIRST, "run", "small.py", asks=True)
    store = Store("runs/small/store")
    answers = store.read("answers")
    assert set(store.read("predictions")["credit"]) == {0.25} and len(answers) == 8
    assert "evaluate: all 2 cells are in the store already" in run(f"# a comment\n{FIRST}", "run", "small.py")

    changed = BENCHMARK.replace("CREDIT", "0.75")
    assert "evaluate: 2 cells, 0 to ask, 2 to grade again" in run(changed, "run", "small.py", "--dry-run")
    run(changed, "report", "small.py")
    sentence = "2 of 2 cells of Hues were graded by other code than is here now"
    assert sentence in Path("runs/small/report/report.html").read_text("utf-8")

    said = run(changed, "run", "small.py")
    assert "the answers of 2 cells are graded again" in said and "all 2 cells are in the store already" in said
    assert set(store.read("predictions")["credit"]) == {0.75} and "0 to do" in run(changed, "run", "small.py", "--dry-run")
    assert sentence not in Path("runs/small/report/report.html").read_text("utf-8")
    pd.testing.assert_frame_equal(store.read("answers"), answers)

    run(FIRST, "run", "small.py")
    assert set(store.read("predictions")["credit"]) == {0.25}, "and back again"
    assert "evaluate: 2 cells, 2 to do" in run(FIRST.replace("which colour", "what colour"), "run", "small.py", "--dry-run")


def test_a_grader_that_fails_costs_no_answer(run: Callable[..., str]) -> None:
    run(FIRST.replace("float(0.25)", "{0: 0.25}[int(sample.id) // 2]"), "run", "small.py", asks=True)
    store = Store("runs/small/store")
    assert set(store.read("predictions")["error"]) == {"", "KeyError: 1"} and set(store.read("answers")["error"]) == {""}
    said = run(FIRST, "run", "small.py")
    assert "graded again" in said and set(store.read("predictions")["error"]) == {""}
    assert set(store.read("predictions")["credit"]) == {0.25}


def test_a_report_elsewhere_says_nothing_of_graders_it_does_not_have(
    run: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(FIRST, "run", "small.py", asks=True)
    monkeypatch.delenv(registry.FOLDER)
    sys.modules.pop("diffprune_benchmarks_hues", None)
    page = report("runs/small/store", tmp_path / "page")["html"].read_text("utf-8")
    assert "graded by other code" not in page and "Not installed here" in page


def test_data_that_changed_are_not_graded_by(store: Store) -> None:
    changed = replace(CELL, subject=replace(CELL.subject, questions=replace(CELL.questions[0], revision="other")))
    with pytest.raises(ValueError, match=r"the data of world\(like='gqa'\) have changed"):
        grading.grade_again([changed], store, MADE)
