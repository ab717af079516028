"""What runs in a worker of a sweep. A file of its own, so that a worker starts without the store and the terminal."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence

from diffprune.core.cell import Cell
from diffprune.core.records import Prediction
from diffprune.core.spec import Spec
from diffprune.evaluate.evaluator import Evaluator
from diffprune.evaluate.transformers_backend import TransformersBackend
from diffprune.vlm.load import load


class Worker:
    """One process with the model resident. Ray makes it an actor."""

    evaluator: Evaluator

    def prepare(self, model: Spec, methods: Sequence[Spec] = ()) -> int:
        """Load the model; not in the constructor, so that a user's mistake comes back as itself. Returns the process id.

        methods: that will be asked about, so that a picture is encoded once with what all of them look at.
        """
        backend = TransformersBackend(load(model))
        self.evaluator = Evaluator(backend)
        backend.encodings.expect(self.evaluator.needs(methods))
        return os.getpid()

    def batches(self, cell: Cell) -> tuple[list[list[int]], float]:
        """(the questions of each batch of a cell, seconds)."""
        start = time.perf_counter()
        return self.evaluator.batches(cell), time.perf_counter() - start

    def answer(self, cell: Cell, index: Sequence[int]) -> tuple[dict[int, Prediction], float]:
        """(rows by number of the question, seconds) of one batch."""
        start = time.perf_counter()
        return self.evaluator.answer(cell, index), time.perf_counter() - start
