"""DiffPrune: variance-preserving noise according to a budgeted soft top-K (arXiv 2605.28051).

In training every token stays and is mixed with Gaussian noise according to its retention weight; at inference the
tokens with low scores are removed. How we differ from the paper: features are standardised per channel before they are
noised (Eq. 5 presumes unit variance), and one scorer serves all budgets because the budget is drawn per step.
"""

from __future__ import annotations

from diffprune.core.budget import Budget
from diffprune.core.noise import Noise
from diffprune.core.pruner import Reference
from diffprune.core.tokens import Relaxation, VisualTokens
from diffprune.pruners._learned import Learned
from diffprune.pruners._soft_topk import centred, laplace_cdf, signal_and_noise


class DiffPrune(Learned):
    """`diffprune(weights='folder')`; `question_aware=True` lets the scorer read the question."""

    label = "DiffPrune"
    reference = Reference("Beyond Surrogate Gradients: Fully Differentiable Token Pruning for Vision-Language Models", "2605.28051")

    def relax(self, tokens: VisualTokens, budget: Budget, temperature: float, noise: Noise) -> Relaxation:
        """Eq. 2-5: alpha = soft top-K of s / tau, x~ = sqrt(alpha) z + sqrt(1 - alpha) noise, x- = denoiser(x~)."""
        z = self.standardised(tokens.features)
        u = centred(self.logits(tokens), tokens.valid, self.counts(tokens, budget), temperature)
        signal, share = (part.float()[..., None] for part in signal_and_noise(u))
        mixed = self.denoised(signal * z + share * noise.normal(tokens.valid, z.shape[-1]))
        return Relaxation(self.restored(mixed, tokens.features), kept=laplace_cdf(u).sum(1).float())
