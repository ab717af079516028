"""A pruner that has words for an option that it does not take."""

from __future__ import annotations

import torch

from diffprune.core.pruner import ScorePruner
from diffprune.core.tokens import VisualTokens


class Description(ScorePruner):
    """Tokens by a fixed direction; its words are about an option it lacks."""

    option_labels = {"sharpness": "sharp"}

    def score(self, tokens: VisualTokens) -> torch.Tensor:
        return tokens.features.float().sum(-1)
