"""Rows of text with slots for visual tokens: which row shows an image, where its question stands, and how rows get shorter."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from diffprune.core.evidence import Question
from diffprune.core.tokens import VisualTokens
from diffprune.core.vlm import VLM, Prompts

POSITIONS = ("original", "compact")


def rows_of_images(prompts: Prompts, tokens: VisualTokens) -> Tensor:
    """[I] int: the row each image stands in. Images come in the order of the rows' slots.

    Raises:
        ValueError: the rows have another number of slots than the images have tokens.
    """
    slots, sizes = prompts.slots.sum(1), tokens.present.sum(1)
    if int(slots.sum()) != int(sizes.sum()):
        raise ValueError(
            f"the prompts have {int(slots.sum())} places for visual tokens, the images have {int(sizes.sum())} of them"
        )
    return torch.searchsorted(slots.cumsum(0), sizes.cumsum(0) - sizes, right=True)


def places_of_question(prompts: Prompts) -> tuple[Tensor, Tensor]:
    """Places of each row's question, on the right of the longest: (places [B T], which are real [B T] bool)."""
    longest = max(int(prompts.question.sum(1).max()), 1)
    order = prompts.question.int().argsort(dim=1, stable=True)[:, -longest:]
    return order, prompts.question.gather(1, order)


def embedded_question(vlm: VLM, prompts: Prompts) -> Question:
    """Embedded question of each row, padded on the left to the longest."""
    order, real = places_of_question(prompts)
    return Question(vlm.embed(prompts.input_ids.gather(1, order)), real)


def places_left(live: Tensor, length: int | None = None) -> tuple[Tensor, Tensor]:
    """Places of what is left of each row [B S] bool, in order, padded on the left: (places [B S'], which are real [B S']).

    length: S', at least what is left of any row; None is that of the longest, for which the device is asked.
    """
    length = int(live.sum(1).max()) if length is None else length
    order = live.int().argsort(dim=1, stable=True)[:, live.shape[1] - length :]
    return order, live.gather(1, order)


def taken(values: Tensor, order: Tensor) -> Tensor:
    """[B S D], or [1 S D] for all rows, at the places `order` [B S'] -> [B S' D]: whole vectors are copied, where `gather` on a CPU
    looks up each number."""
    order = order.to(values.device)  # of another GPU, where layers are spread over several
    start = torch.arange(len(values), device=order.device)[:, None] * values.shape[1]
    return values.flatten(0, 1).index_select(0, (order + start).flatten()).view(*order.shape, values.shape[2])


def cut(prompts: Prompts, live: Tensor, pad: int = 0, positions: str = "original") -> Prompts:
    """The rows at the positions that are left [B S] bool, padded on the left.

    positions: "original" keeps those of the full row; "compact" counts what is left.

    Raises:
        ValueError: another word for `positions`.
    """
    if positions not in POSITIONS:
        raise ValueError(f"positions is {positions!r}; it is one of {', '.join(POSITIONS)}")
    return at_places(prompts, *places_left(live), pad, positions)


def at_places(
    prompts: Prompts, order: Tensor, rows: Tensor, pad: int = 0, positions: str = "original", whole: bool = False
) -> Prompts:
    """The rows at the places `order` [B S'], of which those that are `rows` [B S'] are real and the others become padding.

    whole: it is known that all are real.
    """
    gone = ~rows

    def at(values: Tensor, fill: int | bool) -> Tensor:
        found = values.gather(1, order)
        return found if whole else found.masked_fill_(gone, fill)

    where = prompts.position_ids
    if positions == "compact" or where.ndim == 3:
        compact = (rows.cumsum(1) - 1).clamp_min(0)
    if positions == "compact":
        short = compact if where.ndim == 2 else compact[..., None].expand(-1, -1, where.shape[2])
    elif where.ndim == 2:
        short = at(where, 0)
    else:  # the text coordinate only tells sequences apart and must not have gaps
        short = torch.stack([compact, *(at(where[..., i], 0) for i in range(1, where.shape[2]))], -1)
    places = prompts.index
    if places is None:
        places = torch.arange(prompts.slots.shape[1], device=order.device).expand_as(prompts.slots)
    return Prompts(
        input_ids=at(prompts.input_ids, pad),
        attention_mask=rows.long(),
        position_ids=short,
        slots=at(prompts.slots, False),
        question=at(prompts.question, False),
        labels=None if prompts.labels is None else at(prompts.labels, -100),
        index=at(places, 0) if positions == "original" else None,
        token_types=None if prompts.token_types is None else at(prompts.token_types, 0),
    )


def longer(prompts: Prompts, later: Tensor) -> Prompts:
    """The rows with an answer after them, of which nothing is looked at. later [B M] bool: what of it is no padding; ids are 0."""
    more, last = later.shape[1], prompts.position_ids[:, -1:]
    steps = torch.arange(1, more + 1, device=later.device)
    asked = torch.full_like(prompts.input_ids, -100) if prompts.labels is None else prompts.labels
    return Prompts(
        functional.pad(prompts.input_ids, (0, more)),
        torch.cat([prompts.attention_mask, later.long()], 1),
        torch.cat([prompts.position_ids, last + (steps if last.ndim == 2 else steps[:, None])], 1),
        functional.pad(prompts.slots, (0, more)),
        functional.pad(prompts.question, (0, more)),
        labels=torch.cat([asked, later.long() * 100 - 100], 1),
        index=None if prompts.index is None else torch.cat([prompts.index, prompts.index[:, -1:] + steps], 1),
    )
