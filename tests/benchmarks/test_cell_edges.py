"""Cells of published rows as pandas, hand-made copies and damaged files have them: read rightly, or refused by name."""

from __future__ import annotations

import importlib
import json
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import fixtures as made
import pandas as pd
import pytest

from diffprune.benchmarks import _fixtures
from diffprune.core import registry
from diffprune.io import dataset_manifest, dataset_splits

NAMES = _fixtures.NAMES
HOSTILE: list[Any] = [
    None, float("nan"), float("inf"), "", "x", "B", 1.5, -1, 10**30, True, b"x", [], ["x"], [None], [1], [[]], [{}], {}, {"a": 1},
    [None] * 10, "0123456789", "['a', 'b']", [{"confidence": "yes"}] * 10,
]  # fmt: skip


@cache
def _row(name: str) -> dict[str, Any]:
    """A whole row of the published schema."""
    return dict(made.rows(name)[0]) | dict(importlib.import_module(f"diffprune.benchmarks.{name}").EXAMPLES[0].row)


def _said(name: str, row: dict[str, Any]) -> list[Any]:
    """What is asked, told apart and graded by a row."""
    bench = registry.load("benchmarks", name)
    found = bench.tidy(dict(row))
    prompts = [bench.prompt(found, protocol) for protocol in bench.protocols]
    return [*prompts, bench.identity(found, 0), *(bench.credit(found, "B", protocol) for protocol in bench.protocols)]


@pytest.mark.parametrize("name", NAMES)
def test_a_cell_is_read_or_refused_in_a_sentence_that_names_its_column(name: str) -> None:
    source = registry.load("benchmarks", name).source
    for column in (*source.columns, *source.optional):
        for value in HOSTILE:
            try:
                found = _said(name, _row(name) | {column: value})
            except ValueError as error:
                gone = "but there is no such option" if name.startswith("mmbench") else f"column {column!r}"
                assert f"column {column!r}" in str(error) or gone in str(error), (column, value, error)
                assert "\n" not in str(error) and len(str(error)) < 400
            else:
                assert not {"None", "nan"} & set("\n".join(found[:2]).replace(". ", "\n").split("\n")), (column, value, found)


REFUSED = [
    ("textvqa", "ocr_tokens", ["DAKOTA", None], "column 'ocr_tokens' holds None at place 1; each of the list must be a text"),
    ("textvqa", "ocr_tokens", "DAKOTA", "column 'ocr_tokens' is 'DAKOTA'; it must hold a list"),
    ("textvqa", "question_id", None, "column 'question_id' is None; it must be a whole number"),
    ("textvqa", "answers", "0123456789", "column 'answers' is '0123456789'; it must hold a list"),
    ("vqav2", "answers", [{"confidence": "yes"}] * 10, "column 'answers' is empty; it must hold text"),
    ("vqav2", "image_id", "COCO_1", "column 'image_id' is 'COCO_1'; it must be a whole number"),
    ("scienceqa", "answer", "B", "column 'answer' is 'B'; it must number one of the 2 choices, from 0"),
    ("scienceqa", "answer", 0.5, "column 'answer' is 0.5; it must number one of the 2 choices, from 0"),
    ("scienceqa", "answer", True, "column 'answer' is True; it must number one of the 2 choices, from 0"),
    ("scienceqa", "choices", ["Maine", None], "column 'choices' holds None at place 1"),
    ("scienceqa", "choices", "['a']", "column 'choices' is \"['a']\"; it must hold a list"),
    ("scienceqa", "hint", 3, "column 'hint' is 3; it must hold text"),
    ("seed", "choice_c", None, "column 'choice_c' is empty; it must hold text"),
    ("gqa", "id", None, "column 'id' is None; it must hold a text or a whole number"),
    ("mmbench", "index", "1_0", "column 'index' is '1_0'; it must be a whole number"),
    ("mmbench", "A", ["red"], "column 'A' is ['red']; it must hold text"),
    ("mmbench", "hint", 4.0, "column 'hint' is 4.0; it must hold text"),
]


@pytest.mark.parametrize(("name", "column", "value", "sentence"), REFUSED)
def test_what_cannot_be_meant_is_refused(name: str, column: str, value: Any, sentence: str) -> None:
    with pytest.raises(ValueError) as caught:
        _said(name, _row(name) | {column: value})
    assert sentence in str(caught.value)


WHOLE = [
    ("gqa", "id", 7), ("gqa", "imageId", 7), ("mmbench", "index", 7), ("mmbench", "A", 7), ("mmbench_cn", "index", 7),
    ("mme", "question_id", 7), ("pope", "question_id", 7), ("scienceqa", "answer", 1), ("vqav2", "question_id", 7),
    ("vqav2", "image_id", 7), ("textvqa", "question_id", 7), ("textvqa", "image_id", 7), ("seed", "question_id", 7),
    ("seed", "data_id", 7), ("seed", "question_type_id", 7), ("seed", "choice_b", 7),
]  # fmt: skip


