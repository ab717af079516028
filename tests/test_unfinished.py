"""Answers of a cell that takes long outlive its driver: the next run asks for the last ones again, and gives the same table."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from diffprune.core.cell import Cell
from diffprune.core.records import Prediction
from diffprune.core.spec import Spec
from diffprune.distributed import sweep
from diffprune.distributed.liveness import Watch
from diffprune.evaluate.evaluator import evaluated
from diffprune.evaluate.progress import SweepProgress
from diffprune.evaluate.schedule import Batch, ListBatches, Work
from diffprune.io.blob_store import LocalBlobs
from diffprune.store import Store, writer
from diffprune.store import unfinished as module
from diffprune.store.unfinished import Kept, Unfinished
from tests.blob_stores import MemoryBlobs
from tests.records import evaluate_cell, prediction, provenance

QUESTIONS, BATCH, EACH_S = 80, 4, 0.05
LONG = [evaluate_cell(f"random(seed={seed})", benchmark="world('pope')", batch=BATCH) for seed in range(2)]
MADE = provenance()


@dataclass
class Thread:
    """A worker as a thread of the driver: with the calls of an actor, each of which takes a while. asked: hears of every batch."""

    asked: Callable[[Cell, Sequence[int]], None]

    def __post_init__(self) -> None:
        self.prepare, self.batches, self.answer = (Call(self, made) for made in (self._prepare, self._batches, self._answer))
        self.last: list[threading.Thread] = []

    def _prepare(self, *given: object) -> int:
        return 0

    def _batches(self, cell: Cell) -> Any:
        return [list(range(i, i + BATCH)) for i in range(0, QUESTIONS, BATCH)], 0.0

    def _answer(self, cell: Cell, index: Sequence[int]) -> Any:
        self.asked(cell, index)
        time.sleep(EACH_S)
        return {i: prediction(i, answer=f"{cell.pruner} {i}") for i in index}, EACH_S


@dataclass
class Call:
    """A method of it: `remote` asks, after all that was asked before, and gives what has a future."""

    worker: Thread
    made: Callable[..., Any]

    def remote(self, *given: Any) -> Call:
        answer: Future[Any] = Future()
        before = self.worker.last[-1:]

        def run() -> None:
            for other in before:
                other.join()
            answer.set_result(self.made(*given))

        self.worker.last = [thread := threading.Thread(target=run, daemon=True)]
        found = replace(self)
        found.future = lambda: answer  # type: ignore[attr-defined]
        thread.start()
        return found


def run(place: Path, log: Path, cells: Sequence[Cell] = LONG) -> None:
    """Sweep; every question that is asked is a line of the log."""

    def asked(cell: Cell, index: Sequence[int]) -> None:
        with log.open("a") as file:
            file.write("".join(f"{cell.key} {i}\n" for i in index))

    sweep.KEEP_S, store = 0.2, Store(place)
    with SweepProgress(cells, 0) as progress, writer.Writer(store, MADE, every_s=0.2) as writing:
        going = sweep._Run(Spec("embedded"), cells, 2, progress, writing)
        going.over(2, lambda: Thread(asked), lambda actor: None, Watch())


@pytest.mark.slow
def test_a_killed_driver_loses_seconds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it had kept is not asked for again, and the table is that of a run left alone."""
    place, log = tmp_path / "store", tmp_path / "log"
    code = f"from pathlib import Path; from tests.test_unfinished import run; run(Path({str(place)!r}), Path({str(log)!r}))"
    driver, known = subprocess.Popen([sys.executable, "-c", code], cwd=Path(__file__).parents[1]), 0
    try:
        while known < QUESTIONS:  # half of all
            assert driver.poll() is None
            time.sleep(0.01)
            known = sum(len(mine.rows) for mine in Unfinished(LocalBlobs(place), MADE.run).load(LONG, ()).values())
    finally:
        driver.send_signal(signal.SIGKILL)
        driver.wait()
    assert not Store(place).done(), "both cells are under way"
    before = Counter(log.read_text().splitlines())
    monkeypatch.setattr(sweep, "KEEP_S", sweep.KEEP_S)
    run(place, log)
    again = Counter(log.read_text().splitlines())
    assert len(again) == 2 * QUESTIONS, "every question was asked"
    twice = again.total() - len(again)
    assert twice <= before.total() - known < before.total()
    found = Store(place).read("predictions").sort_values(["cell", "sample"])
    run(tmp_path / "alone", tmp_path / "other")
    alone = Store(tmp_path / "alone").read("predictions").sort_values(["cell", "sample"])
    columns = ["cell", "sample", "answer", "credit"]
    assert found[columns].values.tolist() == alone[columns].values.tolist() and len(found) == 2 * QUESTIONS
    seconds = Store(place).read("outcomes")["seconds"]
    assert seconds.between(0.99 * EACH_S * QUESTIONS / BATCH, 1.5 * EACH_S * QUESTIONS / BATCH).all(), "those of both runs"
    assert not LocalBlobs(place).list(module.PREFIX), "what is published is not kept twice"


