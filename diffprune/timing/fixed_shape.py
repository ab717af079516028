"""Selection, cut and prefill with fixed shapes and no synchronisation, as a CUDA graph needs them.

`pruning` reads counts back from the device to shorten sequences exactly, which a CUDA graph cannot contain. Where the budget is a
count and every row is padded to a given length, nothing has to be read back: choosing, cutting and prefill have fixed shapes.
The answers are those of `pruning`, ties included, which is its oracle. One image per row; rows are padded on the left.

Cuts inside the decoder are the hooks of `pruning.decoder_cuts`, told beforehand how long rows are behind each.

A family that ends rows of tokens with separators keeps a number of them that depends on the choice: they get places up to the
length, and what is left over is padding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

from diffprune import pruning
from diffprune.core.budget import Budget
from diffprune.core.site import for_images
from diffprune.core.tokens import VisualTokens, with_separators
from diffprune.core.vlm import VLM, Prompts
from diffprune.pruning.decoder_cuts import DecoderCuts, Inside
from diffprune.pruning.stages import Length
from diffprune.vlm.windows import Windows


@dataclass(frozen=True)
class Plan:
    """What must be known on the host before a row is cut.

    count: tokens kept of each image. length: of the rows, padding included. padded: rows may be shorter than `length`, so attention
    needs a mask.
    """

    count: int
    length: int
    padded: bool


class Rows(NamedTuple):
    """B rows of one length S, ready for the decoder.

    input_ids [B S]; mask [B S] bool; position_ids [B S] or [B S R]; rank [B S]: the row of `visual` that stands there, -1 for text
    and padding; visual [B V D_text]: projected survivors in order, then the separator where there is one.
    """

    input_ids: Tensor
    mask: Tensor
    position_ids: Tensor
    rank: Tensor
    visual: Tensor


class Request(NamedTuple):
    """Tensors of a request before it is cut. features [B N D], valid [B N], row_id [B N] or none; of the full rows mask [B S] bool,
    slots [B S], table [B S 1+R]: ids and positions side by side, so that one gather fetches both."""

    features: Tensor
    valid: Tensor
    mask: Tensor
    slots: Tensor
    table: Tensor
    row_id: Tensor | None = None


def bucket(length: int, step: int) -> int:
    """The smallest multiple of `step` that holds `length` tokens."""
    return -(-length // step) * step


def plan(tokens: VisualTokens, prompts: Prompts, budget: Budget, step: int) -> Plan:
    """Read what `choose` must know; once per shape of request, outside what is captured.

    Raises:
        ValueError: a threshold or different counts, several images in a row, padded visual tokens, or DeepStack features.
    """
    _check(tokens, prompts)
    count = _one_count(budget, tokens.counts.tolist())
    last, text = _highest(tokens), _text(prompts)
    length = bucket(max(text) + count + min(last, count), step)
    return Plan(count, length, padded=last > 0 or min(text) + count < length)


def lengths(inside: Inside, prompts: Prompts, step: int) -> dict[int, Length]:
    """Lengths of rows behind every cut inside the decoder, by the first layer behind it; 0 for the rows that enter, as they are.

    Raises:
        ValueError: as `plan` does, or a cut that keeps a different number of tokens per image.
    """
    tokens = inside.tokens
    _check(tokens, prompts)
    counts, last, text = tokens.counts.tolist(), _highest(tokens), _text(prompts)
    length = prompts.input_ids.shape[1]
    found = {0: Length(length, bool(prompts.attention_mask.all()))}
    for cut in for_images(inside.cuts, counts):
        if cut.adaptive:
            raise ValueError(
                f"{inside.pruner.label} keeps a different number of tokens per image; rows of fixed length need one count"
            )
        count = _one_count(cut.budget, counts)
        counts, length = [count], min(length, bucket(max(text) + count + min(last, count), step))
        found[cut.site.layer] = Length(length, not last and min(text) + count == length)
    return found


def _check(tokens: VisualTokens, prompts: Prompts) -> None:
    if len(tokens) != len(prompts):
        raise ValueError(f"rows of fixed length show one image each; {len(prompts)} rows show {len(tokens)} images")
    if tokens.deepstack is not None or not bool((tokens.valid if tokens.row_id is None else tokens.present).all()):
        raise ValueError("rows of fixed length take images of one size, of families whose features enter at one decoder layer")


def _one_count(budget: Budget, totals: Sequence[int]) -> int:
    kept = {budget.count(n) for n in totals}
    if len(kept) > 1:
        raise ValueError(f"{budget} keeps {min(kept)} to {max(kept)} tokens of these images; rows of fixed length need one count")
    return kept.pop()


def _highest(tokens: VisualTokens) -> int:
    """The highest `row_id`, 0 without separators."""
    return 0 if tokens.row_id is None else int(tokens.row_id.abs().max())


def _text(prompts: Prompts) -> list[int]:
    """Of each row, tokens that are no visual ones."""
    return (prompts.attention_mask.sum(1) - prompts.slots.sum(1)).tolist()


def request(tokens: VisualTokens, prompts: Prompts, length: int) -> Request:
    """The tensors `choose` takes; rows are lengthened on the left where `length` needs it."""
    more = max(0, length - prompts.input_ids.shape[1])
    where = prompts.position_ids if prompts.position_ids.ndim == 3 else prompts.position_ids[..., None]
    table = torch.cat([prompts.input_ids[..., None], where], -1)
    mask, slots = (functional.pad(m.bool(), (more, 0)) for m in (prompts.attention_mask, prompts.slots))
    return Request(tokens.features, tokens.valid, mask, slots, functional.pad(table, (0, 0, more, 0)), tokens.row_id)


def compact(mask: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Places of the True entries of each row [B N], in order and aligned on the right: (places [B length], which are real).

    No row has more than `length` of them; padding points at place 0. A running sum instead of a sort, which costs more.
    """
    total = mask.sum(1, keepdim=True)
    target = (mask.cumsum(1) + (length - total) - 1).masked_fill(~mask, length)
    index = torch.arange(mask.shape[1], device=mask.device).expand_as(target)
    places = target.new_zeros(len(mask), length + 1).scatter_(1, target, index)[:, :length]
    return places, torch.arange(length, device=mask.device) >= length - total


