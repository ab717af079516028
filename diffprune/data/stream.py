"""Batches of a training run: this worker's share of every step, and the fixed calibration and validation batches."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import count
from typing import Any

from diffprune.core.errors import with_class
from diffprune.core.spec import Spec
from diffprune.core.vlm import VLM
from diffprune.data.batch import TrainBatch, batch
from diffprune.data.catalog import source
from diffprune.data.sources import CALIBRATION, TRAIN, VALIDATION, BrokenRows, DrawIndex, Example, TrainingSource

LOOKED = 16  # draws of each stream that are tried before a run begins


def _share(images: int, rank: int, world: int) -> range:
    if images < world:
        raise ValueError(f"{images} images cannot be split over {world} workers: each needs one")
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
        ValueError: unknown data, data that cannot be read, or fewer `images` than workers.
        TooManyBroken: more of it is broken than the tally allows.
    """
    drawn, mine, counted = source(data), _share(images, rank, world), tally or BrokenRows()
    for step in count(start_step):
        indices = [DrawIndex(TRAIN, i, images, seed, step) for i in mine]
        yield _drawn(vlm, drawn, indices, questions, packed, counted)


def calibration(vlm: VLM, data: Spec | str, images: int = 64, tally: BrokenRows | None = None) -> TrainBatch:
    """Fixed images on which scorers standardise features, one question each; never trained on, the same on every worker."""
    drawn, counted = source(data), tally or BrokenRows()
    return _drawn(vlm, drawn, [DrawIndex(CALIBRATION, i, images) for i in range(images)], 1, False, counted)


def calibration_pictures(data: Spec | str, images: int) -> Iterator[Any]:
    """The PIL images of `calibration`, without a model.

    Raises:
        ValueError: the data cannot be read.
    """
    drawn, counted = source(data), BrokenRows(limit=0.99)
    examples = (drawn.draw(DrawIndex(CALIBRATION, i, images), 1, counted) for i in range(images))
    return (image for example in examples for image in example.images)


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
    return _drawn(vlm, drawn, [DrawIndex(VALIDATION, i, images) for i in mine], questions, False, counted)


def first_batch(vlm: VLM, data: Spec | str, questions: int, packed: bool) -> TrainBatch:
    """The first usable training example of a run with seed 0, for its lengths.

    Raises:
        ValueError: as `first_example`, or the model's processor cannot take it.
    """
    return batch(vlm, [source(data).draw(DrawIndex(TRAIN, 0, 1), questions, BrokenRows(limit=0.99))], packed)


def first_example(data: Spec | str) -> str:
    """The first usable training example of a run with seed 0, for a look at what is trained on: size, question, answer.

    Raises:
        ValueError: the data cannot be read, lack a column, or none of the first rows can be used.
    """
    images, pairs = source(data).draw(DrawIndex(TRAIN, 0, 1), 1, BrokenRows(limit=0.99))
    return described(Example(images, pairs))


def look(data: Spec | str, seed: int, images: int, held_out: Mapping[int, int], broken_share: float) -> str:
    """The first usable training example of a run, told as by `first_example`, after its first draws were made as the run will make
    them.

    seed, images: of the run; held_out: images of CALIBRATION and VALIDATION; of each stream LOOKED draws at most are made.
    broken_share: of the rows drawn that may be broken.

    Raises:
        ValueError: the data cannot be read, lack a column, or more of what was drawn is broken than allowed.
    """
    drawn, tally, first = source(data), BrokenRows(broken_share), None
    for stream, asked in ((TRAIN, images), *held_out.items()):
        for i in range(min(asked, LOOKED)):
            found = drawn.draw(DrawIndex(stream, i * asked // min(asked, LOOKED), asked, seed), 1, tally)
            first = first or found
    assert first is not None, "a step has at least one image"
    return described(first)


def described(example: Example) -> str:
    """An example in a line: size, question, answer."""
    images, pairs = example
    question, answer = (f"{text:.200}".replace("\n", "\\n") for text in pairs[0])
    sizes = " and ".join(f"{image.width} x {image.height}" for image in images)
    what = "an image" if len(images) == 1 else f"{len(images)} images"
    return f"{what} of {sizes}, question {question!r}, answer {answer!r}"


def _drawn(
    vlm: VLM, drawn: TrainingSource, indices: Sequence[DrawIndex], questions: int, packed: bool, tally: BrokenRows
) -> TrainBatch:
    """A batch of the rows of these draws. Where some row cannot go through the model's processor or tokenizer, the rows are drawn
    again and each is tried alone: those that fail are broken rows like any other."""
    before = replace(tally)
    rows = [drawn.draw(index, questions, tally) for index in indices]
    try:
        return batch(vlm, rows, packed, indices[0].image)
    except Exception:  # whatever a foreign processor raises
        tally.reset(before)

    def check(example: Example) -> None:
        try:
            batch(vlm, [example], packed)
        except Exception as error:
            raise ValueError(f"the model cannot take it ({with_class(error)})") from None

    return batch(vlm, [drawn.draw(index, questions, tally, check) for index in indices], packed, indices[0].image)
