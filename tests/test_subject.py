"""Whom a report is about: DiffPrune, the only trained method, or the one that is chosen; and with whom it is compared then."""

from __future__ import annotations

import csv
import shutil
from pathlib import Path

import pytest
from records import evaluate_cell, prediction, provenance

from diffprune.cli import commands
from diffprune.job.files import load_job
from diffprune.job.job import Job
from diffprune.report import about, index, read, report, summary
from diffprune.report.analysis import verdicts
from diffprune.report.analysis.comparison import FULL, chapters
from diffprune.store import Store
from diffprune.verify import verify

LEARNT = "LearnPruner (stage 1)"
CROSS = "DiffPrune, question-aware cross"
CREDIT = {  # every method's share of right answers, in twelfths; only for tests
    "unpruned": 12, "diffprune": 8, "diffprune(question_aware='cross')": 10, "learnpruner": 9, "visionselector": 6,
    "cdpruner": 11, "divprune": 7, "attention": 5, "cdpruner(question=False)": 6,
}  # fmt: skip
TRAINED = ("diffprune", "diffprune(question_aware='cross')", "learnpruner", "visionselector")


def publish(root: Path, *asked: str, seeds: int = 2) -> Path:
    store = Store(root)
    for name in asked:
        trained = name in TRAINED
        for seed in range(seeds if trained else 1):
            more = {"recipe": f"{name:a<20.20}", "seed": seed, "weights": f"{seed}{name:b<20.19}"} if trained else {}
            cell = evaluate_cell(name, budget="Keep(16)", **more)
            right = [float(i % 12 < CREDIT[name] + seed * (i % 24 < 12)) for i in range(120)]
            kept = 144 if name == "unpruned" else 16
            rows = [prediction(i, credit, group=str(i // 2), visual_kept=kept) for i, credit in enumerate(right)]
            store.publish({"predictions": rows}, cell=cell, provenance=provenance())
    return root


@pytest.fixture(scope="module")
def everyone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return publish(tmp_path_factory.mktemp("run") / "store", *[name for name in CREDIT if "=False" not in name])


def compared(store: Path, subject: str = "") -> tuple[set[str], set[str]]:
    """Names in the family of the subject, and in that of methods which are told more."""
    chapter = next(chapters(read(store, subject)))
    return {name for name, _ in verdicts.of(chapter)}, {name for name, _ in verdicts.with_question(chapter)}


def test_a_subject_that_sees_the_picture_alone_is_held_apart_from_what_reads_the_question(everyone: Path) -> None:
    peers = {LEARNT, "VisionSelector", verdicts.RULE, FULL}
    assert compared(everyone) == compared(everyone, "DiffPrune") == (peers, {verdicts.QUESTION_RULE})
    mine = peers - {LEARNT} | {"DiffPrune"}
    assert compared(everyone, LEARNT) == (mine, {CROSS, verdicts.QUESTION_RULE})


def test_one_that_reads_the_question_is_compared_with_all_that_are_told_no_more(everyone: Path) -> None:
    peers = {LEARNT, "VisionSelector", verdicts.RULE, verdicts.QUESTION_RULE, FULL}
    assert compared(everyone, CROSS) == (peers, set()), "the plain one is its variants' business"


def test_a_rule_may_be_the_subject_and_is_no_rival_of_its_own(everyone: Path) -> None:
    peers, _ = compared(everyone, "DivPrune")
    assert peers == {"DiffPrune", LEARNT, "VisionSelector", verdicts.RULE, FULL}
    chapter = next(chapters(read(everyone, "DivPrune")))
    best = verdicts.best_rule(chapter, "Keep(16)")
    assert best is not None and best.label == "Attention"


def difference(out: Path, row: str) -> float:
    with open(out / "tables" / "differences.csv", newline="", encoding="utf-8") as file:
        return next(float(r["16 tokens"]) for r in csv.DictReader(file) if next(iter(r.values())) == row)


@pytest.mark.parametrize(
    ("subject", "asked"),
    [
        ("DiffPrune", "diffprune"),
        (CROSS, "diffprune(question_aware='cross')"),
        (LEARNT, "learnpruner"),
        ("CDPruner (word space)", "cdpruner"),
    ],
)
def test_the_page_is_about_it_and_every_number_is_in_the_store(everyone: Path, tmp_path: Path, subject: str, asked: str) -> None:
    made = report(everyone, tmp_path / "report", subject=subject)
    page = made["html"].read_text("utf-8")
    assert f"Against the unpruned model, {subject} " in page and f"{subject} was asked 120 questions" in page
    assert about(tmp_path / "report") == subject
    shutil.copytree(everyone, tmp_path / "store")
    found = verify(tmp_path)
    assert not found.differences and found.recomputed > 50
    more = 0.25 if asked in TRAINED else 0.0  # the second seed answers one question of 24 more
    assert difference(tmp_path / "report", FULL) == pytest.approx(100 * (CREDIT[asked] + more - 12) / 12, abs=0.01)


def test_what_is_said_of_a_rule_is_said_of_a_rule(everyone: Path, tmp_path: Path) -> None:
    said = report(everyone, tmp_path, subject="DivPrune")["markdown"].read_text("utf-8")
    assert "DivPrune against the trained methods, 3 comparisons: " in said
    assert "10 benchmarks" not in said and "of 1 benchmark at 1 budget. Differences are" in said, "it has no scorer seeds"
    assert "Against the best of the other training-free image-only rules asked here, DivPrune is better with 16 tokens" in said
    assert ", Attention)" in said, "the rule is named"
    assert "Against the best of the training-free rules asked here that also read the question, DivPrune is worse" in said
    usual = report(everyone, tmp_path / "usual")["markdown"].read_text("utf-8")
    assert "DiffPrune against the other trained methods, 2 comparisons" in usual and "with 2 scorer seeds" in usual


def test_the_bound_is_no_subject(everyone: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a report is about a method that prunes: choose another subject than 'Unpruned'"):
        report(everyone, tmp_path, subject="Unpruned")
    with pytest.raises(ValueError, match="subject names 'unpruned': a report is about a method that prunes"):
        Job(name="x", baselines=("unpruned", "divprune"), subject="unpruned")


@pytest.mark.slow
def test_who_reads_the_question_stands_above_the_line_and_nothing_is_called_image_only(everyone: Path, tmp_path: Path) -> None:
    page = report(everyone, tmp_path, subject=CROSS)["html"].read_text("utf-8")
    assert "Below the line: variants." in page and "better than every other method above the line" in page
    assert "those with methods that also read the question by themselves" not in page
    usual = report(everyone, tmp_path / "usual")["html"].read_text("utf-8")
    assert "Below the line: methods that also read the question, and variants." in usual


def test_without_a_choice_it_is_the_only_trained_method(tmp_path: Path) -> None:
    alone = publish(tmp_path / "alone", "unpruned", "learnpruner", "divprune", "attention")
    assert compared(alone) == ({verdicts.RULE, FULL}, set())
    assert f"{LEARNT} against the best training-free rules, 1 comparison: " in summary_of(alone, tmp_path)
    two = publish(tmp_path / "two", "unpruned", "learnpruner", "visionselector")
    assert "DiffPrune is not among the methods that were evaluated" in summary(two)


def summary_of(store: Path, place: Path) -> str:
    return report(store, place / "page")["markdown"].read_text("utf-8")


def test_one_of_which_there_are_no_results_is_said_to_be_missing(everyone: Path) -> None:
    said = summary(read(everyone, "GumbelTop"))
    assert "GumbelTop is not among the methods that were evaluated, so there is no verdict on it." in said


@pytest.mark.slow
def test_an_index_has_a_run_by_the_method_of_its_page(everyone: Path, tmp_path: Path) -> None:
    for name, subject in (("mine", LEARNT), ("usual", "")):
        shutil.copytree(everyone, tmp_path / name / "store")
        report(tmp_path / name / "store", tmp_path / name / "report", subject=subject)
    page = index(tmp_path).read_text("utf-8")
    mine, usual = (page[page.index(f"{name}/report/report.html") :][:2000] for name in ("mine", "usual"))
    assert LEARNT in mine[: mine.index("usual/report")] and "DiffPrune" in usual


@pytest.mark.slow
def test_a_folder_is_reported_again_about_the_same_or_another_that_it_has(
    everyone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(everyone, "run/store")
    assert commands.call(["report", "run", "--set", "subject=LearnPruner"]) == (0, "")
    assert about(Path("run/report")) == LEARNT
    assert commands.call(["report", "run"]) == (0, "")
    assert about(Path("run/report")) == LEARNT, "as before"
    for spelled in ("divprune", "learnpruner", "DivPrune", "learnpruner(diversity=0.1)"):
        assert commands.call(["report", "run", "--set", f"subject={spelled}"]) == (0, "")
        assert about(Path("run/report")) == ("DivPrune" if "div" in spelled.lower()[:3] else LEARNT)
    code, said = commands.call(["report", "run", "--set", "subject=Unpruned"])
    assert code == 2 and "a report is about a method that prunes" in said
    code, said = commands.call(["report", "run", "--set", "subject=Gumbel"])
    assert code == 2 and said.startswith("a report about 'Gumbel' needs results of it: run has those of DiffPrune, ")
    assert about(Path("run/report")) == LEARNT
    shutil.rmtree("run/report")
    Path("run/job.json").write_text('{"name": "run", "subject": "divprune"}')
    assert commands.call(["report", "run"]) == (0, "")
    assert about(Path("run/report")) == "DivPrune", "a folder without a page is about whom its job named"
    capsys.readouterr()


@pytest.mark.slow
@pytest.mark.parametrize("damage", [b"\xff\xfe", b'"' + b"x" * 200_000, b""])
def test_a_damaged_page_is_about_nobody_and_can_be_written_anew(everyone: Path, tmp_path: Path, damage: bytes) -> None:
    report(everyone, tmp_path, subject=LEARNT)
    (tmp_path / "numbers.csv").write_bytes(damage)
    assert about(tmp_path) == ""
    report(everyone, tmp_path, subject=about(tmp_path))
    assert about(tmp_path) == "DiffPrune"


def test_a_name_without_what_stands_behind_it_in_brackets_is_the_plain_method(tmp_path: Path) -> None:
    store = publish(tmp_path, "unpruned", "cdpruner(question=False)", "cdpruner", "diffprune")
    assert read(store, "CDPruner").subject.label == "CDPruner (word space)"


def test_a_job_names_one_of_its_methods() -> None:
    told = Job(name="x", train=None, baselines=("unpruned", "divprune"), subject="divprune")
    assert str(told.subject) == "divprune"
    with pytest.raises(ValueError, match="subject names 'cdpruner', which the job does not run"):
        Job(name="x", baselines=("unpruned", "divprune"), subject="cdpruner")
    chosen = load_job("ablation_questions").subject
    assert chosen is not None and str(chosen) == "dpp(method=diffprune(question_aware='cross'))"
