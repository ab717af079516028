"""A pruner that may keep nothing of an image."""

from __future__ import annotations

import torch

from diffprune.core.budget import Above, standardise
from diffprune.core.pruner import ScorePruner
from diffprune.core.site import Cut
from diffprune.core.tokens import Selection, VisualTokens


class Threshold(ScorePruner):
    """Tokens by a fixed direction; a threshold is taken at its word."""

    def score(self, tokens: VisualTokens) -> torch.Tensor:
        return tokens.features.float().sum(-1)

    def select(self, tokens: VisualTokens, cut: Cut) -> Selection:
        if not isinstance(cut.budget, Above):
            return super().select(tokens, cut)
        return Selection((standardise(self.score(tokens), tokens.valid) > cut.budget.threshold) & tokens.valid)
