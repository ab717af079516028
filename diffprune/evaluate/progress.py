"""How far a sweep is: a bar on a terminal, a line now and then elsewhere. The time left follows the weights of what is left."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence

from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from diffprune.core.cell import Cell
from diffprune.evaluate.schedule import NOMINAL_QUESTIONS, QuestionSet, question_set, weight

LINE_S = 5.0  # at most one line in this time where the output is no terminal
BAR_S = 0.5  # and the bar is drawn anew at most once in this


class SweepProgress:
    """Cells done and questions answered, shown while a `with` block lasts.

    todo: cells to do; skipped: cells that were done before; tell: hears every line, also those a terminal shows as a bar.
    """

    def __init__(self, todo: Sequence[Cell], skipped: int, tell: Callable[[str], None] | None = None) -> None:
        self.tell = tell
        self.skipped, self.batches = skipped, 0
        self.rates = {cell: weight(cell, 1) for cell in todo}
        self.sizes: dict[QuestionSet, int] = {}
        self.answered: Counter[Cell] = Counter()
        self.finished: set[Cell] = set()
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
        self.sizes[question_set(cell)] = questions

    def batch(self, cell: Cell, questions: int) -> None:
        """A batch of so many questions was answered."""
        self.batches += 1
        self.answered[cell] += questions
        self.first = self.first or (time.perf_counter(), self.share())
        self._show()

    def cell(self, cell: Cell) -> None:
        """A cell is in the store, or is given up."""
        self.finished.add(cell)
        self._show()

    def share(self) -> float:
        """Of all the work, weights of cells considered; benchmarks nobody has opened yet are guessed."""
        total = past = 0.0
        for cell, rate in self.rates.items():
            size = self.sizes.get(asked := question_set(cell), asked.questions.limit or NOMINAL_QUESTIONS)
            total += rate * size
            past += rate * (size if cell in self.finished else self.answered[cell])
        return past / total

    def _show(self) -> None:
        now, terminal, last = time.perf_counter(), not self.bar.disable, len(self.finished) == len(self.rates)
        if now - self.shown < (BAR_S if terminal else LINE_S) and not last:
            return
        self.shown, share = now, self.share()
        text = f"{self.skipped + len(self.finished)}/{self.skipped + len(self.rates)} cells, {self.batches} batches"
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
        return f", about {(now - begun) * (1 - self.share()) / gained:.0f} s left" if gained > 0 else ""