def choose(asked: Request, scores: Tensor, fixed: Plan) -> tuple[Rows, Tensor]:
    """Rows of the `count` best tokens of each image, `visual` [B count D] still to be projected; and who was kept [B N] bool.

    Equal scores go to the earlier token, as in `budget.top`.
    """
    best = scores.float().masked_fill(~asked.valid, -math.inf).argsort(dim=1, descending=True, stable=True)[:, : fixed.count]
    keep = torch.zeros_like(asked.valid).scatter_(1, best, True)
    present = keep if asked.row_id is None else with_separators(keep, asked.row_id)
    slot = (asked.slots.cumsum(1) - 1).clamp_min(0)  # which of its image's entries a slot stands for
    live = torch.where(asked.slots, present.gather(1, slot), asked.mask)
    places, rows = compact(live, fixed.length)
    rank = torch.where(keep, keep.cumsum(1) - 1, fixed.count).gather(1, slot).masked_fill(~asked.slots, -1)
    found = asked.table.gather(1, places[..., None].expand(-1, -1, asked.table.shape[2])).masked_fill(~rows[..., None], 0)
    where = found[..., 1] if found.shape[2] == 2 else found[..., 1:]
    if where.ndim == 3:  # the text coordinate only tells sequences apart and must not have gaps
        where = torch.cat([(rows.cumsum(1) - 1).clamp_min(0)[..., None], where[..., 1:]], -1)
    first, size = torch.arange(len(keep), device=keep.device)[:, None] * keep.shape[1], asked.features.shape[-1]
    kept = asked.features.flatten(0, 1).index_select(0, (compact(keep, fixed.count)[0] + first).flatten())
    rank = rank.gather(1, places).masked_fill(~rows, -1)
    return Rows(found[..., 0], rows, where, rank, kept.view(len(keep), fixed.count, size)), keep


