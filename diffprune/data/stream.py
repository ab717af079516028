"""Batches of a training run: this worker's share of every step, and the fixed calibration and validation batches."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count

from diffprune.core.spec import Spec
from diffprune.core.vlm import VLM
from diffprune.data.batch import TrainBatch, batch
from diffprune.data.catalog import source
from diffprune.data.sources import CALIBRATION, TRAIN, VALIDATION, BrokenRows, DrawIndex


def _share(images: int, rank: int, world: int) -> range:
    if images % world:
        raise ValueError(f"{images} images cannot be split evenly over {world} workers; choose a multiple of {world}")
    return range(rank * images // world, (rank + 1) * images // world)


def batches(
    vlm: VLM,
    data: Spec | str,
    *,
    seed: int,
    images: int,
    questions: int,
    rank: int = 0,
    world: int = 1,
    start_step: int = 0,
    packed: bool = True,
    tally: BrokenRows | None = None,
) -> Iterator[TrainBatch]:
    """This worker's share of every step's batch, from `start_step` on, without end.

    images: of the whole batch, over all workers; questions: per image; packed: many questions per row; tally: where to count
    what was drawn and what was broken.

    Raises:
        ValueError: unknown data, data that cannot be read, or `images` is no multiple of `world`.
        TooManyBroken: more of it is broken than the tally allows.
    """
    drawn, mine, counted = source(data), _share(images, rank, world), tally or BrokenRows()
    for step in count(start_step):
        indices = [DrawIndex(TRAIN, i, images, seed, step) for i in mine]
        yield batch(vlm, [drawn.draw(index, questions, counted) for index in indices], packed)


def calibration(vlm: VLM, data: Spec | str, images: int = 64, tally: BrokenRows | None = None) -> TrainBatch:
    """Fixed images on which scorers standardise features, one question each; never trained on, the same on every worker."""
    drawn, counted = source(data), tally or BrokenRows()
    return batch(vlm, [drawn.draw(DrawIndex(CALIBRATION, i, images), 1, counted) for i in range(images)], False)


def validation(
    vlm: VLM,
    data: Spec | str,
    *,
    images: int = 24,
    questions: int = 3,
    rank: int = 0,
    world: int = 1,
    tally: BrokenRows | None = None,
) -> TrainBatch:
    """Fixed images that are never trained on, one question per row; this worker's share of them."""
    drawn, mine, counted = source(data), _share(images, rank, world), tally or BrokenRows()
    return batch(vlm, [drawn.draw(DrawIndex(VALIDATION, i, images), questions, counted) for i in mine], False)
