"""Training batches that are kept, with what the frozen encoder made of them, for the methods that train next on the same ones."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, replace
from itertools import count
from typing import Any, NamedTuple

from torch import Tensor

from diffprune import data as training
from diffprune.core.spec import Spec
from diffprune.core.vlm import VLM
from diffprune.data import TrainBatch


class _Drawn(NamedTuple):
    """A batch, and the rows that were drawn for it: all, broken, and why the first was."""

    batch: TrainBatch
    rows: int
    broken: int
    first: str


class DrawnBatches:
    """Batches of one seed: methods that train on as many images a step see the same, so each is drawn, and encoded, once.

    They are used in order, so what does not fit is not kept at all: to drop the oldest for it would drop the next to be used. On a
    GPU nothing is kept; there its memory is worth more than the encoder's time.

    mebibytes: most memory of what is kept; 0 keeps nothing.
    """

    def __init__(self, mebibytes: float) -> None:
        self._free, self._most, self._seed = 0.0, mebibytes * 2**20, -1
        self._kept: dict[tuple[Any, ...], _Drawn] = {}

    def batches(
        self,
        vlm: VLM,
        data: Spec,
        *,
        seed: int,
        images: int,
        questions: int,
        rank: int,
        world: int,
        start_step: int,
        packed: bool,
        tally: training.BrokenRows,
    ) -> Iterator[TrainBatch]:
        """What `data.batches` gives, and counts; from memory where it was drawn before."""
        if seed != self._seed:
            self._kept, self._free, self._seed = {}, self._most, seed
        asked: dict[str, Any] = {"images": images, "questions": questions, "rank": rank, "world": world, "packed": packed}
        stream: Iterator[TrainBatch] = iter(())
        ready = -1  # the step that the stream of new batches is at
        for step in count(start_step):
            key = (data, *asked.values(), step)
            drawn = self._kept.get(key)
            if drawn is None:
                if ready != step:
                    stream = training.batches(vlm, data, seed=seed, **asked, start_step=step, tally=tally)
                before, batch, ready = replace(tally), next(stream), step + 1
                drawn = _Drawn(batch, tally.drawn - before.drawn, tally.broken - before.broken, tally.first)
                if vlm.device.type == "cpu" and (size := _size(drawn)) <= self._free:
                    self._kept[key], self._free = drawn, self._free - size
            else:
                tally.drawn, tally.broken = tally.drawn + drawn.rows, tally.broken + drawn.broken
                tally.first = tally.first or (drawn.first if drawn.broken else "")
            yield drawn.batch


def _size(drawn: _Drawn) -> int:
    """Bytes of a batch, and twice as many for its encoded images as its pixels take, which is about what encoders make of them."""
    texts = [value for f in fields(drawn.batch.prompts) if isinstance(value := getattr(drawn.batch.prompts, f.name), Tensor)]
    return sum(value.nbytes for value in texts) + 3 * sum(value.nbytes for value in drawn.batch.pixels.values())
