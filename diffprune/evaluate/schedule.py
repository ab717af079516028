"""Greedy scheduling of batches over workers with image affinity: which batch of which cell a worker answers next.

Cells that ask the same questions go through them together: a worker takes one batch, answers it for every cell of the group,
heaviest first, and so encodes its images once. Workers spread over the benchmarks while there are enough of them, then share what
is left, at the end a single batch of a single cell. Pure bookkeeping: it knows neither Ray nor the model.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from diffprune.core.budget import Above
from diffprune.core.cell import Cell, Questions
from diffprune.core.records import Prediction
from diffprune.evaluate.evaluator import evaluated

HELD_ROWS = 200_000  # answers of unfinished cells in the driver, some 700 bytes each: what it holds, and what its death costs
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


@dataclass(eq=False)
class _BatchQueue:
    """A batch that has been begun, and the cells that still ask it."""

    number: int
    cells: deque[Cell]


@dataclass(eq=False)
class _Queue:
    """Cells that ask the same questions. waiting: not begun; group: those under way together; fresh: batches nobody has begun."""

    waiting: deque[Cell]
    batches: list[list[int]] | None = None
    questions: int = 0
    listing: int = 0  # workers that are finding out the batches
    group: list[Cell] = field(default_factory=list)
    fresh: deque[int] = field(default_factory=deque)
    sheets: list[_BatchQueue] = field(default_factory=list)

    @property
    def left(self) -> int:
        """Batches that can be handed out, over all cells."""
        begun = len(self.fresh) * len(self.group) + sum(len(sheet.cells) for sheet in self.sheets)
        return begun + len(self.waiting) * len(self.batches or ())

    def sheet(self, most: int) -> _BatchQueue:
        """One to work at: a fresh one, else the one of another with most to do; a group ends before the next `most` cells begin."""
        assert self.batches is not None and self.left
        if not self.fresh and not self.sheets:
            self.group = [self.waiting.popleft() for _ in range(min(most, len(self.waiting)))]
            self.fresh = deque(reversed(range(len(self.batches))))  # the longest questions first
        if self.fresh:
            self.sheets.append(_BatchQueue(self.fresh.popleft(), deque(self.group)))
            return self.sheets[-1]
        return max(self.sheets, key=lambda sheet: len(sheet.cells))

    def take(self, sheet: _BatchQueue) -> Batch:
        assert self.batches is not None
        cell = sheet.cells.popleft()
        self._tidy()
        return Batch(cell, sheet.number, self.batches[sheet.number])

    def back(self, batch: Batch) -> None:
        for sheet in self.sheets:
            if sheet.number == batch.number:
                return sheet.cells.appendleft(batch.cell)
        self.sheets.append(_BatchQueue(batch.number, deque([batch.cell])))

    def drop(self, cell: Cell) -> None:
        for cells in (self.waiting, self.group, *(sheet.cells for sheet in self.sheets)):
            if cell in cells:
                cells.remove(cell)
        self._tidy()
        if not self.group:
            self.fresh.clear()

    def _tidy(self) -> None:
        self.sheets = [sheet for sheet in self.sheets if sheet.cells]


class Work:
    """The cells of one sweep: what is to be handed out, and the answers to those that are not finished.

    workers: how many share it; held: answers it may hold, unless a single cell per worker has more.
    """

    def __init__(self, cells: Sequence[Cell], workers: int, held: int = HELD_ROWS) -> None:
        self.workers, self.held = workers, held
        ordered = sorted(cells, key=lambda cell: (-weight(cell), cell.key))
        self._found: dict[Cell, dict[int, Prediction]] = {cell: {} for cell in ordered}
        self._sets: dict[QuestionSet, _Queue] = {}
        for cell in ordered:
            self._sets.setdefault(question_set(cell), _Queue(deque())).waiting.append(cell)
        self._sets = dict(sorted(self._sets.items(), key=lambda item: -sum(map(weight, item[1].waiting))))
        self._at: dict[int, tuple[_Queue, _BatchQueue | None]] = {}

    @property
    def unfinished(self) -> int:
        """Cells without all their answers."""
        return len(self._found)

    @property
    def held_rows(self) -> int:
        """Answers of unfinished cells."""
        return sum(map(len, self._found.values()))

    @property
    def waiting(self) -> bool:
        """Whether there is something to hand out."""
        return any(one.left or (one.batches is None and not one.listing) for one in self._sets.values())

    @property
    def plenty(self) -> bool:
        """Whether a worker may have a batch waiting: near the end it would wait behind another one, while somebody rests."""
        return sum(one.left for one in self._sets.values()) > AHEAD * self.workers

    def questions(self, cell: Cell) -> int:
        """Of a cell whose question set is listed."""
        return self._sets[question_set(cell)].questions

    def next(self, worker: int) -> ListBatches | Batch | None:
        """The best piece of work for this worker now; None: there is nothing to hand out."""
        here, sheet = self._at.get(worker, (None, None))
        if here is None or sheet is None or not sheet.cells:
            here = self._queue(here)
            if here is None:
                return None
            if here.batches is None:
                here.listing += 1
                self._at[worker] = here, None
                return ListBatches(here.waiting[0])
            sheet = here.sheet(max(1, self.held // (self.workers * here.questions)))
        self._at[worker] = here, sheet
        return here.take(sheet)

    def _queue(self, here: _Queue | None) -> _Queue | None:
        """Where a worker goes on: where it is, else a set of its own, else where most is left, else where one is listed."""
        if here is not None and here.left:
            return here
        queues = self._sets.values()
        if own := [one for one in queues if one.batches is None and not one.listing]:
            return own[0]
        if shared := [one for one in queues if one.left]:
            return max(shared, key=lambda one: one.left)
        return next((one for one in queues if one.batches is None), None)  # it will need the questions anyhow

    def listed(self, listing: ListBatches, batches: list[list[int]]) -> None:
        """The batches of a question set are known. Of several workers that were asked the first counts, as all say the same."""
        here = self._sets.get(question_set(listing.cell))
        if here is not None and here.batches is None:
            here.batches, here.questions = batches, sum(map(len, batches))

    def answered(self, batch: Batch, rows: Mapping[int, Prediction]) -> dict[int, Prediction] | None:
        """Keep the answers to a batch; all answers of the cell where it was the last, None before and of a cell given up."""
        if batch.cell not in self._found:
            return None
        found = self._found[batch.cell]
        found |= rows
        if len(found) < self.questions(batch.cell):
            return None
        return self._found.pop(batch.cell)

    def returned(self, worker: int, piece: ListBatches | Batch) -> None:
        """A worker was lost with this piece of work: it is handed out again, the next time to whoever asks first."""
        self._at.pop(worker, None)
        here = self._sets.get(question_set(piece.cell))
        if here is None or piece.cell not in self._found:
            return
        if isinstance(piece, Batch):
            here.back(piece)
        else:
            here.listing -= 1

    def given_up(self, piece: ListBatches | Batch) -> list[Cell]:
        """Forget the cell of this batch, or all cells whose batches cannot be listed; those it meant, each told once."""
        here = self._sets.get(question_set(piece.cell))
        if here is None or (isinstance(piece, ListBatches) and here.batches is not None):
            return []
        cells = [piece.cell] if isinstance(piece, Batch) else list(here.waiting)
        lost = [cell for cell in cells if self._found.pop(cell, None) is not None]
        for cell in lost:
            here.drop(cell)
        if isinstance(piece, ListBatches):
            del self._sets[question_set(piece.cell)]
        return lost
