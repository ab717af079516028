"""The ten benchmarks on rows of the published schemas: prompts, answers, groups, figures, and what does not change them."""

from __future__ import annotations

import importlib
import random
from dataclasses import replace
from pathlib import Path

import fixtures as made
import pytest

from diffprune.benchmarks import _fixtures
from diffprune.benchmarks._groups import drawn
from diffprune.benchmarks._table import Example, TableBenchmark
from diffprune.core import registry
from diffprune.core.benchmark import Graded, Sample
from diffprune.core.spec import Spec
from diffprune.evaluate.cells import Evaluation, cells
from diffprune.evaluate.evaluator import Evaluator, evaluated
from diffprune.evaluate.transformers_backend import TransformersBackend
from diffprune.vlm.load import load

NAMES = _fixtures.NAMES
CASES = [
    pytest.param(name, example, id=f"{name}-{number}")
    for name in NAMES
    for number, example in enumerate(importlib.import_module(f"diffprune.benchmarks.{name}").EXAMPLES)
]


@pytest.mark.parametrize(("name", "example"), CASES)
def test_examples(name: str, example: Example) -> None:
    bench = registry.load("benchmarks", name)
    answers = example.row.get("answers")
    row = bench.tidy(dict(example.row))
    assert answers is None or len(row["answers"]) == 10
    assert bench.prompt(row, example.protocol) == example.prompt
    sample = Sample("0", "0", "0", example.prompt, row)
    assert bench.grade(sample, example.answer, example.protocol).credit == pytest.approx(example.credit)


@pytest.mark.parametrize("name", NAMES)
def test_examples_cover_both_protocols_and_both_outcomes(name: str) -> None:
    examples = [case.values[1] for case in CASES if case.values[0] == name]
    assert {e.protocol for e in examples} == {"llava", "lmms_eval"}
    assert min(e.credit for e in examples) < 1 == max(e.credit for e in examples)


PROMPTS = {  # of the first row of the fixtures, written out
    ("gqa", "llava"): "What color is the shape?\nAnswer the question using a single word or phrase.",
    ("gqa", "lmms_eval"): "What color is the shape?\nAnswer the question using a single word or phrase.",
    ("mmbench", "llava"): "What color is the shape?\nA. red\nB. blue\nC. green\nD. yellow\n"
    "Answer with the option's letter from the given choices directly.",
    ("mmbench", "lmms_eval"): "What color is the shape? There are several options:\nA. red\nB. blue\nC. green\nD. yellow\n\n"
    "Answer with the option's letter from the given choices directly.",
    ("mmbench_cn", "llava"): "图形是什么颜色？\nA. 红色\nB. 蓝色\nC. 绿色\nD. 黄色\n请直接回答选项字母。",
    ("mmbench_cn", "lmms_eval"): "图形是什么颜色？ There are several options:\nA. 红色\nB. 蓝色\nC. 绿色\nD. 黄色\n\n"
    "请直接使用所提供的选项字母作为答案回答。",
    ("mme", "llava"): "Is there a red shape in the image?\nAnswer the question using a single word or phrase.",
    ("mme", "lmms_eval"): "Is there a red shape in the image?\nAnswer the question using a single word or phrase.",
    ("pope", "llava"): "Is there a circle in the image?\nAnswer the question using a single word or phrase.",
    ("pope", "lmms_eval"): "Is there a circle in the image?\nAnswer the question using a single word or phrase.",
    ("scienceqa", "llava"): "Context: One shape is drawn.\nWhich color does the shape have?\nA. red\nB. blue\n"
    "Answer with the option's letter from the given choices directly.",
    ("scienceqa", "lmms_eval"): "Context: One shape is drawn.\nWhich color does the shape have?\nA. red\nB. blue\n"
    "Answer with the option's letter from the given choices directly.",
    ("vqav2", "llava"): "What color is the shape?\nAnswer the question using a single word or phrase.",
    ("vqav2", "lmms_eval"): "What color is the shape?\nAnswer the question using a single word or phrase.",
    ("textvqa", "llava"): "What color is the shape?\nReference OCR token: \nAnswer the question using a single word or phrase.",
    ("textvqa", "lmms_eval"): "What color is the shape?\nAnswer the question using a single word or phrase.",
    ("seed", "llava"): "What color is the shape?\nA. red\nB. blue\nC. green\nD. yellow\n"
    "Answer with the option's letter from the given choices directly.",
    ("seed", "lmms_eval"): "What color is the shape?\nA. red\nB. blue\nC. green\nD. yellow\n"
    "Answer with the option's letter from the given choices directly.",
    ("vizwiz", "llava"): "What color is this?\nWhen the provided information is insufficient, respond with 'Unanswerable'.\n"
    "Answer the question using a single word or phrase.",
    ("vizwiz", "lmms_eval"): "What color is this?\nWhen the provided information is insufficient, respond with 'Unanswerable'.\n"
    "Answer the question using a single word or phrase.",
}
TOKENS = {  # of an answer: llava, lmms_eval
    "gqa": (128, 16), "mmbench": (1024, 1024), "mmbench_cn": (1024, 256), "mme": (128, 16), "pope": (128, 128),
    "scienceqa": (1024, 16), "vqav2": (128, 16), "textvqa": (128, 1024), "seed": (128, 1024), "vizwiz": (128, 1024),
}  # fmt: skip


