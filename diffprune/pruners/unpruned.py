"""The unpruned model: the upper bound every table starts with."""

from __future__ import annotations

from diffprune.core.budget import Budget
from diffprune.core.pruner import Cut, Pruner
from diffprune.core.tokens import Selection, VisualTokens


class Unpruned(Pruner):
    """Keeps every token, whatever the budget."""

    label = "Unpruned"
    kind = "bound"

    def plan(self, budget: Budget) -> tuple[Cut, ...]:
        return ()

    def select(self, tokens: VisualTokens, budget: Budget) -> Selection:
        return Selection(tokens.valid, tokens.features)
