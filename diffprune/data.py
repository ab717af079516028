"""Training batches: images, questions and labelled answers, a pure function of (seed, step, rank).

Image `i` of step `t` is drawn from its own generator, so a resumed run sees what it would have seen, and N workers together
see what one worker with the whole batch sees.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from itertools import count
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diffprune.core.plugins import nearest, parse_call
from diffprune.core.vlm import VLM, Prompts
from diffprune.embedded import world as embedded

TRAIN, CALIBRATION, VALIDATION = 0, 1, 2  # streams of random numbers that never meet

Asked = list[tuple[str, str]]  # (question, answer) pairs about one image


@dataclass(frozen=True)
class TrainBatch:
    """I images and B rows of text about them.

    pixels:  encoder inputs of the I images, first axis I.
    image:   [B] int, the image each row is about.
    prompts: full-length rows with `labels`; packed (many questions per row, [B 1 S S] block mask) or one question per row.
    """

    pixels: dict[str, Tensor]
    image: Tensor
    prompts: Prompts

    def part(self, start: int, stop: int) -> TrainBatch:
        """Images start..stop and the rows about them."""
        mine = ((self.image >= start) & (self.image < stop)).nonzero().squeeze(1)
        cut = {f.name: v[mine] for f in fields(self.prompts) if (v := getattr(self.prompts, f.name)) is not None}
        pixels = {k: v[start:stop] for k, v in self.pixels.items()}
        return TrainBatch(pixels, self.image[mine] - start, replace(self.prompts, **cut))

    @property
    def num_labels(self) -> int:
        """Answer tokens to predict."""
        assert self.prompts.labels is not None, "training rows carry labels"
        return int((self.prompts.labels >= 0).sum())


# --- where images and questions come from ----------------------------------------------------------------------------


def _world(split: str, rng: np.random.Generator, questions: int) -> tuple[Any, Asked]:
    """A picture of the embedded world and questions about it."""
    seeds = embedded.SPLITS[split]
    scene = embedded.scene(int(rng.integers(seeds.start, seeds.stop)))
    return Image.fromarray(scene.image), [asked[1:] for asked in embedded.questions(scene, rng, questions)]


SOURCES: dict[str, Callable[[str, np.random.Generator, int], tuple[Any, Asked]]] = {"world": _world}


def source(data: str) -> Callable[[str, np.random.Generator, int], tuple[Any, Asked]]:
    """The source spelled `data`.

    Raises:
        ValueError: no such source; names the nearest one.
    """
    name, args, options = parse_call(data)
    if name not in SOURCES or args or options:
        raise ValueError(f"no training data {data!r}: {nearest(data, SOURCES)}")
    return SOURCES[name]


# --- rows ------------------------------------------------------------------------------------------------------------

COLUMNS = ("input_ids", "position_ids", "slots", "question", "labels")
Row = list[np.ndarray]  # one array per column, without padding


def _single(vlm: VLM, asked: Sequence[Asked]) -> list[list[Row]]:
    """Prompt, answer and end token of every question, grouped by image."""
    tokenizer, pairs = vlm.processor.tokenizer, [pair for image in asked for pair in image]
    framed = vlm.prompts([q for q, _ in pairs], [vlm.num_visual_tokens] * len(pairs)).to("cpu")
    live = framed.attention_mask.bool().numpy()
    arrays = [getattr(framed, name).numpy() for name in COLUMNS[:-1]]
    answers = {text: tokenizer(text, add_special_tokens=False)["input_ids"] for text in {a for _, a in pairs}}
    made: list[Row] = []
    for i, (_, answer) in enumerate(pairs):
        ids, positions, slots, question = (a[i][live[i]] for a in arrays)
        said = np.array([*answers[answer], tokenizer.eos_token_id])
        more = positions[-1] + 1 + np.arange(len(said))
        parts = (ids, said), (positions, more), (slots, said < 0), (question, said < 0), (np.full_like(ids, -100), said)
        made.append([np.concatenate(part) for part in parts])
    groups = iter(made)
    return [[next(groups) for _ in image] for image in asked]


def _padded(found: Sequence[np.ndarray], fill: int, left: bool) -> Tensor:
    table = np.full((len(found), max(map(len, found))), fill, found[0].dtype)
    for line, values in zip(table, found, strict=True):
        start = len(line) - len(values) if left else 0
        line[start : start + len(values)] = values
    return torch.from_numpy(table)


def rows(vlm: VLM, asked: Sequence[Asked]) -> Prompts:
    """One left-padded row per question: prompt, answer, end. `asked[i]` are the pairs about image i."""
    made = [row for image in _single(vlm, asked) for row in image]
    fills = (vlm.processor.tokenizer.pad_token_id or 0, 0, 0, 0, -100)
    columns = {name: _padded([row[c] for row in made], fills[c], True) for c, name in enumerate(COLUMNS)}
    mask = _padded([np.ones(len(row[0]), np.int64) for row in made], 0, True)
    return Prompts(attention_mask=mask, **columns).to(vlm.device)


def packed_rows(vlm: VLM, asked: Sequence[Asked]) -> Prompts:
    """One row per image: the prefix up to the last visual token once, then a segment per question; padding on the right.

    A segment sees the prefix and itself, and its positions go on where the prefix ends, so a packed row scores every answer
    as its own row would.
    """
    made: list[Row] = []
    for image in _single(vlm, asked):
        end = int(image[0][COLUMNS.index("slots")].nonzero()[0].max()) + 1
        tails = [[column[end:] for column in row] for row in image]
        columns = [np.concatenate([image[0][c][:end], *(tail[c] for tail in tails)]) for c in range(len(COLUMNS))]
        segments = np.repeat(np.arange(len(image) + 1), [end, *(len(tail[0]) for tail in tails)])
        made.append([*columns, segments])
    fills = (vlm.processor.tokenizer.pad_token_id or 0, 0, 0, 0, -100, -1)
    *found, segment = (_padded([row[c] for row in made], fill, False) for c, fill in enumerate(fills))
    return Prompts(attention_mask=block_mask(segment), **dict(zip(COLUMNS, found, strict=True))).to(vlm.device)


def block_mask(segments: Tensor) -> Tensor:
    """[B S] segment numbers (0 prefix, -1 padding) -> [B 1 S S] bool: causal, the prefix and one's own segment."""
    seen = (segments[:, None, :] == 0) | (segments[:, None, :] == segments[:, :, None])
    return (seen & torch.ones(seen.shape[1:], dtype=torch.bool).tril())[:, None]


