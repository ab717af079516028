"""Per-token keep/drop Gumbel-Softmax with masked attention and a ratio loss (DynamicViT, Dynamic-LLaVA).

The like-for-like variant: DiffPrune's scorer body with two logits per token, the frozen VLM, lambda = 100. Features are
not degraded; a dropped token stops being a key in every decoder layer. There is no noise to undo, hence no denoiser.
"""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from diffprune.core.budget import Budget
from diffprune.core.fitted import Annealing, Progress
from diffprune.core.noise import Noise
from diffprune.core.pruner import Reference
from diffprune.core.tokens import Relaxation, VisualTokens
from diffprune.pruners._learned import Learned


class GumbelKeepDrop(Learned):
    """Keeps or drops every token on its own; `ratio_weight` pulls the mean towards the budget."""

    label = "Gumbel keep/drop"
    reference = Reference("DynamicViT: Efficient Vision Transformers with Dynamic Token Sparsification", "2106.02034")
    outputs = 2
    attention_implementation = "masked_softmax"

    def __init__(
        self,
        weights: Path | None = None,
        *,
        ratio_weight: float = 100.0,
        question_aware: bool = False,
        attention: bool | None = None,
        depth: int = 0,
        width: int = 0,
        other_model: bool = False,
    ) -> None:
        self.ratio_weight = ratio_weight
        super().__init__(
            weights, question_aware=question_aware, attention=attention, denoiser=False, depth=depth, width=width,
            other_model=other_model,
        )  # fmt: skip

    def temperature(self, progress: Progress, annealing: Annealing) -> float:
        """Geometric from 1 to the recipe's last temperature over all steps, as in Dynamic-LLaVA (arXiv 2412.00876)."""
        return float(annealing.end ** (progress.step / max(progress.steps - 1, 1)))

    def score(self, tokens: VisualTokens) -> Tensor:
        keep, drop = self.logits(tokens).unbind(-1)
        return keep - drop

    def relax(self, tokens: VisualTokens, budget: Budget, temperature: float, noise: Noise) -> Relaxation:
        logits = self.logits(tokens).log_softmax(-1)
        gumbel = -(-noise.uniform(tokens.valid, 2).log()).log()
        soft = ((logits + gumbel) / temperature).softmax(-1)[..., 0]
        hard = (soft > 0.5).to(soft.dtype)
        mask = (hard + soft - soft.detach()).where(tokens.valid, 0.0)
        num = tokens.counts.clamp_min(1)
        target = self.counts(tokens, budget) / num
        penalty = self.ratio_weight * (mask.sum(1) / num - target).square().mean()
        return Relaxation(tokens.features, let=hard.where(tokens.valid, 0.0).detach(), retention=mask, penalty=penalty)
