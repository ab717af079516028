"""Conditional diversity: a determinantal point process weighted by relevance to the question (CDPruner, arXiv 2506.10967)."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import normalize

from diffprune.core.budget import Budget
from diffprune.core.evidence import QUESTION, Question
from diffprune.core.pruner import Pruner, Reference
from diffprune.core.site import PROJECTED, Cut, Plan
from diffprune.core.tokens import Selection, VisualTokens
from diffprune.core.vlm import Shape
from diffprune.pruners._greedy import cosines, first, most_volume


class CDPruner(Pruner):
    """Keeps tokens that are diverse and bear on the question: greedy MAP of the kernel r_i cos(x_i, x_j) r_j, after the projector.

    The release takes the relevance r from CLIP's text tower and visual projection, which vision-language checkpoints leave out.
    Here it is read in the decoder's word space: the mean cosine of a projected token and the question's embedded words, scaled to
    0 .. 1 within the image. That is another relevance than the paper's, hence the label; its sign is plain, where the release
    negates its own. Released with contiguous positions, and on LLaVA-NeXT with a budget for each crop; here an image has one.

    question: False leaves relevance out, which is the unconditional process.
    """

    label = "CDPruner (word space)"
    reference = Reference(
        "Beyond Attention or Similarity: Maximizing Conditional Diversity for Token Pruning in MLLMs", "2506.10967"
    )
    option_labels = {"question": "question read"}

    def __init__(self, question: bool = True) -> None:
        self.question = question
        self.needs = frozenset({QUESTION}) if question else frozenset()

    def cuts(self, budget: Budget, shape: Shape) -> Plan:
        return (Cut(PROJECTED, budget),)

    def select(self, tokens: VisualTokens, cut: Cut) -> Selection:
        counts, num = cut.budget.counts(tokens.counts), tokens.valid.shape[1]
        found = kernel(tokens) if self.question else cosines(tokens.features, tokens.valid)
        return Selection(first(most_volume(found, tokens.valid, cut.budget.count(num))[0], counts, num))


def kernel(tokens: VisualTokens) -> Tensor:
    """[B N N]: r_i cos(x_i, x_j) r_j with the relevance r of `relevance`."""
    weight = relevance(tokens)
    return cosines(tokens.features, tokens.valid).mul_(weight[:, :, None]).mul_(weight[:, None])


def relevance(tokens: VisualTokens) -> Tensor:
    """[B N] in 0 .. 1: mean cosine of each token and the words of its question, scaled within the image; 1 without a question."""
    question = tokens.evidence[QUESTION]
    assert isinstance(question, Question), "asked for in `needs`"
    words = normalize(question.embedding.float(), dim=-1).masked_fill(~question.valid[..., None], 0.0)
    likeness = (normalize(tokens.features.float(), dim=-1) @ words.sum(1)[..., None])[..., 0]
    likeness = likeness / question.valid.sum(1, keepdim=True).clamp_min(1)
    low = likeness.masked_fill(~tokens.valid, math.inf).amin(1, keepdim=True)
    high = likeness.masked_fill(~tokens.valid, -math.inf).amax(1, keepdim=True)
    scaled = (likeness - low + 1e-6) / (high - low)
    return torch.where(high > low, scaled, 1.0).masked_fill(~tokens.valid, 0.0)
