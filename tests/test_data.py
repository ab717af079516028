"""Training data from files: every row once per epoch, the same for any number of workers, broken rows skipped and counted."""

from __future__ import annotations

import csv
import io
import itertools
import json
import pickle
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from diffprune import data as training
from diffprune.core import registry
from diffprune.core.spec import Spec
from diffprune.data import catalog, stream, text
from diffprune.data.order import WINDOW, Order, split
from diffprune.data.sources import CALIBRATION, TRAIN, VALIDATION, BrokenRows, DrawIndex, TooManyBroken
from diffprune.embedded import vlm as embedded
from diffprune.io import text_rows
from diffprune.train import loop
from diffprune.train.context import LocalContext
from diffprune.train.recipe import Recipe
from diffprune.train.scorer_trainer import ScorerTrainer
from diffprune.vlm.load import load

NUM = 40


def picture(number: int) -> bytes:
    """A picture that says its number: the red channel of its only pixel."""
    buffer = io.BytesIO()
    Image.new("RGB", (1, 1), (number, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def write_pictures(folder: Path, num: int = NUM) -> None:
    folder.mkdir(exist_ok=True)
    for i in range(num):
        (folder / f"{i}.png").write_bytes(picture(i))


def chat(i: int, turns: int = 2) -> dict[str, Any]:
    """A row in the style of LLaVA-665K."""
    said = [{"from": "human", "value": ("<image>\n" if t == 0 else "") + f"q{i}.{t}?"} for t in range(turns)]
    answered = [{"from": "gpt", "value": f"a{i}.{t}"} for t in range(turns)]
    return {"id": f"row{i}", "image": f"{i}.png", "conversations": [x for pair in zip(said, answered, strict=True) for x in pair]}


def lines(rows: list[Any], path: str = "rows.jsonl") -> str:
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def as_jsonl() -> str:
    write_pictures(Path("pictures"))
    blind = {"id": "no image", "conversations": [{"from": "human", "value": "1 + 1?"}, {"from": "gpt", "value": "2"}]}
    lines([row for i in range(NUM) for row in (chat(i), blind)])
    return "jsonl('rows.jsonl', images='pictures')"


def as_array() -> str:
    as_jsonl()
    rows = [json.loads(line) for line in Path("rows.jsonl").read_text().splitlines()]
    Path("rows.json").write_text(json.dumps(rows, indent=2))
    return "jsonl('rows.json', images='pictures')"


def as_folder() -> str:
    write_pictures(Path("captioned"))
    lines([{"file_name": f"{i}.png", "text": f"a{i}"} for i in range(NUM)], "captioned/metadata.jsonl")
    return "folder('captioned')"


def as_csv() -> str:
    write_pictures(Path("listed"))
    with Path("listed/metadata.csv").open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["caption", "file_name"])
        table.writerows([f'a{i}, "quoted"\nin two lines ü', f"{i}.png"] for i in range(NUM))
    return "folder('listed')"


def write_parquet(folder: str, numbers: range, group: int, **columns: list[Any]) -> None:
    Path(folder).mkdir(parents=True, exist_ok=True)
    images = [{"bytes": picture(i), "path": f"{i}.png"} for i in numbers]
    table = pa.table({"image": images, "unread": ["x" * 99] * len(images), **columns})
    pq.write_table(table, f"{folder}/train-{numbers.start:05d}.parquet", row_group_size=group)


def as_parquet() -> str:
    for numbers in (range(17), range(17, NUM)):
        write_parquet("shards", numbers, 5, question=[f"q{i}?" for i in numbers], answer=[f"a{i}" for i in numbers])
    return "parquet('shards')"


def as_paths() -> str:
    """Parquet with captions whose images lie beside it."""
    write_pictures(Path("beside"))
    pq.write_table(
        pa.table({"image": [f"{i}.png" for i in range(NUM)], "says": [f"a{i}" for i in range(NUM)]}), "beside/all.parquet"
    )
    return "parquet('beside/all.parquet', answer='says', prompt='what is it?')"


LAYOUTS: list[Callable[[], str]] = [as_jsonl, as_array, as_folder, as_csv, as_parquet, as_paths]
each_layout = pytest.mark.parametrize("write", LAYOUTS, ids=lambda f: f.__name__)

Drawn = tuple[int, training.QAPairs]


def number(drawn: training.Example) -> Drawn:
    """(number of the picture, pairs)."""
    return drawn.images[0].getpixel((0, 0))[0], drawn.pairs


def draw(data: str, place: DrawIndex, questions: int = 9, tally: BrokenRows | None = None) -> Drawn:
    return number(training.source(data).draw(place, questions, tally or BrokenRows()))


def epoch(data: str, seed: int, num: int, start: int = 0) -> list[int]:
    made = training.source(data)
    return [number(made.draw(DrawIndex(TRAIN, i, num, seed), 9, BrokenRows()))[0] for i in range(start, start + num)]


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """`batches` gives what was drawn, without a model."""
    monkeypatch.setattr(stream, "batch", lambda vlm, drawn, packed, first: [number(one) for one in drawn])


# --- what a row says -------------------------------------------------------------------------------------------------


@each_layout
def test_questions_and_answers_stay_with_their_image(write: Callable[[], str]) -> None:
    made = training.source(write())
    expected: dict[Callable[[], str], Callable[[int], training.QAPairs]] = {
        as_jsonl: lambda i: [(f"q{i}.0?", f"a{i}.0"), (f"q{i}.1?", f"a{i}.1")],
        as_array: lambda i: [(f"q{i}.0?", f"a{i}.0"), (f"q{i}.1?", f"a{i}.1")],
        as_folder: lambda i: [("Describe the image.", f"a{i}")],
        as_csv: lambda i: [("Describe the image.", f'a{i}, "quoted"\nin two lines ü')],
        as_parquet: lambda i: [(f"q{i}?", f"a{i}")],
        as_paths: lambda i: [("what is it?", f"a{i}")],
    }
    for position in range(NUM):
        i, pairs = number(made.draw(DrawIndex(TRAIN, position, NUM), 9, BrokenRows()))
        assert pairs == expected[write](i)


def test_more_turns_than_asked_for_are_drawn_from_in_order() -> None:
    write_pictures(Path("."))
    lines([chat(i, turns=8) for i in range(4)])
    seen = set()
    for step in range(30):
        _, pairs = draw("jsonl('rows.jsonl')", DrawIndex(TRAIN, 0, 1, step=step), questions=3)
        turns = [question.split(".")[1] for question, _ in pairs]
        assert len(pairs) == 3 and turns == sorted(turns)
        seen.update(turns)
    assert len(seen) == 8, "every turn has its chance"


def test_chats_of_roles_and_renamed_columns_are_read() -> None:
    write_pictures(Path("."), 3)
    turns = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "q? <image>"},
        {"role": "assistant", "content": "a"},
    ]
    lines([{"photo": [f"{i}.png"], "turns": turns} for i in range(3)])
    assert draw("jsonl('rows.jsonl', image='photo', answer='turns')", DrawIndex(TRAIN, 0, 1))[1] == [("q?", "a")]


