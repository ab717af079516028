"""Rows of a user's own data, read alike for training and evaluation: files, options, answers, pictures, columns."""

from __future__ import annotations

import base64
import csv
import io
import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from diffprune.core import registry
from diffprune.core.benchmark import Benchmark, Sample
from diffprune.data import catalog
from diffprune.data.sources import CALIBRATION, TRAIN, VALIDATION, BrokenRows, DrawIndex, TooManyBroken
from diffprune.io.image import open_image
from diffprune.io.listed_text import listed
from diffprune.io.text_rows import TextRows


def png(number: int) -> bytes:
    """A picture that says its number: the red channel of its pixels."""
    file = io.BytesIO()
    Image.new("RGB", (9, 9), (number, 7, 7)).save(file, "PNG")
    return file.getvalue()


def write_pictures(num: int, folder: str = ".") -> None:
    Path(folder).mkdir(parents=True, exist_ok=True)
    for i in range(num):
        Path(folder, f"{i}.png").write_bytes(png(i))


def write_jsonl(rows: list[Any], path: str = "rows.jsonl") -> str:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_json(rows: list[Any]) -> str:
    Path("rows.json").write_bytes(b"\xef\xbb\xbf" + json.dumps(rows).encode())
    return "rows.json"


def write_csv(rows: list[dict[str, Any]], path: str = "rows.csv", delimiter: str = ",") -> str:
    with Path(path).open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
        table.writeheader()
        table.writerows({k: json.dumps(v) if isinstance(v, list | dict) else v for k, v in row.items()} for row in rows)
    return path


def write_tsv(rows: list[dict[str, Any]]) -> str:
    return write_csv(rows, "rows.tsv", "\t")


def write_parquet(rows: list[Any]) -> str:
    pq.write_table(pa.Table.from_pylist(rows), "rows.parquet", row_group_size=4)
    return "rows.parquet"


WRITERS: list[Callable[[list[Any]], str]] = [write_jsonl, write_json, write_csv, write_tsv, write_parquet]
each_file = pytest.mark.parametrize("write", WRITERS, ids=lambda write: write.__name__.removeprefix("write_"))


def custom(path: str, **options: Any) -> Benchmark:
    said = ", ".join([repr(path), *(f"{k}={v!r}" for k, v in options.items())])
    found: Benchmark = registry.make("benchmarks", registry.spec("benchmarks", f"custom({said})"))
    return found


def questions(path: str, **options: Any) -> list[Sample]:
    return custom(path, **{"suffix": "", **options}).samples("test")


def trained_on(data: str) -> list[tuple[int, str, str]]:
    """(number of the picture, question, answer) of all usable rows of all streams."""
    source, found = catalog.source(data), set()
    for stream in (TRAIN, CALIBRATION, VALIDATION):
        for i in range(40):
            with suppress(TooManyBroken):  # the only row that is held out may be the broken one
                (image,), pairs = source.draw(DrawIndex(stream, i, 40), 9, BrokenRows(limit=0.9, drawn=2))
                found |= {(image.getpixel((0, 0))[0], question, answer) for question, answer in pairs}
    return sorted(found)


def both(path: str, **options: Any) -> list[tuple[str, str]]:
    """(question, first answer), which training and evaluation must agree on."""
    evaluated = [(s.question, s.row["answers"][0]) for s in questions(path, **options)]
    source = (
        f"{'parquet' if path.endswith('parquet') else 'jsonl'}({path!r}" + "".join(f", {k}={v!r}" for k, v in options.items()) + ")"
    )
    assert sorted(evaluated) == sorted((question, answer) for _, question, answer in trained_on(source))
    return evaluated


# --- options (line 1) ------------------------------------------------------------------------------------------------

SHOWN = "which?\nA. red\nB. blue"


def with_choices(*choices: Any) -> list[dict[str, Any]]:
    write_pictures(len(choices))
    return [{"image": f"{i}.png", "question": "which?", "choices": c, "answer": "A"} for i, c in enumerate(choices)]