def kept(numbers: Sequence[int], seconds: float = 1.0) -> Kept:
    return Kept({i: prediction(i) for i in numbers}, seconds)


def test_what_is_kept_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    blobs, (one, two) = MemoryBlobs(), LONG
    keeping = Unfinished(blobs, "a")
    keeping.keep([(one, kept([3, 1])), (two, kept([0]))])
    keeping.keep([(one, kept([7]))])
    keeping.keep([(one, kept([7], 5.0))])
    found = Unfinished(blobs, "a").load(LONG, ())
    assert {key: set(mine.rows) for key, mine in found.items()} == {one.key: {1, 3, 7}, two.key: {0}}
    assert found[two.key] == kept([0]) and Unfinished(blobs, "b").load(LONG, ()) == {}
    assert Unfinished(blobs, "a").load([two], ()).keys() == {two.key} and len(blobs.list(module.PREFIX)) == 3, (
        "others may be asked later"
    )
    monkeypatch.setattr(module, "grader", lambda cell: "another")
    assert Unfinished(blobs, "a").load(LONG, ()) == {}, "grades of another grader are none"
    monkeypatch.undo()
    assert Unfinished(blobs, "a").load([two], {one.key}).keys() == {two.key} and len(blobs.list(module.PREFIX)) == 1
    (key,) = blobs.list(module.PREFIX)
    blobs.replace(key, blobs.read(key)[:-1])
    assert Unfinished(blobs, "a").load(LONG, ()) == {} and not blobs.list(module.PREFIX), "what is damaged counts as never asked"


def test_many_become_one_and_none_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_BLOBS", 4)
    blobs, (one, two) = MemoryBlobs(), LONG
    keeping = Unfinished(blobs, "a")
    for number in range(10):
        keeping.keep([(one, kept([number]))])
        keeping.keep([(two, kept([number]))])
        assert len(blobs.list(module.PREFIX)) <= 5
    assert {key: len(mine.rows) for key, mine in Unfinished(blobs, "a").load(LONG, ()).items()} == {one.key: 10, two.key: 10}
    keeping.forget([one.key])
    keeping.keep([(two, kept([10]))] * 5)
    keeping.forget([two.key])
    assert not blobs.list(module.PREFIX)


@pytest.mark.parametrize("workers", [1, 3])
def test_only_what_is_missing_is_handed_out(workers: int) -> None:
    """Of one cell nothing is known, of one the first and half of the second batch, of one all."""
    new, some, whole = cells = [evaluate_cell(f"random(seed={seed})", batch=2) for seed in range(3)]
    work = Work(cells, workers)
    work.resumed(some.key, {i: prediction(i) for i in range(3)})
    work.resumed(whole.key, {i: prediction(i) for i in range(6)})
    assert work.held_rows == 9 and not work.unkept(last=True)
    asked, ended, complete = list[tuple[str, int]](), set[str](), 0
    while work.unfinished:
        piece = work.next(complete % workers)
        if isinstance(piece, ListBatches):
            for cell, rows in work.listed(piece, [[0, 1], [2, 3], [4, 5]]):
                assert cell == whole and set(rows) == set(range(6))
                ended.add(cell.key)
        elif isinstance(piece, Batch):
            asked.append((piece.cell.key, piece.number))
            if rows := work.answered(piece, {i: prediction(i) for i in piece.index}):
                assert set(rows) == set(range(6)) and evaluated(piece.cell)
                ended.add(piece.cell.key)
        complete += 1
    assert ended == {cell.key for cell in cells} and not work.waiting and work.held_rows == 0
    assert Counter(asked) == Counter([(new.key, 0), (new.key, 1), (new.key, 2), (some.key, 1), (some.key, 2)])


def test_answers_are_kept_at_the_second_look() -> None:
    (cell,) = cells = LONG[:1]
    work = Work(cells, 1)
    listing = work.next(0)
    assert isinstance(listing, ListBatches)
    work.listed(listing, [[0], [1], [2]])

    def answer() -> Prediction:
        batch = work.next(0)
        assert isinstance(batch, Batch)
        work.answered(batch, found := {i: prediction(i) for i in batch.index})
        return found[batch.index[0]]

    first = answer()
    assert work.unkept() == []
    second = answer()
    assert [list(rows.values()) for _, rows in work.unkept()] == [[first]]
    assert [(one, list(rows.values())) for one, rows in work.unkept(last=True)] == [(cell, [second])]
    answer()
    assert work.unkept(last=True) == [], "it is finished"