# --- the order -------------------------------------------------------------------------------------------------------


@each_layout
def test_an_epoch_has_every_row_once_and_none_that_is_held_out(write: Callable[[], str]) -> None:
    data = write()
    streams = {s: {draw(data, DrawIndex(s, i, NUM))[0] for i in range(NUM)} for s in (CALIBRATION, VALIDATION)}
    held = streams[CALIBRATION] | streams[VALIDATION]
    assert not streams[CALIBRATION] & streams[VALIDATION] and all(len(found) == NUM // 16 for found in streams.values())
    num = NUM - len(held)
    first, second = epoch(data, 0, num), epoch(data, 0, num, start=num)
    assert sorted(first) == sorted(second) == sorted(set(range(NUM)) - held)
    assert first != second and first != sorted(first) and first != epoch(data, 1, num)


@pytest.mark.parametrize("write", [as_jsonl, as_parquet])
def test_workers_together_see_what_one_sees_and_a_resumed_run_goes_on(write: Callable[[], str], plain: None) -> None:
    data = write()

    def steps(num: int, **options: Any) -> list[Any]:
        made = training.batches(None, data, seed=3, images=6, questions=1, **options)  # type: ignore[arg-type]
        return list(itertools.islice(made, num))

    whole = steps(14)  # more than two epochs of 36 rows
    assert len({i for step in whole[:6] for i, _ in step}) == 36, "six steps are an epoch"
    for world in (2, 3):
        shares = [steps(14, rank=rank, world=world) for rank in range(world)]
        assert [sum(parts, []) for parts in zip(*shares, strict=True)] == whole
    assert steps(5, start_step=9) == whole[9:], "a run that goes on sees what it would have seen"
    assert steps(2, rank=1, world=2, start_step=9) == [step[3:] for step in whole[9:11]]


def test_splits_follow_the_image_not_the_row() -> None:
    random = np.random.default_rng(0)
    images = random.integers(0, 2**63, 100, dtype=np.uint64)
    rows = random.integers(0, 100, 1000)
    found = split(images[rows])
    assert all(len(set(found[rows == i])) == 1 for i in set(rows))
    assert Counter(split(images).tolist()) == {TRAIN: 88, CALIBRATION: 6, VALIDATION: 6}
    mixed = random.permutation(100)
    assert np.array_equal(split(images[mixed]), split(images)[mixed])


def test_rows_of_a_block_come_close_together() -> None:
    """What bounds the memory: a window has few blocks, and every block belongs to one window."""
    blocks = np.repeat(np.arange(50), 100)
    order = Order(np.arange(5000), blocks)
    at = [order.at(7, p) for p in range(5000)]
    assert sorted(at) == list(range(5000))
    for start in range(0, 5000, 1100):
        assert len({blocks[row] for row in at[start : start + 1100]}) <= -(-WINDOW // 100)
    assert len({blocks[row] for row in at[:100]}) > 5, "rows of several blocks are mixed"
    near = {order.near(7, 1500, np.random.default_rng(i)) for i in range(300)}
    assert near <= set(at[1100:2200]) and len(near) > 100


def test_row_groups_are_read_once_and_only_the_columns_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    data, read = as_parquet(), []
    whole = pq.ParquetFile.read_row_group

    def counted(self: Any, i: int, columns: list[str], **options: Any) -> Any:
        read.append(tuple(columns))
        return whole(self, i, columns=columns, **options)

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", counted)
    epoch(data, 0, NUM - 4)
    assert Counter(read) == {("image", "question", "answer"): 9, ("image.path",): 9}


def test_a_json_array_larger_than_the_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    data = as_array()
    expected = epoch(data, 0, NUM)
    monkeypatch.setattr(text_rows, "CHUNK", 50)
    text._index.cache_clear()
    assert epoch(data, 0, NUM) == expected
    Path("rows.json").write_text(Path("rows.json").read_text()[:-40])
    with pytest.raises(ValueError, match="breaks off"):
        epoch(data, 0, 1)


# --- the Hub ---------------------------------------------------------------------------------------------------------

COMMIT = "0123456789" * 4


@pytest.fixture
def snapshot(monkeypatch: pytest.MonkeyPatch) -> Path:
    """A local folder with the layout of a downloaded snapshot; what would download it only lists it."""
    place = Path("cache/snapshots", COMMIT).absolute()
    for part, numbers in enumerate((range(20), range(20, NUM))):
        write_parquet(str(place / "data"), numbers, 6, caption_enriched=[f"a{i}" for i in numbers])
        (place / f"data/train-{numbers.start:05d}.parquet").rename(place / f"data/train-{part:05d}-of-00002.parquet")
    write_parquet(str(place / "data"), range(3), 6, caption_enriched=["other split"] * 3)
    (place / "data/train-00000.parquet").rename(place / "data/validation-00000-of-00001.parquet")

    def files(repository: str, revision: str, wanted: list[str]) -> list[Path]:
        assert (repository, revision) == ("owner/captions", COMMIT)
        return sorted({path for pattern in wanted for path in place.glob(pattern)})

    monkeypatch.setattr(catalog.remote, "files", files)
    return place


def test_a_data_set_of_the_hub_is_read_at_a_commit(snapshot: Path) -> None:
    data = f"hub('owner/captions', revision='{COMMIT}', prompt='what is it?')"
    made = training.source(data)
    drawn = [number(made.draw(DrawIndex(TRAIN, i, NUM), 1, BrokenRows())) for i in range(NUM - 4)]
    assert len({i for i, _ in drawn}) == NUM - 4
    assert all(pairs == [("what is it?", f"a{i}")] for i, pairs in drawn)
    keys = {Recipe(data=data).key(Spec("diffprune")), Recipe(data=data.replace("0123", "3210", 1)).key(Spec("diffprune"))}
    (snapshot / "data/train-00001-of-00002.parquet").unlink()
    assert len(keys | {Recipe(data=data).key(Spec("diffprune"))}) == 2, "known without the files, by the commit"
    with pytest.raises(ValueError, match=r"train-00001-of-00002\.parquet is missing"):
        training.source(data).draw(DrawIndex(TRAIN, 0, 1), 1, BrokenRows())


@pytest.mark.parametrize("data", ["hub('owner/captions')", "hub('owner/captions', revision='main')", "hub('captions')"])
def test_a_data_set_of_the_hub_needs_its_owner_and_a_commit(data: str) -> None:
    with pytest.raises(ValueError, match=r"revision='<commit>'|write 'owner/name'"):
        Recipe(data=data)


# --- what is broken --------------------------------------------------------------------------------------------------


def breakages(rows: list[Any]) -> None:
    """One of each kind, in rows 0 to 7."""
    Path("0.png").unlink()
    Path("1.png").write_bytes(picture(1)[:40])
    rows[2]["conversations"] = []
    rows[3]["conversations"][1]["value"] = "  "
    rows[4]["conversations"][0]["value"] = "<image>"
    rows[5]["conversations"][1]["from"] = "robot"
    rows[6]["conversations"][1]["value"] = {"a": 4}
    rows[7]["image"] = ["7.png"] * 65


def test_broken_rows_are_counted_and_replaced_alike_for_all_workers(plain: None) -> None:
    write_pictures(Path("."))
    rows = [chat(i) for i in range(NUM)]
    breakages(rows)
    lines(rows)
    with Path("rows.jsonl").open("ab") as file:
        file.write(b"{no json\n\xff\xfe\n[1]\n\n")
    data = "jsonl('rows.jsonl')"

    def steps(num: int, tally: BrokenRows, **options: Any) -> list[Any]:
        made = training.batches(None, data, seed=0, images=6, questions=1, tally=tally, **options)  # type: ignore[arg-type]
        return list(itertools.islice(made, num))

    tally = BrokenRows(limit=0.9)
    whole = steps(20, tally)
    drawn = {i for step in whole for i, _ in step}
    assert drawn <= set(range(8, NUM)) and len(drawn) > 20
    assert tally.drawn - tally.broken == 120 and tally.broken > 20 and "rows.jsonl line " in tally.first
    shares, counts = [], [BrokenRows(0.9), BrokenRows(0.9)]
    for rank in range(2):
        shares.append(steps(20, counts[rank], rank=rank, world=2))
    assert [sum(parts, []) for parts in zip(*shares, strict=True)] == whole
    assert sum(c.broken for c in counts) == tally.broken
    assert steps(5, BrokenRows(0.9), start_step=15) == whole[15:]


def test_too_many_broken_rows_stop_the_run_and_name_the_first() -> None:
    write_pictures(Path("."))
    for i in range(0, NUM, 2):
        (Path(f"{i}.png")).write_bytes(b"")
    lines([chat(i) for i in range(NUM)])
    made, tally = training.source("jsonl('rows.jsonl')"), BrokenRows(limit=0.1)
    with pytest.raises(TooManyBroken, match=r"5 of the \d+ .*max_broken_share=0.1 .*\d+\.png is an empty file") as stopped:
        for i in range(NUM):
            made.draw(DrawIndex(TRAIN, i, NUM), 1, tally)
    assert "\n" not in str(stopped.value) and tally.broken == 5 > 0.1 * NUM


def test_the_share_is_judged_over_a_thousand_rows() -> None:
    tally = BrokenRows(limit=0.01)
    for _ in range(10):
        tally.drawn += 1
        tally.skip("x", rows=10**6)
    with pytest.raises(TooManyBroken, match="11 of the 11"):
        tally.drawn += 1
        tally.skip("x", rows=10**6)
    tally.drawn = 1100
    tally.broken = 10
    tally.skip("x", rows=10**6)


def test_a_broken_row_group_counts_as_broken_rows() -> None:
    data, path = as_parquet(), Path("shards/train-00000.parquet")
    place = pq.ParquetFile(path).metadata.row_group(1).column(0).data_page_offset
    raw = bytearray(path.read_bytes())
    raw[place : place + 60] = b"\xff" * 60
    tally = BrokenRows(limit=0.9)
    path.write_bytes(raw)
    made = training.source(data)
    seen = {number(made.draw(DrawIndex(TRAIN, i, NUM), 1, tally))[0] for i in range(NUM)}
    assert not seen & set(range(5, 10)) and tally.broken >= 3 and "train-00000.parquet" in tally.first


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ("jsonl('absent.jsonl')", "absent.jsonl cannot be read"),
        ("jsonl('shards/train-00000.parquet')", "is a Parquet file, no text"),
        ("jsonl('rows.jsonl', image='photo')", "column 'photo' is missing; it has "),
        ("parquet('absent')", "there is no file or folder .*absent"),
        ("parquet('pictures')", "holds no file with rows: one of .parquet is needed"),
        ("parquet('rows.jsonl')", "no Parquet file"),
        ("parquet('shards', image='imgae')", "column 'imgae' is missing; it has .*: did you mean 'image'"),
        ("parquet('shards', answer='anser')", "did you mean 'answer'"),
        ("parquet('shards', id='nr')", "column 'nr' is missing"),
        ("folder('pictures')", "neither metadata.jsonl nor metadata.csv"),
        ("jsonl('two.jsonl')", "found 2 images"),
    ],
)
def test_data_that_cannot_be_read_is_refused_in_one_sentence(data: str, said: str) -> None:
    as_jsonl(), as_parquet()
    lines([chat(i) for i in range(2)], "two.jsonl")
    with pytest.raises(ValueError, match=said) as refused:
        training.source(data).draw(DrawIndex(TRAIN, 0, 1), 1, BrokenRows())
    assert "\n" not in str(refused.value)


