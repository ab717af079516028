"""Training on a user's own data: rows that the model refuses are skipped, no picture is both trained on and held out."""

from __future__ import annotations

import base64
import io
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from diffprune import data as training
from diffprune.core import registry
from diffprune.core.vlm import VLM
from diffprune.data import batch
from diffprune.data.order import BROKEN, split
from diffprune.data.sources import TRAIN, BrokenRows, DrawIndex, Example
from diffprune.distributed import train
from diffprune.train.recipe import Recipe

# --- rows that the model refuses (line 3) ----------------------------------------------------------------------------


def rows_with(changes: dict[int, dict[str, Any]], sizes: dict[int, tuple[int, int]], num: int = 24) -> str:
    """Pictures of 56 x 56, each with a question of its own."""
    rows = []
    for i in range(num):
        Image.new("RGB", sizes.get(i, (56, 56)), (i, 99, 0)).save(f"{i}.png")
        rows.append({"image": f"{i}.png", "question": f"q{i}", "answer": "a"} | changes.get(i, {}))
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return "jsonl('rows.jsonl')"


def tiny(family: str) -> VLM:
    made: VLM = registry.find("models", family).tiny()  # type: ignore[attr-defined]
    return made


def questions(vlm: VLM, made: training.TrainBatch) -> list[str]:
    tokenizer = vlm.processor.tokenizer
    rows = zip(made.prompts.input_ids, made.prompts.question, strict=True)
    return [tokenizer.decode(ids[shown], skip_special_tokens=True) for ids, shown in rows]


