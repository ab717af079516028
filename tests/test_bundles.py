"""Many cells per commit: the same rows as one commit a cell, whatever is merged, stopped, killed or damaged on the way."""

from __future__ import annotations

import errno
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from blob_stores import FailingBlobs, MemoryBlobs

from diffprune.core.cell import Cell
from diffprune.core.records import Figure, Prediction
from diffprune.io.blob_store import Blobs, LocalBlobs
from diffprune.store import Fenced, Store, bundles, lock, manifest, views
from diffprune.store.writer import Writer
from tests.records import evaluate_cell, outcome, prediction, provenance

MADE = provenance()
Found = tuple[Cell, dict[str, list[Any]]]


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bundles are full with 12 cells, and three of one size are merged."""
    monkeypatch.setattr(bundles, "MOST_CELLS", 12)
    monkeypatch.setattr(bundles, "TOGETHER", 3)


def cell(seed: int) -> Cell:
    return evaluate_cell(f"random(seed={seed})", benchmark=f"world('{('pope', 'gqa')[seed % 2]}')")


def found(seed: int, rows: int = 3, word: str = "red") -> Found:
    """A cell with answers and an outcome."""
    answers = [prediction(i, answer=f"{word} {seed}") for i in range(rows)]
    return cell(seed), {
        "predictions": answers,
        "figures": [Figure("accuracy", float(seed), "mean", "")],
        "outcomes": [outcome(rows)],
    }


def failed(seed: int, reason: str = "it broke") -> Found:
    return cell(seed), {"outcomes": [outcome(0, "failed", reason)]}


def everything(store: Store) -> dict[str, pd.DataFrame]:
    """All that readers can ask, by what they ask; and nothing was damaged."""
    asked = {table: store.read(table) for table in ("answers", "grades", "figures", "outcomes", "predictions", "timings")}
    asked["coded"] = store.read("predictions", coded=True)
    asked |= {f"origins {table}": store.origins(table) for table in ("predictions", "outcomes")}
    for name, value in (("statuses", store.statuses()), ("graders", store.graders())):
        asked[name] = pd.DataFrame(sorted(value.items()))
    asked["done"] = pd.DataFrame(sorted((table, key) for table in ("outcomes", "predictions") for key in store.done(table)))
    assert store.problems == []
    return asked


def assert_same(one: Store, other: Store) -> None:
    here, there = everything(one), everything(other)
    for name, frame in here.items():
        pd.testing.assert_frame_equal(frame, there[name], obj=name)


def cells_of(place: Blobs | Path) -> dict[str, list[str]]:
    frame = Store(place).read("predictions")
    return {key: rows["answer"].tolist() for key, rows in frame.groupby("cell")}


def copied(base: MemoryBlobs) -> MemoryBlobs:
    other = MemoryBlobs()
    for key in base.list():
        other.replace(key, base.read(key))
    return other


def whole(*seeds: int) -> dict[str, list[str]]:
    return {cell(seed).key: [f"red {seed}"] * 3 for seed in seeds}


# The oracle: one commit a cell ---------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("number", [0, 1])
def test_bundles_say_what_single_commits_say(small: None, tmp_path: Path, number: int) -> None:
    """Cells that succeed, fail, are tried again by later and earlier attempts, come in bundles and alone, and are graded again."""
    draw = random.Random(number)
    single, many = Store(MemoryBlobs()), Store(MemoryBlobs())
    for _ in range(14):
        made = replace(MADE, attempt=draw.choice((1, 1, 2, 3)))
        some: dict[str, Found] = {}
        for seed in draw.sample(range(50), draw.randint(1, 4)):
            how = draw.random()
            kind = failed(seed, f"reason {draw.random()}") if how < 0.3 else found(seed, draw.randint(0, 4), draw.choice("abc"))
            some[kind[0].key] = kind
        alone = draw.random() < 0.2
        for one, records in some.values():
            single.publish(records, cell=one, provenance=made)
            if alone:
                many.publish(records, cell=one, provenance=made)
        if not alone:
            many.publish_all(list(some.values()), made)
        if draw.random() < 0.7:
            many.merge(made)
        graded_again(draw, single, many)
    assert len(many.blobs.list("bundles")) < 15 and any(len(one) > 4 for one in many._commits.bundles()), "some were merged"
    assert_same(single, many if number else Store(many.blobs))
    keys = {cell(seed).key for seed in range(0, 50, 3)}
    pd.testing.assert_frame_equal(single.read("predictions", cells=keys), many.read("predictions", cells=keys))
    pd.testing.assert_frame_equal(single.read("grades", ["credit"], cells=keys), many.read("grades", ["credit"], cells=keys))
    for store, name in ((single, "single"), (many, "many")):
        on_disk(store.blobs, tmp_path / name)
    same_in_sql(tmp_path / "single", tmp_path / "many")
    small_ones = MemoryBlobs(), MemoryBlobs()
    single.compact(small_ones[0])
    many.compact(small_ones[1])
    one, other = ({key: blobs.read(key) for key in blobs.list("parts")} for blobs in small_ones)
    assert one == other and one


def on_disk(blobs: Blobs, root: Path) -> None:
    for key in blobs.list():
        path = root / key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(blobs.read(key))


def graded_again(draw: random.Random, *stores: Store) -> None:
    """Another grader likes one of the cells."""
    counting = stores[0].graders()
    if not counting or draw.random() < 0.7:
        return
    key = draw.choice(sorted(counting))
    seed = next(seed for seed in range(50) if cell(seed).key == key)
    grader = f"{draw.random()}"
    for store in stores:
        samples = store.read("answers", ["sample"], cells={key})["sample"]
        if len(samples):
            grades = [replace(prediction(0).credited(grader), sample=sample, credit=0.25) for sample in samples]
            store.grade_again({"grades": grades}, cell=cell(seed), provenance=MADE)


def same_in_sql(*roots: Path) -> None:
    """DuckDB, which reads manifests by itself, finds the same."""
    for view in ("answers_given", "grades", "outcomes", "figures", "predictions", "published"):
        columns = "of_table, cell" if view == "published" else "*"
        one, other = (views.connect(root).sql(f"SELECT {columns} FROM {view} ORDER BY ALL").fetchall() for root in roots)
        assert one == other and one, view


def test_a_merge_that_is_read_while_it_happens_shows_nothing_twice(small: None, tmp_path: Path) -> None:
    """Both the small bundles and the one they became are there: for the store and for DuckDB a cell has its rows once."""
    blobs = LocalBlobs(tmp_path)
    store = Store(blobs)
    for seed in range(3):
        store.publish_all([found(seed)], MADE)
    before = {key: blobs.read(key) for key in blobs.list()}
    store.merge(MADE)
    assert len(blobs.list("bundles")) == 1 and len(blobs.list("parts")) == 4
    for key, data in before.items():
        blobs.replace(key, data)
    assert cells_of(blobs) == whole(0, 1, 2) and len(Store(blobs).read("outcomes")) == 3
    assert views.connect(tmp_path).sql("SELECT count(*), count(DISTINCT cell) FROM predictions").fetchall() == [(9, 3)]
    Store(blobs).merge(MADE)
    assert len(blobs.list("bundles")) == 1 and len(blobs.list("parts")) == 4, "what a stopped merge left is removed by the next"
    assert cells_of(blobs) == whole(0, 1, 2)


def test_a_reader_that_listed_before_a_merge_lists_again(small: None) -> None:
    class Merging(MemoryBlobs):
        """Merges when the first part is read."""

        armed = False

        def read(self, key: str) -> bytes:
            if self.armed and key.startswith("parts/"):
                self.armed = False
                Store(self).merge(MADE)
            return super().read(key)

    blobs = Merging()
    for seed in range(3):
        Store(blobs).publish_all([found(seed)], MADE)
    fresh, knowing = Store(blobs), Store(blobs)
    knowing.done()
    second = copied(blobs)
    blobs.armed = True
    assert len(fresh.read("predictions")) == 9 and fresh.problems == [] and not blobs.armed, "merged while parts are checked"
    for key in blobs.list("bundles"):
        blobs.delete(key)
    for key in second.list():
        blobs.replace(key, second.read(key))
    knowing.done()
    blobs.armed = True
    assert len(knowing.read("predictions")) == 9 and knowing.problems == [] and not blobs.armed, "merged while rows are read"


def test_many_small_commits_become_few_files(small: None) -> None:
    blobs = MemoryBlobs()
    store = Store(blobs)
    for seed in range(60):
        store.publish_all([found(seed, rows=1)], MADE)
        store.merge(MADE)
    assert len(blobs.list("bundles")) <= 60 / (12 * bundles.FULL) + 4 and len(blobs.list("parts")) == 4 * len(blobs.list("bundles"))
    assert len(Store(blobs).done()) == 60


# Stopped, killed, damaged, overtaken ---------------------------------------------------------------------------------


@pytest.mark.parametrize("late", [False, True])
def test_stopped_at_any_write_a_bundle_is_there_or_not(late: bool) -> None:
    blobs = MemoryBlobs()
    Store(blobs).publish_all([found(0), found(1)], MADE)
    for point in range(5):  # four parts and the manifest
        with pytest.raises(KeyboardInterrupt):
            Store(FailingBlobs(blobs, KeyboardInterrupt(), point, late)).publish_all([found(2), found(3)], MADE)
        assert cells_of(blobs) == whole(0, 1, *((2, 3) if late and point == 4 else ())) and Store(blobs).problems == []
    Store(blobs).publish_all([found(2), found(3)], MADE)
    assert cells_of(blobs) == whole(0, 1, 2, 3)


@pytest.mark.parametrize("late", [False, True])
def test_stopped_at_any_write_a_merge_loses_nothing(small: None, late: bool) -> None:
    base = MemoryBlobs()
    for seed in range(3):
        Store(base).publish_all([found(seed)], MADE)
    for point in (0, 2, 3, 4, 5, 6, 9, 10, 19):  # four parts, the manifest, and then three manifests and twelve parts are removed
        blobs = copied(base)
        with pytest.raises(KeyboardInterrupt):
            Store(FailingBlobs(blobs, KeyboardInterrupt(), point, late)).merge(MADE)
        assert cells_of(blobs) == whole(0, 1, 2) and Store(blobs).problems == []
        Store(blobs).merge(MADE)
        assert cells_of(blobs) == whole(0, 1, 2) and len(blobs.list("bundles")) == 1
    Store(FailingBlobs(base, KeyboardInterrupt(), 20)).merge(MADE)


WRITING = f"""
import sys, time
sys.path[:0] = {[str(Path(__file__).parent), str(Path(__file__).parents[1])]!r}
from test_store import MADE, OK, Store, cell, prediction
from diffprune.core import termination
from diffprune.store import bundles
from diffprune.store.writer import Writer
bundles.MOST_CELLS, bundles.TOGETHER = 12, 3
termination.handle()
with Writer(Store(sys.argv[1]), MADE, every_s=float(sys.argv[2])) as writer:
    for seed in range(int(sys.argv[3])):
        print(cell(seed).key, flush=True)
        writer.publish(cell(seed), {{"predictions": [prediction(i) for i in range(3)], "outcomes": [OK]}})
        print(cell(seed).key, flush=True)
        time.sleep(0.003)
    time.sleep(60)
