"""Groups by principal components, near-duplicates suppressed in each (PruneSID, arXiv 2603.09480)."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from diffprune.core.evidence import encoder_attention
from diffprune.core.pruner import Pruner, Reference
from diffprune.core.site import Cut
from diffprune.core.tokens import Selection, VisualTokens
from diffprune.pruners._greedy import cosines, unsuppressed
from diffprune.pruners._quotas import lowest, ranks, sizes_of

SUPPRESSED = 18  # times the share that is kept and the mean cosine: above, a token is a near-duplicate
ITERATIONS = 2  # of the subspace, as in `torch.pca_lowrank`


class PruneSID(Pruner):
    """Keeps the most attended tokens of every group of tokens that share a principal component, distinct ones first.

    A quarter of the budget is the number of components, of the sigmoid of the features with tokens as variables; a token belongs
    to the one where its loading is largest. In a group, tokens with a cosine above 18 K/N of the image's mean to a better one are
    suppressed and rank last. Every group has at least one place; the others are shared out by the number of distinct tokens, up to
    a limit. This is the release for LLaVA, whose K/32 is of each crop of 576; that for Qwen takes at least the mean itself, and
    loadings in place of attention. [CLS] takes one of the K in the release; a family's visual tokens need not include it, so here
    the tokens have all K, and an image of several crops one budget. The release draws the subspace's start at random; `seed` fixes
    it. Tokens stand in the order of the raster, where the release leaves that of the groups. Released with contiguous positions.

    seed: of the start of the subspace iteration.
    """

    label = "PruneSID"
    reference = Reference(
        "Prune Redundancy, Preserve Essence: Vision Token Compression in VLMs via Synergistic Importance-Diversity", "2603.09480"
    )
    replicate_options = frozenset({"seed"})
    needs = frozenset({encoder_attention()})

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def select(self, tokens: VisualTokens, cut: Cut) -> Selection:
        valid, attention = tokens.valid, tokens.given(encoder_attention()).float()
        counts, most = cut.budget.counts(tokens.counts), cut.budget.count(valid.shape[1])
        num = max(1, most // 4)
        group = components(tokens, (counts // 4).clamp_min(1), num, self.seed)
        likeness = cosines(tokens.features, valid)
        pairs = (tokens.counts * (tokens.counts - 1)).clamp_min(1)
        mean = (likeness.sum((1, 2)) - likeness.diagonal(dim1=1, dim2=2).sum(1)) / pairs
        alike = likeness > (SUPPRESSED * counts / tokens.counts.clamp_min(1) * mean)[:, None, None]
        distinct = unsuppressed(alike & (group[:, None] == group[:, :, None]), attention, valid)
        return Selection(chosen(group, attention, distinct, valid, counts, num))


def chosen(group: Tensor, scores: Tensor, distinct: Tensor, valid: Tensor, counts: Tensor, num: int) -> Tensor:
    """Mask [B N] of `counts` [B] tokens: each group's quota, distinct tokens first, by falling score. num: groups."""
    sizes, survivors = sizes_of(group, valid, num), sizes_of(group, distinct, num)
    quota, limit = quotas(sizes, survivors, counts)
    by_score = ranks(scores, group, valid, num)
    last = group.shape[1]
    rank = ranks(-(by_score + last * (~distinct).long()).float(), group, valid, num)
    fill = torch.where(rank < quota.gather(1, group), 0, torch.where(rank < limit.gather(1, group), 1, 2))
    order = survivors.argsort(dim=1, descending=True, stable=True).argsort(dim=1)  # groups with most distinct tokens fill up first
    return lowest([fill, order.gather(1, group), rank], valid, counts)


def quotas(sizes: Tensor, survivors: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """([B G] places of each group before what is left over is filled up, [B G] its limit). sizes, survivors: [B G]; counts: [B].

    At least one for every group with tokens, the rest in proportion to survivors, rounded cumulatively. The limit, at most
    5 ceil(K / 64) and the survivors, rises until it holds the budget.
    """
    limit = (5 * ((counts[:, None] + 63) // 64)).minimum(sizes).minimum(survivors)
    while bool((short := limit.sum(1, keepdim=True) < counts[:, None]).any()):
        limit = (limit + short.long()).minimum(sizes)
    least = sizes.clamp_max(1)
    rest = (counts - least.sum(1)).clamp_min(0)[:, None]
    share = survivors.double() / survivors.sum(1, keepdim=True).clamp_min(1)
    upto = (share.cumsum(1) * rest).round().long()
    spread = upto - torch.cat([torch.zeros_like(upto[:, :1]), upto[:, :-1]], 1)
    return (least + spread).minimum(limit), limit


def components(tokens: VisualTokens, counts: Tensor, num: int, seed: int) -> Tensor:
    """[B N] int: of each token, the principal component with its largest loading, among the first `counts` [B] of `num`.

    Randomised subspace iteration (arXiv 0909.4061, Algorithm 4.4) on a start that is the same for every image. The leading columns
    of an orthogonal basis do not depend on those behind them, so an image's answer does not depend on `num`.
    """
    values = tokens.features.float().sigmoid()
    values = (values - values.mean(2, keepdim=True)).masked_fill(~tokens.valid[..., None], 0.0)  # a channel is a sample
    start = draw(values.shape[1], num, seed).to(values.device)
    basis = torch.linalg.qr(values.transpose(1, 2) @ start).Q  # [B D num]
    for _ in range(ITERATIONS):
        basis = torch.linalg.qr(values @ basis).Q
        basis = torch.linalg.qr(values.transpose(1, 2) @ basis).Q
    own = torch.arange(basis.shape[2], device=values.device) < counts[:, None]
    small = (values @ basis) * own[:, None]  # [B N num]
    loadings = torch.linalg.svd(small, full_matrices=False).U.abs()
    return loadings.masked_fill(~own[:, None], -1.0).argmax(2).masked_fill(~tokens.valid, 0)


@lru_cache(maxsize=64)
def draw(rows: int, columns: int, seed: int) -> Tensor:
    """[rows columns] standard normal; what stands in a place depends on neither number, as each column has a stream of its own, of
    which torch draws 16 values at a time."""
    streams = [torch.Generator().manual_seed(seed * 2**20 + column) for column in range(columns)]
    return torch.stack([torch.randn(-(-rows // 16) * 16, generator=stream) for stream in streams], 1)[:rows]
