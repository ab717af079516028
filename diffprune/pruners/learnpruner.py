"""LearnPruner's first stage: a tiny network with a straight-through keep or drop, and a few tokens unlike those it keeps.

Training (arXiv 2604.23950): softmax over two logits of every token, arg max forward, the softmax's gradient backward; a dropped
token is no key in any decoder layer, which is what removing it does. The frozen model teaches through its answers alone.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from diffprune.core.budget import Budget, Keep, Share, top
from diffprune.core.noise import Noise
from diffprune.core.pruner import Reference
from diffprune.core.site import Cut
from diffprune.core.tokens import Relaxation, Selection, VisualTokens
from diffprune.pruners._greedy import cosines, farther
from diffprune.pruners._logistic_topk import centred
from diffprune.pruners._own_scorer import OwnScorer


class LearnPruner(OwnScorer):
    """The stage before the projector: keep or drop by a network of one hidden layer, then diversity tokens.

    Left out is the second stage, a cut after decoder layer 12 of 32 by the attention of the question's words, with which the paper
    reports 96.9 % at 64 tokens of LLaVA-1.5-7B, and 96.1 without. We know the paper by accounts of it, and none says what holds the
    number of tokens kept in training to a budget: ours shifts the logits of an image so that the softmax expects as many as the
    budget keeps, and keeps that many of the largest, which meets it exactly. The hidden layer is half as wide as the tokens, which
    gives the 0.53 million parameters stated. GELU, standardised features, and diversity among the features that the projector
    reads are our choices. Data, steps, seeds and drawn budgets are the recipe's; there is no denoiser, noise or temperature.

    diversity: share of the budget that goes, when tokens are removed, to tokens unlike those kept: again and again the one whose
               largest cosine to any kept token is smallest. Not with a threshold, which has no count to fill. 0: none.
    width:     of the hidden layer; 0 is half of the tokens'.
    """

    label = "LearnPruner (stage 1)"
    reference = Reference("LearnPruner: Rethinking Attention-based Token Pruning in Vision Language Models", "2604.23950")
    attention_implementation = "masked_softmax"
    searched = {"diversity": (0.0, 0.1, 0.2)}
    apart = (
        "Its scorer is its paper's; there is no denoiser, noise or temperature.",
        "The paper's second stage, inside the decoder, is left out.",
    )

    def __init__(self, weights: Path | None = None, *, diversity: float = 0.1, width: int = 0, other_model: bool = False) -> None:
        if isinstance(diversity, bool) or not isinstance(diversity, (int, float)) or not 0 <= diversity < 1:
            raise ValueError(f"learnpruner(diversity={diversity!r}): the share for unlike tokens lies from 0 to below 1")
        self.diversity = diversity
        super().__init__(weights, width=width, other_model=other_model)

    def network(self, features: int, width: int) -> nn.Module:
        return TwoLogits(features, width)

    def score(self, tokens: VisualTokens) -> Tensor:
        keep, drop = self.logits(tokens).unbind(-1)
        return keep - drop

    def relax(self, tokens: VisualTokens, budget: Budget, temperature: float, noise: Noise) -> Relaxation:
        """The softmax of keep against drop + b is sigmoid(keep - drop - b); b such that its sum is the budget."""
        margin, counts = self.score(tokens) / temperature, self.counts(tokens, budget)
        soft = centred(margin, tokens.valid, counts).sigmoid()
        hard = top(margin, tokens.valid, counts.long()).to(soft.dtype)
        mask = (hard + (soft - soft.detach())).where(tokens.valid, 0.0)
        return Relaxation(tokens.features, let=hard, retention=mask)

    def select(self, tokens: VisualTokens, cut: Cut) -> Selection:
        budget = cut.budget
        if not self.diversity or not isinstance(budget, Keep | Share):
            return super().select(tokens, cut)
        num, most = tokens.valid.shape[1], _part(budget, 1 - self.diversity)
        important = super().select(tokens, replace(cut, budget=most)).keep
        steps = budget.count(num) - most.count(num) + 1  # shares round: a smaller image may have one more to add
        distance = cosines(tokens.features, tokens.valid).neg_()
        return Selection(farther(distance, important, tokens.valid, budget.counts(tokens.counts), steps))


class TwoLogits(nn.Module):
    """Standardised tokens [B N D] -> logits of keep and drop [B N 2], every token by itself."""

    blocks = ()

    def __init__(self, features: int, width: int) -> None:
        super().__init__()
        self.inlet = nn.Linear(features, width)
        self.head = nn.Linear(width, 2, bias=False)  # a constant would never train

    def forward(self, z: Tensor, valid: Tensor) -> Any:
        return self.head(functional.gelu(self.inlet(z)))

    def flops(self, num: int) -> float:
        """Of `num` tokens of one image, forward."""
        return 2.0 * num * (self.inlet.weight.numel() + self.head.weight.numel())


def _part(budget: Keep | Share, share: float) -> Keep | Share:
    """A share of a budget, at least one token."""
    return Keep(max(1, int(share * budget.num + 0.5))) if isinstance(budget, Keep) else Share(share * budget.share)