@pytest.mark.parametrize(("name", "column", "value"), WHOLE)
def test_whole_numbers_that_pandas_made_floats_are_whole(name: str, column: str, value: int) -> None:
    whole = _said(name, _row(name) | {column: value})
    assert _said(name, _row(name) | {column: float(value)}) == whole
    if not column.startswith(("choice_", "A")):  # the text of an option is shown as it is
        assert _said(name, _row(name) | {column: f"{value}.0"}) == whole == _said(name, _row(name) | {column: str(value)})


def test_questions_find_their_pictures_where_one_side_has_floats(tmp_path: Path) -> None:
    numbers = {image: n for n, image in enumerate(dict.fromkeys(row["imageId"] for row in made.rows("gqa")))}
    tables = _fixtures.tables("gqa")
    for path, rows in tables.items():
        for row in rows:
            row["imageId" if "imageId" in row else "id"] = (
                float(numbers[row["imageId"]]) if "imageId" in row else numbers[row["id"]]
            )
        _fixtures.dataset_rows.write_parquet(tmp_path / path, rows)
    samples = made.load("gqa", tmp_path).samples("test")
    assert {sample.image_id for sample in samples} == {str(n) for n in numbers.values()}


def test_rotations_find_their_picture_where_pandas_made_the_index_a_float(tmp_path: Path) -> None:
    made.tsv(tmp_path / "a" / "dev.tsv", made.rows("mmbench"))
    frame = pd.read_csv(tmp_path / "a" / "dev.tsv", sep="\t", keep_default_na=False)
    frame["index"] = frame["index"].astype(float)
    (tmp_path / "b").mkdir()
    frame.to_csv(tmp_path / "b" / "dev.tsv", sep="\t", index=False, encoding="utf-8-sig")  # with the BOM that Excel writes, too
    benches = [made.load("mmbench", tmp_path / folder) for folder in "ab"]
    for one, two in zip(*(bench.samples("test") for bench in benches), strict=True):
        assert (one.id, one.group, one.question) == (two.id, two.group, two.question)
        assert benches[0].image(one).tobytes() == benches[1].image(two).tobytes()


def test_hidden_files_are_no_data(tmp_path: Path) -> None:
    made.tsv(tmp_path / "mmbench" / "dev.tsv", made.rows("mmbench"))
    wanted = made.load("mmbench", tmp_path / "mmbench").samples("test")
    (tmp_path / "mmbench" / "._dev.tsv").write_bytes(b"\x00\x05\x16\x07Mac OS X")
    assert made.load("mmbench", tmp_path / "mmbench").samples("test") == wanted

    folder = _fixtures.write(tmp_path, "vizwiz")
    (file,) = folder.rglob("*.parquet")
    (folder / "README.md").write_text(
        "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: val\n    path: '**/*.parquet'\n---\n"
    )
    copy = file.rename(folder / "all.parquet")
    for stray in (
        folder / "data/._all.parquet",
        folder / ".ipynb_checkpoints/all-checkpoint.parquet",
        folder / "__MACOSX/all.parquet",
    ):
        stray.parent.mkdir(exist_ok=True)
        shutil.copy(copy, stray)
    assert dataset_splits.split_files(folder, "default", "val") == [copy]


@pytest.mark.parametrize(
    "readme",
    [
        b"---\nconfigs: [\n---\n",
        b"---\nauthor: Ren\xe9\n---\n",
        b"---\n- a list\n---\n",
        b"---\nconfigs: [default]\n---\n",
        b"---\nconfigs:\n- data_files: 3\n---\n",
        b"---\nconfigs:\n- data_files:\n  - {split: val, path: 3}\n  - {split: val, path: [3, '', 'a**b', '../up', '/']}\n---\n",
    ],
)
def test_a_readme_that_is_no_card_says_nothing(readme: bytes, tmp_path: Path) -> None:
    """Whoever copies rows into a folder of his own may have a README of his own beside them."""
    folder = _fixtures.write(tmp_path, "vizwiz")
    (file,) = folder.rglob("*.parquet")
    (folder / "README.md").write_bytes(readme)
    assert dataset_splits.split_files(folder, "default", "val") == [file]


@pytest.mark.parametrize(
    "changed",
    [{"commit": None}, {"repository": 1}, {"splits": []}, {"splits": {"default/val": {}}}, {"splits": {"default/val": "x"}}],
)
def test_a_manifest_of_other_types_is_refused(changed: dict[str, Any], tmp_path: Path) -> None:
    folder = _fixtures.write(tmp_path, "vizwiz")
    place = folder / dataset_manifest.MANIFEST
    place.write_text(json.dumps({"repository": "lmms-lab/VizWiz-VQA", "commit": "c" * 40, "splits": {}} | changed))
    with pytest.raises(ValueError, match=r"diffprune.json is no manifest of ours \("):
        made.load("vizwiz", folder).samples("val")
