"""A pruner whose mask is made of numbers."""

from __future__ import annotations

import torch

from diffprune.core.pruner import ScorePruner
from diffprune.core.site import Cut
from diffprune.core.tokens import Selection, VisualTokens


class DtypeAndDevice(ScorePruner):
    """Tokens by a fixed direction; the mask is of bytes."""

    def score(self, tokens: VisualTokens) -> torch.Tensor:
        return tokens.features.float().sum(-1)

    def select(self, tokens: VisualTokens, cut: Cut) -> Selection:
        return Selection(super().select(tokens, cut).keep.byte())
