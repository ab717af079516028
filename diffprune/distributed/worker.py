"""What runs in a worker of a sweep. A file of its own, so that a worker starts without the store and the terminal."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence

from diffprune.core.cell import Cell
from diffprune.core.records import Prediction
from diffprune.core.spec import Spec
from diffprune.distributed import metrics
from diffprune.evaluate.evaluator import Evaluator
from diffprune.evaluate.transformers_backend import TransformersBackend
from diffprune.io.shared_storage import Proof
from diffprune.vlm.load import load


class Worker:
    """One process with the model resident. Ray makes it an actor."""

    evaluator: Evaluator
    backend: TransformersBackend
    counted: Mapping[str, tuple[int, int]]

    def prepare(self, model: Spec, methods: Sequence[Spec] = (), storage: Proof | None = None) -> int:
        """Load the model; not in the constructor, so that a user's mistake comes back as itself. Returns the process id.

        methods: that will be asked about, so that a picture is encoded once with what all of them look at; storage: of the run,
        which this host has to see.

        Raises:
            ValueError: the model cannot be loaded. Unseen: see `Proof.check`.
        """
        if storage:
            storage.check()
        self.backend = backend = TransformersBackend(load(model))
        self.evaluator, self.counted = Evaluator(backend), backend.looked_up()
        backend.encodings.expect(self.evaluator.needs(methods))
        return os.getpid()

    def batches(self, cell: Cell) -> tuple[list[list[int]], float]:
        """(the questions of each batch of a cell, seconds)."""
        start = time.perf_counter()
        return self.evaluator.batches(cell), time.perf_counter() - start

    def answer(self, cell: Cell, index: Sequence[int]) -> tuple[dict[int, Prediction], float]:
        """(rows by number of the question, seconds) of one batch."""
        start = time.perf_counter()
        found = self.evaluator.answer(cell, index)
        self._count()
        return found, time.perf_counter() - start

    def _count(self) -> None:
        """Metrics of the caches since the last time."""
        before, self.counted = self.counted, self.backend.looked_up()
        for cache, (found, made) in self.counted.items():
            metrics.CACHE_HITS.add(found - before[cache][0], cache)
            metrics.CACHE_MISSES.add(made - before[cache][1], cache)
