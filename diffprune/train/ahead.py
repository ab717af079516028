"""Batches drawn before they are needed: while a worker draws one, the gradients of another are computed on a GPU, and travel."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from diffprune.data import TrainBatch
from diffprune.train.checkpoints import ELSEWHERE
from diffprune.train.context import Context

AHEAD = 2  # batches: what the workers tell each other of one has come long before its step begins

Count = Callable[[TrainBatch], tuple[float, float]]  # labels, and rows that are relaxed
Share = tuple[TrainBatch, Tensor]  # of one worker; [2]: those numbers, added up over the shares of all workers


class BadData(ValueError):
    """Training data cannot be read on some worker, or too much of it is broken; trying again gives the same."""


class Ahead:
    """This worker's shares of a training's batches, in order. Every worker must draw, and ask for the next, equally often.

    stream: gives them; steps: how many are needed.
    """

    def __init__(self, context: Context, stream: Iterator[TrainBatch], steps: int, count: Count) -> None:
        self._context, self._stream, self._left, self._count, self._failed = context, stream, steps, count, ""
        self._drawn: deque[Callable[[], Share]] = deque()
        for _ in range(AHEAD):
            self.draw()

    def draw(self) -> None:
        """Draw one more, unless all that are needed are drawn; the other workers are told, and not waited for."""
        if self._left:
            self._left -= 1
            self._drawn.append(_begun(self._context, self._one, self._count))

    def _one(self) -> TrainBatch:
        """The next of the stream.

        Raises:
            ValueError: it cannot be drawn, or an earlier one could not, which the other workers do not know yet.
        """
        if self._failed:
            raise ValueError(self._failed)
        try:
            return next(self._stream)
        except ValueError as error:
            self._failed = str(error)
            raise

    def next(self) -> Share:
        """The share of the next step.

        Raises:
            BadData: on every worker, when one of them could not draw its own.
        """
        return self._drawn.popleft()()


def drawn(context: Context, draw: Callable[[], TrainBatch]) -> TrainBatch:
    """What `draw` gives on this worker, once all workers have theirs: nobody is left waiting for one that has failed.

    Raises:
        BadData: on every worker, when one of them cannot draw.
    """
    return _begun(context, draw, lambda _: (0.0, 0.0))()[0]


def _begun(context: Context, draw: Callable[[], TrainBatch], count: Count) -> Callable[[], Share]:
    """Draw, and tell the other workers. What this returns waits for what they tell, and raises BadData where one could not draw."""
    reason, found = "", None
    try:
        found = draw()
    except ValueError as error:
        reason = str(error)
    mine = (1.0, 0.0, 0.0) if found is None else (0.0, *count(found))
    told = context.begin_sum(torch.tensor(mine, device=context.device))

    def agreed() -> Share:
        total = told()
        if found is None or total[0] > 0:
            raise BadData(reason or f"the training data cannot be read {ELSEWHERE}")
        return found, total[1:]

    return agreed