@each_file
def test_the_keys_of_options_are_their_letters(write: Callable[[list[Any]], str]) -> None:
    path = write(with_choices(*[{"B": "blue", "A": "red", "C": None, "D": ""}] * 3))
    for sample in questions(path, grader="letter", options="choices"):
        assert (sample.question, sample.row["options"]) == (SHOWN, {"A": "red", "B": "blue"})
        found = custom(path, grader="letter", options="choices")
        assert [found.grade(sample, said).credit for said in ("A", "red", "B", "C")] == [1, 1, 0, 0]
    both(path, options="choices")


@each_file
def test_null_and_empty_options_do_not_exist(write: Callable[[list[Any]], str]) -> None:
    path = write(with_choices(["red", "blue", None, "", " "], ["red", None, "blue", None, None], ["red", "blue", "2", "4", "6"]))
    shown = [sample.row["options"] for sample in questions(path, grader="letter", options="choices")]
    assert shown[:2] == [{"A": "red", "B": "blue"}, {"A": "red", "C": "blue"}], "a letter is a place in the list"


def test_arrow_maps_structs_and_dictionaries_hold_options() -> None:
    write_pictures(3)
    columns = {
        "image": [f"{i}.png" for i in range(3)],
        "question": ["which?"] * 3,
        "answer": pa.array(["A"] * 3).dictionary_encode(),
    }
    for choices in (
        pa.array([[("B", "blue"), ("A", "red")]] * 3, pa.map_(pa.string(), pa.string())),
        pa.array([{"B": "blue", "A": "red", "C": None}] * 3),
        pa.array([{"label": ["B", "A"], "text": ["blue", "red"]}] * 3),
        pa.array([[{"label": "B", "text": "blue"}, {"label": "A", "text": "red"}]] * 3),
    ):
        pq.write_table(pa.table({**columns, "choices": choices}), "rows.parquet")
        assert [s.question for s in questions("rows.parquet", grader="letter", options="choices")] == [SHOWN] * 3


@pytest.mark.parametrize("written", ["['red', 'blue']", '["red", "blue"]', "{'B': 'blue', 'A': 'red'}", "('red', 'blue', None)"])
def test_text_that_holds_a_list_is_read_as_one(written: str) -> None:
    path = write_jsonl(with_choices(*[written] * 3))
    assert [s.question for s in questions(path, grader="letter", options="choices")] == [SHOWN] * 3


@pytest.mark.parametrize(
    ("choices", "sentence"),
    [
        ("red or blue", r"column 'choices' is 'red or blue'; a list of options, or options by letter, is needed"),
        ("['red' 'blue']", r"column 'choices' is \"\['red' 'blue'\]\"; a list of options"),
        (["red"], r"column 'choices' has 1 options; two at least are needed"),
        (["red", None], r"column 'choices' has 1 options"),
        (None, r"column 'choices' is None; a list"),
        ({"1": "red", "2": "blue"}, r"column 'choices' names an option 1; its keys must be different letters, A, B"),
        ({"a": "red", "A": "blue"}, r"names an option A; its keys must be different letters"),
        (["a", "b", "c", "d", "e", "f"], r"there is an option F; the published rules know A, B, C, D, E"),
        *(
            ({"label": labels, "text": ["red", "blue"]}, r"names an option label; its keys must be different letters")
            for labels in (None, 1, "AB", ["A"])
        ),
    ],
)
def test_other_options_are_refused_with_row_and_column(choices: Any, sentence: str) -> None:
    path = write_jsonl(with_choices(["red", "blue"], choices))
    with pytest.raises(ValueError, match=rf"rows.jsonl line 2: .*{sentence}"):
        questions(path, grader="letter", options="choices")


# --- rows of text files (line 2) -------------------------------------------------------------------------------------

ODD = [
    "a\x85b",
    "a\u2028b",
    "a\u2029b",
    "a\x0bb",
    "a\x0cb",
    "a\x1cb",
    'a 12" screen',
    "x\ry",
    "two\nlines",
    'said "no"',
    "ü, é",
    "",
]


