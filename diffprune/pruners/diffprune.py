"""DiffPrune: variance-preserving noise according to a budgeted soft top-K (arXiv 2605.28051).

In training every token stays and is mixed with Gaussian noise according to its retention weight; at inference the
tokens with low scores are removed. How we differ from the paper: features are standardised per channel before they are
noised (Eq. 5 presumes unit variance), scores per image before they are divided by the temperature (see `scale`), and one scorer
serves all budgets because the budget is drawn per step.
"""

from __future__ import annotations

from pathlib import Path

from diffprune.core.budget import Budget, standardise
from diffprune.core.noise import Noise
from diffprune.core.pruner import Reference
from diffprune.core.tokens import Relaxation, VisualTokens
from diffprune.pruners._learned import Learned
from diffprune.pruners._soft_topk import centred, laplace_cdf, signal_and_noise

SCALES = ("unit", "free")


class DiffPrune(Learned):
    """`diffprune(weights='folder')`; `question_aware=True` lets the scorer read the question.

    scale: "unit" divides scores by their standard deviation in each image before the temperature does its part, so that the
           temperature alone says how sharp the soft top-K is, and thresholds (`Above`) see what training saw; "free" is the
           paper's s / tau, where growing scores sharpen the soft top-K by themselves and can freeze what it lets through early.
    """

    label = "DiffPrune"
    reference = Reference("Beyond Surrogate Gradients: Fully Differentiable Token Pruning for Vision-Language Models", "2605.28051")

    def __init__(
        self,
        weights: Path | None = None,
        *,
        scale: str = "unit",
        question_aware: bool = False,
        attention: bool | None = None,
        denoiser: bool = True,
        depth: int = 0,
        width: int = 0,
        other_model: bool = False,
    ) -> None:
        if scale not in SCALES:
            raise ValueError(f"diffprune: scale is one of {', '.join(SCALES)}, not {scale!r}")
        self.scale = scale
        super().__init__(
            weights, question_aware=question_aware, attention=attention, denoiser=denoiser, depth=depth, width=width,
            other_model=other_model,
        )  # fmt: skip

    def relax(self, tokens: VisualTokens, budget: Budget, temperature: float, noise: Noise) -> Relaxation:
        """Eq. 2-5: alpha = soft top-K of s / tau, x~ = sqrt(alpha) z + sqrt(1 - alpha) noise, x- = denoiser(x~)."""
        z, scores = self.standardised(tokens.features), self.logits(tokens)
        if self.scale == "unit":
            scores = standardise(scores, tokens.valid)
        u = centred(scores, tokens.valid, self.counts(tokens, budget), temperature)
        signal, share = (part.float()[..., None] for part in signal_and_noise(u))
        mixed = self.denoised(signal * z + share * noise.normal(tokens.valid, z.shape[-1]))
        return Relaxation(self.restored(mixed, tokens.features), let=laplace_cdf(u).float().detach())
