"""VisionSelector: tokens scaled by a logistic soft top-K, which a growing penalty makes agree with its own hard top-K.

Training (arXiv 2510.16598 and its release): alpha_i = sigmoid(s_i + t), t such that the sum is the budget, x~_i = alpha_i x_i, and
the loss is that of the answers + lambda BCE(alpha, top-K of s), lambda growing linearly from 0.1 to 2. The model is frozen.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from diffprune.core.budget import Budget, top
from diffprune.core.fitted import Loss, Progress, TrainingRun
from diffprune.core.noise import Noise
from diffprune.core.pruner import Reference
from diffprune.core.tokens import Relaxation, VisualTokens
from diffprune.pruners._logistic_topk import centred
from diffprune.pruners._own_scorer import OwnScorer

GROWTH = 20.0  # the last weight of the penalty over its first: 0.1 to 2


class VisionSelector(OwnScorer):
    """Scores by one head of attention without softmax or values, scales tokens by a soft top-K, keeps the best.

    Differences: the release scores and scales what the projector gives; ours does so before it, where DiffPrune stands, and a
    scaled token fades to the mean of its channels instead of to zero (features are standardised). The release trains at 20 % alone;
    here budgets are drawn as for every method. BCE is a mean over an image's tokens, then over images (our choice). Data, steps and
    seeds are the recipe's; there is no denoiser, noise or temperature.

    agreement: last weight of the penalty; the first is a twentieth of it.
    width:     of queries and keys; 0 is half of the tokens'.
    """

    label = "VisionSelector"
    reference = Reference(
        "VisionSelector: End-to-End Learnable Visual Token Compression for Efficient Multimodal LLMs", "2510.16598"
    )
    searched = {"agreement": (0.5, 1.0, 2.0, 4.0)}
    apart = (
        "Its scorer is its paper's; there is no denoiser, noise or temperature, but a penalty that grows over the steps.",
        "The paper trains at 20 % alone; here budgets are drawn.",
    )

    def __init__(self, weights: Path | None = None, *, agreement: float = 2.0, width: int = 0, other_model: bool = False) -> None:
        if isinstance(agreement, bool) or not isinstance(agreement, (int, float)) or not 0 <= agreement < float("inf"):
            raise ValueError(f"visionselector(agreement={agreement!r}): the weight of a penalty is a number that is not negative")
        self.agreement = agreement
        super().__init__(weights, width=width, other_model=other_model)

    def network(self, features: int, width: int) -> nn.Module:
        return MeanAttention(features, width)

    def relax(self, tokens: VisualTokens, budget: Budget, temperature: float, noise: Noise) -> Relaxation:
        """Penalty: the binary cross-entropy, not yet weighted."""
        scores, valid, counts = self.logits(tokens) / temperature, tokens.valid, self.counts(tokens, budget)
        u = centred(scores, valid, counts)
        alpha = u.sigmoid().where(valid, 0.0)
        hard = top(scores, valid, counts.long()).to(u.dtype)
        apart = functional.binary_cross_entropy_with_logits(u, hard, reduction="none").where(valid, 0.0)
        penalty = (apart.sum(1) / tokens.counts.clamp_min(1)).mean()
        scaled = self.restored(alpha[..., None] * self.standardised(tokens.features), tokens.features)
        return Relaxation(scaled, let=alpha.detach(), penalty=penalty)

    def objective(self, run: TrainingRun, batch: Any, budget: Budget, progress: Progress, noise: Noise) -> Loss:
        """The answers' loss and the penalty at its weight of this step.

        Raises:
            ValueError: as of any relaxation of the encoder's tokens.
        """
        loss = super().objective(run, batch, budget, progress, noise)
        plain = loss.terms["penalty"]
        penalty = self.weight(progress) * plain
        return replace(loss, total=loss.total - plain + penalty, terms={**loss.terms, "penalty": penalty})

    def weight(self, progress: Progress) -> float:
        """lambda of a step: linear from a twentieth of `agreement` at the first to all of it at the last."""
        done = progress.step / max(progress.steps - 1, 1)
        return self.agreement * (1 + (GROWTH - 1) * done) / GROWTH


class MeanAttention(nn.Module):
    """Standardised tokens [B N D] -> scores [B N]: mean_j (W_q x_i + b_q) . (W_k x_j + b_k) / sqrt(width), over an image's tokens.

    The mean of keys is taken before the product, which is the same and costs N products instead of N^2.
    """

    blocks = ()

    def __init__(self, features: int, width: int) -> None:
        super().__init__()
        self.inlet, self.key = nn.Linear(features, width), nn.Linear(features, width)  # the inlet makes queries
        for layer in (self.inlet, self.key):
            nn.init.normal_(layer.weight, std=1e-4)
            nn.init.zeros_(layer.bias)

    def forward(self, z: Tensor, valid: Tensor) -> Tensor:
        live = valid[..., None]
        middle = z.where(live, 0.0).sum(1) / live.sum(1).clamp_min(1)
        key = self.key(middle) / self.key.out_features**0.5
        return torch.einsum("bnw,bw->bn", self.inlet(z), key)

    def flops(self, num: int) -> float:
        """Of `num` tokens of one image, forward: queries of every token, one key, their products."""
        return 2.0 * (num + 1) * self.inlet.weight.numel() + 2.0 * num * self.inlet.out_features
