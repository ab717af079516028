"""A million rows: what makes reports and grading fast may not change what they say. Counts and ratios here, no seconds."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pytest

from diffprune.benchmarks import _answers as answers
from diffprune.core.cell import Cell
from diffprune.core.records import TABLES, Answered, Credited, Prediction
from diffprune.report import report
from diffprune.report.analysis import records
from diffprune.store import Store, commits, parquet
from diffprune.store.columns import ORIGIN, columns
from tests.records import evaluate_cell, outcome, provenance
from tests.records import prediction as row


def cell(pruner: str = "diffprune", seed: int = 0) -> Cell:
    return evaluate_cell(pruner) if pruner == "unpruned" else evaluate_cell(pruner, weights=f"{seed}" * 20, recipe="r", seed=seed)


def prediction(number: int, credit: float, said: str = "red") -> Prediction:
    asked = f"What colour has thing {number} of the picture that is shown above?"
    return row(
        number, credit, group=f"g{number // 3:05}", category="color", question_type=("open", "binary")[number % 2], question=asked,
        answer=f"{said} {number}", parsed=said, target="red",
    )  # fmt: skip


def fill(root: Path, num: int, pruners: tuple[str, ...] = ("unpruned", "diffprune", "gumbel_topk")) -> Store:
    """A store with `num` answers per cell, two scorer seeds of each method."""
    store, draw = Store(root), random.Random(0)
    for pruner in pruners:
        for seed in (0,) if pruner == "unpruned" else (0, 1):
            rows = [prediction(n, float(draw.random() < 0.7), draw.choice(("red", "blue"))) for n in range(num)]
            found: dict[str, list[Any]] = {"predictions": rows, "outcomes": [outcome(num)]}
            store.publish(found, cell=cell(pruner, seed), provenance=provenance(attempt=1 + seed))
    return store


# The store: less is read, the same is found --------------------------------------------------------------------------


def test_coded_text_is_the_same_text_in_the_order_of_the_texts(tmp_path: Path) -> None:
    store = fill(tmp_path, 40)
    plain, coded = store.read("predictions"), store.read("predictions", coded=True)
    text = [c.name for c in columns("predictions") if c.type is str]
    assert all(coded[name].dtype == "category" for name in text)
    for name in text:
        known = coded[name].cat.categories
        assert list(known) == sorted(set(plain[name])), name
    pd.testing.assert_frame_equal(coded.astype({name: "str" for name in text}), plain.astype({name: "str" for name in text}))
    assert [c.dtype for _, c in coded.drop(columns=text).items()] == [c.dtype for _, c in plain.drop(columns=text).items()]


def test_coded_rows_take_a_fraction_of_the_memory(tmp_path: Path) -> None:
    store = fill(tmp_path, 600)
    plain, coded = store.read("predictions"), store.read("predictions", coded=True)
    assert coded.memory_usage(deep=True).sum() < plain.memory_usage(deep=True).sum() / 3


def test_a_selection_is_the_same_as_selecting_afterwards(tmp_path: Path) -> None:
    store = fill(tmp_path, 20)
    whole = store.read("predictions")
    wanted = ["credit", "cell", "sample"]
    pd.testing.assert_frame_equal(store.read("predictions", wanted), whole[wanted])
    keys = {cell("diffprune", 1).key, cell("unpruned").key, "a cell nobody wrote"}
    mine = whole[whole["cell"].isin(keys)].reset_index(drop=True)
    pd.testing.assert_frame_equal(store.read("predictions", cells=keys), mine)
    assert store.read("predictions", ["sample"], cells=()).columns.tolist() == ["sample"]
    with pytest.raises(ValueError, match=r"no column 'sampel'.*'sample'"):
        store.read("predictions", ["sampel"])


def test_origins_are_those_of_the_rows(tmp_path: Path) -> None:
    store = fill(tmp_path, 5)
    store.publish({"predictions": []}, cell=cell("gumbel_keepdrop"), provenance=provenance())
    for table in ("predictions", "outcomes"):
        listed = [c for c in columns(table) if c.owner != "record"]
        slow = store.read(table)[[c.name for c in listed]].drop_duplicates("cell").astype(object)
        slow = slow.set_axis(list(ORIGIN), axis=1).reset_index(drop=True)
        found = store.origins(table)
        assert found.where(found.notna(), None).to_dict("list") == slow.where(slow.notna(), None).to_dict("list")
    assert store.origins("timings").columns.tolist() == list(ORIGIN) and not len(store.origins("timings"))


def counted(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str) -> list[Any]:
    """The first arguments a function was called with."""
    calls: list[Any] = []
    real: Callable[..., Any] = getattr(owner, name)

    def counting(*args: Any, **more: Any) -> Any:
        calls.append(args[0])
        return real(*args, **more)

    monkeypatch.setattr(owner, name, counting)
    return calls


def test_a_manifest_is_parsed_once_and_again_when_it_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path, 3)
    parsed = counted(monkeypatch, commits, "parse")
    reader = Store(tmp_path)
    for table in TABLES:
        reader.read(table)
    assert len(parsed) == 5 == len(list((tmp_path / "manifests").iterdir()))
    fill(tmp_path, 3, ("gumbel_keepdrop",))
    assert len(reader.done()) == 7
    victim = min((tmp_path / "manifests").iterdir())
    victim.write_bytes(victim.read_bytes()[:-1])
    assert len(reader.done()) == 6 and len(reader.problems) == 1


def test_a_report_decodes_every_part_once_and_few_columns_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path, 3)
    real, seen = parquet.decode, []

    def seeing(table: str, data: bytes, names: list[str], coded: bool) -> pa.Table:
        seen.append((table, len(names), coded))
        return real(table, data, names, coded)

    monkeypatch.setattr(parquet, "decode", seeing)
    records.read(tmp_path)
    ours, theirs = (1 + len(fields(kind)) for kind in (Answered, Credited))  # less `TEXTS`; less `cell` and `grader`
    wanted = [("answers", ours - len(records.TEXTS), True), ("grades", theirs - 2, True), ("outcomes", 5, True)]
    assert sorted(seen) == [one for one in wanted for _ in range(5)]


# The report ----------------------------------------------------------------------------------------------------------


def test_the_texts_of_rows_are_their_own(tmp_path: Path) -> None:
    found = records.read(fill(tmp_path, 30).blobs)
    rows = found.frames["predictions"].iloc[[7, 3, 100, 149]]
    assert not set(records.TEXTS) & set(rows.columns)
    whole = Store(tmp_path).read("predictions").iloc[[7, 3, 100, 149]]
    texts = found.texts(rows)
    assert texts.index.tolist() == [7, 3, 100, 149]
    for name in ("cell", "sample", *records.TEXTS):
        assert texts[name].tolist() == whole[name].tolist()


@pytest.mark.slow
def test_a_page_does_not_grow_with_its_rows(tmp_path: Path) -> None:
    sizes = []
    for num in (60, 1200):
        paths = report(fill(tmp_path / str(num), num).blobs, tmp_path / f"{num}-page")
        sizes.append(sum(path.stat().st_size for path in paths.values()))
    assert sizes[1] < 1.1 * sizes[0]


# Grading -------------------------------------------------------------------------------------------------------------

PIECES = (
    *"two Two none a an the The isnt dont cant she's let's ows'at yall'd've man's 's red Red blue yes No é İ".split(),
    *"3 10 10,000 1,,2 3. 3.5 .5".split(),
    *answers.PUNCTUATION, *".,' \t\n\u00a0", " ", " ", " ", "٣", "..", "." * 35,
)  # fmt: skip


def slow_normalised(text: str, several: bool) -> str:
    """The official normaliser letter by letter; several: 1,,000 has a thousands comma, too."""
    text = "".join(" " if letter in "\n\t" else letter for letter in text).strip()
    thousands = False
    for start, letter in enumerate(text):
        end = start + 1
        while text[end : end + 1] == "," and (several or end == start + 1):
            end += 1
        thousands |= letter.isdecimal() and end > start + 1 and text[end : end + 1].isdecimal()
    kept = ""
    for letter in text:
        deleted = thousands or f"{letter} " in text or f" {letter}" in text
        kept += letter if letter not in answers.PUNCTUATION else "" if deleted else " "
    spoken, periods = "", 0
    for place, letter in enumerate(kept):
        ends = letter == "." and not kept[place + 1 : place + 2].isdecimal() and periods < 32
        periods += ends
        spoken += "" if ends else letter
    words = []
    for word in spoken.lower().split():
        word = answers.NUMBERS.get(word, word)
        if word not in ("a", "an", "the"):
            words.append(answers.CONTRACTIONS.get(word, word))
    return " ".join(words)


def slow_evalai(text: str) -> str:
    return slow_normalised(text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip(), True)


def slow_credit(said: str, given: list[str]) -> float:
    credits = [min(sum(other == said for other in given[:n] + given[n + 1 :]) / 3, 1) for n in range(10)]
    return sum(credits) / 10


def slow_vqav2(said: str, given: list[str], protocol: str) -> float:
    if protocol == "lmms_eval":
        return slow_credit(slow_normalised(said, True), [slow_normalised(one, True) for one in given])
    said, given = slow_evalai(said), [one.replace("\n", " ").replace("\t", " ").strip() for one in given]
    if any(one != given[0] for one in given):
        said, given = slow_normalised(said, False), [slow_normalised(one, False) for one in given]
    return slow_credit(said, given)


def test_normalisers_agree_with_letter_by_letter_ones_on_random_text() -> None:
    draw = random.Random(0)
    for _ in range(4000):
        text = "".join(draw.choices(PIECES, k=draw.randrange(8)))
        assert answers.vqa(text) == slow_normalised(text, False), text
        assert answers.vqa(text, harness=True) == slow_normalised(text, True), text
        assert answers.evalai(text) == slow_evalai(text), text


@pytest.mark.parametrize("protocol", answers.PROTOCOLS)
def test_vqav2_agrees_with_a_naive_reference_on_random_answers(protocol: str) -> None:
    draw, credits = random.Random(1), set()
    for _ in range(1500):
        pool = ["".join(draw.choices(PIECES, k=draw.randrange(1, 4))) for _ in range(draw.randrange(1, 4))]
        pool += [text.lower() for text in pool]
        said, given = draw.choice(pool), draw.choices(pool, k=10)
        if draw.random() < 0.2:
            given = given[:1] * 10
        found = answers.vqav2(said, given, protocol).credit
        assert found == pytest.approx(slow_vqav2(said, given, protocol)), (said, given)
        credits.add(round(found, 6))
    assert {0.0, 0.3, 0.6, 0.9, 1.0} <= credits
