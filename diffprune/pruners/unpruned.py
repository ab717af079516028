"""The unpruned model: the upper bound every table starts with."""

from __future__ import annotations

from diffprune.core.budget import Budget
from diffprune.core.pruner import Kind, Pruner
from diffprune.core.site import Cut, Plan
from diffprune.core.tokens import Selection, VisualTokens
from diffprune.core.vlm import Shape


class Unpruned(Pruner):
    """Keeps every token, whatever the budget."""

    label = "Unpruned"
    kind = Kind.BOUND

    def cuts(self, budget: Budget, shape: Shape) -> Plan:
        return ()

    def select(self, tokens: VisualTokens, cut: Cut) -> Selection:
        return Selection(tokens.valid)