@pytest.mark.parametrize("family", ["qwen2_5_vl", "llava"])
def test_a_row_that_the_model_cannot_take_is_skipped_and_named(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures of 1 x 300, which Qwen's processor refuses (llava's is made to), and half an emoji in a question and an answer."""
    vlm = tiny(family)
    if family == "llava":
        whole = vlm.pixels

        def narrow(images: Any) -> Any:
            if any(image.width == 1 for image in images):
                raise ZeroDivisionError("too thin")
            return whole(images)

        monkeypatch.setattr(vlm, "pixels", narrow)
    every = range(0, 24, 3)
    data = rows_with({4: {"answer": "\ud83d"}, 5: {"question": "\ude00?"}}, {i: (1, 300) for i in every})

    def steps(tally: BrokenRows, **options: Any) -> list[training.TrainBatch]:
        made = training.batches(vlm, data, seed=0, images=4, questions=1, packed=False, tally=tally, **options)
        return list(itertools.islice(made, 8))

    tally = BrokenRows(limit=0.9)
    asked = [questions(vlm, step) for step in steps(tally)]
    flat = {text for step in asked for text in step}
    assert all(len(step) == 4 for step in asked) and not any(f"q{i}:" in text for i in (*every, 4, 5) for text in flat)
    assert tally.broken > 8 and tally.drawn - tally.broken == 32, "each broken row is counted once a draw"
    assert "rows.jsonl line" in tally.first and ("cannot take it" in tally.first or "half a character" in tally.first)
    counts = [BrokenRows(limit=0.9), BrokenRows(limit=0.9)]
    shares = [[questions(vlm, step) for step in steps(counts[rank], rank=rank, world=2)] for rank in range(2)]
    assert [a + b for a, b in zip(*shares, strict=True)] == asked, "the same for any number of workers"
    assert sum(count.broken for count in counts) == tally.broken


def test_the_share_of_refused_rows_is_limited() -> None:
    vlm, data = tiny("qwen2_5_vl"), rows_with({}, {i: (1, 300) for i in range(24)})
    with pytest.raises(
        training.TooManyBroken, match=r"max_broken_share=0.01 allows; the first: .*rows.jsonl line \d+: the model cannot"
    ):
        next(training.batches(vlm, data, seed=0, images=2, questions=1))


def test_what_every_row_alone_can_do_but_the_batch_cannot_is_no_broken_row(monkeypatch: pytest.MonkeyPatch) -> None:
    vlm, data = tiny("llava"), rows_with({}, {})
    whole = vlm.pixels

    def crowded(images: Any) -> Any:
        if len(images) > 1:
            raise torch.cuda.OutOfMemoryError("too many at once")
        return whole(images)

    monkeypatch.setattr(vlm, "pixels", crowded)
    tally = BrokenRows()
    with pytest.raises(torch.cuda.OutOfMemoryError):
        next(training.batches(vlm, data, seed=0, images=2, questions=1, tally=tally))
    assert tally.broken == 0


@pytest.mark.parametrize("family", ["llava", "gemma3", "qwen2_5_vl", "paligemma"])
@pytest.mark.parametrize("packed", [True, False])
def test_an_image_placeholder_in_an_answer_or_a_question_is_text(family: str, packed: bool) -> None:
    vlm = tiny(family)
    mark = vlm.image_placeholder  # type: ignore[attr-defined]
    image = Image.new("RGB", (56, 56), (9, 99, 0))
    pairs = [(f"what is {mark}", f"a {mark} b"), ("what?", "<image>")]
    made = batch.batch(vlm, [Example([image], pairs)], packed and vlm.packs)
    plain = batch.batch(vlm, [Example([image], [("what?", "a")])], False)
    assert int(made.prompts.slots.sum()) == int(plain.prompts.slots.sum()) * len(made.prompts.slots)
    assert int((made.prompts.input_ids == vlm.model.config.image_token_id).sum()) == int(made.prompts.slots.sum())
    labels = made.prompts.labels[0]  # type: ignore[index]
    said = vlm.processor.tokenizer.decode(labels[labels >= 0])
    assert f"a {mark} b" in said


@pytest.mark.parametrize("packed", [True, False])
def test_a_tokenizer_without_an_end_token_trains_on_answers_alone(packed: bool) -> None:
    vlm, drawn = tiny("llava"), [Example([Image.new("RGB", (56, 56))], [("what?", "a cat"), ("where?", "here")])]
    whole = batch.batch(vlm, drawn, packed)
    vlm.processor.tokenizer.eos_token = None
    made = batch.batch(vlm, drawn, packed)
    assert made.num_labels == whole.num_labels - 2 == len("a cat") + len("here")


# --- held-out parts (line 4) -----------------------------------------------------------------------------------------


def png(number: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (2, 2), (number, 0, 0)).save(file, "PNG")
    return file.getvalue()


PATHS = [f"{i % 24}.png" for i in range(48)]  # two questions about each of 24 pictures
BYTES = [png(i % 24) for i in range(48)]
STRUCTS = [{"bytes": held, "path": path} for held, path in zip(BYTES, PATHS, strict=True)]
COLUMNS = {
    "text": pa.array(PATHS),
    "large text": pa.array(PATHS, pa.large_string()),
    "dictionary": pa.array(PATHS).dictionary_encode(),
    "view": pa.array(PATHS, pa.string_view()),
    "list of a text": pa.array([[path] for path in PATHS]),
    "list of a struct": pa.array([[struct] for struct in STRUCTS]),
    "list of a path": pa.array([[{"path": path}] for path in PATHS]),
    "struct": pa.array(STRUCTS),
    "struct without names": pa.array([{"bytes": held, "path": None} for held in BYTES]),
    "struct with one name": pa.array([{"bytes": held, "path": "image.png"} for held in BYTES]),
    "struct with some names": pa.array([struct | {"path": struct["path"] if i % 2 else None} for i, struct in enumerate(STRUCTS)]),
    "struct with names in the first half": pa.array([s | {"path": s["path"] if i < 24 else None} for i, s in enumerate(STRUCTS)]),
    "struct of a path in the first half": pa.array(
        [s | ({"bytes": None} if i < 24 else {"path": None}) for i, s in enumerate(STRUCTS)]
    ),
    "bytes": pa.array(BYTES),
    "other spelling": pa.array([path if i < 24 else f"./{path}" for i, path in enumerate(PATHS)]),
    "around": pa.array([path if i < 24 else f"../{{here}}/x/../{path}" for i, path in enumerate(PATHS)]),
}


@pytest.mark.parametrize("column", COLUMNS, ids=lambda name: name.replace(" ", "-"))
def test_no_picture_is_trained_on_and_held_out(column: str) -> None:
    for i in range(24):
        Path(f"{i}.png").write_bytes(png(i))
    shown = COLUMNS[column]
    if column == "around":
        shown = pa.array([path.as_py().format(here=Path.cwd().name) for path in shown])
        Path("x").mkdir()
    table = pa.table({"image": shown, "question": ["q"] * 48, "answer": ["a"] * 48})
    pq.write_table(table, "rows.parquet", row_group_size=7)
    source = training.source("parquet('rows.parquet')")
    stream = split(source.table.images)  # type: ignore[attr-defined]
    assert np.array_equal(stream[:24], stream[24:]), "both questions about a picture fall together"
    assert len(set(source.table.images.tolist())) == 24 and BROKEN not in source.table.images  # type: ignore[attr-defined]
    (image,), _ = source.draw(DrawIndex(TRAIN, 0, 1), 1, BrokenRows())
    assert image.getpixel((0, 0))[0] == int(source.orders[TRAIN].at(0, 0)) % 24  # type: ignore[attr-defined]


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_row_without_an_id_or_a_path_is_with_the_others_about_its_picture(kind: str) -> None:
    for i in range(24):
        Path(f"{i}.png").write_bytes(png(i))
    shown = [PATHS[i] if i < 24 else base64.b64encode(BYTES[i]).decode() for i in range(48)]
    rows = [{"image": one, "question": "q", "answer": "a", "name": f"n{i % 24}" if i < 36 else None} for i, one in enumerate(shown)]
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), "rows.parquet", row_group_size=7)
    else:
        Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for data in (f"{kind}('rows.{kind}')", f"{kind}('rows.{kind}', id='name')"):
        images = training.source(data).table.images  # type: ignore[attr-defined]
        assert np.array_equal(images[:24], images[24:]) and len(set(images.tolist())) == 24 and BROKEN not in images


def test_pictures_in_base64_are_told_apart_by_content() -> None:
    rows = [{"image": base64.b64encode(held).decode(), "question": "q", "answer": "a"} for held in BYTES]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    images = training.source("jsonl('rows.jsonl')").table.images  # type: ignore[attr-defined]
    assert len(set(images.tolist())) == 24 and np.array_equal(images[:24], images[24:])


def test_broken_rows_are_never_held_out() -> None:
    images = np.array([5, BROKEN, 3, BROKEN, 9], np.uint64)
    assert (split(images)[[1, 3]] == TRAIN).all()
    with pytest.raises(ValueError, match="found 2 images"):
        split(np.array([5, BROKEN, 3, BROKEN], np.uint64))


# --- the first example (line D) --------------------------------------------------------------------------------------


def test_the_first_example_says_what_is_trained_on() -> None:
    data = rows_with({}, {})
    source = training.source(data)
    _, ((question, _),) = source.draw(DrawIndex(TRAIN, 0, 1), 1, BrokenRows())
    assert training.first_example(data) == f"an image of 56 x 56, question {question!r}, answer 'a'"
    assert "96 x 96" in training.first_example("world")
    Path("rows.jsonl").write_text(Path("rows.jsonl").read_text().replace("question", "qestion"))
    with pytest.raises(ValueError, match="did you mean 'qestion'"):
        training.first_example(data)


def test_the_first_example_is_printed_before_the_workers_start(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = rows_with({}, {})

    def started(*_: Any) -> str:
        assert f"train: the first example is {training.first_example(data)}" in capsys.readouterr().out
        return "far enough"

    monkeypatch.setattr(train, "_fit", started)
    with pytest.raises(RuntimeError, match="far enough"):
        train.train(Recipe(pruners=("diffprune",), data=data, steps=1), "run")