@pytest.mark.parametrize(("name", "protocol"), PROMPTS)
def test_prompts_byte_for_byte(fixtures: Path, name: str, protocol: str) -> None:
    bench = made.load(name, fixtures / name)
    assert bench.samples("test", None, protocol)[0].question == PROMPTS[name, protocol]
    assert bench.new_tokens(protocol) == TOKENS[name][protocol == "lmms_eval"]


def _right(sample: Sample) -> str:
    row = sample.row
    if "answers" in row:
        return max(row["answers"], key=row["answers"].count)
    return "ABCDE"[row["answer"]] if isinstance(row["answer"], int) else row["answer"]


def _graded(bench: TableBenchmark, protocol: str, wrong: int = 0) -> list[Graded]:
    found = []
    for number, sample in enumerate(bench.samples("test", None, protocol)):
        said = _right(sample)
        if wrong and number % wrong == 0:
            said = {"yes": "No", "no": "Yes"}.get(said.lower(), "?!")
        grade = bench.grade(sample, said, protocol)
        found.append(Graded(sample.group, sample.category, grade.credit, grade.parsed, grade.target))
    return found


MAIN = {
    "gqa": "accuracy", "mmbench": "circular_accuracy", "mmbench_cn": "circular_accuracy", "mme": "mme_perception",
    "pope": "f1_mean", "scienceqa": "accuracy", "vqav2": "soft_accuracy", "textvqa": "soft_accuracy", "seed": "seed_image",
    "vizwiz": "soft_accuracy",
}  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_right_answers_earn_everything(fixtures: Path, name: str) -> None:
    bench = made.load(name, fixtures / name)
    for protocol in bench.protocols:
        figures = bench.aggregate(_graded(bench, protocol))
        assert next(iter(figures)) == MAIN[name]
        most = 600 if name == "mme" else 100  # three categories of perception in the fixture
        assert figures[MAIN[name]] == pytest.approx(most)
        assert bench.aggregate(_graded(bench, protocol, wrong=2))[MAIN[name]] < most


@pytest.mark.parametrize("name", NAMES)
def test_figures_do_not_depend_on_order_shards_or_second_deliveries(fixtures: Path, tmp_path: Path, name: str) -> None:
    bench = made.load(name, fixtures / name)
    rows = _graded(bench, "llava", wrong=3)
    wanted = bench.aggregate(rows)
    mixed = list(rows)
    random.Random(0).shuffle(mixed)
    assert bench.aggregate(mixed) == pytest.approx(wanted)

    samples = bench.samples("test")
    grade_of = dict(zip((s.id for s in samples), rows, strict=True))
    shards = [[s for s in samples if hash_of(s.group) % 7 == shard] for shard in range(7)]
    delivered = [s for shard in shards for s in shard] + shards[0] + shards[3]
    once = {s.id: grade_of[s.id] for s in delivered}
    assert bench.aggregate(list(once.values())) == pytest.approx(wanted)

    records = made.rows(name)
    random.Random(1).shuffle(records)
    shuffled = made.write(tmp_path / "shuffled", name, records).samples("test")
    if name != "scienceqa":  # whose ids are places in the file
        assert {s.id: (s.group, s.question, s.category) for s in shuffled} == {
            s.id: (s.group, s.question, s.category) for s in samples
        }
    assert sorted((s.group, s.question) for s in shuffled) == sorted((s.group, s.question) for s in samples)


def hash_of(group: str) -> int:
    return sum(group.encode())


