"""A pruner that looks at padding."""

from __future__ import annotations

import torch

from diffprune.core.pruner import ScorePruner
from diffprune.core.tokens import VisualTokens


class PaddingUnseen(ScorePruner):
    """Tokens by distance; those most unlike the mean of all slots, padding included."""

    def score(self, tokens: VisualTokens) -> torch.Tensor:
        features = tokens.features.float()
        return (features - features.mean(1, keepdim=True)).norm(dim=-1)
