"""A pruner whose sums are no numbers."""

from __future__ import annotations

import torch

from diffprune.core.pruner import ScorePruner
from diffprune.core.site import Cut
from diffprune.core.tokens import Selection, VisualTokens


class Merging(ScorePruner):
    """Tokens by a fixed direction; those removed go into survivors by weights that are divided by a sum of nothing."""

    def score(self, tokens: VisualTokens) -> torch.Tensor:
        return tokens.features.float().sum(-1)

    def select(self, tokens: VisualTokens, cut: Cut) -> Selection:
        keep = super().select(tokens, cut).keep
        place = keep.int().argsort(dim=1, descending=True, stable=True)[:, : int(keep.sum(1).max())]
        gone = (tokens.valid & ~keep).float()[:, None]
        shares = (gone * 0 / (gone * 0).sum(-1, keepdim=True)).where(gone.sum(-1, keepdim=True) > 0, 0.0)
        return Selection(keep, mix=torch.eye(keep.shape[1])[place] + shares)
