"""A pruner that also selects padding."""

from __future__ import annotations

import torch

from diffprune.core.pruner import ScorePruner
from diffprune.core.site import Cut
from diffprune.core.tokens import Selection, VisualTokens


class Padding(ScorePruner):
    """Tokens by a fixed direction; the last slot is always kept, whether a token is there or not."""

    def score(self, tokens: VisualTokens) -> torch.Tensor:
        return tokens.features.float().sum(-1)

    def select(self, tokens: VisualTokens, cut: Cut) -> Selection:
        keep = super().select(tokens, cut).keep
        keep[:, -1] |= ~tokens.valid[:, -1]
        return Selection(keep)
