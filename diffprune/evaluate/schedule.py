"""Greedy scheduling of batches over workers with image affinity: which batch of which cell a worker answers next.

Cells that ask the same questions go through them together: a worker takes one batch, answers it for every cell of the group,
heaviest first, and so encodes its images once. Workers spread over the benchmarks while there are enough of them, then share what
is left, at the end a single batch of a single cell. Pure bookkeeping: it knows neither Ray nor the model.
"""

from __future__ import annotations

import contextlib
import math
from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush, heapreplace
from itertools import count, islice
from typing import Generic, Protocol, TypeVar

from diffprune.core.budget import Above
from diffprune.core.cell import Cell, Questions
from diffprune.core.records import Prediction
from diffprune.evaluate.evaluator import evaluated

HELD_ROWS = 200_000  # answers of unfinished cells in the driver, some 700 bytes each
AHEAD = 16  # batches left per worker from which on each has its next one before it is done, so that it need not ask
NOMINAL_TOKENS = 576  # of an unpruned image, to compare counts with shares when cells are put in order
NOMINAL_QUESTIONS = 1000  # of a benchmark nobody has opened yet


@dataclass(frozen=True)
class QuestionSet:
    """What decides the batches of a cell: cells with the same question set ask the same questions, batch by batch."""

    questions: Questions
    batch: int


def question_set(cell: Cell) -> QuestionSet:
    """The questions a cell asks and how many at a time."""
    spec = evaluated(cell)
    return QuestionSet(spec.questions, spec.batch)


def most_batches(cells: Sequence[Cell]) -> float:
    """Batches in all, as far as limits tell: more workers than that would find nothing to do."""
    asked = [question_set(cell) for cell in cells]
    return sum(math.ceil(a.questions.limit / a.batch) if a.questions.limit else math.inf for a in asked)


def weight(cell: Cell, questions: int | None = None) -> float:
    """How long a cell takes beside the others, roughly: an order for the queue, and the estimate of the time left."""
    return (0.2 + _share(cell)) * (questions or evaluated(cell).questions.limit or NOMINAL_QUESTIONS)


def _share(cell: Cell) -> float:
    """Of the visual tokens, roughly."""
    spec = evaluated(cell)
    if spec.blind:
        return 0.0
    if isinstance(spec.budget, Above):
        return 0.5
    return spec.budget.count(NOMINAL_TOKENS) / NOMINAL_TOKENS


@dataclass(frozen=True)
class ListBatches:
    """A piece of work: say what the batches of this cell are, and with it of all cells of its question set."""

    cell: Cell

    @property
    def name(self) -> object:
        """What tells it from other pieces of work."""
        return question_set(self.cell)


@dataclass(frozen=True)
class Batch:
    """A piece of work: answer these questions for this cell. number: which of the question set's batches they are."""

    cell: Cell
    number: int
    index: Sequence[int]

    @property
    def name(self) -> object:
        """What tells it from other pieces of work."""
        return self.cell.key, self.number


class _Counted(Protocol):
    @property
    def left(self) -> int: ...


C = TypeVar("C", bound=_Counted)


class _MostLeft(Generic[C]):
    """Things by how much is left of each, without looking at all: a heap whose entries may be larger than the truth, never smaller.

    What becomes less is looked at when it comes up, so whoever makes one more has to `put` it again.
    """

    def __init__(self) -> None:
        self._heap, self._number = list[tuple[int, int, C]](), count()

    def put(self, one: C) -> None:
        heappush(self._heap, (-one.left, next(self._number), one))

    def most(self) -> C | None:
        """The one with most left; None where nothing is left of any."""
        while self._heap:
            said, number, one = self._heap[0]
            if -said == one.left > 0:
                return one
            if one.left:
                heapreplace(self._heap, (-one.left, number, one))
            else:
                heappop(self._heap)
        return None


@dataclass(eq=False)
class _BatchQueue:
    """A batch that has been begun, and the cells that still ask it."""

    number: int
    cells: deque[Cell]

    @property
    def left(self) -> int:
        """Cells that ask it."""
        return len(self.cells)


