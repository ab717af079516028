"""Questions about one image continue from one prefill of what they share: all tokens up to the last visual token that is kept.

    shared  -> where the rows of a batch part, if those about one image agree until then
    prefill -> keys and values of one row per image
    answer  -> greedy answers: the questions of an image stand beside each other in one row behind its prefix

A question's tokens see the prefix and themselves, at the positions they have in a row of their own, so its answer is the one that
`path.answer` gives. The decoding loop stands in for the one of transformers inside its `generate`, which prepares the logits
processors and stopping criteria of the checkpoint as always.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from diffprune.core.budget import Budget
from diffprune.core.pruner import Pruner
from diffprune.core.site import Stage
from diffprune.core.vlm import VLM, Prompts
from diffprune.pruning import path
from diffprune.pruning.path import Packed, forward
from diffprune.pruning.rows import cut
from diffprune.vlm.prefilled_cache import STEPS, prefilled, states_of

COPIED = 1 / 16  # what laying a prefix token into a row costs beside computing a token, roughly


def refusal(vlm: VLM, pruner: Pruner, budget: Budget) -> str:
    """Why every question needs a prefill of its own, as a clause; empty where questions about one image can share it.

    Raises:
        ValueError: the method refuses the budget.
    """
    if pruner.reads_question:
        return f"{pruner.label} reads the question"
    if any(step.site.stage is Stage.DECODER for step in pruner.cuts(budget, vlm.shape)):
        return f"{pruner.label} removes tokens inside the decoder"
    return vlm.lacks_shared_prefix()


@dataclass(frozen=True)
class Shared:
    """Where rows part. first: [B] the column each row starts at; end: [B] the column behind its last visual token.

    owner: of each row, the image it is about; leader: of each image, its first row.
    """

    first: list[int]
    end: list[int]
    owner: Sequence[int]
    leader: list[int]

    def prefixes(self, prompts: Prompts, images: Sequence[int]) -> Prompts:
        """One row for each of these images: what its rows share."""
        rows = prompts[torch.tensor([self.leader[i] for i in images], device=prompts.slots.device)]
        end = torch.tensor([self.end[self.leader[i]] for i in images], device=prompts.slots.device)
        within = torch.arange(prompts.slots.shape[1], device=end.device) < end[:, None]
        return replace(rows, attention_mask=rows.attention_mask * within, question=rows.question & within)

    def ids(self, prompts: Prompts) -> list[bytes]:
        """The token ids of each image's prefix."""
        rows = prompts.input_ids.cpu().numpy()
        return [rows[b, self.first[b] : self.end[b]].tobytes() for b in self.leader]


def shared(prompts: Prompts, owner: Sequence[int]) -> Shared | None:
    """Where the rows part from others about their image; None: some do so before its last visual token, or have no text behind it.

    owner: of each row, the image it is about, numbered from 0 in the order in which they first occur.
    """
    length, told = prompts.slots.shape[1], (prompts.input_ids, prompts.slots, prompts.position_ids)
    first = (length - prompts.attention_mask.sum(1)).tolist()
    end = (length - prompts.slots.flip(1).int().argmax(1)).tolist()
    leader: list[int] = []
    for row, image in enumerate(owner):
        if image == len(leader):
            leader.append(row)
        one = leader[image]
        here, there = slice(first[row], end[row]), slice(first[one], end[one])
        alike = row == one or all(torch.equal(values[row, here], values[one, there]) for values in told)
        if end[row] == length or not alike:
            return None
    return Shared(first, end, owner, leader)


@dataclass(frozen=True)
class Prefix:
    """One image's prefix in the decoder. states [L 2 H P D]: keys and values; left [S_prefix] bool: which of its tokens remain.

    kept, total: visual tokens after and before.
    """

    states: Tensor
    left: Tensor
    kept: int
    total: int

    @property
    def nbytes(self) -> int:
        """Of its tensors."""
        return self.states.nbytes + self.left.nbytes