@pytest.mark.parametrize("name", NAMES)
def test_pictures_are_those_of_their_rows(fixtures: Path, name: str) -> None:
    bench = made.load(name, fixtures / name)
    by_image: dict[str, bytes] = {}
    for sample in reversed(bench.samples("test")):
        image = bench.image(sample)
        assert image.mode == "RGB"
        data = image.tobytes()
        assert by_image.setdefault(sample.image_id, data) == data, "one image_id, one picture"
        middle = image.getpixel((48, 48))
        named = [c for c, value in _fixtures.COLOURS.items() if value == middle]
        assert len(named) == 1
        if sample.question.startswith(("What color", "Which color", "图形")):
            right = _right(sample)
            said = sample.row.get(right) or sample.row.get(f"choice_{right.lower()}") or right
            if name == "scienceqa":
                said = sample.row["choices"][sample.row["answer"]] if sample.row["answer"] else named[0]
            assert said in (named[0], _fixtures.CHINESE[named[0]], "unanswerable"), "the picture of another row"
    assert len(set(by_image.values())) == len(by_image) or name == "mme"


@pytest.mark.parametrize("name", NAMES)
def test_limit_draws_whole_groups(fixtures: Path, name: str) -> None:
    bench = made.load(name, fixtures / name)
    full = bench.samples("test")
    some = bench.samples("test", 3)
    assert 3 <= len(some) < len(full) and [s for s in full if s in some] == some
    for group in {s.group for s in some}:
        assert [s for s in full if s.group == group] == [s for s in some if s.group == group]
    assert bench.samples(bench.splits[0], 3) == some


def test_drawing_is_by_hash_nested_and_blind_to_order() -> None:
    groups = [f"g{n % 50}" for n in range(400)]
    few, more = drawn(groups, 20), drawn(groups, 100)
    assert few < more and len(few) == 3 and drawn(sorted(groups), 20) == few


