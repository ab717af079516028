"""A learned pruner that learns to let through what it removes."""

from __future__ import annotations

from diffprune.core.budget import Budget
from diffprune.core.noise import Noise
from diffprune.core.tokens import Relaxation, VisualTokens
from diffprune.pruners._logistic_topk import centred
from diffprune.pruners.visionselector import VisionSelector


class HardLimit(VisionSelector):
    """Tokens by learned scores; training lets through those of low scores."""

    def relax(self, tokens: VisualTokens, budget: Budget, temperature: float, noise: Noise) -> Relaxation:
        alpha = centred(-self.score(tokens) / temperature, tokens.valid, self.counts(tokens, budget)).sigmoid().float()
        z = alpha[..., None] * self.standardised(tokens.features)
        return Relaxation(self.restored(z, tokens.features), let=alpha.detach())
