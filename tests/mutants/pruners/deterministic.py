"""A pruner that draws from the global generator."""

from __future__ import annotations

import torch

from diffprune.core.pruner import ScorePruner
from diffprune.core.tokens import VisualTokens


class Deterministic(ScorePruner):
    """Tokens by a fixed direction; ties are broken, and more, by whatever the global generator gives."""

    def score(self, tokens: VisualTokens) -> torch.Tensor:
        scores = tokens.features.float().sum(-1)
        return scores + 4 * torch.rand(scores.shape[1])