def test_revisions_name_the_benchmark_and_say_fixture(fixtures: Path) -> None:
    revisions = {name: made.load(name, fixtures / name).revision for name in NAMES}
    assert all(revision.startswith(f"{name}@fixture-") for name, revision in revisions.items())
    assert len(set(revisions.values())) == len(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_making_one_touches_no_data(name: str) -> None:
    bench = registry.load("benchmarks", f"{name}(folder='nowhere')")
    assert str(bench.spec) == name, "where the rows lie is no part of what is asked"
    assert bench.flags("llava") is not None
    with pytest.raises(ValueError, match=r"there is no folder .*nowhere"):
        bench.samples("test")


def test_flags_tell_where_a_published_number_is_on_other_data() -> None:
    flagged = {n for n in NAMES if "substitute" in registry.load("benchmarks", n).flags("llava")}
    assert flagged == {"mmbench", "mmbench_cn", "pope", "vqav2", "vizwiz"}
    assert registry.load("benchmarks", "vqav2").flags("lmms_eval") == ()


def test_the_evaluator_asks_them_like_any_other_and_refuses_other_data(fixtures: Path, tmp_path: Path) -> None:
    vlm = load("embedded")
    asked = Evaluation(benchmarks=(f"pope(folder={str(fixtures / 'pope')!r})",), limit=4, protocol="lmms_eval")
    (cell,) = cells(vlm, [Spec("unpruned")], [], asked)
    about, mine = evaluated(cell).questions, Evaluator(TransformersBackend(vlm))
    assert about.revision.startswith("pope@fixture-") and (about.protocol, about.split, about.limit) == ("lmms_eval", "test", 4)
    rows = mine.run(cell)
    samples = made.load("pope", fixtures / "pope").samples("test", 4, "lmms_eval")
    assert [(row.sample, row.question, row.error) for row in rows] == [(s.id, s.question, "") for s in samples]
    with pytest.raises(ValueError, match=r"the data of pope have changed: the cell asks for 'pope@older', found 'pope@fixture"):
        mine.run(replace(cell, subject=replace(evaluated(cell), questions=replace(about, revision="pope@older"))))


# --- switches and traps ----------------------------------------------------------------------------------------------


def test_switches(fixtures: Path) -> None:
    strict = made.load("pope", fixtures / "pope", rule="strict")
    sample = strict.samples("test")[0]
    assert (
        strict.grade(sample, "No way").parsed == "neither"
        and made.load("pope", fixtures / "pope").grade(sample, "No way").parsed == "no"
    )
    unread = made.load("vqav2", fixtures / "vqav2", mode="official_raw")
    number = next(s for s in unread.samples("test") if s.category == "number")
    assert unread.grade(number, "one").credit == 0 and unread.grade(number, "1").credit == 1
    assert made.load("textvqa", fixtures / "textvqa", ocr=False).samples("test")[-1].question.count("OCR") == 0
    assert (
        "token: SHAPE, GREEN\n"
        in made.load("textvqa", fixtures / "textvqa", ocr=True).samples("test", None, "lmms_eval")[-1].question
    )
    total = made.load("mme", fixtures / "mme", main="total")
    assert next(iter(total.aggregate(_graded(total, "llava")).items())) == ("mme_total", 800)
    plain = made.load("mmbench", fixtures / "mmbench", rule="tokens")
    assert plain.grade(plain.samples("test")[0], "The correct answer is **B**").parsed == ""
    for text, message in (
        ("pope(rule='strikt')", "did you mean 'strict'"), ("vqav2(mode='alway')", "did you mean 'always'"),
        ("mme(main='totl')", "did you mean 'total'"), ("mmbench(rule='statik')", "did you mean 'static'"),
        ("mmbench(edition='20230713')", "did you mean '20230712'"), ("textvqa(ocr='yes')", "ocr is 'yes'"),
        ("gqa(foldr='x')", "did you mean 'folder'"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            registry.load("benchmarks", text)


def test_the_papers_edition_of_mmbench_is_another_source() -> None:
    paper = registry.load("benchmarks", "mmbench(edition='20230712')")
    assert paper.source.repositories == ("lmms-lab-encoder/MMBench_EN", "lmms-lab/MMBench_EN")
    assert (paper.source.rows, paper.source.groups) == ({"dev": (4_377,)}, {"dev": (1_176,)})


def test_mmbench_rotations_hints_and_missing_options(fixtures: Path) -> None:
    bench = made.load("mmbench", fixtures / "mmbench")
    samples = {s.id: s for s in bench.samples("test", None, "lmms_eval")}
    assert {s.group for s in samples.values()} == {"0x4", "1x3", "2x2", "3x3"}
    assert samples["1000000"].question.split("\n")[1:3] == ["A. blue", "B. green"] and samples["1000000"].row["answer"] == "D"
    assert samples["1"].question.startswith("A shape is drawn. What color")
    assert "nan" not in samples["2"].question and "C." not in samples["2"].question
    assert bench.grade(samples["2"], "a banana").parsed != "C", "a missing option matches nothing"
    llava = {s.id: s.question for s in bench.samples("test")}
    assert llava["1"].startswith("A shape is drawn.\nWhat color") and llava["2"].count("\n") == 3


def test_a_lost_rotation_or_half_a_pair_is_refused_by_name_without_the_data(fixtures: Path) -> None:
    for name, message in (
        ("mmbench", "group '0x4' has 3 graded rotations where 4 belong"),
        ("mme", "'color/0000.png' of 'color' has 1"),
    ):
        rows = _graded(made.load(name, fixtures / name), "llava")
        with pytest.raises(ValueError, match=message):
            registry.load("benchmarks", name).aggregate(rows[1:])


def test_mme_two_blanks_and_stable_ids(fixtures: Path) -> None:
    samples = {s.id: s.question for s in made.load("mme", fixtures / "mme").samples("test", None, "lmms_eval")}
    assert samples["code_reasoning/0000.png#0"].startswith("Is there a blue shape in the image? \n")
    llava = {s.id: s.question for s in made.load("mme", fixtures / "mme").samples("test")}
    assert not any(" \n" in question or "Please" in question for question in llava.values())


def test_seed_leaves_videos_out_and_scienceqa_clusters_by_picture(fixtures: Path) -> None:
    seed = made.load("seed", fixtures / "seed").samples("test")
    assert len(seed) == 6 and {s.group for s in seed} == {"drawn_0", "drawn_1", "drawn_2"}
    science = made.load("scienceqa", fixtures / "scienceqa").samples("test")
    assert len(science) == 7 and len({s.group for s in science}) == 5
    assert science[-1].question.count("\nE. grey") == 1


def test_the_worth_of_a_constant_answer(fixtures: Path) -> None:
    assert made.load("pope", fixtures / "pope").constant("yes")["f1_mean"] == pytest.approx(200 / 3)
    vizwiz = made.load("vizwiz", fixtures / "vizwiz").constant("unanswerable")
    assert (vizwiz["soft_accuracy"], vizwiz["refusal_rate"]) == pytest.approx((40, 100))
