"""Dominant tokens by attention, the others merged into a few contextual ones (VisionZip, arXiv 2412.04467)."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import normalize

from diffprune.core.budget import top
from diffprune.core.evidence import encoder_attention, encoder_keys
from diffprune.core.pruner import Pruner, Reference
from diffprune.core.site import Cut
from diffprune.core.tokens import Selection, VisualTokens
from diffprune.pruners._greedy import comparable


class VisionZip(Pruner):
    """Keeps the tokens that the encoder attends to most, and spreads a few targets over the others, which are merged into them.

    Each of the others goes to the target whose key, mean over heads, is most like its own; a target becomes itself plus the mean of
    what it got, as in the release: no weighted mean of both. [CLS] counts among the dominant tokens of the release and reaches the
    decoder; here the budget is of visual tokens, and all of it goes to them. Tokens stay in raster order; the release puts
    contextual ones last. Released with contiguous positions, and on LLaVA-NeXT with a budget for each crop; here an image has one.

    contextual: share of the budget that goes to contextual tokens; 5/32 is the release's 10 of 64, 20 of 128, 30 of 192.
    """

    label = "VisionZip"
    reference = Reference("VisionZip: Longer is Better but Not Necessary in Vision Language Models", "2412.04467")
    needs = frozenset({encoder_attention(), encoder_keys()})

    def __init__(self, contextual: float = 5 / 32) -> None:
        if isinstance(contextual, bool) or not isinstance(contextual, (int, float)) or not 0 <= contextual <= 1:
            raise ValueError(f"visionzip(contextual={contextual!r}): the share of contextual tokens lies between 0 and 1")
        self.contextual = contextual

    def select(self, tokens: VisualTokens, cut: Cut) -> Selection:
        valid, counts = tokens.valid, cut.budget.counts(tokens.counts)
        num_targets = (counts.double() * self.contextual + 0.5).long()
        dominant = top(tokens.given(encoder_attention()), valid, counts - num_targets)
        rest = valid & ~dominant
        targets = evenly(rest, num_targets)
        keep, most = dominant | targets, cut.budget.count(valid.shape[1])
        into = nearest(tokens.given(encoder_keys()), targets, int(most * self.contextual + 0.5))
        return Selection(keep, with_means(keep, rest & ~targets & targets.any(1, keepdim=True), into, most))


def evenly(among: Tensor, counts: Tensor) -> Tensor:
    """Mask [B N] of `counts` [B] tokens of `among` [B N] at equal strides, the first of them included."""
    place, total = among.cumsum(1) - 1, among.sum(1)
    stride = (total // counts.clamp_min(1)).clamp_min(1)[:, None]
    return among & (place % stride == 0) & (place // stride < counts[:, None])


def nearest(keys: Tensor, targets: Tensor, most: int) -> Tensor:
    """[B N] int: of the `targets` [B N], at most `most` of them, the one whose key [B N H d], mean over heads, is most like each
    token's; ties go to the earlier."""
    key = normalize(keys.float().mean(2), dim=-1)
    place = targets.int().argsort(dim=1, descending=True, stable=True)[:, : max(1, most)]
    theirs = key.gather(1, place[..., None].expand(-1, -1, key.shape[2]))
    likeness = comparable(key @ theirs.transpose(1, 2)).masked_fill_(~targets.gather(1, place)[:, None], -math.inf)
    return place.gather(1, likeness.argmax(2))


def with_means(keep: Tensor, moves: Tensor, into: Tensor, most: int) -> Tensor:
    """`Selection.mix` [B K N]: each survivor plus the mean of the tokens that go into it.

    keep: [B N]; moves: [B N], tokens that go somewhere; into: [B N] int, where; most: K, at least the survivors of any image.
    """
    slot = keep.cumsum(1) - 1
    target = torch.where(keep, slot, slot.gather(1, into)).where(keep | moves, most)
    goes = torch.zeros(len(keep), most + 1, keep.shape[1], device=keep.device).scatter_(1, target[:, None], moves.float()[:, None])
    got = goes / goes.sum(2, keepdim=True).clamp_min(1)
    own = keep.float()[:, None] * (slot[:, None] == torch.arange(most + 1, device=keep.device)[:, None])
    return (got + own)[:, :most]
