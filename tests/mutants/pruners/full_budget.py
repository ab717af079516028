"""A pruner that merges where nothing is removed."""

from __future__ import annotations

import torch

from diffprune.core.budget import Keep
from diffprune.core.pruner import ScorePruner
from diffprune.core.site import Cut
from diffprune.core.tokens import Selection, VisualTokens


class FullBudget(ScorePruner):
    """Tokens by a fixed direction; with a full budget every token becomes the mean of its image."""

    def score(self, tokens: VisualTokens) -> torch.Tensor:
        return tokens.features.float().sum(-1)

    def select(self, tokens: VisualTokens, cut: Cut) -> Selection:
        keep = super().select(tokens, cut).keep
        full = torch.equal(keep, tokens.valid)
        mean = tokens.valid[:, None].float() / tokens.counts[:, None, None]
        return Selection(keep, mix=mean.expand(-1, keep.shape[1], -1) if full and isinstance(cut.budget, Keep) else None)
