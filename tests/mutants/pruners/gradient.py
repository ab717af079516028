"""A learned pruner whose scores are cut off from the loss."""

from __future__ import annotations

from diffprune.core.budget import Budget
from diffprune.core.noise import Noise
from diffprune.core.tokens import Relaxation, VisualTokens
from diffprune.pruners._logistic_topk import centred
from diffprune.pruners.visionselector import VisionSelector


class Gradient(VisionSelector):
    """Tokens by learned scores; weights of tokens carry no gradient."""

    def relax(self, tokens: VisualTokens, budget: Budget, temperature: float, noise: Noise) -> Relaxation:
        scores = self.score(tokens)
        alpha = centred(scores.detach() / temperature, tokens.valid, self.counts(tokens, budget)).sigmoid().float()
        z = alpha[..., None] * self.standardised(tokens.features)
        return Relaxation(self.restored(z, tokens.features), let=alpha, penalty=0 * scores.where(tokens.valid, 0.0).sum())
