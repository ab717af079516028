"""What runs in a worker of a sweep. A file of its own, so that a worker starts without the store and the terminal."""

from __future__ import annotations

import os
import time

from diffprune.core.record import Cell, Prediction
from diffprune.evaluate import Evaluator
from diffprune.models._load import load


class Worker:
    """One process with the model resident. Ray makes it an actor."""

    evaluator: Evaluator

    def prepare(self, model: str) -> int:
        """Load the model; not in the constructor, so that a user's mistake comes back as itself. Returns the process id."""
        self.evaluator = Evaluator(load(model))
        return os.getpid()

    def run(self, cell: Cell) -> tuple[list[Prediction], float]:
        """(rows, seconds) of one cell."""
        start = time.perf_counter()
        return self.evaluator.run(cell), time.perf_counter() - start