@pytest.mark.parametrize("ending", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_text_tables_have_the_rows_that_csv_gives(ending: str, mark: bytes) -> None:
    file = io.StringIO()
    csv.writer(file, lineterminator=ending, quoting=csv.QUOTE_ALL).writerows(
        [["image", "answer"], *([f"{i}.png", text] for i, text in enumerate(ODD))]
    )
    content = file.getvalue() + f'12.png,a 12" screen{ending}13.png,a 13" screen{ending}{ending}14.png,last'
    Path("rows.csv").write_bytes(mark + content.encode())
    with Path("rows.csv").open(newline="", encoding="utf-8-sig") as stream:
        wanted = [row for row in csv.reader(stream) if row][1:]
    rows = TextRows(Path("rows.csv"))
    assert len(wanted) == len(ODD) + 3 and [list(rows.row(i).values()) for i in range(len(rows))] == wanted  # type: ignore[union-attr]
    assert [list(row.values()) for row in rows.scan()] == wanted  # type: ignore[union-attr]


def test_a_quotation_that_never_ends_costs_its_own_line_only() -> None:
    write_pictures(6)
    lines = ["image,question,answer", "0.png,q,a0", '1.png,q,"open', "2.png,q,a2", '3.png,q,"a, 3"', "4.png,q", "5.png,q,a5"]
    Path("rows.csv").write_text("\n".join(lines) + "\n")
    assert [found[0] for found in trained_on("jsonl('rows.csv')")] == [0, 2, 3, 5]
    for drop, sentence in ((None, "line 3 is no record of separated values"), (2, "line 5 has another number of values")):
        Path("rows.csv").write_text("\n".join(line for i, line in enumerate(lines) if i != drop) + "\n")
        with pytest.raises(ValueError, match=sentence):
            questions("rows.csv")


def test_a_long_cell_and_a_picture_that_points_to_another_row() -> None:
    data = base64.b64encode(np.random.default_rng(0).bytes(200_000)).decode()
    rows = [
        {"index": 7, "image": data, "answer": "a"},
        {"index": 8, "image": "7", "answer": "7"},
        {"index": 9, "image": "5", "answer": "b"},
    ]
    read = TextRows(Path(write_tsv(rows)), "image")
    assert read.row(0)["image"] == read.row(1)["image"] == data and read.row(1)["answer"] == "7"
    with pytest.raises(ValueError, match=r"rows.tsv line 4: 'image' is 5, but no row of this index has a picture"):
        read.row(2)


# --- what a file may be (line 10) ------------------------------------------------------------------------------------


def test_an_array_with_a_mark_is_an_array() -> None:
    write_pictures(3)
    assert len(both(write_json([{"image": f"{i}.png", "question": "q", "answer": f"a{i}"} for i in range(3)]))) == 3


@pytest.mark.parametrize("name", ["rows.csv", "rows.jsonl", "rows.tsv", "rows.json"])
@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le"])
def test_utf_16_is_told_from_utf_8(name: str, encoding: str) -> None:
    Path(name).write_bytes("image,question,answer\n0.png,q,a\n".encode(encoding))
    for read in (lambda: questions(name), lambda: trained_on(f"jsonl({name!r})")):
        with pytest.raises(ValueError, match=rf"{name} is not UTF-8 but, it seems, UTF-16 or binary; save it as UTF-8"):
            read()


def test_hidden_files_are_no_data() -> None:
    rows = [{"image": {"bytes": png(i), "path": None}, "question": "q", "answer": f"a{i}"} for i in range(3)]
    Path("own/.ipynb_checkpoints").mkdir(parents=True)
    Path("own/__MACOSX").mkdir()
    for place in ("own/a.parquet", "own/.ipynb_checkpoints/a-checkpoint.parquet"):
        Path(write_parquet(rows)).rename(place)
    for place in ("own/._a.parquet", "own/__MACOSX/b.parquet", "own/.a.tsv"):
        Path(place).write_bytes(b"\0\5\x16\7")
    Path("own/dataset_info.json").write_text("{}")
    assert len(questions("own")) == 3 and len(trained_on("parquet('own')")) == 3


def test_rows_behind_links_to_folders_are_rows_and_a_link_upwards_is_no_circle() -> None:
    write_pictures(3, "elsewhere/shard")
    write_jsonl([{"image": f"{i}.png", "question": "q", "answer": f"b{i}"} for i in range(3)], "elsewhere/shard/rows.jsonl")
    write_pictures(3, "own/first")
    write_jsonl([{"image": f"{i}.png", "question": "q", "answer": f"a{i}"} for i in range(3)], "own/first/rows.jsonl")
    Path("own/second").symlink_to(Path("elsewhere/shard").resolve())
    for up in ("own/first/up", "elsewhere/shard/up"):
        Path(up).symlink_to(Path("own").resolve())
    assert [sample.row["answers"] for sample in questions("own")] == [[f"{shard}{i}"] for shard in "ab" for i in range(3)]


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("ending", [b"\n", b"\r\n"])
def test_a_json_file_of_a_folder_may_have_a_row_a_line(mark: bytes, ending: bytes) -> None:
    """As `Dataset.to_json` writes it; one object is a description, in one line or in several."""
    write_pictures(2, "own")
    rows = [json.dumps({"image": f"{i}.png", "question": "q", "answer": f"a{i}"}).encode() for i in range(2)]
    Path("own/test.json").write_bytes(mark + ending.join(rows))
    Path("own/info.json").write_text('{"name": "own"}\n')
    Path("own/more.json").write_text(json.dumps({"features": {"image": {}}}, indent=1))
    Path("own/calibration.jsonl").write_bytes(rows[0])
    assert custom("own").splits == ("test", "calibration")
    assert [sample.row["answers"] for sample in questions("own")] == [["a0"], ["a1"]]


def test_a_file_of_which_no_row_can_be_read_says_why() -> None:
    Path("rows.jsonl").write_text(json.dumps({"image": "0.png", "question": "q", "answer": "é"}, ensure_ascii=False), "latin-1")
    with pytest.raises(ValueError, match=r"no row can be read: .*rows.jsonl line 1 is not UTF-8"):
        trained_on("jsonl('rows.jsonl')")
    Path("rows.csv").write_text("image;question;answer\n0.png;q;a\n")
    with pytest.raises(ValueError, match=r"rows.csv: column 'image' is missing; it has image;question;answer"):
        trained_on("jsonl('rows.csv')")


def test_something_behind_an_array_is_refused() -> None:
    Path("rows.jsonl").write_text('[{"image": "0.png", "answer": "a"}]\n{"image": "1.png", "answer": "b"}\n')
    with pytest.raises(ValueError, match="goes on after its array"):
        questions("rows.jsonl")


@each_file
def test_integers_that_pandas_made_floats_are_integers(write: Callable[[list[Any]], str]) -> None:
    write_pictures(4)
    path = write([{"image": f"{i}.png", "question": "how many?", "answer": float(i), "id": float(10 + i)} for i in range(4)])
    assert both(path) == [("how many?", str(i)) for i in range(4)]
    assert [sample.id for sample in questions(path)] == ["10", "11", "12", "13"]


def test_a_version_number_in_csv_stays_what_it_is() -> None:
    write_pictures(3)
    path = write_csv(
        [{"image": f"{i}.png", "question": "which version?", "answer": a} for i, a in enumerate(("2.0", "2.1", "3.0"))]
    )
    assert [answer for _, answer in both(path)] == ["2.0", "2.1", "3.0"]


# --- a picture (line 9) ----------------------------------------------------------------------------------------------


def pictured(i: int) -> list[Any]:
    """Every way in which a row may hold picture `i`."""
    encoded = base64.b64encode(png(i)).decode()
    uri = f"data:image/png;base64,{encoded}"
    return [
        f"{i}.png",
        f"./{i}.png",
        {"path": f"{i}.png"},
        [f"{i}.png"],
        f'["{i}.png"]',
        [{"path": f"{i}.png"}],
        encoded,
        uri,
        {"bytes": encoded},
    ]


@pytest.mark.parametrize("way", range(9))
@pytest.mark.parametrize("write", [write_jsonl, write_json])
def test_every_way_to_hold_a_picture_is_the_same_for_all(way: int, write: Callable[[list[Any]], str]) -> None:
    write_pictures(4)
    path = write([{"image": pictured(i)[way], "question": f"q{i}", "answer": "a"} for i in range(4)])
    assert [(image, question) for image, question, _ in trained_on(f"jsonl({path!r})")] == [(i, f"q{i}") for i in range(4)]
    found = custom(path)
    assert [found.image(sample).getpixel((0, 0))[0] for sample in found.samples("test")] == [0, 1, 2, 3]


def test_open_image_takes_what_a_row_holds() -> None:
    write_pictures(4)
    assert {open_image(way).getpixel((0, 0))[0] for way in pictured(3)} == {3}


@pytest.mark.parametrize(
    ("picture", "sentence"),
    [
        ("A" * 400_001, r"400,001 letters is neither a path nor base64"),
        ("%" * 400_000, r"400,000 letters is neither a path nor base64"),
        ("data:image/png;base64,iVBOR", r"neither a path nor base64"),
        ("https://example.org/cat.png", r"is an address; download it"),
        ("0" * 4000, r"there is no picture"),
        (["0.png"] * 65, r"has 65 pictures; a question is about 64 at most"),
        (7, r"a picture is int; a path"),
    ],
)
def test_what_is_no_picture_is_told_shortly(picture: Any, sentence: str) -> None:
    write_pictures(3)
    path = write_jsonl([{"image": p, "question": "q", "answer": "a"} for p in ("0.png", picture, "1.png", "2.png")])
    with pytest.raises(ValueError, match=rf"rows.jsonl line 2.*{sentence}") as told:
        questions(path)
    assert len(str(told.value)) < 600
    assert [image for image, *_ in trained_on(f"jsonl({path!r})")] == [0, 1, 2], "training leaves the row out"


# --- texts (lines 7, 8, F) -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("column", ["question", "answer", "id", "group", "category"])
def test_half_a_character_is_refused_beforehand(column: str) -> None:
    write_pictures(4)
    rows = [
        {"image": f"{i}.png", "question": "q", "answer": f"a{i}", "id": f"i{i}", "group": f"g{i}", "category": "c"}
        for i in range(4)
    ]
    rows[1][column] = "a cat \ud83d"
    with pytest.raises(ValueError, match=rf"rows.jsonl line 2: column '{column}' holds half a character"):
        questions(write_jsonl(rows))
    if column in ("question", "answer"):
        assert [image for image, *_ in trained_on("jsonl('rows.jsonl')")] == [0, 2, 3]


@each_file
def test_numbers_truth_values_and_lists_are_read_alike(write: Callable[[list[Any]], str]) -> None:
    write_pictures(3)
    path = write([{"image": f"{i}.png", "question": f"q{i}", "answers": ["2", "2", "3"]} for i in range(3)])
    assert [sample.row["answers"] for sample in questions(path)] == [["2", "2", "3"]] * 3
    assert both(path) == [(f"q{i}", "2") for i in range(3)]


def test_training_takes_the_answer_of_most_annotators() -> None:
    write_pictures(3)
    answers: list[Any] = [["no", "yes", "yes"], [{"answer": "yes"}, {"answer": "no"}, {"answer": "yes"}], "['no', 'yes', 'yes']"]
    path = write_jsonl([{"image": f"{i}.png", "question": "q", "answers": a} for i, a in enumerate(answers)])
    assert [answer for *_, answer in trained_on(f"jsonl({path!r})")] == ["yes"] * 3
    assert [sorted(s.row["answers"]) for s in questions(path)] == [["no", "yes", "yes"]] * 3


def test_integers_and_truth_values_of_json_are_texts() -> None:
    write_pictures(4)
    path = write_jsonl([{"image": f"{i}.png", "question": f"q{i}", "answer": a} for i, a in enumerate((3, True, 0.5, False))])
    assert [answer for _, answer in both(path)] == ["3", "yes", "0.5", "no"]


def test_a_number_beyond_all_floats_is_its_digits() -> None:
    write_pictures(3)
    path = write_jsonl([{"image": f"{i}.png", "question": "q", "answer": 10**400 + i} for i in range(3)])
    assert [answer for _, answer in both(path)] == [f"1{'0' * 399}{i}" for i in range(3)]


def test_numbers_of_32_bits_are_what_was_written() -> None:
    write_pictures(4)
    said = [0.1, 2.0, 3.7, 1e-7]
    columns = {"image": [f"{i}.png" for i in range(4)], "question": list("abcd"), "answer": pa.array(said, pa.float32())}
    pq.write_table(pa.table(columns), "rows.parquet")
    assert both("rows.parquet") == list(zip("abcd", ("0.1", "2", "3.7", "1e-07"), strict=True))
    for of_list in (pa.list_, pa.large_list, lambda kind: pa.list_(kind, 1)):
        pq.write_table(pa.table({**columns, "answer": pa.array([[one] for one in said], of_list(pa.float32()))}), "rows.parquet")
        assert [answer for _, answer in both("rows.parquet")] == ["0.1", "2", "3.7", "1e-07"]


def test_a_parquet_file_with_two_columns_of_one_name_is_refused() -> None:
    columns = [["0.png"], ["q"], ["first"], ["second"]]
    pq.write_table(pa.table([pa.array(one) for one in columns], ["image", "question", "answer", "answer"]), "rows.parquet")
    for read in (lambda: questions("rows.parquet"), lambda: trained_on("parquet('rows.parquet')")):
        with pytest.raises(ValueError, match=r"rows.parquet has two columns 'answer'; give each a name of its own"):
            read()


def test_a_time_that_is_none_is_told_in_a_sentence() -> None:
    columns = {"image": ["0.png"], "question": ["q"], "answer": pa.array([2**60], pa.timestamp("ms"))}
    pq.write_table(pa.table(columns), "rows.parquet")
    with pytest.raises(ValueError, match=r"rows.parquet holds a time that is none"):
        questions("rows.parquet")


def test_a_box_is_one_answer() -> None:
    write_pictures(3)
    path = write_jsonl([{"image": f"{i}.png", "question": "where?", "answer": "[0.1, 0.2, 0.3, 0.4]"} for i in range(3)])
    assert [answer for _, answer in both(path)] == ["[0.1, 0.2, 0.3, 0.4]"] * 3


def test_conversations_are_questions_of_an_evaluation_too() -> None:
    write_pictures(3)
    turns = [("human", "<image>\nWhat?"), ("gpt", "a cat"), ("human", "Where?"), ("gpt", "here")]
    path = write_jsonl([{"image": f"{i}.png", "conversations": [{"from": f, "value": v} for f, v in turns]} for i in range(3)])
    assert both(path) == [("What?", "a cat"), ("Where?", "here")] * 3
    assert [sample.id for sample in questions(path)][:3] == ["0.0", "0.1", "1.0"]


@pytest.mark.parametrize(
    ("asked", "question"),
    [
        ("<image>\nWhat?", "What?"),
        ("What?\n<image>", "What?"),
        ("<image> What does <image> mean?", "What does <image> mean?"),
        ("What does <image> mean?", "What does <image> mean?"),
    ],
)
def test_one_mark_for_the_picture_is_taken_out(asked: str, question: str) -> None:
    write_pictures(3)
    path = write_jsonl([{"image": f"{i}.png", "question": asked, "answer": "a"} for i in range(3)])
    assert {found for found, _ in both(path)} == {question}


# --- columns (line D) ------------------------------------------------------------------------------------------------


@each_file
def test_a_misspelt_question_column_is_refused_with_the_nearest(write: Callable[[list[Any]], str]) -> None:
    write_pictures(4)
    path = write([{"image": f"{i}.png", "qestion": f"q{i}", "answer": "a"} for i in range(4)])
    source = "parquet" if path.endswith("parquet") else "jsonl"
    sentence = (
        r"rows.*: column 'question' is missing; it has image, qestion, answer: did you mean 'qestion'\?.*name yours with question="
    )
    for data in (f"{source}({path!r})", f"{source}({path!r}, answer='answer')"):
        with pytest.raises(ValueError, match=sentence):
            trained_on(data)
    with pytest.raises(ValueError, match=sentence):
        questions(path)
    with pytest.raises(ValueError, match=r"column 'qestoin' is missing; .* did you mean 'qestion'"):
        trained_on(f"{source}({path!r}, question='qestoin')")
    assert {question for _, question, _ in trained_on(f"{source}({path!r}, question='qestion')")} == {f"q{i}" for i in range(4)}


def test_captions_are_asked_for_by_name() -> None:
    write_pictures(4)
    path = write_jsonl([{"image": f"{i}.png", "says": f"a{i}"} for i in range(4)])
    with pytest.raises(ValueError, match=r"of captions say what is asked, as prompt='Describe the image.'"):
        trained_on(f"jsonl({path!r}, answer='says')")
    assert {q for _, q, _ in trained_on(f"jsonl({path!r}, answer='says', prompt='What is it?')")} == {"What is it?"}
    path = write_jsonl([{"image": f"{i}.png", "caption": f"a{i}"} for i in range(4)])
    assert {q for _, q, _ in trained_on(f"jsonl({path!r})")} == {"Describe the image."}
    path = write_jsonl([{"image": f"{i}.png", "Question": "q", "caption": f"a{i}"} for i in range(4)])
    with pytest.raises(ValueError, match="did you mean 'Question'"):
        trained_on(f"jsonl({path!r})")


@pytest.mark.parametrize("other", ["label", "ground_truth", "Answr", "user-query", "text"])
def test_captions_beside_a_question_or_an_answer_are_refused_unless_they_are_named(other: str) -> None:
    write_pictures(4)
    caption = "caption" if other == "text" else "text"
    path = write_jsonl([{"image": f"{i}.png", caption: "what is it?", other: f"a{i}"} for i in range(4)])
    sentence = rf"column '{caption}' would be read as captions or answers, and column '{other}' not at all; name "
    with pytest.raises(ValueError, match=sentence):
        trained_on(f"jsonl({path!r})")
    asked = trained_on(f"jsonl({path!r}, question={caption!r}, answer={other!r})")
    assert {(q, a) for _, q, a in asked} >= {("what is it?", a) for _, _, a in asked}
    assert {q for _, q, _ in trained_on(f"jsonl({path!r}, answer={caption!r})")} == {"Describe the image."}
    asked_too = write_jsonl([{"image": f"{i}.png", "question": "q", caption: "b", other: "a"} for i in range(4)], "asked.jsonl")
    with pytest.raises(ValueError, match=sentence):
        trained_on(f"jsonl({asked_too!r})")
    if other == "label":
        with pytest.raises(ValueError, match=r"column 'answer' .* is missing"):
            trained_on(f"jsonl({path!r}, question='text')")


def test_facts_of_a_picture_may_stand_beside_its_caption() -> None:
    write_pictures(4)
    path = write_jsonl([{"image": f"{i}.png", "caption": f"a{i}", "width": 9, "height": 9, "url": "x"} for i in range(4)])
    assert {q for _, q, _ in trained_on(f"jsonl({path!r})")} == {"Describe the image."}


def test_only_lists_are_read_as_lists() -> None:
    assert listed("[x") == "[x" and listed("[1, 2]") == [1, 2] and listed("['a' 'b']") == "['a' 'b']" and listed("('a')") == "('a')"
    assert listed("[" * 100_000 + "]" * 100_000) == "[" * 100_000 + "]" * 100_000
