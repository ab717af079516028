"""What one answered batch costs the driver: the same for few workers and many, few question sets and many, few cells and many."""

from __future__ import annotations

import random
import sys
from dataclasses import replace
from types import FrameType
from typing import Any

import pytest

from diffprune.core.cell import Cell
from diffprune.core.records import Prediction
from diffprune.core.spec import Spec
from diffprune.evaluate import progress, schedule
from diffprune.evaluate.evaluator import evaluated
from diffprune.evaluate.schedule import Batch, ListBatches, Work, weight
from tests.records import evaluate_cell, prediction

ROW = prediction()


def cells(topics: int, each: int) -> list[Cell]:
    """Cells about benchmarks nobody opens, `each` for every topic; half of them prune."""
    first = [evaluate_cell(f"random(seed={seed})", budget=("Keep(8)", "Keep(500)")[seed % 2], batch=2) for seed in range(each)]
    found = []
    for topic in range(topics):
        for cell in first:
            asked = replace(evaluated(cell).questions, benchmark=Spec(f"t{topic}"))
            found.append(replace(cell, subject=replace(evaluated(cell), questions=asked)))
    return found


def lines(run: Any, *modules: Any) -> int:
    """Lines of Python of these modules that a call goes through."""
    counted, files = [0], {module.__file__ for module in modules}

    def trace(frame: FrameType, event: str, arg: object) -> Any:
        if frame.f_code.co_filename not in files:
            return None
        counted[0] += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        run()
    finally:
        sys.settrace(before)
    return counted[0]


def swept(work: Work, workers: int, batches: int, rng: random.Random, shown: progress.SweepProgress | None = None) -> int:
    """Answer everything in a random order, as the driver hands it out: pieces of work."""
    asked: dict[int, ListBatches | Batch] = {}
    pieces, free = 0, list(range(workers))
    while work.unfinished:
        for worker in free:
            if work.waiting and worker not in asked and (piece := work.next(worker)):
                asked[worker] = piece
        chosen = rng.choice(list(asked))
        piece, pieces, free = asked.pop(chosen), pieces + 1, [chosen]
        if isinstance(piece, ListBatches):
            work.listed(piece, [[2 * i, 2 * i + 1] for i in range(batches)])
            if shown:
                shown.listed(piece.cell, 2 * batches)
            free = list(range(workers))
            continue
        complete = work.answered(piece, dict.fromkeys(piece.index, ROW))
        if shown:
            shown.batch(piece.cell, len(piece.index))
            if complete:
                shown.cell(piece.cell)
    return pieces


def test_a_batch_costs_the_same_for_any_number_of_workers_and_question_sets() -> None:
    """Lines of Python, which no busy machine makes more of: most where all workers share what is left at the end."""

    def cost(topics: int, each: int, workers: int) -> float:
        asked, rng = cells(topics, each), random.Random(0)
        work, pieces = Work(asked, workers), [0]

        def run() -> None:
            pieces[0] = swept(work, workers, 8, rng)

        counted = lines(run, schedule)
        assert pieces[0] >= len(asked) * 8
        return counted / pieces[0]

    few = cost(4, 4, 4)
    assert cost(2, 64, 64) < 2 * few and cost(120, 2, 8) < 2 * few and cost(60, 4, 64) < 2 * few


def test_progress_costs_the_same_for_any_number_of_cells(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "LINE_S", 0.0)  # every batch says how far it is

    def cost(count: int) -> float:
        asked = cells(4, count)
        shown = progress.SweepProgress(asked, 0)

        def run() -> None:
            for cell in asked:
                shown.batch(cell, 2)
                shown.cell(cell)

        return lines(run, progress) / count

    assert cost(40) < 1.3 * cost(5)


@pytest.mark.parametrize("number", range(3))
def test_counts_are_the_sums(number: int) -> None:
    """What is counted as it comes equals what a look at everything says: with workers that die, and cells that are given up."""
    rng = random.Random(number)
    asked = cells(5, 4)
    work, shown = Work(asked, 3, held=40), progress.SweepProgress(asked, 0)
    held: dict[int, list[ListBatches | Batch]] = {worker: [] for worker in range(3)}
    rows: dict[str, dict[int, Prediction]] = {cell.key: {} for cell in asked}
    sizes: dict[str, int] = {}
    ended: set[str] = set()
    while work.unfinished:
        queues = {id(one.queue): one.queue for one in work._open.values()}.values()
        assert work._left == sum(one.left for one in queues)
        for one in queues:
            begun = len(one.fresh) * len(one.group) + sum(len(sheet.cells) for sheet in one.sheets.values())
            assert one.left == begun + len(one.waiting) * len(one.batches or ())
        assert work.held_rows == sum(len(found) for key, found in rows.items() if key not in ended)
        assert shown.share() == pytest.approx(by_hand(asked, rows, sizes, ended))
        worker = rng.randrange(3)
        if len(held[worker]) < 2 and work.waiting and (piece := work.next(worker)):
            held[worker].append(piece)
        elif held[worker] and rng.random() < 0.1:
            for piece in held[worker]:
                work.returned(worker, piece)
            held[worker].clear()
        elif held[worker]:
            piece, name = held[worker].pop(0), None
            if isinstance(piece, ListBatches):
                name = evaluated(piece.cell).questions.benchmark.name
                work.listed(piece, [[2 * i, 2 * i + 1] for i in range(4)])
                if name not in sizes:
                    sizes[name] = 8
                    shown.listed(piece.cell, 8)
            elif rng.random() < 0.03:
                for cell in work.given_up(piece):
                    ended.add(cell.key)
                    shown.cell(cell)
            else:
                complete = work.answered(piece, dict.fromkeys(piece.index, ROW))
                if piece.cell.key not in ended:
                    rows[piece.cell.key] |= dict.fromkeys(piece.index, ROW)
                    shown.batch(piece.cell, len(piece.index))
                if complete:
                    assert set(complete) == set(range(8))
                    ended.add(piece.cell.key)
                    shown.cell(piece.cell)
    assert ended == set(rows) and work.held_rows == 0 and not work.waiting and shown.share() == pytest.approx(1)


def by_hand(asked: list[Cell], rows: dict[str, dict[int, Prediction]], sizes: dict[str, int], ended: set[str]) -> float:
    """The share of all the work that is done, from everything."""
    total = past = 0.0
    for cell in asked:
        size = sizes.get(evaluated(cell).questions.benchmark.name, schedule.NOMINAL_QUESTIONS)
        total += weight(cell, size)
        past += weight(cell, 1) * (size if cell.key in ended else len(rows[cell.key]))
    return past / total


def test_a_benchmark_that_nobody_can_list_is_given_up_whole() -> None:
    asked = cells(2, 300)
    work = Work(asked, 1)
    piece = work.next(0)
    assert isinstance(piece, ListBatches)
    lost = work.given_up(piece)
    assert len(lost) == 300 and work.unfinished == 300 and work.given_up(piece) == []
    other = work.next(0)
    assert isinstance(other, ListBatches) and other.cell.key not in {cell.key for cell in lost}
