"""A pruner that changes what it keeps."""

from __future__ import annotations

import torch

from diffprune.core.pruner import ScorePruner
from diffprune.core.site import Cut
from diffprune.core.tokens import Selection, VisualTokens


class Survivors(ScorePruner):
    """Tokens by a fixed direction; survivors are scaled to the norm of what was there, and nothing says so."""

    def score(self, tokens: VisualTokens) -> torch.Tensor:
        return tokens.features.float().sum(-1)

    def select(self, tokens: VisualTokens, cut: Cut) -> Selection:
        keep = super().select(tokens, cut).keep
        return Selection(keep, features=2 * tokens.features)