# --- batches ---------------------------------------------------------------------------------------------------------


def _batch(vlm: VLM, drawn: Sequence[tuple[Any, Asked]], packed: bool) -> TrainBatch:
    asked = [pairs for _, pairs in drawn]
    index = range(len(asked)) if packed else [i for i, pairs in enumerate(asked) for _ in pairs]
    prompts = packed_rows(vlm, asked) if packed else rows(vlm, asked)
    return TrainBatch(vlm.pixels([picture for picture, _ in drawn]), torch.tensor(list(index), device=vlm.device), prompts)


def _share(images: int, rank: int, world: int) -> range:
    if images % world:
        raise ValueError(f"{images} images cannot be split evenly over {world} workers; choose a multiple of {world}")
    return range(rank * images // world, (rank + 1) * images // world)


def batches(
    vlm: VLM,
    data: str,
    *,
    seed: int,
    images: int,
    questions: int,
    rank: int = 0,
    world: int = 1,
    start_step: int = 0,
    packed: bool = True,
) -> Iterator[TrainBatch]:
    """This worker's share of every step's batch, from `start_step` on, without end.

    images: of the whole batch, over all workers; questions: per image; packed: many questions per row.

    Raises:
        ValueError: unknown data, or `images` is no multiple of `world`.
    """
    draw, mine = source(data), _share(images, rank, world)
    for step in count(start_step):
        yield _batch(vlm, [draw("train", np.random.default_rng([seed, TRAIN, step, i]), questions) for i in mine], packed)


def calibration(vlm: VLM, data: str, images: int = 64) -> TrainBatch:
    """Fixed images on which scorers standardise features, one question each; the same on every worker."""
    draw = source(data)
    return _batch(vlm, [draw("calibration", np.random.default_rng([CALIBRATION, i]), 1) for i in range(images)], False)


def validation(vlm: VLM, data: str, *, images: int = 24, questions: int = 3, rank: int = 0, world: int = 1) -> TrainBatch:
    """Fixed images that are never trained on, one question per row; this worker's share of them."""
    draw, mine = source(data), _share(images, rank, world)
    return _batch(vlm, [draw("calibration", np.random.default_rng([VALIDATION, i]), questions) for i in mine], False)
