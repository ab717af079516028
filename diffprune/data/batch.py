"""Training batches: images with labelled question-answer rows, one question per row or many packed into one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffprune.core.evidence import Evidence
from diffprune.core.tokens import VisualTokens
from diffprune.core.vlm import VLM, Prompts
from diffprune.data.sources import QAPairs
from diffprune.vlm.tokenize import mentions, picture_tokens, plain, token_ids


@dataclass(frozen=True)
class TrainBatch:
    """I images and B rows of text about them.

    pixels:  encoder inputs of the I images; `images` is I.
    image:   [B] int, the image each row is about.
    prompts: full-length rows with `labels`; packed (many questions per row, [B 1 S S] block mask) or one question per row.
    first:   number of the first image in the whole step, over all workers and parts.
    encoded: tokens of the images by the evidence they were encoded with, kept by whoever encodes them.
    """

    pixels: dict[str, Tensor]
    image: Tensor
    prompts: Prompts
    images: int
    first: int = 0
    encoded: dict[frozenset[Evidence], VisualTokens] = field(default_factory=dict, repr=False, compare=False)

    def part(self, vlm: VLM, start: int, stop: int) -> TrainBatch:
        """Images start..stop and the rows about them."""
        mine = ((self.image >= start) & (self.image < stop)).nonzero().squeeze(1)
        cut = {f.name: v[mine] for f in fields(self.prompts) if (v := getattr(self.prompts, f.name)) is not None}
        pixels = vlm.part(self.pixels, start, stop)
        return TrainBatch(pixels, self.image[mine] - start, replace(self.prompts, **cut), stop - start, self.first + start)

    def image_names(self) -> list[int]:
        """[I] number of each image in the whole step."""
        return list(range(self.first, self.first + self.images))

    def row_names(self) -> list[tuple[int, int]]:
        """[B] (number of its image in the whole step, number of the row among those about it) of each row."""
        seen: Counter[int] = Counter()
        names = []
        for image in self.image.tolist():
            names.append((self.first + image, seen[image]))
            seen[image] += 1
        return names

    @property
    def num_labels(self) -> int:
        """Answer tokens to predict."""
        assert self.prompts.labels is not None, "training rows carry labels"
        return int((self.prompts.labels >= 0).sum())


# --- rows ------------------------------------------------------------------------------------------------------------

COLUMNS = ("input_ids", "position_ids", "slots", "question", "labels")
Row = list[np.ndarray]  # one array per column, without padding


def _single(vlm: VLM, qa: Sequence[QAPairs], pixels: dict[str, Tensor]) -> list[list[Row]]:
    """Prompt, answer and end token of every question, grouped by image: [image][question] -> COLUMNS, each [S] or [S ...]."""
    tokenizer, pairs = vlm.processor.tokenizer, [pair for image in qa for pair in image]
    owner = [i for i, image in enumerate(qa) for _ in image]
    slots, layout = vlm.slots(pixels), vlm.layout(pixels)
    framed = vlm.prompts([q for q, _ in pairs], [slots[i] for i in owner], None if layout is None else layout[owner]).to("cpu")
    live = framed.attention_mask.bool().numpy()
    arrays = [getattr(framed, name).numpy() for name in COLUMNS[:-1]]
    shown = mentions(picture_tokens(vlm.model.config, tokenizer))  # in an answer they are text
    answers = {text: token_ids(tokenizer, plain(text, shown)) for text in {a for _, a in pairs}}
    made: list[Row] = []
    for i, (_, answer) in enumerate(pairs):
        ids, positions, places, question = (a[i][live[i]] for a in arrays)
        said = np.array([*answers[answer], tokenizer.eos_token_id])
        more = positions[-1] + 1 + np.arange(len(said)).reshape(-1, *[1] * (positions.ndim - 1))
        parts = (ids, said), (positions, more), (places, said < 0), (question, said < 0), (np.full_like(ids, -100), said)
        made.append([np.concatenate(part) for part in parts])
    groups = iter(made)
    return [[next(groups) for _ in image] for image in qa]


def _padded(found: Sequence[np.ndarray], fill: int, left: bool) -> Tensor:
    """B arrays of [S_i ...] -> [B S ...], S the longest; `fill` stands on the left or on the right."""
    table = np.full((len(found), max(map(len, found)), *found[0].shape[1:]), fill, found[0].dtype)
    for line, values in zip(table, found, strict=True):
        start = len(line) - len(values) if left else 0
        line[start : start + len(values)] = values
    return torch.from_numpy(table)


def rows(vlm: VLM, qa: Sequence[QAPairs], pixels: dict[str, Tensor]) -> Prompts:
    """One left-padded row per question: prompt, answer, end. `qa[i]` are the pairs about image i."""
    made = [row for image in _single(vlm, qa, pixels) for row in image]
    fills = (vlm.processor.tokenizer.pad_token_id or 0, 0, 0, 0, -100)
    columns = {name: _padded([row[c] for row in made], fills[c], True) for c, name in enumerate(COLUMNS)}
    mask = _padded([np.ones(len(row[0]), np.int64) for row in made], 0, True)
    return Prompts(attention_mask=mask, **columns).to(vlm.device)


def packed_rows(vlm: VLM, qa: Sequence[QAPairs], pixels: dict[str, Tensor]) -> Prompts:
    """One row per image: the prefix up to the last visual token once, then a segment per question; padding on the right.

    A segment sees the prefix and itself, and its positions go on where the prefix ends, so a packed row scores every answer
    as its own row would.
    """
    made: list[Row] = []
    for image in _single(vlm, qa, pixels):
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


def batch(vlm: VLM, drawn: Sequence[tuple[Any, QAPairs]], packed: bool, first: int = 0) -> TrainBatch:
    """Drawn (image, pairs about it) as a batch; packed: many questions per row; first: number of the first image in the step."""
    qa, pixels = [pairs for _, pairs in drawn], vlm.pixels([picture for picture, _ in drawn])
    index = range(len(qa)) if packed else [i for i, pairs in enumerate(qa) for _ in pairs]
    prompts = packed_rows(vlm, qa, pixels) if packed else rows(vlm, qa, pixels)
    return TrainBatch(pixels, torch.tensor(list(index), device=vlm.device), prompts, len(drawn), first)