# --- the recipe ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ("jsnl('x')", "did you mean 'jsonl'"),
        ("jsonl('x', pictures='y')", "no option 'pictures'"),
        ("world(3)", "too many"),
        ("jsonl()", "missing a required argument: 'file'"),
        ("parquet(3)", "must be a path in quotes"),
    ],
)
def test_wrong_data_are_refused_before_any_file_is_looked_at(data: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Recipe(data=data)
    with pytest.raises(ValueError, match="max_broken_share is 1"):
        Recipe(max_broken_share=1)


def test_the_key_follows_the_contents_not_the_place(tmp_path: Path) -> None:
    key = Recipe(data=as_jsonl()).key(Spec("diffprune"))
    other = tmp_path / "moved"
    other.mkdir()
    Path("rows.jsonl").rename(other / "rows.jsonl")
    made = Recipe(data=f"jsonl({str(other / 'rows.jsonl')!r})", max_broken_share=0.5)
    assert made.key(Spec("diffprune")) == key
    assert Recipe(data=f"jsonl({str(other / 'rows.jsonl')!r}, prompt='?')").key(Spec("diffprune")) != key
    with (other / "rows.jsonl").open("a") as file:
        file.write(json.dumps(chat(0)) + "\n")
    assert made.key(Spec("diffprune")) != key
    assert Recipe().key(Spec("diffprune")) != key


def test_paths_travel_with_the_recipe_and_are_no_part_of_what_it_says() -> None:
    made = pickle.loads(pickle.dumps(Recipe(data="jsonl('a.jsonl', images='b', prompt='what?')")))
    assert str(made.data) == "jsonl(prompt='what?')" and made.model_dump(mode="json")["data"] == str(made.data)
    assert (made.data.place("file"), made.data.place("images")) == (Path("a.jsonl").absolute(), Path("b").absolute())


def test_a_scorer_trains_on_files_with_broken_images() -> None:
    embedded.build(0).save_pretrained("model")
    embedded.processor().save_pretrained("model")
    for i in range(12):
        Image.new("RGB", (96, 96), (i * 20, 0, 99)).save(f"{i}.png")
    Path("3.png").write_bytes(b"")
    lines([chat(i, turns=1 + i % 3) for i in range(12)])
    made = Recipe(
        data="jsonl('rows.jsonl')", pruners=("diffprune",), steps=3, images=4, questions=2, workers=1, calibration_images=1,
        validation_images=1, checkpoint_every=0, validate_every=3, grad_cosine_every=0, max_broken_share=0.2,
    )  # fmt: skip
    arm = ScorerTrainer(LocalContext("run"), load("model", device="cpu"), made, registry.load("pruners", "diffprune"), 0)
    rows = [arm.step(batch) for batch in itertools.islice(loop.batches(arm), made.steps)]
    assert all(np.isfinite(row.loss) for row in rows)
    assert arm.tally.broken >= 1 and "3.png" in arm.tally.first
