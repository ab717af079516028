"""Edges of the published rules, with what the reference scorers give, and a TSV read as pandas reads it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import fixtures as made
import pytest

from diffprune.benchmarks import _answers as answers
from diffprune.benchmarks._fixtures import NAMES
from diffprune.core import registry
from diffprune.io import lmms_eval

THOUGHTS = [  # answer, what lmms-eval's default leaves of it
    ("<think>B or C?</think>\nB", "B"),
    ("Yes.</think> No", "No"),
    ("a</think>b</think> c ", "c"),
    ("<think>never closed: yes", "<think>never closed: yes"),
    ("</think>no<think>", "</think>no<think>"),
    ("<analysis>1</analysis>A<think>2</think>", "A"),
    ("<th<think>x</think>ink>y</think>z", "z"),
    ("<THINK>a</THINK> b", "<THINK>a</THINK> b"),
    (" plain ", "plain"),
]


@pytest.mark.parametrize(("answer", "left"), THOUGHTS)
def test_reasoning_is_stripped_as_the_harness_does(answer: str, left: str) -> None:
    assert answers.without_reasoning(answer) == left


@pytest.mark.parametrize("name", NAMES)
def test_every_benchmark_strips_reasoning_under_lmms_eval_alone(fixtures: Path, name: str) -> None:
    bench = made.load(name, fixtures / name)
    for sample in bench.samples("test"):
        right = sample.row.get("answer", "unanswerable")
        said = "ABCDE"[right] if isinstance(right, int) else right
        thought = f"<think>Not no, F.</think>\n{said}"
        assert bench.grade(sample, thought, "lmms_eval") == bench.grade(sample, said, "lmms_eval")
        assert bench.grade(sample, thought, "llava") == bench.credit(sample.row, thought, "llava")


def test_a_task_of_the_harness_gets_answers_without_reasoning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lmms_eval, "broken", None)

    def graded(tags: object, filtered: object) -> object:
        bench = registry.load("benchmarks", "lmms('made')")
        seen: list[object] = []
        config = SimpleNamespace(metric_list=(), **({} if tags == "unset" else {"reasoning_tags": tags}))
        step = SimpleNamespace(name="f", apply=lambda said, docs: said[0].filtered_resps.update(f=filtered))
        task = SimpleNamespace(config=config, _filters=[step], eval_docs=[{}], doc_to_target=lambda doc: "yes")
        task.process_results = lambda doc, results: seen.extend(results) or {"acc": 1.0}
        monkeypatch.setitem(vars(bench), "_task", task)
        monkeypatch.setitem(vars(bench), "_config", {})
        bench.grade(SimpleNamespace(id="0", row={"doc": 0}), "unused")
        return seen[0]

    assert graded("unset", "<think>no</think>yes") == graded(None, "<analysis>no</analysis> yes") == "yes"
    assert graded(None, ["<think>no</think>yes", "b "]) == ["yes", "b"]
    assert graded("none", "<think>no</think>yes") == graded(False, "<think>no</think>yes") == "<think>no</think>yes"
    assert graded([["[", "]"]], "[no]<think>yes") == graded('[["[", "]"]]', "[no]<think>yes") == "<think>yes"


@pytest.mark.parametrize(
    ("answer", "word"),
    [
        ("yes,\tno,x", "unknown"),  # the comma touches a tab, which is no blank: it becomes one, and `no` is a word
        ("no-\tway-yes", "unknown"),
        ("1. " * 40 + "no.", "no"),  # a period after a digit stays, and is none of the 32 that are deleted
        ("yes\nno", "unknown"),
    ],
)
def test_pope_word_as_vlmevalkit_reads_it(answer: str, word: str) -> None:
    assert answers.pope_parse(answer, "word") == word


@pytest.mark.parametrize(
    ("answer", "given", "evalai", "raw", "prenormalised"),
    [
        ("Coca Cola", ["coca cola"] * 10, 1, 1, 1),
        ("coca cola", ["Coca Cola"] * 10, 1, 0, 0),  # an annotator's capitals are never met
        ("two", ["two"] * 10, 1, 0, 0),
        ("2", ["2"] * 3 + ["two"] * 7, 1, 0.9, 0.9),
        ("10,,000", ["10 000"] * 10, 0, 1, 0),
        ("john's", ["john's"] * 10, 1, 1, 0),
        ("dont know", ["don't know"] * 10, 1, 0, 1),  # the script writes don’t
        ("dont know", ["don’t know"] * 10, 0, 1, 0),
        ("couldnt", ["couldn't"] * 10, 1, 1, 1),  # but this one as everybody does
        ("a dog", ["dog", "dog", "a dog"] + ["x"] * 7, 0.9, 0.6, 0.6),
    ],
)
def test_vizwiz_modes(answer: str, given: list[str], evalai: float, raw: float, prenormalised: float) -> None:
    wanted = {"evalai": evalai, "official_raw": raw, "official_prenormalised": prenormalised}
    for protocol in answers.PROTOCOLS:
        assert {mode: answers.vizwiz(answer, given, protocol, mode).credit for mode in answers.VIZWIZ_MODES} == pytest.approx(
            wanted
        )


def test_vizwiz_offers_the_challenges_own_comparison(fixtures: Path) -> None:
    ours, official = [made.load("vizwiz", fixtures / "vizwiz", mode=mode) for mode in ("evalai", "official_raw")]
    sample = ours.samples("test")[0]
    capitals = {**sample.row, "answers": [answer.upper() for answer in sample.row["answers"]]}
    assert ours.credit(capitals, capitals["answers"][0], "llava").credit == 1
    assert official.credit(capitals, capitals["answers"][0], "llava").credit == 0
    assert made.load("vizwiz", fixtures / "vizwiz").grade(sample, "Unanswerable") == ours.grade(sample, "Unanswerable")
    with pytest.raises(ValueError, match="vizwiz has no mode 'official_ra': did you mean 'official_raw'"):
        registry.load("benchmarks", "vizwiz(mode='official_ra')")


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("It must be **E**", ""),  # with no other letter the last rule finds nothing
        ("**E**, as D-ogs are rare", "D"),
        ("E", "E"),  # a bare letter is read up to E
        ("zebra", ""),
    ],
)
def test_mmbenchs_last_two_rules_read_options_a_to_d(fixtures: Path, answer: str, letter: str) -> None:
    bench = made.load("mmbench", fixtures / "mmbench")
    row = {"A": "tapir", "B": "rabbit", "C": "cat", "D": "dog", "E": "zebra", "answer": "E"}
    for protocol in bench.protocols:
        assert bench.credit(row, answer, protocol).parsed == letter
    assert answers.mmbench_parse("**E**", {"E": "zebra", "A": "cat"}) == answers.mmbench_parse("zebra", {"E": "zebra"}) == "E"


NA = ["", "NA", "N/A", "null", "None", "nan", "NaN", "NULL", "n/a", "<NA>", "#N/A"]


@pytest.mark.parametrize("word", NA)
def test_words_that_pandas_takes_for_nothing_are_nothing_in_mmbenchs_tsv(tmp_path: Path, word: str) -> None:
    records = made.rows("mmbench")[:4]
    made.tsv(tmp_path / "dev.tsv", [{**record, "hint": word, "E": word} for record in records])
    bench = made.load("mmbench", tmp_path)
    for protocol in bench.protocols:
        question = bench.samples("test", None, protocol)[0].question
        assert question.startswith("What color") and "E." not in question
    kept = {**records[0], "hint": "No hint", "E": "Nothing"}
    made.tsv(tmp_path / "dev.tsv", [kept, *records[1:]])
    assert "\nE. Nothing" in made.load("mmbench", tmp_path).samples("test", None, "lmms_eval")[0].question


def _prompt(name: str, protocol: str, **changed: object) -> str:
    bench = registry.load("benchmarks", name)
    asked: str = bench.prompt(bench.tidy(dict(made.rows(name)[0]) | changed), protocol)
    return asked


def test_blanks_of_scienceqa_are_single_in_llavas_file_alone() -> None:
    row = {"hint": " Look  here. ", "question": "Which  state?", "choices": ["Maine  (far)", "Ohio"]}
    assert _prompt("scienceqa", "llava", **row).startswith("Context: Look here.\nWhich state?\nA. Maine (far)\nB. Ohio\nAnswer")
    asked = _prompt("scienceqa", "lmms_eval", **row)
    assert asked.startswith("Context:  Look  here. \nWhich  state?\nA. Maine  (far)\nB. Ohio\nAnswer")
    assert "a b" in _prompt("scienceqa", "llava", question="a  b") and "a  b" in _prompt("scienceqa", "llava", question="a   b")


def test_the_harness_strips_popes_question_and_what_ends_mmbenchs_options() -> None:
    assert _prompt("pope", "lmms_eval", question=" Is there a cat? ").startswith("Is there a cat?\nAnswer")
    assert _prompt("pope", "llava", question=" Is there a cat? ").startswith(" Is there a cat? \nAnswer")
    asked = _prompt("mmbench", "lmms_eval", C="green ", D="yellow\n")
    assert "C. green \nD. yellow\n\nAnswer" in asked, "the end of all options, not of each"
