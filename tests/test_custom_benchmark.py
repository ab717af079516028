"""A benchmark of a user's own: each way to bring rows gives the same questions, rules are what they say, mistakes a sentence."""

from __future__ import annotations

import base64
import csv
import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from diffprune.benchmarks import custom
from diffprune.core import registry
from diffprune.core.benchmark import Graded, Sample
from diffprune.core.spec import Spec
from diffprune.evaluate.cells import Evaluation, cells
from diffprune.evaluate.evaluator import Evaluator
from diffprune.evaluate.transformers_backend import TransformersBackend
from diffprune.io import dataset_rows
from diffprune.vlm.load import load

COLOURS = {"red": (255, 0, 0), "blue": (0, 0, 255)}
QUESTIONS = [("what colour is it", "red"), ("is it a colour, and which", "red"), ("what colour is this", "blue")]


def png(colour: str) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (96, 96), COLOURS[colour]).save(file, "PNG")
    return file.getvalue()


def records() -> list[dict[str, Any]]:
    return [{"image": f"{c}.png", "question": q, "answers": [c, "that one"], "category": c[0]} for q, c in QUESTIONS]


def folder(path: Path, rows: list[dict[str, Any]] | None = None, name: str = "rows.jsonl") -> Path:
    """A folder with the pictures and JSON lines."""
    path.mkdir(parents=True, exist_ok=True)
    for colour in COLOURS:
        (path / f"{colour}.png").write_bytes(png(colour))
    lines = records() if rows is None else rows
    (path / name).write_text("".join(json.dumps(row) + "\n" for row in lines), encoding="utf-8")
    return path


def made(path: Path | str, **options: Any) -> custom.Custom:
    said = ", ".join([repr(str(path)), *(f"{k}={v!r}" for k, v in options.items())])
    return registry.load("benchmarks", f"custom({said})")


def as_jsonl() -> Path:
    return folder(Path("lines"))


def as_image_folder() -> Path:
    rows = [{"file_name" if k == "image" else k: v for k, v in row.items()} for row in records()]
    return folder(Path("imagefolder"), rows, "metadata.jsonl")


def as_csv() -> Path:
    path = folder(Path("commas"), [])
    (path / "rows.jsonl").unlink()
    with (path / "metadata.csv").open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.DictWriter(file, ["file_name", "question", "answers", "category"])
        writer.writeheader()
        for row in records():
            writer.writerow({"file_name": row.pop("image"), **row, "answers": json.dumps(row["answers"])})
    return path


def as_parquet_with_bytes() -> Path:
    path = Path("rows.parquet")
    dataset_rows.write_parquet(path, [r | {"image": {"bytes": png(r["image"][:-4]), "path": None}} for r in records()])
    return path


def as_parquet_with_paths() -> Path:
    path = folder(Path("beside"), [])
    (path / "rows.jsonl").unlink()
    dataset_rows.write_parquet(path / "test-00000-of-00001.parquet", records())
    return path


def as_tsv() -> Path:
    path = Path("rows.tsv")
    rows = [f"{base64.b64encode(png(c)).decode()}\t{q}\t{c}\t{c[0]}\n" for q, c in QUESTIONS]
    path.write_text("image\tquestion\tanswer\tcategory\n" + "".join(rows), encoding="utf-8")
    return path


WAYS = [as_jsonl, as_image_folder, as_csv, as_parquet_with_bytes, as_parquet_with_paths, as_tsv]


@pytest.mark.parametrize("bring", WAYS, ids=lambda way: way.__name__)
def test_every_way_to_bring_rows_gives_the_same_questions(bring) -> None:
    found = made(bring())
    samples = found.samples("test")
    asked = [q + "\nAnswer the question using a single word or phrase." for q, _ in QUESTIONS]
    assert [s.question for s in samples] == asked
    assert [s.id for s in samples] == ["0", "1", "2"] and [s.category for s in samples] == ["r", "r", "b"]
    assert samples[0].image_id == samples[1].image_id != samples[2].image_id, "equal pictures are encoded once"
    assert [s.group for s in samples] == [s.image_id for s in samples]
    for sample, (_, colour) in zip(samples, QUESTIONS, strict=True):
        assert found.image(sample).getpixel((4, 4)) == COLOURS[colour]
        assert found.grade(sample, f"{colour.title()}.").credit == 1 and found.grade(sample, "green").credit == 0
    assert {s.group for s in found.samples("test", 1)} in ({samples[0].group}, {samples[2].group}), "whole groups"
    assert found.revision == made(found.path).revision


@pytest.mark.parametrize(("grader", "row", "answer", "protocol", "credit"), custom.EXAMPLES)
def test_examples(grader: str, row: dict[str, Any], answer: str, protocol: str, credit: float) -> None:
    grade = made("nowhere", grader=grader).grade(Sample("0", "0", "0", "", dict(row)), answer, protocol)
    assert grade.credit == pytest.approx(credit)


def test_the_revision_follows_every_byte() -> None:
    path = as_jsonl()
    before = made(path).revision
    (path / "red.png").write_bytes(png("blue"))
    other_picture = made(path).revision
    (path / "rows.jsonl").write_text((path / "rows.jsonl").read_text().replace("that one", "this one"))
    assert len({before, other_picture, made(path).revision}) == 3


