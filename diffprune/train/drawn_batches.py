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
from diffprune.io.sized_cache import sized_cache


class _Drawn(NamedTuple):
    """A batch, and the rows that were drawn for it: all, broken, and why the first was."""

    batch: TrainBatch
    rows: int
    broken: int
    first: str


class DrawnBatches:
    """Batches by what they were drawn for: the methods of one seed see the same, so each is drawn, and its images encoded, once.

    mebibytes: most memory of what is kept, least recently used first to go; 0 keeps nothing.
    """

    def __init__(self, mebibytes: float) -> None:
        self._kept = sized_cache(int(mebibytes * 2**20), _size)
        self._keeps = mebibytes > 0

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
        asked: dict[str, Any] = {
            "seed": seed,
            "images": images,
            "questions": questions,
            "rank": rank,
            "world": world,
            "packed": packed,
        }
        stream: Iterator[TrainBatch] = iter(())
        ready = -1  # the step that the stream of new batches is at
        for step in count(start_step):
            key = (data, *asked.values(), step)
            drawn: _Drawn | None = self._kept.get(key)
            if drawn is None:
                if ready != step:
                    stream = training.batches(vlm, data, **asked, start_step=step, tally=tally)
                before, batch, ready = replace(tally), next(stream), step + 1
                drawn = _Drawn(batch, tally.drawn - before.drawn, tally.broken - before.broken, tally.first)
                if self._keeps:
                    self._kept[key] = drawn
            else:
                tally.drawn, tally.broken = tally.drawn + drawn.rows, tally.broken + drawn.broken
                tally.first = tally.first or (drawn.first if drawn.broken else "")
            yield drawn.batch


def _size(drawn: _Drawn) -> int:
    """Bytes of a batch, and as many for its encoded images as its pixels take."""
    texts = [value for f in fields(drawn.batch.prompts) if isinstance(value := getattr(drawn.batch.prompts, f.name), Tensor)]
    return sum(value.nbytes for value in texts) + 2 * sum(value.nbytes for value in drawn.batch.pixels.values())
