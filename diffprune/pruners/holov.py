"""Quotas for stretches of the image, inside which attention chooses (HoloV, arXiv 2510.02912)."""

from __future__ import annotations

import torch
from torch import Tensor

from diffprune.core.budget import Budget
from diffprune.core.evidence import encoder_attention
from diffprune.core.pruner import Pruner, Reference
from diffprune.core.site import PROJECTED, Cut, Plan
from diffprune.core.tokens import Selection, VisualTokens
from diffprune.core.vlm import Shape
from diffprune.pruners._greedy import cosines
from diffprune.pruners._quotas import lowest, ranks, sizes_of


class HoloV(Pruner):
    """Keeps the tokens the encoder attends to most in every stretch of the image, by quotas that follow its attention there.

    The sequence is split into stretches of equal length, 1024 N / (576 K) of them as in the release for Qwen (16 at 64 of 576). A
    stretch's share of the budget is that of its mean token score, 1000 a_i + 0.09 v_i: attention, and the variance of the token's
    cosines to the others of its stretch after the projector, scaled to the size of the attention there. As that scale is of the
    stretch's own means, in the release as here, variance adds nine hundredths of the mean attention to any stretch of several
    tokens, however alike they are, unless it is next to none. What rounding leaves, and what a stretch cannot hold, goes one each
    to the largest shares; the release fills up with zeros instead, and gives stretches of one token a thousandth of their score.
    Tokens stay in raster order, where the release leaves those of a stretch in that of their attention. Released with contiguous
    positions on LLaVA and original ones on Qwen.
    """

    label = "HoloV"
    reference = Reference(
        'Don\'t Just Chase "Highlighted Tokens" in MLLMs: Revisiting Visual Holistic Context Retention', "2510.02912"
    )
    needs = frozenset({encoder_attention()})

    def cuts(self, budget: Budget, shape: Shape) -> Plan:
        return (Cut(PROJECTED, budget),)

    def select(self, tokens: VisualTokens, cut: Cut) -> Selection:
        valid, attention = tokens.valid, tokens.given(encoder_attention()).float()
        counts = cut.budget.counts(tokens.counts)
        group, num = stretches(valid, counts)
        weight = stretch_scores(tokens, attention, group, num)
        share = weight / (weight.sum(1, keepdim=True) + 1e-6)
        quota = (share * counts[:, None]).floor().long()
        rank = ranks(attention, group, valid, num)
        beyond = (rank + 1 - quota.gather(1, group)).clamp_min(0)  # 0 within the quota, 1 for the first token after it ...
        return Selection(lowest([beyond, -share.gather(1, group)], valid, counts))


def stretches(valid: Tensor, counts: Tensor) -> tuple[Tensor, int]:
    """([B N] int, the stretch of each valid token, 0 elsewhere; stretches of the image that has most). counts: [B], the budget.

    The first stretches are one token longer where the length is no multiple.
    """
    total = valid.sum(1)
    parts = (1024 * total // (576 * counts.clamp_min(1))).minimum(total).clamp_min(1)[:, None]
    place, short = valid.cumsum(1) - 1, total[:, None] // parts
    edge = (total[:, None] - short * parts) * (short + 1)  # where the longer ones end
    group = torch.where(place < edge, place // (short + 1), (place - edge) // short.clamp_min(1) + total[:, None] - short * parts)
    return group.masked_fill(~valid, 0), int(parts.max())


def stretch_scores(tokens: VisualTokens, attention: Tensor, group: Tensor, num: int) -> Tensor:
    """[B num] mean token score of each stretch; 0 where an image has fewer."""
    valid, batch = tokens.valid, len(tokens)
    sizes = sizes_of(group, valid, num)
    length = int(sizes.max())
    place = (group * length + ranks(attention, group, valid, num)).where(valid, num * length)  # padding: behind the last stretch

    def laid(values: Tensor) -> Tensor:
        """[B N C] -> [B num, length, C], a row of its own for every stretch."""
        rows = values.new_zeros(batch, num * length + 1, values.shape[2])
        return rows.scatter_(1, place[..., None].expand_as(values), values)[:, :-1].reshape(batch * num, length, -1)

    real = (torch.arange(length, device=valid.device) < sizes[..., None]).flatten(0, 1)
    cosine = cosines(laid(tokens.features), real)
    cosine.diagonal(dim1=1, dim2=2).zero_()
    total = sizes.view(-1, 1)
    others = (total - 1).clamp_min(1)
    mean = cosine.sum(2) / others
    variance = ((cosine - mean[..., None]).square() * real[:, None]).sum(2) / others * real
    attended = laid(1000 * attention[..., None])[..., 0]
    scale = attended.abs().sum(1) / (variance.abs().sum(1) + 1e-6 * total[:, 0]).clamp_min(1e-12)
    return ((attended + 0.09 * variance * scale[:, None]).sum(1) / total[:, 0].clamp_min(1)).view(batch, num)
