"""Outliers of attention, with their nearest neighbours by key added to them (LLaVA-PruMerge, arXiv 2403.15388)."""

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

NEIGHBOURS = 32
ATTENTION, KEYS = encoder_attention(-1, joint=True), encoder_keys(-1)


class PruMerge(Pruner):
    """Keeps the tokens that the last encoder layer attends to most, and adds to each what is most like it, weighted by attention.

    Attention is that of one head as wide as all together. To a kept token are added its 32 nearest others by key, kept ones
    included, each with its attention as weight; weights are not normalised. Of the tokens that are not kept, weighted alike, one
    more is made: here it is one of the budget's tokens and stands in the place of the best of them, where the release appends it.
    The order is that of the raster; the release's is by attention. Released with contiguous positions.

    plus:     PruMerge+: a quarter of the tokens by attention, the others evenly over what is left. The release's strides do that
              about, without meeting a count, where it counts outliers; at a fixed ratio, for training, they are a half.
    adaptive: as many by attention as are outliers, above Q3 + 1.5 IQR of the image's attention, and the one that is made of what
              is not kept; the budget is then an upper limit, and with `plus` three times as many again are spread over what is
              left.
    """

    label = "PruMerge"
    reference = Reference("LLaVA-PruMerge: Adaptive Token Reduction for Efficient Large Multimodal Models", "2403.15388")
    option_labels = {"plus": "plus", "adaptive": "adaptive"}
    needs = frozenset({ATTENTION, KEYS})

    def __init__(self, plus: bool = False, adaptive: bool = False) -> None:
        self.plus, self.adaptive = plus, adaptive

    def select(self, tokens: VisualTokens, cut: Cut) -> Selection:
        valid, weight, total = tokens.valid, tokens.given(ATTENTION).float(), tokens.counts
        counts = cut.budget.counts(total)
        if self.adaptive:
            counts = (outliers(weight, valid) * (4 if self.plus else 1) + 1).minimum(counts)
        last = (counts > 1) & (counts < total)  # whether there is a token of what is not kept
        best = counts - last.long()
        if self.plus:
            best = ((best + 3) // 4).where(counts < total, best)
        centres = top(weight, valid, best)
        centres |= spread(valid & ~centres, counts - last.long() - best)
        rest = valid & ~centres
        remainder = top(weight, rest, last.long())
        return Selection(
            centres | remainder,
            sums(tokens, weight, centres, remainder, rest & (counts < total)[:, None], cut.budget.count(valid.shape[1])),
        )


def outliers(values: Tensor, valid: Tensor) -> Tensor:
    """[B] int: valid values above Q3 + 1.5 (Q3 - Q1), quartiles interpolated linearly."""
    known = values.masked_fill(~valid, math.nan)
    low, high = known.nanquantile(0.25, 1, keepdim=True), known.nanquantile(0.75, 1, keepdim=True)
    return ((values > high + 1.5 * (high - low)) & valid).sum(1)


def spread(among: Tensor, counts: Tensor) -> Tensor:
    """Mask [B N] of `counts` [B] tokens of `among` [B N], evenly along it."""
    place, total = among.cumsum(1) - 1, among.sum(1, keepdim=True).clamp_min(1)
    before, after = (place * counts[:, None]) // total, ((place + 1) * counts[:, None]) // total
    return among & (after > before)


def sums(tokens: VisualTokens, weight: Tensor, centres: Tensor, remainder: Tensor, rest: Tensor, most: int) -> Tensor:
    """`Selection.mix` [B K N]: rows of `centres` with their neighbours, the row of `remainder` with all of `rest`.

    weight: [B N], of a token that is added to another. Masks are [B N]; `rest` is empty where nothing is removed. most: K.
    """
    keep, valid = centres | remainder, tokens.valid
    index = keep.int().argsort(dim=1, descending=True, stable=True)[:, :most]
    own = torch.zeros(*index.shape, valid.shape[1], device=valid.device).scatter_(2, index[..., None], 1.0)
    key = normalize(tokens.given(KEYS).flatten(2).float(), dim=-1)
    likeness = comparable(key.gather(1, index[..., None].expand(-1, -1, key.shape[2])) @ key.transpose(1, 2))
    likeness = likeness.masked_fill((own > 0) | ~valid[:, None], -math.inf)
    nearest = likeness.topk(min(NEIGHBOURS, valid.shape[1]), dim=2)
    near = torch.zeros_like(own).scatter_(2, nearest.indices, (nearest.values > -math.inf).float())
    joins = near * rest.any(1)[:, None, None]
    added = (own + joins * weight[:, None]).masked_fill(~valid[:, None], 0.0)
    row = remainder.gather(1, index)[..., None]
    return torch.where(row, weight.where(rest, 0.0)[:, None], added)
