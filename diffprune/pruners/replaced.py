"""A diagnostic: tokens a method would remove stay in place, replaced by the mean of their image.

Comparing it with the method itself separates the information lost from what *removal* costs, e.g. attention sinks that
a model misses (EMBEDDED.md, second study).
"""

from __future__ import annotations

from diffprune.core.budget import Budget
from diffprune.core.pruner import Cut, Pruner
from diffprune.core.tokens import Selection, VisualTokens


class Replaced(Pruner):
    """`replaced(attention)`: the choice of `attention`, every other token set to the image's mean. Saves nothing."""

    label = "Replaced"
    kind = "diagnostic"

    def __init__(self, method: Pruner) -> None:
        self.method = self.inner = method
        self.reference, self.needs, self.stage = method.reference, method.needs, method.stage  # type: ignore[misc]

    def plan(self, budget: Budget) -> tuple[Cut, ...]:
        return self.method.plan(budget)

    def select(self, tokens: VisualTokens, budget: Budget) -> Selection:
        chosen = self.method.select(tokens, budget)
        valid = tokens.valid[..., None]
        mean = (tokens.features * valid).sum(1, keepdim=True) / valid.sum(1, keepdim=True).clamp_min(1)
        return Selection(tokens.valid, chosen.features.where(chosen.keep[..., None], mean))