def prefill(vlm: VLM, prompts: Prompts, packed: Packed, images: Sequence[int] | None = None) -> list[Prefix]:
    """Run the decoder on prefixes, one row each. prompts: of `Shared.prefixes`; packed: the same rows, shortened; images: of each
    row (None: one)."""
    cache = forward(vlm, packed, use_cache=True, logits_to_keep=1).past_key_values
    short, index = packed.prompts, packed.prompts.index
    assert index is not None, "survivors keep their positions"
    states = states_of(cache, short.attention_mask.sum(1).tolist())
    length = prompts.slots.shape[1]
    left = torch.zeros(len(prompts), length + 1, dtype=torch.bool, device=index.device)  # padding goes behind the row
    left = left.scatter_(1, index.masked_fill(short.attention_mask == 0, length), True)[:, :length]
    full = prompts.attention_mask.bool()
    kept, total = (
        [int(part.sum()) for part in counts.split(list(images or [1] * len(prompts)))] for counts in (packed.kept, packed.total)
    )
    return [Prefix(*row) for row in zip(states, [row[full[i]] for i, row in enumerate(left)], kept, total, strict=True)]


@torch.inference_mode()
def answer(
    vlm: VLM, prompts: Prompts, where: Shared, prefixes: Sequence[Prefix], max_new_tokens: int
) -> tuple[list[str], list[int]]:
    """Greedy answers, as `path.answer`. prompts: full-length rows; prefixes: of each image."""
    continuation = Continuation(vlm, prompts, where, prefixes)
    packed = Packed(continuation.rows, torch.zeros(0, 1), torch.zeros(0), torch.zeros(0))  # its tokens are in the cache
    return path.answer(vlm, packed, max_new_tokens, custom_generate=continuation.generate)


