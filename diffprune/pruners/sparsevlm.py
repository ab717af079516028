"""SparseVLM: staged cuts by the attention of words that have to do with the picture (arXiv 2410.04417)."""

from __future__ import annotations

import torch
from torch import Tensor

from diffprune.core.budget import Budget
from diffprune.core.evidence import QUESTION, Question, decoder_attention, decoder_features
from diffprune.core.pruner import Pruner, Reference
from diffprune.core.site import Cut, Plan, staged
from diffprune.core.tokens import Selection, VisualTokens, means
from diffprune.core.vlm import Shape
from diffprune.pruners._depth import scaled

AFTER = (3, 7, 16)  # of 32 layers
EACH, EMBEDDED = decoder_attention(queries="each"), decoder_features(0)
RECYCLED, PER_CLUSTER = 0.3, 10


class SparseVLM(Pruner):
    """Keeps the tokens to which rater words attend most; the best of the others are clustered, each cluster kept as its mean.

    Raters are the words of the question to which visual tokens point more than to the average word (softmax of products of input
    embeddings). recycle: cluster the best 30 % of what is dropped, one cluster for ten tokens (density peaks over as many nearest
    neighbours as there are clusters); their means take part in the budget, where the release adds them to it.

    From the authors' code, cuts behind layers 2, 6 and 15 of 32, counted from 0, by the attention in them: after 3, 7 and 16
    layers, the same fractions of other depths. How we differ: every cut leaves the same share, so that the layer average is the
    budget, where the release lists counts for four budgets; a cluster's mean stands at its centre, and tokens keep their
    positions, where the release appends means and numbers anew; of equal densities the earlier token's is the larger, where the
    release adds noise; the words that rate are chosen at every cut by the tokens that are left, where the release chooses them
    once, by all tokens.
    """

    label = "SparseVLM"
    reference = Reference("SparseVLM: Visual Token Sparsification for Efficient Vision-Language Model Inference", "2410.04417")
    option_labels = {"recycle": "recycling"}
    needs = frozenset({QUESTION, EACH, EMBEDDED})

    def __init__(self, recycle: bool = True) -> None:
        self.recycle = recycle

    def cuts(self, budget: Budget, shape: Shape) -> Plan:
        return staged(budget, shape.layers, scaled(AFTER, shape.layers))

    def select(self, tokens: VisualTokens, cut: Cut) -> Selection:
        counts, total = cut.budget.counts(tokens.counts), tokens.counts
        question = tokens.evidence[QUESTION]
        assert isinstance(question, Question)
        chosen = raters(tokens.given(EMBEDDED), tokens.valid, question)
        scores = (tokens.given(EACH).float() * chosen[:, None]).sum(-1)
        order = scores.masked_fill(~tokens.valid, -torch.inf).argsort(dim=1, descending=True, stable=True)
        keep, into = torch.zeros_like(tokens.valid), torch.full_like(order, -1)
        for i, (count, num) in enumerate(zip(counts.tolist(), total.tolist(), strict=True)):
            pool, clusters = recycled(count, num) if self.recycle else (0, 0)
            keep[i, order[i, : count - clusters]] = True
            if clusters:
                found = order[i, count - clusters : count - clusters + pool].sort().values
                centre, member = density_peaks(tokens.features[i, found].float(), clusters)
                keep[i, found[centre]], into[i, found] = True, found[centre][member]
        merging = self.recycle and bool((into >= 0).any())
        return Selection(keep, means(tokens, keep, into, torch.ones_like(scores)) if merging else None)


def raters(visual: Tensor, valid: Tensor, question: Question) -> Tensor:
    """Mask [B T] of words that visual tokens [B N D] point to at least as much as to the average word; never padding."""
    products = visual.float() @ question.embedding.float().transpose(1, 2)
    pointing = products.masked_fill(~question.valid[:, None], torch.finfo(torch.float32).min).softmax(-1) * valid[..., None]
    mean = pointing.sum(1) / valid.sum(1)[:, None].clamp_min(1)
    average = mean.sum(1, keepdim=True) / question.valid.sum(1)[:, None].clamp_min(1)
    return (mean >= average - 1e-7) & question.valid


def recycled(count: int, total: int) -> tuple[int, int]:
    """(tokens that are clustered, clusters) where `count` of `total` are to be left; at least one is kept as it is.

    Clustered are 30 % of the tokens that are not kept as they are, and one more; clusters are a tenth of these, and one more.
    """
    pool, clusters = 0, 0
    while total > count and pool // PER_CLUSTER + 1 > clusters < count - 1:  # a cluster more leaves one token less as it is
        clusters += 1
        pool = int(RECYCLED * (total - count + clusters)) + 1
    return pool, clusters


def density_peaks(points: Tensor, clusters: int) -> tuple[Tensor, Tensor]:
    """(centres [clusters], the number of each point's centre [N]): density peaks by nearest neighbours (DPC-kNN).

    Centres have most density times distance to the nearest denser point; others join the nearest centre. A density is of as many
    nearest points as there are clusters, the point itself among them. Of equal densities the earlier point's is the larger.
    """
    apart = torch.cdist(points[None], points[None])[0] / points.shape[1] ** 0.5
    near = apart.sort(dim=1).values[:, :clusters]
    density = (-near.square().mean(1)).exp()
    rank = density.argsort(descending=True, stable=True).argsort()
    denser = rank[None, :] < rank[:, None]  # of two equal densities too, as of a pair that are each other's nearest
    height = torch.where(denser.any(1), apart.masked_fill(~denser, torch.inf).amin(1), apart.amax())
    centre = (density * height).argsort(descending=True, stable=True)[:clusters]
    member = apart[:, centre].argmin(1)
    member[centre] = torch.arange(len(centre), device=centre.device)
    return centre, member
