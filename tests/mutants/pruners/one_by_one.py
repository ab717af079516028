"""A pruner that looks at the other images of a batch."""

from __future__ import annotations

import torch

from diffprune.core.pruner import ScorePruner
from diffprune.core.tokens import VisualTokens


class OneByOne(ScorePruner):
    """Tokens by likeness; the direction is that of the whole batch's mean."""

    def score(self, tokens: VisualTokens) -> torch.Tensor:
        valid = tokens.valid[..., None]
        return tokens.features.float() @ tokens.features.float().where(valid, 0.0).sum((0, 1))