def test_names_of_columns_options_suffix_and_splits() -> None:
    rows = [
        {"pic": "red.png", "q": "which?", "gold": "B", "choices": ["blue", "red"], "key": "x", "scene": "one"},
        {"pic": "blue.png", "q": "which?", "gold": "A", "choices": ["blue", "red"], "key": "y", "scene": "one"},
    ]
    folder(Path("own/train"), rows[:1])
    folder(Path("own/validation"), rows)
    names = {"image": "pic", "question": "q", "answer": "gold", "options": "choices", "id": "key", "group": "scene"}
    found = made("own", grader="letter", **names)
    assert found.splits == ("validation", "train")
    one, two = found.samples("test")
    assert [s.id for s in found.samples("train")] == ["x"] and [one.id, two.id] == ["x", "y"] and one.group == two.group == "one"
    assert one.question == "which?\nA. blue\nB. red\nAnswer with the option's letter from the given choices directly."
    assert [found.grade(one, said).credit for said in ("B", "red", "(A)")] == [1, 1, 0]
    assert made("own", grader="letter", **names, suffix=" Say it.").samples("test")[0].question.endswith("B. red Say it.")
    assert found.new_tokens() == 128 and made("own", tokens=3).new_tokens() == 3
    with pytest.raises(ValueError, match=r"has no split 'trian': did you mean 'train'"):
        found.samples("trian")


def test_ten_annotators_share_the_credit_and_a_mixture_is_refused() -> None:
    rows = records()
    rows[0]["answers"] = ["red"] * 2 + ["crimson"] * 8
    with pytest.raises(ValueError, match=r"line 2 has 2 answers where other rows have ten annotators"):
        made(folder(Path("mixed"), rows), grader="vqa").samples("test")
    found = made(folder(Path("ten"), rows[:1]), grader="vqa")
    (sample,) = found.samples("test")
    assert found.grade(sample, "red").credit == pytest.approx((2 * 1 / 3 + 8 * 2 / 3) / 10)


def test_figures() -> None:
    rows = [Graded("a", "x", 1.0, "yes", "yes"), Graded("b", "y", 0.0, "yes", "no"), Graded("c", "y", 1.0, "no", "no")]
    assert made("x").aggregate(rows) == pytest.approx({"accuracy": 200 / 3, "accuracy/x": 100, "accuracy/y": 50})
    assert next(iter(made("x", grader="vqa").aggregate(rows))) == "soft_accuracy"
    found = made("x", grader="yes_no").aggregate(rows)
    assert next(iter(found)) == "accuracy" and found["precision"] == 50 and found["recall"] == 100


def test_a_function_of_the_users_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path / "code"
    home.mkdir()
    (home / "my_grades.py").write_text(
        "def half(answer, answers, row):\n    return 0.5 * (answer in answers) + (row['category'] == 'b') / 2\n"
        "def wild(answer, answers, row):\n    return 7\n"
    )
    monkeypatch.syspath_prepend(str(home))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    path = as_jsonl()
    found = made(path, grader="my_grades:half")
    red, _, blue = found.samples("test")
    assert red.question == QUESTIONS[0][0], "no instruction is added for a rule we do not know"
    assert [found.grade(red, "red").credit, found.grade(blue, "red").credit, found.grade(blue, "blue").credit] == [0.5, 0.5, 1.0]
    with pytest.raises(ValueError, match=r"answered 7: a credit from 0 to 1"):
        made(path, grader="my_grades:wild").grade(red, "x")
    with pytest.raises(ValueError, match=r"my_grades has no function 'hafl'"):
        made(path, grader="my_grades:hafl").grade(red, "x")
    with pytest.raises(ValueError, match=r"no_such_module cannot be imported"):
        made(path, grader="no_such_module:f").grade(red, "x")
    (path / "brought_along.py").write_text("def f(answer, answers, row):\n    return 1\n")
    monkeypatch.syspath_prepend(str(path.resolve()))
    with pytest.raises(ValueError, match=r"lies in the folder of the data"):
        made(path, grader="brought_along:f").grade(red, "x")


def broken(change: dict[str, Any], drop: tuple[str, ...] = ()) -> list[dict[str, Any]]:
    rows = records()
    rows[1] = {k: v for k, v in (rows[1] | change).items() if k not in drop}
    return rows


