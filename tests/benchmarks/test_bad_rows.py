"""What can be wrong with a folder of rows: one sentence that says what, and where."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import fixtures as made
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from diffprune.benchmarks import _fixtures

Records = list[dict[str, Any]]


def _set(number: int, **columns: Any) -> Callable[[Records], None]:
    return lambda records: records[number].update(columns)


def _drop(column: str) -> Callable[[Records], None]:
    return lambda records: [record.pop(column) for record in records] and None


def _lose(number: int) -> Callable[[Records], None]:
    return lambda records: records.__delitem__(number)


def _again(records: Records) -> None:
    records.append(dict(records[0]))


NINE = ["x"] * 9
BAD = [
    ("gqa", _drop("answer"), "column 'answer' is missing; it has id, imageId, question"),
    ("gqa", _set(3, answer=""), "row 3: column 'answer' is ''; it must hold the right answer"),
    ("gqa", _set(3, question=None), "row 3: column 'question' is empty"),
    ("gqa", _set(2, question="x" * 200_000), "row 2: column 'question' holds 200,000 characters"),
    ("gqa", _again, "gqa has 2 rows with the id '000000' in split 'testdev'"),
    ("gqa", _set(0, imageId="n99"), "image 'n99' of question '000000' is not in testdev_balanced_images"),
    ("mmbench", _set(1, index="x1"), "column 'index' is 'x1'; it must be a whole number"),
    ("mmbench", _set(1, split="test"), "row 1: column 'split' is 'test'; only dev has answers"),
    ("mmbench", _set(7, answer="D"), "row 7: column 'answer' is 'D', but there is no such option"),
    ("mmbench", _set(0, answer="F"), "row 0: column 'answer' is 'F'; it must hold one of A, B, C, D, E"),
    ("mmbench_cn", _drop("hint"), "column 'hint' is missing"),
    ("mme", _lose(3), "MME image 'color/0001.png' has 1 rows where a pair belongs"),
    ("mme", _set(0, category="ocr"), "row 0: column 'category' is 'ocr'; MME has existence"),
    ("mme", _set(0, answer="maybe"), "row 0: column 'answer' is 'maybe'; it must hold one of yes, no"),
    ("mme", lambda r: r[1].update(question=r[0]["question"]), "2 rows with the id 'color/0000.png#0'"),
    ("pope", _set(4, category="easy"), "row 4: column 'category' is 'easy'; POPE has adversarial, popular, random"),
    ("scienceqa", _set(2, answer=9), "row 2: column 'answer' is 9; it must number one of the 3 choices"),
    ("scienceqa", _set(2, choices=[]), "row 2: column 'choices' has 0 of them"),
    ("scienceqa", _set(2, image=None), "row 2: the picture is missing"),
    ("vqav2", _set(1, answers=[]), "row 1: column 'answers' has 0 answers where those of ten"),
    ("textvqa", _set(1, answers=NINE), "row 1: column 'answers' has 9 answers"),
    ("textvqa", _set(1, answers=None), "row 1: column 'answers' has 0 answers"),
    ("vizwiz", _set(1, answers=["x" * 10_000_000] + NINE), "row 1: column 'answers' holds 10,000,000 characters"),
    ("vizwiz", _drop("image"), "column 'image' is missing"),
    ("seed", _set(1, data_type="audio"), "row 1: column 'data_type' is 'audio'; it is image or video"),
    ("seed", _drop("choice_c"), "column 'choice_c' is missing"),
]


@pytest.mark.parametrize(("name", "spoil", "sentence"), BAD)
def test_bad_rows(tmp_path: Path, name: str, spoil: Callable[[Records], None], sentence: str) -> None:
    records = made.rows(name)
    spoil(records)
    if name == "mmbench" and any(isinstance(r["index"], str) for r in records):
        for record in records:
            record["index"] = str(record["index"])
    bench = made.write(tmp_path, name, records)
    with pytest.raises(ValueError) as caught:
        bench.samples("test")
    message = str(caught.value)
    assert sentence in message and "\n" not in message
    assert str(tmp_path) in message


@pytest.mark.parametrize("split", ["tests", "val", "train"])
def test_wrong_split_protocol_and_limit(fixtures: Path, split: str) -> None:
    bench = made.load("gqa", fixtures / "gqa")
    with pytest.raises(ValueError, match=rf"has no split '{split}': (did you mean|choose from)"):
        bench.samples(split)
    with pytest.raises(ValueError, match="no protocol 'lava': did you mean 'llava'"):
        bench.samples("test", None, "lava")
    with pytest.raises(ValueError, match="limit is 0"):
        bench.samples("test", 0)


@pytest.mark.parametrize("name", _fixtures.NAMES)
def test_an_answer_of_ten_megabytes_is_no_answer(fixtures: Path, name: str) -> None:
    bench = made.load(name, fixtures / name)
    sample = bench.samples("test", 1)[0]
    with pytest.raises(ValueError, match=r"a text of 10,000,000 characters is no answer of \d+ tokens"):
        bench.grade(sample, "yes " * 2_500_000)
    assert bench.grade(sample, "yes " * 200_000).credit in (0, 1)


def test_broken_and_missing_pictures_fail_late_with_their_row(tmp_path: Path) -> None:
    records = made.rows("vizwiz")
    records[1]["image"] = {"bytes": records[1]["image"]["bytes"][:60], "path": "cut.png"}
    records[2]["image"] = None
    records[3]["image"] = {"bytes": None, "path": "elsewhere.png"}
    samples = (bench := made.write(tmp_path, "vizwiz", records)).samples("test")
    for number, words in ((1, ""), (2, "is missing"), (3, "there is no image file")):
        with pytest.raises(
            ValueError, match=rf"{words}.*picture of vizwiz VizWiz_val_0000000{number}.jpg|picture of vizwiz.*{words}"
        ):
            bench.image(samples[number])
    assert bench.image(samples[4]).size == (96, 96)


def test_a_picture_of_a_video_row_is_refused(tmp_path: Path) -> None:
    records = made.rows("seed")
    records[0]["image"] = records[6]["image"]
    bench = made.write(tmp_path, "seed", records)
    with pytest.raises(ValueError, match="has 2 pictures where an image question has one"):
        bench.image(bench.samples("test")[0])


def test_text_that_is_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "data" / "val-00000-of-00001.parquet"
    bench = made.write(tmp_path, "vizwiz", made.rows("vizwiz"))
    table = pq.read_table(path)
    broken = pa.array([b"caf\xe9"] * len(table)).view(pa.string())
    pq.write_table(table.set_column(table.schema.get_field_index("question"), "question", broken), path)
    with pytest.raises(ValueError, match=r"val-00000-of-00001.parquet: column 'question' holds text that is not UTF-8"):
        bench.samples("test")
    (tmp_path / "tsv").mkdir()
    (tmp_path / "tsv" / "dev.tsv").write_bytes("index\tquestion\n1\tcafé\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"dev.tsv is not UTF-8 \(unexpected end of data\)"):
        made.load("mmbench", tmp_path / "tsv").samples("test")


def test_cut_files_and_missing_shards(tmp_path: Path) -> None:
    folder = _fixtures.write(tmp_path, "gqa")
    second = folder / "testdev_balanced_instructions" / "testdev-00001-of-00002.parquet"
    data = second.read_bytes()
    second.write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=r"testdev-00001-of-00002.parquet is not a complete Parquet file"):
        made.load("gqa", folder).samples("test")
    second.unlink()
    with pytest.raises(ValueError, match=r"testdev-00001-of-00002.parquet is missing: 00002 files make up this split"):
        made.load("gqa", folder).samples("test")
    with pytest.raises(ValueError, match="has no file of configuration 'default', split 'test'; wanted is one of default/test-"):
        made.load("pope", folder).samples("test")
