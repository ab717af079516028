"""DiffPrune trained for the diversity it is used with: its soft top-K is that of a determinantal point process.

`dpp(diffprune)` spreads what a scorer ranks that was trained to be right by itself. Here the scorer is trained as it will be used.
Greedy MAP inference of the kernel e^(w s_i) cos(x_i, x_j) e^(w s_j) takes the token of largest 2 w s_i + log r_i, with r_i the
squared length of x_i / |x_i| that is orthogonal to the tokens taken before. So

    a_i = s_i + log(r_i) / (2 w),    r_i orthogonal to those taken before i, to all K for an i that is not taken,

is at least as large of every token that is taken as of any that is not, and DiffPrune's soft top-K of a in place of s becomes, as
its temperature falls, the greedy choice itself. r depends on features and on the order in which tokens are taken, not otherwise on
scores, so the gradient through s alone is exact wherever a small step leaves that order as it is. The combination is ours.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from diffprune.core.budget import standardise
from diffprune.core.site import Cut
from diffprune.core.tokens import Selection, VisualTokens
from diffprune.pruners._greedy import EPSILON, cosines, most_volume
from diffprune.pruners._learned import Learned
from diffprune.pruners._soft_topk import centred
from diffprune.pruners.diffprune import DiffPrune
from diffprune.pruners.dpp import DPP


class DiffPruneDPP(DiffPrune):
    """`diffprune_dpp(weights='folder')` keeps what `dpp(diffprune)` would keep by its scores, and was trained for that.

    weight: w of a standard deviation of scores; the larger, the less diversity counts.

    The others are DiffPrune's. Budgets are counts; a threshold has none to fill.
    """

    label = "DiffPrune trained for DPP"
    option_labels = Learned.option_labels

    def __init__(
        self,
        weights: Path | None = None,
        *,
        weight: float = 0.5,
        question_aware: bool | str = False,
        attention: bool | None = None,
        denoiser: bool | str = True,
        depth: int | None = None,
        width: int = 0,
        other_model: bool = False,
    ) -> None:
        super().__init__(
            weights, question_aware=question_aware, attention=attention, denoiser=denoiser, depth=depth, width=width,
            other_model=other_model,
        )  # fmt: skip
        self.choice = DPP(self, weight)
        if not weight:
            raise ValueError("diffprune_dpp(weight=0) would learn nothing, as scores would not count: give a weight above 0")
        self.weight = weight

    @property
    def by_score_alone(self) -> bool:
        return False

    def select(self, tokens: VisualTokens, cut: Cut) -> Selection:
        """Greedy MAP inference, as `dpp` has it.

        Raises:
            ValueError: a score is NaN, or the budget is a threshold.
        """
        return self.choice.select(tokens, cut)

    def _logits_of_alpha(self, tokens: VisualTokens, counts: Tensor, temperature: float) -> Tensor:
        scores = standardise(self.logits(tokens), tokens.valid)
        unlike = length_left(tokens, self.weight * scores.detach(), counts.long()).log() / (2 * self.weight)
        return centred(scores + unlike, tokens.valid, counts, temperature)


@torch.no_grad()
def length_left(tokens: VisualTokens, logits: Tensor, counts: Tensor) -> Tensor:
    """r [B N], from `EPSILON` to 1: squared length of the unit vector of each token that is orthogonal to those taken before it, or
    to all `counts` [B] of its image where it is not taken. logits: [B N] of `most_volume`."""
    kernel = cosines(tokens.features, tokens.valid)
    order, basis = most_volume(kernel, tokens.valid, int(counts.max()), logits)
    steps = torch.arange(order.shape[1], device=order.device)
    turn = torch.full_like(tokens.valid, len(steps), dtype=torch.long)  # a row that has run out repeats a token it took before
    turn = turn.scatter_reduce_(1, order, steps.expand_as(order), "amin")
    before = steps[:, None] < turn.minimum(counts[:, None])[:, None]  # [B steps N]
    return (1 - basis.square().where(before, 0.0).sum(1)).clamp_min(EPSILON)
