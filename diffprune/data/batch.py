"""Training batches: images with labelled question-answer rows, one question per row or many packed into one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from diffprune.core.evidence import Evidence
from diffprune.core.tokens import VisualTokens
from diffprune.core.vlm import VLM, Prompts
from diffprune.data.sources import Example, QAPairs
from diffprune.vlm.tokenize import mentions, picture_tokens, plain, token_ids


@dataclass(frozen=True)
class TrainBatch:
    """Examples with I images together, and B rows of text about them.

    pixels:  encoder inputs of the I images.
    about:   [B] int, the example each row is about.
    prompts: full-length rows with `labels`; packed (many questions per row, [B 1 S S] block mask) or one question per row.
    sizes:   images of each example, mostly 1; a row shows all images of its example.
    first:   number of the first example in the whole step, over all workers and parts.
    encoded: tokens of the images by the evidence they were encoded with, kept by whoever encodes them.
    """

    pixels: dict[str, Tensor]
    about: Tensor
    prompts: Prompts
    sizes: tuple[int, ...]
    first: int = 0
    encoded: dict[frozenset[Evidence], VisualTokens] = field(default_factory=dict, repr=False, compare=False)

    @property
    def examples(self) -> int:
        """How many there are."""
        return len(self.sizes)

    @property
    def images(self) -> int:
        """I."""
        return sum(self.sizes)

    @cached_property
    def image(self) -> Tensor:
        """[M] int: the images that the rows show, row after row, one of several after the other; M is B where each shows one."""
        return torch.tensor(shown_images(self.sizes, self.about.tolist()), device=self.about.device)

    def part(self, vlm: VLM, start: int, stop: int) -> TrainBatch:
        """Examples start..stop and the rows about them."""
        mine = ((self.about >= start) & (self.about < stop)).nonzero().squeeze(1)
        cut = {f.name: v[mine] for f in fields(self.prompts) if (v := getattr(self.prompts, f.name)) is not None}
        sizes = self.sizes[start:stop]
        pixels = vlm.part(self.pixels, before := sum(self.sizes[:start]), before + sum(sizes))
        return TrainBatch(pixels, self.about[mine] - start, replace(self.prompts, **cut), sizes, self.first + start)

    def image_names(self) -> list[Hashable]:
        """[I] the number of each image's example in the whole step, of an example's further images with their own number."""
        return [(self.first + i, k) if k else self.first + i for i, size in enumerate(self.sizes) for k in range(size)]

    def row_names(self) -> list[Hashable]:
        """[M] (name of an image that a row shows, number of the row among those that do), for all rows."""
        names, seen, found = self.image_names(), Counter[int](), list[Hashable]()
        for image in self.image.tolist():
            found.append((names[image], seen[image]))
            seen[image] += 1
        return found

    @property
    def num_labels(self) -> int:
        """Answer tokens to predict."""
        assert self.prompts.labels is not None, "training rows carry labels"
        return int((self.prompts.labels >= 0).sum())


def shown_images(sizes: Sequence[int], about: Sequence[int]) -> list[int]:
    """Numbers of the images that rows show. sizes: images of each example; about: the example of each row."""
    ends = list(accumulate(sizes))
    return [image for example in about for image in range(ends[example] - sizes[example], ends[example])]


# --- rows ------------------------------------------------------------------------------------------------------------

COLUMNS = ("input_ids", "position_ids", "slots", "question", "labels")
Row = list[np.ndarray]  # one array per column, without padding


def _single(vlm: VLM, qa: Sequence[QAPairs], pixels: dict[str, Tensor], sizes: Sequence[int] | None) -> list[list[Row]]:
    """Prompt, answer and end token of every question, by example: [example][question] -> COLUMNS, each [S] or [S ...].

    Where the tokenizer has no end token, an answer has none.
    """
    tokenizer, pairs = vlm.processor.tokenizer, [pair for example in qa for pair in example]
    owner, sizes = [i for i, example in enumerate(qa) for _ in example], sizes or [1] * len(qa)
    slots, layout, shown = vlm.slots(pixels), vlm.layout(pixels), shown_images(sizes, owner)
    framed = vlm.prompts(
        [q for q, _ in pairs], [slots[i] for i in shown], None if layout is None else layout[shown], [sizes[i] for i in owner]
    ).to("cpu")
    live = framed.attention_mask.bool().numpy()
    arrays = [getattr(framed, name).numpy() for name in COLUMNS[:-1]]
    special = mentions(picture_tokens(vlm.model.config, tokenizer))  # in an answer they are text
    answers = {text: token_ids(tokenizer, plain(text, special)) for text in {a for _, a in pairs}}
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    made: list[Row] = []
    for i, (_, answer) in enumerate(pairs):
        ids, positions, places, question = (a[i][live[i]] for a in arrays)
        said = np.array([*answers[answer], *end])
        more = positions[-1] + 1 + np.arange(len(said)).reshape(-1, *[1] * (positions.ndim - 1))
        parts = (ids, said), (positions, more), (places, said < 0), (question, said < 0), (np.full_like(ids, -100), said)
        made.append([np.concatenate(part) for part in parts])
    groups = iter(made)
    return [[next(groups) for _ in example] for example in qa]


def _padded(found: Sequence[np.ndarray], fill: int, left: bool) -> Tensor:
    """B arrays of [S_i ...] -> [B S ...], S the longest; `fill` stands on the left or on the right."""
    table = np.full((len(found), max(map(len, found)), *found[0].shape[1:]), fill, found[0].dtype)
    for line, values in zip(table, found, strict=True):
        start = len(line) - len(values) if left else 0
        line[start : start + len(values)] = values
    return torch.from_numpy(table)


def rows(vlm: VLM, qa: Sequence[QAPairs], pixels: dict[str, Tensor], sizes: Sequence[int] | None = None) -> Prompts:
    """One left-padded row per question: prompt, answer, end. `qa[i]` are the pairs about example i, sizes its images (None: 1)."""
    made = [row for example in _single(vlm, qa, pixels, sizes) for row in example]
    fills = (vlm.processor.tokenizer.pad_token_id or 0, 0, 0, 0, -100)
    columns = {name: _padded([row[c] for row in made], fills[c], True) for c, name in enumerate(COLUMNS)}
    mask = _padded([np.ones(len(row[0]), np.int64) for row in made], 0, True)
    return Prompts(attention_mask=mask, **columns).to(vlm.device)


def packed_rows(vlm: VLM, qa: Sequence[QAPairs], pixels: dict[str, Tensor], sizes: Sequence[int] | None = None) -> Prompts:
    """One row per example: the prefix up to the last visual token once, then a segment per question; padding on the right.

    A segment sees the prefix and itself, and its positions go on where the prefix ends, so a packed row scores every answer
    as its own row would.
    """
    made: list[Row] = []
    for example in _single(vlm, qa, pixels, sizes):
        end = int(example[0][COLUMNS.index("slots")].nonzero()[0].max()) + 1
        tails = [[column[end:] for column in row] for row in example]
        columns = [np.concatenate([example[0][c][:end], *(tail[c] for tail in tails)]) for c in range(len(COLUMNS))]
        segments = np.repeat(np.arange(len(example) + 1), [end, *(len(tail[0]) for tail in tails)])
        made.append([*columns, segments])
    fills = (vlm.processor.tokenizer.pad_token_id or 0, 0, 0, 0, -100, -1)
    *found, segment = (_padded([row[c] for row in made], fill, False) for c, fill in enumerate(fills))
    return Prompts(attention_mask=block_mask(segment), **dict(zip(COLUMNS, found, strict=True))).to(vlm.device)


def block_mask(segments: Tensor) -> Tensor:
    """[B S] segment numbers (0 prefix, -1 padding) -> [B 1 S S] bool: causal, the prefix and one's own segment."""
    seen = (segments[:, None, :] == 0) | (segments[:, None, :] == segments[:, :, None])
    return (seen & torch.ones(seen.shape[1:], dtype=torch.bool).tril())[:, None]


def batch(vlm: VLM, drawn: Sequence[Example], packed: bool, first: int = 0) -> TrainBatch:
    """Drawn examples as a batch; packed: many questions per row; first: number of the first example in the step."""
    qa, pixels = [example.pairs for example in drawn], vlm.pixels([image for example in drawn for image in example.images])
    sizes = tuple(len(example.images) for example in drawn)
    about = range(len(qa)) if packed else [i for i, pairs in enumerate(qa) for _ in pairs]
    prompts = packed_rows(vlm, qa, pixels, sizes) if packed else rows(vlm, qa, pixels, sizes)
    return TrainBatch(pixels, torch.tensor(list(about), device=vlm.device), prompts, sizes, first)