class Continuation:
    """The questions of a batch behind the prefixes of their images. rows: as they would go to the decoder alone, [B S].

    Questions stand in a table of R columns: a row is a row of the decoder and has one prefix, a column is a segment of it.
    """

    def __init__(self, vlm: VLM, prompts: Prompts, where: Shared, prefixes: Sequence[Prefix]) -> None:
        self.vlm, self.rows = vlm, _shortened(prompts, where, prefixes)
        self.device = self.rows.input_ids.device
        lengths = [prompts.slots.shape[1] - end for end in where.end]
        longest = max(prefix.states.shape[3] for prefix in prefixes)
        table = in_rows(where.owner, lengths, longest)
        self.table = torch.tensor(table, device=self.device)
        place = {number: spot for spot, number in enumerate(self.table.flatten().tolist())}
        self.place = torch.tensor([place[b] for b in range(len(prompts))], device=self.device)
        self.lengths = lengths
        owners = [where.owner[row[0]] for row in table]
        self.widths = [max(lengths[b] for b in column if b >= 0) for column in zip(*table, strict=True)]
        room = sum(self.widths) + STEPS * len(self.widths)
        self.cache = prefilled([prefix.states for prefix in prefixes], owners, room)
        sizes = torch.tensor([prefixes[image].states.shape[3] for image in owners], device=self.device)
        self.seen = torch.arange(longest, device=self.device) < sizes[:, None]  # of what is in the cache, what is no padding
        self.segment = torch.full((longest,), -1, device=self.device)  # of each column of the cache, -1: the prefix
        self.steps = 0

    def start(self) -> Tensor:
        """[B V]: logits behind the questions."""
        width, numbers = max(self.widths), self.table.clamp_min(0)
        tails = self.rows.input_ids[:, -width:], self.rows.position_ids[:, -width:]
        behind = torch.arange(width, device=self.device) >= width - torch.tensor(self.lengths, device=self.device)[:, None]

        def laid(values: Tensor) -> Tensor:
            return torch.cat([values[numbers[:, j], width - own :] for j, own in enumerate(self.widths)], 1)

        widths = torch.tensor(self.widths, device=self.device)
        segment = torch.arange(len(widths), device=self.device).repeat_interleave(widths)
        live = laid(behind) & (self.table >= 0)[:, segment]
        return self._forward(laid(tails[0]), laid(tails[1]), live, segment, widths.cumsum(0) - 1)

    def step(self, chosen: Tensor) -> Tensor:
        """[B V]: logits behind one more token [B] of each answer."""
        self.steps += 1
        numbers, live = self.table.clamp_min(0), self.table >= 0
        segment = torch.arange(live.shape[1], device=self.device)
        return self._forward(chosen[numbers], self.rows.position_ids[:, -1][numbers] + self.steps, live, segment, segment)

    def _forward(self, ids: Tensor, positions: Tensor, live: Tensor, segment: Tensor, ends: Tensor) -> Tensor:
        """[B V] at the columns `ends`, one per segment. live: tokens that are no padding; segment: of each column."""
        before = len(self.segment)
        self.seen, self.segment = torch.cat([self.seen, live], 1), torch.cat([self.segment, segment])
        own = (segment[:, None] == self.segment) | (self.segment == -1)
        own[:, before:] &= torch.ones(len(segment), len(segment), dtype=torch.bool, device=self.device).tril()
        mask = (own & self.seen[:, None])[:, None]
        positions = positions if positions.ndim == 2 else positions.permute(2, 0, 1)
        logits = self.vlm.model(
            input_ids=ids, attention_mask=mask, position_ids=positions + self.vlm.position_offset, past_key_values=self.cache,
            use_cache=True, logits_to_keep=ends,
        ).logits  # fmt: skip
        return logits.flatten(0, 1)[self.place]

    def generate(
        self, model: Any, input_ids: Tensor, logits_processor: Any, stopping_criteria: Any, generation_config: Any, **_: Any
    ) -> Tensor:
        """[B S + new]: the loop of greedy decoding, as transformers' own has it; called inside its `generate`."""
        going, logits = torch.ones(len(input_ids), dtype=torch.bool, device=self.device), self.start()
        ends = any(hasattr(criterion, "eos_token_id") for criterion in stopping_criteria)
        while True:
            chosen = logits_processor(input_ids, logits.to(torch.float32, copy=True)).argmax(-1)
            if ends:
                chosen = chosen.where(going, generation_config.pad_token_id)
            input_ids = torch.cat([input_ids, chosen[:, None]], 1)
            going &= ~stopping_criteria(input_ids, None)
            if not going.any():
                return input_ids
            logits = self.step(chosen)


def _shortened(prompts: Prompts, where: Shared, prefixes: Sequence[Prefix]) -> Prompts:
    """The rows without the visual tokens that their image's prefix has lost."""
    live = prompts.attention_mask.bool()
    for row, image in enumerate(where.owner):
        live[row, where.first[row] : where.end[row]] = prefixes[image].left
    return cut(prompts, live)


def in_rows(owner: Sequence[int], lengths: Sequence[int], prefix: int) -> list[list[int]]:
    """A table of all questions, each row about one image; -1 where a row has fewer than the others.

    lengths: tokens of each question; prefix: of the longest prefix. The number of columns is the one that costs least: tokens to
    compute, padding included, and prefixes to lay out.
    """
    numbers: dict[int, list[int]] = {}
    for b in sorted(range(len(owner)), key=lambda b: (owner[b], -lengths[b], b)):
        numbers.setdefault(owner[b], []).append(b)
    longest = max(lengths)

    def cost(columns: int) -> float:
        rows = sum(-(-len(found) // columns) for found in numbers.values())
        return rows * (columns * longest + prefix * COPIED)

    best = min(range(1, max(map(len, numbers.values())) + 1), key=cost)
    chunks = [found[start : start + best] for found in numbers.values() for start in range(0, len(found), best)]
    return [chunk + [-1] * (best - len(chunk)) for chunk in chunks]
