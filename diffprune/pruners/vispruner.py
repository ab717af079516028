"""Important tokens by attention, the rest by removing duplicates (VisPruner, arXiv 2412.01818 v2)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from diffprune.core.budget import top
from diffprune.core.evidence import encoder_attention
from diffprune.core.pruner import Pruner, Reference
from diffprune.core.site import Cut
from diffprune.core.tokens import Selection, VisualTokens
from diffprune.pruners._greedy import cosines, first

STEP = 8  # duplicates removed in a round
HALVINGS = 3  # rounds more than one in `STEP` that a list can need which is to get shorter than `STEP`


class VisPruner(Pruner):
    """Keeps the tokens that the encoder attends to most, and of the others those that are no near-duplicates of each other.

    The others are listed by attention and split alternately in two; the eight of the first half that are most like a token of the
    second are dropped, and the rest of it is listed anew, most alike first, with the second half behind; again and again. The
    release breaks where the list is odd: here the first half is then the longer one, and no round drops more than the first half
    has. Features and attention are those the projector reads; cosines are computed in float32, where the release computes them in
    the model's dtype. Released with contiguous positions, and on LLaVA-NeXT with a budget for each crop; here an image has one.

    important: the share of the budget that goes by attention.
    """

    label = "VisPruner"
    reference = Reference("Beyond Text-Visual Attention: Exploiting Visual Cues for Effective Token Pruning in VLMs", "2412.01818")
    needs = frozenset({encoder_attention()})

    def __init__(self, important: float = 0.5) -> None:
        if isinstance(important, bool) or not isinstance(important, (int, float)) or not 0 <= important <= 1:
            raise ValueError(f"vispruner(important={important!r}): the share that goes by attention lies between 0 and 1")
        self.important = important

    def select(self, tokens: VisualTokens, cut: Cut) -> Selection:
        valid, scores, num = tokens.valid, tokens.given(encoder_attention()).float(), tokens.valid.shape[1]
        counts = cut.budget.counts(tokens.counts)
        num_important = (counts.double() * self.important).floor().long()
        keep = top(scores, valid, num_important)
        rest = valid & ~keep
        most = cut.budget.count(num)  # of an image that has all N tokens, which bounds the others' lists
        most_distinct = most - math.floor(most * self.important)
        longest = num - (most - most_distinct)
        likeness = cosines(tokens.features, valid)
        return Selection(keep | distinct(likeness, scores, rest, counts - num_important, longest, most_distinct))


def rounds(length: int, left: int) -> int:
    """Rounds after which `left` of a list are left, or of any list that is no longer and of which no more are dropped."""
    return -(-(length - left) // STEP) + (HALVINGS if left < STEP else 0) if length > left else 0


def distinct(likeness: Tensor, scores: Tensor, among: Tensor, counts: Tensor, longest: int, most: int) -> Tensor:
    """Mask [B N] of `counts` [B] tokens of `among` [B N] that are left when near-duplicates are dropped round by round.

    likeness: [B N N], symmetric. scores: [B N], by which the list is ordered at first. longest, most: the list of the largest image
    and what is left of it, from which the rounds follow without asking the device.
    """
    batch, num = among.shape
    if not most:
        return torch.zeros_like(among)
    order = scores.masked_fill(~among, -math.inf).argsort(dim=1, descending=True, stable=True)[:, :longest]
    length, rows = among.sum(1), likeness.reshape(batch * num, num)
    base = torch.arange(batch, device=order.device)[:, None] * num
    work = rows.new_empty(batch * ((longest + 1) // 2), num)
    for _ in range(rounds(longest, most)):
        step = (length - counts).clamp_max(STEP).minimum((length + 1) // 2)
        listed = torch.arange(longest, device=order.device) < length[:, None]
        one, two = order[:, 0::2], order[:, 1::2]
        again = two.where(listed[:, 1::2], two[:, :1])  # behind the end of a list its first once more, which changes no maximum
        pairs = torch.index_select(rows, 0, (again + base).flatten(), out=work[: two.numel()]).view(batch, -1, num)
        nearest = pairs.amax(1).gather(1, one)
        alike = nearest.masked_fill(~listed[:, 0::2], -math.inf).argsort(dim=1, descending=True, stable=True)
        one, place = one.gather(1, alike), torch.arange(one.shape[1], device=one.device)
        gone = torch.cat([(place < step[:, None]) | ~listed[:, 0::2], ~listed[:, 1::2]], 1)
        longest = max(longest - min(STEP, (longest + 1) // 2), most, 2)
        order = torch.cat([one, two], 1).gather(1, gone.int().argsort(dim=1, stable=True))[:, :longest]
        length = length - step
    return first(order, counts, num)