@dataclass(eq=False)
class _Queue:
    """Cells that ask the same questions. waiting: not begun; group: those under way together, by key; fresh: batches nobody has
    begun; known: batches of cells, by (key, number), that an earlier run has answered; left: batches that can be handed out, over
    all cells."""

    waiting: deque[Cell]
    batches: list[list[int]] | None = None
    questions: int = 0
    listing: int = 0  # workers that are finding out the batches
    group: dict[str, Cell] = field(default_factory=dict)
    fresh: deque[int] = field(default_factory=deque)
    known: set[tuple[str, int]] = field(default_factory=set)
    sheets: dict[int, _BatchQueue] = field(default_factory=dict)
    order: _MostLeft[_BatchQueue] = field(default_factory=lambda: _MostLeft[_BatchQueue]())
    left: int = 0

    def sheet(self, most: int) -> _BatchQueue:
        """One to work at: a fresh one, else the one of another with most to do; a group ends before the next `most` cells begin."""
        assert self.batches is not None and self.left
        while True:
            if not self.fresh and not self.sheets:
                begun = [self.waiting.popleft() for _ in range(min(most, len(self.waiting)))]
                self.group = {cell.key: cell for cell in begun}
                self.fresh = deque(reversed(range(len(self.batches))))  # the longest questions first
            while self.fresh:
                number = self.fresh.popleft()
                if more := self._asking(number):
                    return self._begun(number, more)
            if found := self.order.most():
                return found

    def _asking(self, number: int) -> deque[Cell]:
        """The cells of the group that ask a batch nobody has begun."""
        if not self.known:
            return deque(self.group.values())
        return deque(cell for key, cell in self.group.items() if (key, number) not in self.known)

    def _begun(self, number: int, more: deque[Cell]) -> _BatchQueue:
        """The batch is to be asked for more cells; those of an earlier group may have come back from a worker that was lost."""
        sheet = self.sheets.setdefault(number, _BatchQueue(number, deque()))
        sheet.cells.extend(more)
        self.order.put(sheet)
        return sheet

    def take(self, sheet: _BatchQueue) -> Batch:
        assert self.batches is not None
        cell = sheet.cells.popleft()
        self.left -= 1
        if not sheet.cells:
            del self.sheets[sheet.number]
        return Batch(cell, sheet.number, self.batches[sheet.number])

    def back(self, batch: Batch) -> None:
        self.left += 1
        self._begun(batch.number, deque([batch.cell])).cells.rotate(1)  # to the front: its cell waits the longest

    def drop(self, cell: Cell) -> int:
        """Forget a cell that was begun; how many of its batches are not handed out any more."""
        before = self.left
        if self.group.pop(cell.key, None) is not None:
            self.left -= sum((cell.key, number) not in self.known for number in self.fresh)
        for sheet in list(self.sheets.values()):
            if cell in sheet.cells:
                sheet.cells.remove(cell)
                self.left -= 1
                if not sheet.cells:
                    del self.sheets[sheet.number]
        if not self.group:
            self.fresh.clear()
        return before - self.left


@dataclass(eq=False)
class _Open:
    """A cell that is not finished: where its questions are, and its answers so far, in the order they came; kept: how many of
    them are durable; seen: how many were there at the last look."""

    cell: Cell
    queue: _Queue
    found: dict[int, Prediction] = field(default_factory=dict)
    kept: int = 0
    seen: int = 0