@pytest.mark.parametrize(
    ("rows", "options", "sentence"),
    [
        (broken({}, ("question",)), {}, r"rows.jsonl line 2: column 'question' is missing; it has image, answers, category"),
        (broken({}, ("image",)), {}, r"line 2: column 'image' is missing"),
        (broken({}, ("answers",)), {}, r"line 2: column 'answer' \(or 'answers'\) is missing; name yours with answer="),
        (records(), {"answer": "label"}, r"line 1: column 'label' is missing; it has image, question, answers, category"),
        (broken({"answers": []}), {}, r"line 2: column 'answers' has no answer"),
        (broken({"answers": [""]}), {}, r"line 2: column 'answers' has no answer"),
        (broken({"answers": None}), {}, r"line 2: column 'answers' has no answer"),
        (broken({"answers": ["x", {"a": 1}]}), {}, r"line 2: column 'answers' is {'a': 1}; it must hold text"),
        (broken({"answers": "x" * 10_000_000}), {}, r"line 2: column 'answers' holds 10,000,000 characters; at most 100,000"),
        (broken({"question": " "}), {}, r"line 2: column 'question' is empty; it must hold text"),
        (broken({"image": "green.png"}), {}, r"line 2: there is no picture .*lines.green.png"),
        (broken({"image": ""}), {}, r"line 2 has no picture"),
        ([r | {"id": "same"} for r in records()], {}, r"line 2 has the id 'same', which .*lines.rows.jsonl line 1 has already"),
        (records(), {"grader": "letter", "answer": "category"}, r"the answer r is not one of the letters A, B, C, D, E"),
        (records(), {"grader": "yes_no", "answer": "category"}, r"the answer r is neither yes nor no"),
        (
            records(),
            {"options": "category"},
            r"line 1: column 'category' is 'r'; a list of options, or options by letter",
        ),
        ([], {}, r"lines has no row in split 'test'"),
    ],
)
def test_wrong_rows_are_told_in_one_sentence(rows: list[dict[str, Any]], options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence) as told:
        made(folder(Path("lines"), rows), **options).samples("test")
    assert "\n" not in str(told.value) and len(str(told.value)) < 300


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("rows.jsonl", b'{"question": "caf\xe9"}\n', r"rows.jsonl line 1 is not UTF-8"),
        ("rows.jsonl", b"{question\n", r"rows.jsonl line 1 is not JSON"),
        ("rows.jsonl", b"[1]\n", r"rows.jsonl line 1 is int, not a mapping"),
        ("rows.jsonl", b'{"question": "a", "answer": "b", "answer": "c"}\n', r"rows.jsonl line 1 has 'answer' twice"),
        ("rows.csv", b"image,question,answer\na.png,caf\xe9,x\n", r"rows.csv line 2 is not UTF-8"),
        ("rows.csv", b"image,question,answer\na.png,x\n", r"rows.csv line 2 has another number of values"),
        ("rows.parquet", b"PAR1", r"rows.parquet is no Parquet file that can be read"),
        ("rows.txt", b"", r"holds no file with rows"),
    ],
)
def test_wrong_files_are_told_in_one_sentence(name: str, content: bytes, sentence: str) -> None:
    Path("data").mkdir()
    Path("data", name).write_bytes(content)
    with pytest.raises(ValueError, match=sentence):
        made("data").samples("test")


def test_wrong_settings_are_told_in_one_sentence() -> None:
    for spelling, sentence in {
        "custom('x', grader='vqua')": "did you mean 'vqa'",
        "custom('x', grader='my.module:1')": "write your own function as",
        "custom('x', quesiton='q')": "did you mean 'question'",
        "custom('x', tokens=0)": "at least 1",
        "custom()": "path",
    }.items():
        with pytest.raises(ValueError, match=sentence):
            registry.load("benchmarks", spelling)
    with pytest.raises(ValueError, match=r"there is no file or folder .*x"):
        made("x").samples("test")
    folder(Path("some/test"))
    folder(Path("some"))
    with pytest.raises(ValueError, match=r"other files tell their split, rows.jsonl does not"):
        made("some").samples("test")
    found = made("some/test")
    with pytest.raises(ValueError, match="did you mean 'llava'"):
        found.samples("test", None, "lava")
    with pytest.raises(ValueError, match="a text of 10,000,000 characters is no answer of 128 tokens"):
        found.grade(found.samples("test")[0], "x" * 10_000_000)


def test_from_the_command_lines_words_to_answers_with_a_broken_picture() -> None:
    """Answered on the embedded model: the row with the broken picture is an error, the others are as without it."""
    rows = [{"image": f"{c}.png", "question": "is there a circle", "answer": "no"} for c in COLOURS]
    path = folder(Path("mine"), rows)
    vlm, unpruned = load("embedded"), [Spec("unpruned")]
    mine = Evaluator(TransformersBackend(vlm))
    options = Evaluation(benchmarks=("custom('mine', grader='yes_no', suffix='', tokens=4)",))
    (cell,) = cells(vlm, unpruned, [], options)
    assert cell.columns().benchmark == "custom(grader='yes_no', suffix='', tokens=4)" and cell.benchmark_label == "mine"
    clean = mine.run(cell)
    assert {row.error for row in clean} == {""} and {row.parsed for row in clean} <= {"yes", "no"}
    (path / "blue.png").write_bytes(png("blue")[:40])
    with pytest.raises(ValueError, match=r"the data of custom.* have changed"):
        Evaluator(TransformersBackend(vlm)).run(cell)
    (cell,) = cells(vlm, unpruned, [], options)
    red, blue = mine.run(cell)
    assert red == clean[0]
    assert blue.error.startswith("ValueError: the picture of ") and "mine/rows.jsonl line 2" in blue.error
    assert (blue.answer, blue.parsed) == ("", "")
