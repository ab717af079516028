"""Diagnostic: tokens that a method would remove stay in place, their features replaced by the mean of their image.

Comparing it with the method itself separates the information lost from what *removal* costs, e.g. attention sinks that
a model misses when they are gone.
"""

from __future__ import annotations

from diffprune.core.budget import Budget
from diffprune.core.pruner import Kind, Pruner
from diffprune.core.site import Cut, Plan
from diffprune.core.tokens import Selection, VisualTokens
from diffprune.core.vlm import Shape


class Replaced(Pruner):
    """`replaced(attention)`: the choice of `attention`, every other token set to the image's mean. Saves nothing.

    What the wrapped method needs, learnt and cites is its own; its label says that it is wrapped.

    method: whose choice it is.
    """

    kind = Kind.DIAGNOSTIC

    def __init__(self, method: Pruner) -> None:
        self.inner: Pruner = method
        self.label, self.reference = f"{method.label}, replaced", method.reference  # type: ignore[misc]
        self.option_labels, self.replicate_options = method.option_labels, method.replicate_options  # type: ignore[misc]
        self.needs = method.needs

    def cuts(self, budget: Budget, shape: Shape) -> Plan:
        return self.inner.cuts(budget, shape)

    def select(self, tokens: VisualTokens, cut: Cut) -> Selection:
        keep = self.inner.select(tokens, cut).keep
        valid = tokens.valid[..., None]
        mean = (tokens.features * valid).sum(1, keepdim=True) / valid.sum(1, keepdim=True).clamp_min(1)
        return Selection(tokens.valid, features=tokens.features.where(keep[..., None], mean))