"""


def writing(root: Path, every_s: float, cells: int, kill: int, enough: Callable[[int], bool]) -> list[str]:
    """A process that publishes cells, saying so before and after each, and is sent a signal once it has said enough: their keys."""
    command = [sys.executable, "-c", WRITING, str(root), str(every_s), str(cells)]
    writer = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert writer.stdout
    told = [writer.stdout.readline()]
    while not enough(len(told)):
        told.append(writer.stdout.readline())
    writer.send_signal(kill)
    told += [line for line in writer.stdout if line.endswith("\n")]
    assert writer.wait(timeout=60) != 0
    return list(dict.fromkeys(map(str.strip, told)))


def test_killed_at_a_random_moment(tmp_path: Path) -> None:
    """Only what was handed over last is lost, and every cell is whole."""
    bundle = tmp_path / "bundles"
    more = random.randint(5, 40)
    begun: list[int] = []

    def enough(number: int) -> bool:
        begun.extend([number] if not begun and bundle.is_dir() and any(bundle.glob("*.json")) else [])
        return bool(begun) and number >= begun[0] + more

    told = writing(tmp_path, 0.02, 10**9, signal.SIGKILL, enough)
    reader = Store(tmp_path)
    rows, done = reader.read("predictions").groupby("cell").size(), reader.done()
    assert reader.problems == [] and set(rows) == {3} and done == set(rows.index)
    assert done == set(told[: len(done)]), "no cell is missing before one that is there"


def test_a_terminated_process_publishes_what_waits(tmp_path: Path) -> None:
    told = writing(tmp_path, 1e6, 5, signal.SIGTERM, lambda number: number == 10)
    assert Store(tmp_path).done() == set(told) and len(told) == 5
    assert len(list((tmp_path / "bundles").iterdir())) == 1


@pytest.mark.parametrize("number", range(12))
def test_every_flipped_bit_costs_its_bundle(number: int) -> None:
    blobs, draw = MemoryBlobs(), random.Random(number)
    Store(blobs).publish_all([found(0), failed(1), found(2)], MADE)
    Store(blobs).publish({"outcomes": [outcome()]}, cell=cell(7), provenance=MADE)
    (key,) = blobs.list("bundles")
    victim = draw.choice([key, *(key for key in blobs.list("parts") if "bundle-" in key)])
    raw = bytearray(blobs.read(victim))
    place = draw.randrange(8 * len(raw))
    raw[place // 8] ^= 1 << place % 8
    blobs.replace(victim, bytes(raw))
    reader = Store(blobs)
    assert reader.done() == {cell(7).key} and set(reader.read("outcomes")["cell"]) == {cell(7).key}
    assert len(reader.problems) == 1 and victim in reader.problems[0] and blobs.read(f"quarantine/{victim}") == bytes(raw)
    assert "bundles/" in victim or "3 cells (" in reader.problems[0]
    Store(blobs).publish_all([found(0), found(2)], MADE)
    assert Store(blobs).done() == {cell(seed).key for seed in (0, 2, 7)} and Store(blobs).problems == []


def test_a_manifest_that_does_not_add_up_is_refused() -> None:
    """Whoever can compute checksums cannot make rows belong to nobody, nor a cell count twice, nor lead out of the store."""

    def made(change: Callable[[list[manifest.Commit], list[manifest.Part]], Any]) -> list[str]:
        blobs = MemoryBlobs()
        Store(blobs).publish_all([found(0), found(1)], MADE)
        (key,) = blobs.list("bundles")
        commits = manifest.parse_bundle(blobs.read(key), Path(key).stem)
        parts = list(commits[0].parts)
        commits = change(commits, parts) or commits
        blobs.replace(key, manifest.render_bundle(commits, parts))
        reader = Store(blobs)
        assert len(reader.read("predictions")) == len(reader.read("outcomes")) == 0
        return reader.problems

    def shorter(commits: list[manifest.Commit], parts: list[manifest.Part]) -> list[manifest.Commit]:
        return [replace(commits[0], spans=tuple((a, max(0, n - 1)) for a, n in commits[0].spans)), *commits[1:]]

    def outside(commits: list[manifest.Commit], parts: list[manifest.Part]) -> None:
        parts[0] = replace(parts[0], name="../../secret")

    assert "truncated, changed or foreign" in made(shorter)[0]
    assert "twice" in made(lambda commits, parts: [commits[0], replace(commits[1], cell=commits[0].cell)])[0]
    assert "is refused" in made(outside)[0]
    assert "describes another" in made(lambda commits, parts: [replace(one, bundle="bundle-x") for one in commits])[0]


def test_an_earlier_attempt_can_neither_publish_nor_merge(small: None) -> None:
    blobs = MemoryBlobs()
    with lock(blobs, run=MADE.run) as attempt:
        mine = replace(MADE, attempt=attempt)
        for seed in range(3):
            Store(blobs).publish_all([found(seed)], mine)
    with lock(blobs, run=MADE.run):
        before = blobs.list()
        for late in (lambda: Store(blobs).publish_all([found(9)], mine), lambda: Store(blobs).merge(mine)):
            with pytest.raises(Fenced):
                late()
        with pytest.raises(Fenced), Writer(Store(blobs), mine) as writer:
            writer.publish(*found(9))
        assert blobs.list() == before


@pytest.mark.parametrize("merging", [False, True])
def test_the_fence_falls_between_parts_and_manifest(small: None, merging: bool) -> None:
    class Overtaken(MemoryBlobs):
        """A newer attempt takes over while a part is written."""

        armed = False

        def replace(self, key: str, data: bytes | memoryview) -> None:
            super().replace(key, data)
            if self.armed and key.startswith("parts/"):
                self.armed = False
                super().create(f"locks/{MADE.run}/{MADE.attempt + 1}", b"")

    blobs = Overtaken()
    for seed in range(3):
        Store(blobs).publish_all([found(seed)], MADE)
    before, blobs.armed = set(blobs.list("bundles")), True
    with pytest.raises(Fenced):
        Store(blobs).merge(MADE) if merging else Store(blobs).publish_all([found(9)], MADE)
    assert set(blobs.list("bundles")) == before and cells_of(blobs) == whole(0, 1, 2)


# The thread that publishes -------------------------------------------------------------------------------------------


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_what_waits_is_published_in_time_and_at_any_end() -> None:
    blobs = MemoryBlobs()
    with Writer(Store(blobs), MADE, every_s=0.01) as writer:
        writer.publish(*found(0))
        until(lambda: cells_of(blobs) == whole(0))
    for number, error in enumerate((KeyboardInterrupt, ValueError)):
        with pytest.raises(error), Writer(Store(blobs), MADE, every_s=1e6) as writer:
            writer.publish(*found(1 + 2 * number))
            writer.publish(*found(2 + 2 * number))
            raise error
    assert cells_of(blobs) == whole(0, 1, 2, 3, 4) and len(blobs.list("bundles")) == 3, "two cells at a time"


def test_one_wrong_cell_does_not_take_others_along() -> None:
    blobs = MemoryBlobs()
    with pytest.raises(ValueError, match="'answer'"), Writer(Store(blobs), MADE) as writer:
        for number in range(5):
            bad: list[Any] = [replace(prediction(0), answer="\ud800")]
            writer.publish(*(found(number) if number != 2 else (cell(2), {"predictions": bad})))
    assert cells_of(blobs) == whole(0, 1, 3, 4)


def test_a_full_disk_is_told_and_what_waits_is_tried_once_more() -> None:
    class Filling(MemoryBlobs):
        full = True

        def replace(self, key: str, data: bytes | memoryview) -> None:
            if self.full and key.startswith("parts/"):
                raise OSError(errno.ENOSPC, "disk full, could not write", key)
            super().replace(key, data)

    blobs = Filling()
    with pytest.raises(OSError, match=r"disk full.*parts/"), Writer(Store(blobs), MADE, every_s=0.01) as writer:
        for seed in range(10**6):
            try:
                writer.publish(*found(seed % 5))
            except OSError:
                blobs.full = False
                raise
            time.sleep(0.005)
    assert Store(blobs).done() and Store(blobs).problems == []


def test_a_slow_disk_slows_the_sweep_and_does_not_fill_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diffprune.store.writer.MOST_WAITING", (3, 10**9))
    most, gate = [0], []

    class Slow(MemoryBlobs):
        def replace(self, key: str, data: bytes | memoryview) -> None:
            until(lambda: bool(gate) or not key.startswith("bundles/") or most[0] >= 3)
            super().replace(key, data)

    blobs = Slow()
    with Writer(Store(blobs), MADE, every_s=1e6) as writer:
        for seed in range(30):
            writer.publish(*found(seed, rows=1))
            most[0] = max(most[0], len(writer._waiting))
        gate.append(1)
    assert most[0] <= 4 and len(Store(blobs).done()) == 30


def test_bundles_take_a_fraction_of_the_files(tmp_path: Path) -> None:
    with Writer(Store(tmp_path), MADE) as writer:
        for seed in range(40):
            writer.publish(*found(seed))
    assert sum(path.is_file() for path in tmp_path.rglob("*")) == 5
    assert cells_of(tmp_path) == whole(*range(40))


def test_rows_of_no_answer_and_many_answers_keep_to_their_cells() -> None:
    """Spans of length 0 at the begin, within and at the end of a bundle."""
    blobs = MemoryBlobs()
    counts = {0: 0, 1: 5, 2: 0, 3: 1, 4: 0}
    Store(blobs).publish_all([found(seed, rows) for seed, rows in counts.items()], MADE)
    assert cells_of(blobs) == {cell(seed).key: [f"red {seed}"] * rows for seed, rows in counts.items() if rows}
    assert isinstance(found(1)[1]["predictions"][0], Prediction)