class Work:
    """The cells of one sweep: what is to be handed out, and the answers to those that are not finished.

    What one call costs depends neither on the workers nor on the cells, and on the number of question sets by its logarithm, but
    for the cells that are given up.

    workers: how many share it; held: answers it may hold, unless a single cell per worker has more.
    """

    def __init__(self, cells: Sequence[Cell], workers: int, held: int = HELD_ROWS) -> None:
        self.workers, self.held = workers, held
        self.held_rows = 0  # answers of unfinished cells
        self._left = 0  # batches that can be handed out, of all question sets that are listed
        weights = {cell.key: weight(cell) for cell in cells}
        every: dict[QuestionSet, _Queue] = {}
        self._open: dict[str, _Open] = {}
        self._begun: dict[str, _Open] = {}  # those that have answers
        totals: dict[QuestionSet, float] = defaultdict(float)
        for cell in sorted(cells, key=lambda cell: (-weights[cell.key], cell.key)):
            asked = question_set(cell)
            totals[asked] += weights[cell.key]
            queue = every.setdefault(asked, _Queue(deque()))
            queue.waiting.append(cell)
            self._open[cell.key] = _Open(cell, queue)
        order = sorted(every, key=lambda asked: -totals[asked])
        self._unlisted: deque[_Queue] = deque(every[asked] for asked in order)  # nobody finds out their batches yet
        self._listing: dict[_Queue, None] = {}  # somebody does
        self._listed: _MostLeft[_Queue] = _MostLeft()
        self._at: dict[int, tuple[_Queue, _BatchQueue | None]] = {}

    @property
    def unfinished(self) -> int:
        """Cells without all their answers."""
        return len(self._open)

    @property
    def waiting(self) -> bool:
        """Whether there is something to hand out."""
        return bool(self._left or self._unlisted)

    @property
    def plenty(self) -> bool:
        """Whether a worker may have a batch waiting: near the end it would wait behind another one, while somebody rests."""
        return self._left > AHEAD * self.workers

    def next(self, worker: int) -> ListBatches | Batch | None:
        """The best piece of work for this worker now; None: there is nothing to hand out."""
        here, sheet = self._at.get(worker, (None, None))
        if here is None or sheet is None or not sheet.cells:
            here = self._queue(here)
            if here is None:
                return None
            if here.batches is None:
                here.listing += 1
                self._listing[here] = None
                self._at[worker] = here, None
                return ListBatches(here.waiting[0])
            sheet = here.sheet(max(1, self.held // (self.workers * max(1, here.questions))))
        self._at[worker] = here, sheet
        self._left -= 1
        return here.take(sheet)

    def _queue(self, here: _Queue | None) -> _Queue | None:
        """Where a worker goes on: where it is, else a set of its own, else where most is left, else where one is listed."""
        if here is not None and here.left:
            return here
        if self._unlisted:
            return self._unlisted.popleft()
        return self._listed.most() or next(iter(self._listing), None)  # it will need the questions anyhow

    def resumed(self, key: str, rows: Mapping[int, Prediction]) -> None:
        """Answers of a cell that an earlier run has kept; to be told before anything is handed out."""
        mine = self._begun[key] = self._open[key]
        mine.found |= rows
        mine.kept = mine.seen = len(mine.found)
        self.held_rows += len(mine.found)

    def listed(self, listing: ListBatches, batches: list[list[int]]) -> list[tuple[Cell, dict[int, Prediction]]]:
        """The batches of a question set are known. Of several workers that were asked the first counts, as all say the same.
        Returns cells, with all their answers, of which an earlier run had kept every one."""
        here = self._where(listing.cell)
        if here is None or here.batches is not None:
            return []
        here.batches, here.questions = batches, sum(map(len, batches))
        begun = [mine for cell in here.waiting if (mine := self._begun.get(cell.key))] if self._begun else []
        complete = [mine for mine in begun if len(mine.found) >= here.questions]
        for mine in complete:
            here.waiting.remove(mine.cell)
        for mine in begun:
            if len(mine.found) < here.questions:
                whole = [number for number, index in enumerate(batches) if mine.found.keys() >= set(index)]
                here.known.update((mine.cell.key, number) for number in whole)
        here.left = len(batches) * len(here.waiting) - len(here.known)
        self._left += here.left
        self._listing.pop(here, None)
        self._listed.put(here)
        return [(mine.cell, self._closed(mine)) for mine in complete]

    def _where(self, cell: Cell) -> _Queue | None:
        found = self._open.get(cell.key)
        return found.queue if found else None

    def answered(self, batch: Batch, rows: Mapping[int, Prediction]) -> dict[int, Prediction] | None:
        """Keep the answers to a batch; all answers of the cell where it was the last, None before and of a cell given up."""
        mine = self._open.get(batch.cell.key)
        if mine is None:
            return None
        self._begun[mine.cell.key] = mine
        before = len(mine.found)
        mine.found.update(rows)
        self.held_rows += len(mine.found) - before
        if len(mine.found) < mine.queue.questions:
            return None
        return self._closed(mine)

    def _closed(self, mine: _Open) -> dict[int, Prediction]:
        del self._open[mine.cell.key]
        self._begun.pop(mine.cell.key, None)
        self.held_rows -= len(mine.found)
        return mine.found

    def unkept(self, last: bool = False) -> list[tuple[Cell, dict[int, Prediction]]]:
        """Answers to keep of cells that are not finished: those that were there at the look before this one, so that short cells
        cost nothing, or all at the `last` look. Each is given once."""
        found = []
        for mine in self._begun.values():
            until = len(mine.found) if last else mine.seen
            if mine.kept < until:
                found.append((mine.cell, dict(islice(mine.found.items(), mine.kept, until))))
                mine.kept = until
            mine.seen = len(mine.found)
        return found

    def returned(self, worker: int, piece: ListBatches | Batch) -> None:
        """A worker was lost with this piece of work: it is handed out again, the next time to whoever asks first."""
        self._at.pop(worker, None)
        here = self._where(piece.cell)
        if here is None:
            return
        if isinstance(piece, Batch):
            here.back(piece)
            self._left += 1
            self._listed.put(here)
            return
        here.listing -= 1
        if not here.listing and here.batches is None:
            self._listing.pop(here, None)
            self._unlisted.appendleft(here)

    def given_up(self, piece: ListBatches | Batch) -> list[Cell]:
        """Forget the cell of this batch, or all cells whose batches cannot be listed; those it meant, each told once."""
        here = self._where(piece.cell)
        if here is None or (isinstance(piece, ListBatches) and here.batches is not None):
            return []
        if isinstance(piece, Batch):
            self._left -= here.drop(piece.cell)
            lost = [piece.cell]
        else:
            lost, here.waiting = list(here.waiting), deque()
            self._listing.pop(here, None)
            with contextlib.suppress(ValueError):
                self._unlisted.remove(here)
        for cell in lost:
            self._closed(self._open[cell.key])
        return lost
