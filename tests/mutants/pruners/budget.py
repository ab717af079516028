"""A pruner that keeps one token too many."""

from __future__ import annotations

import torch

from diffprune.core.budget import top
from diffprune.core.pruner import ScorePruner
from diffprune.core.site import Cut
from diffprune.core.tokens import Selection, VisualTokens


class Budget(ScorePruner):
    """Tokens by a fixed direction; one more than asked for, where there is one."""

    def score(self, tokens: VisualTokens) -> torch.Tensor:
        return tokens.features.float().sum(-1)

    def select(self, tokens: VisualTokens, cut: Cut) -> Selection:
        return Selection(top(self.score(tokens), tokens.valid, (cut.budget.counts(tokens.counts) + 1).minimum(tokens.counts)))
