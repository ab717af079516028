"""A pruner that sorts images by size and puts them back by the wrong permutation."""

from __future__ import annotations

import torch

from diffprune.core.pruner import ScorePruner
from diffprune.core.tokens import VisualTokens


class OrderOfRows(ScorePruner):
    """Tokens by a fixed direction; the sort of the rows is undone by itself."""

    def score(self, tokens: VisualTokens) -> torch.Tensor:
        order = tokens.counts.argsort(descending=True, stable=True)
        return tokens.features[order].float().sum(-1)[order]  # order.argsort() would put them back
