"""How far a sweep is: a bar on a terminal, a line now and then elsewhere. The time left follows the weights of what is left."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from diffprune.core.cell import Cell
from diffprune.evaluate.schedule import NOMINAL_QUESTIONS, QuestionSet, question_set, weight

LINE_S = 5.0  # at most one line in this time where the output is no terminal
BAR_S = 0.5  # and the bar is drawn anew at most once in this


@dataclass
class _Set:
    """Cells that ask the same questions: how many, and the sum of their rates."""

    questions: int
    rate: float = 0.0


@dataclass
class _Cell:
    """One that is not finished. rate: its weight for one question; answered: questions."""

    rate: float
    asked: _Set
    answered: int = 0


class SweepProgress:
    """Cells done and questions answered, shown while a `with` block lasts.

    todo: cells to do; skipped: cells that were done before; tell: hears every line, also those a terminal shows as a bar.
    """

    def __init__(self, todo: Sequence[Cell], skipped: int, tell: Callable[[str], None] | None = None) -> None:
        self.tell = tell
        self.skipped, self.batches = skipped, 0
        self.cells, self.finished = len(todo), 0
        self.total = self.past = 0.0  # questions times the rates of their cells, counted as they come
        self.open: dict[str, _Cell] = {}
        self.sets: dict[QuestionSet, _Set] = {}
        for cell in todo:
            asked, rate = question_set(cell), weight(cell, 1)
            here = self.sets.setdefault(asked, _Set(asked.questions.limit or NOMINAL_QUESTIONS))
            here.rate += rate
            self.total += rate * here.questions
            self.open[cell.key] = _Cell(rate, here)
        self.start = self.shown = time.perf_counter()
        self.first: tuple[float, float] | None = None  # (time, share) of the first batch: before it, workers load the model
        self.bar = Progress(
            TextColumn("evaluate"),
            BarColumn(),
            TextColumn("{task.description}"),
            TimeElapsedColumn(),
            disable=not sys.stdout.isatty(),
        )
        self.task = self.bar.add_task("", total=1.0)

    def __enter__(self) -> SweepProgress:
        self.bar.start()
        return self

    def __exit__(self, *raised: object) -> None:
        self.bar.stop()

    def listed(self, cell: Cell, questions: int) -> None:
        """The cells of this one's question set have so many questions."""
        here = self.sets[question_set(cell)]
        self.total += here.rate * (questions - here.questions)
        here.questions = questions

    def resumed(self, key: str, questions: int) -> None:
        """So many questions of a cell were answered by an earlier run."""
        mine = self.open[key]
        mine.answered += questions
        self.past += mine.rate * questions

    def batch(self, cell: Cell, questions: int) -> None:
        """A batch of so many questions was answered."""
        self.batches += 1
        if cell.key in self.open:
            self.resumed(cell.key, questions)
        self.first = self.first or (time.perf_counter(), self.share())
        self._show()

    def cell(self, cell: Cell) -> None:
        """A cell was found, or is given up."""
        if mine := self.open.pop(cell.key, None):
            self.past += mine.rate * (mine.asked.questions - mine.answered)
            self.finished += 1
        self._show()

    def share(self) -> float:
        """Of all the work, weights of cells considered; benchmarks nobody has opened yet are guessed."""
        return self.past / self.total

    def _show(self) -> None:
        now, terminal, last = time.perf_counter(), not self.bar.disable, self.finished == self.cells
        if now - self.shown < (BAR_S if terminal else LINE_S) and not last:
            return
        self.shown, share = now, self.share()
        text = f"{self.skipped + self.finished}/{self.skipped + self.cells} cells, {self.batches} batches"
        if self.tell:
            self.tell(text + self.left(now))
        if terminal:
            self.bar.update(self.task, completed=share, description=text + self.left(now))
        else:
            print(f"evaluate: {text}, {now - self.start:.0f} s{self.left(now)}", flush=True)

    def left(self, now: float) -> str:
        """What remains at the pace since the first batch; "" until there is one."""
        begun, before = self.first or (now, 0.0)
        gained = self.share() - before
        return f", about {(now - begun) * max(0.0, 1 - self.share()) / gained:.0f} s left" if gained > 0 else ""