def projected(vlm: VLM, rows: Rows, separated: bool) -> Rows:
    """The rows with their survivors in the decoder's width, and the family's separator behind them where it has one."""
    batch, count, _ = rows.visual.shape
    visual = vlm.project(rows.visual.flatten(0, 1)).view(batch, count, -1)
    if separated:
        visual = torch.cat([visual, vlm.separator().to(visual.dtype).expand(batch, 1, -1)], 1)
    return rows._replace(visual=visual.to(vlm.model.dtype))


def causal(mask: Tensor) -> Tensor:
    """[B S] -> [B 1 S S] bool: who may attend to whom. Padding attends to itself, or its softmax would have nothing to sum."""
    here = torch.arange(mask.shape[1], device=mask.device)
    earlier = here[None, :] <= here[:, None]
    return (earlier & mask[:, None, None, :]) | (here[None, :] == here[:, None])


def prefill(vlm: VLM, rows: Rows, padded: bool) -> Any:
    """The model's own forward on embedded rows: logits of the last position, and the cache.

    Without padding it gets no mask, so that its fused causal kernel runs.
    """
    text, at = vlm.embed(rows.input_ids), rows.rank.clamp_min(0)[..., None]
    visual = rows.visual.gather(1, at.expand(-1, -1, rows.visual.shape[2]))
    where = rows.position_ids if rows.position_ids.ndim == 2 else rows.position_ids.permute(2, 0, 1)
    return vlm.model(
        inputs_embeds=torch.where((rows.rank >= 0)[..., None], visual, text),
        attention_mask=causal(rows.mask) if padded else None,
        position_ids=where + vlm.position_offset,
        use_cache=True,
        logits_to_keep=1,
    )  # fmt: skip


@contextmanager
def cutting(
    vlm: VLM, rows: Rows, inside: Inside, known: Mapping[int, Length], around: Callable[[], AbstractContextManager[Any]]
) -> Iterator[DecoderCuts]:
    """In the block, `prefill` of these rows cuts what the decoder shall cut. known: `lengths`; around: of `DecoderCuts`."""
    cuts = DecoderCuts(vlm, inside.pruner, inside.cuts, Windows(vlm), around, known)
    cuts.expect(as_prompts(rows), inside.tokens)
    with cuts.hooked():
        yield cuts


def as_prompts(rows: Rows) -> Prompts:
    """The rows as `pruning` has them, padding included."""
    slots = rows.rank >= 0
    return Prompts(rows.input_ids, rows.mask.long(), rows.position_ids, slots, torch.zeros_like(slots))


# --- to and from `pruning` ---------------------------------------------------------------------------------------------


def fitted(packed: pruning.Packed, length: int, dtype: torch.dtype) -> Rows:
    """Rows that `pruning` cut, lengthened on the left to `length`."""
    prompts, more = packed.prompts, length - packed.prompts.input_ids.shape[1]
    rank = torch.where(prompts.slots, prompts.slots.cumsum(1) - 1, -1)
    where = prompts.position_ids
    return Rows(
        functional.pad(prompts.input_ids, (more, 0)),
        functional.pad(prompts.attention_mask.bool(), (more, 0)),
        functional.pad(where, (more, 0) if where.ndim == 2 else (0, 0, more, 0)),
        functional.pad(rank, (more, 0), value=-1),
        pad_sequence(list(packed.features.to(dtype).split(packed.sizes.tolist())), batch_first=True),
    )


def unfitted(rows: Rows, kept: Tensor, total: Tensor) -> pruning.Packed:
    """Rows of fixed length as `pruning` packs them: without padding that no row needs, features in the order of their slots."""
    asked, slots = as_prompts(rows), rows.rank >= 0
    owner = torch.arange(len(slots), device=slots.device)[:, None].expand_as(slots)
    features = rows.visual[owner[slots], rows.rank[slots]]
    short = replace(pruning.cut(asked, rows.mask), index=None)  # places in the full row are not among what is fixed
    return pruning.Packed(short, features, kept, total, slots.sum(1))
