"""Token merging: in every round the most similar pairs of alternating tokens become their means (ToMe, arXiv 2210.09461)."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import normalize

from diffprune.core.budget import top
from diffprune.core.evidence import encoder_keys
from diffprune.core.pruner import Pruner, Reference
from diffprune.core.site import Cut
from diffprune.core.tokens import Selection, VisualTokens, means
from diffprune.pruners._greedy import comparable

KEYS = encoder_keys()


class ToMe(Pruner):
    """Bipartite soft matching, behind the encoder: nothing is dropped, tokens that say the same become their mean.

    In a round, tokens are dealt out in turn to A and B; each of A links to the one of B whose key, mean over heads, is most like
    its own; the strongest links merge. A mean weighs each token by how many went into it, and so does its key.

    How we differ: the paper merges inside every block of the encoder, between attention and MLP, whereby the encoder gets faster
    and later blocks work on what is merged. Here the encoder runs whole and the same number of rounds follow each other on the
    keys of the layer that the projector reads, so time is saved in the decoder alone. Hence also no size in the attention's logits.
    A mean stands in the place of the token of B that others went into, and tokens are dealt out in the order of the raster, where
    the release puts B behind what is left of A; A begins with the first patch, where that of the release begins with [CLS]. A round
    merges half of what is there at most, and rounds are added where the budget is not met by then.

    rounds: over which merging is spread evenly; 23 blocks of CLIP ViT-L act before the layer that LLaVA reads.
    """

    label = "ToMe (behind the encoder)"
    reference = Reference("Token Merging: Your ViT But Faster", "2210.09461")
    needs = frozenset({KEYS})

    def __init__(self, rounds: int = 23) -> None:
        if isinstance(rounds, bool) or not isinstance(rounds, int) or rounds < 1:
            raise ValueError(f"tome(rounds={rounds!r}): merging takes a whole number of rounds, at least 1")
        self.rounds = rounds

    def select(self, tokens: VisualTokens, cut: Cut) -> Selection:
        total = tokens.counts
        excess = total - cut.budget.counts(total)
        size = torch.ones_like(total)[:, None].expand_as(tokens.valid).float() if tokens.size is None else tokens.size.float()
        keys = tokens.given(KEYS).float().mean(2).masked_fill(~tokens.valid[..., None], 0.0) * size[..., None]
        own = torch.arange(tokens.valid.shape[1], device=total.device).expand_as(tokens.valid)
        keep, into, number = tokens.valid, own, 0
        while number < self.rounds or bool((keep.sum(1) > total - excess).any()):
            number += 1
            wanted = excess * min(number, self.rounds) // self.rounds - (total - keep.sum(1))
            goes, target = links(keys, keep, wanted)
            keys = keys.scatter_add(1, target[..., None].expand_as(keys), keys * goes[..., None])
            keep = keep & ~goes
            into = target.where(goes, own).gather(1, into)
        return Selection(keep, means(tokens, keep, into))


def links(keys: Tensor, keep: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """One round: (mask [B N] of tokens that go, [B N] int, the token each goes into), at most `counts` [B] and half of an image's.

    keys: [B N d], any length. keep: [B N], the tokens that are still there.
    """
    order = keep.int().argsort(dim=1, descending=True, stable=True)[:, : int(keep.sum(1).max())]
    real = keep.gather(1, order)
    unit = normalize(keys.gather(1, order[..., None].expand(-1, -1, keys.shape[2])), dim=-1)
    likeness = comparable(unit[:, ::2] @ unit[:, 1::2].transpose(1, 2)).masked_fill(~real[:, None, 1::2], -math.inf)
    target = torch.arange(keep.shape[1], device=keep.device).expand_as(keep)
    if not likeness.shape[2]:  # one token is left of every image
        return torch.zeros_like(keep), target
    best, other = likeness.max(2)
    first, second = order[:, ::2], order[:, 1::2]
    linked = real[:, ::2] & best.isfinite()
    taken = top(best, linked, counts.minimum(real.sum(1) // 2).clamp_min(0))
    goes = torch.zeros_like(keep).scatter(1, first, taken)
    return goes, target.scatter(1, first, second.gather(1, other))
