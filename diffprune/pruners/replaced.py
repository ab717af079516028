"""Diagnostic: tokens that a method would remove stay in place, their features replaced by the mean of their image.

Comparing it with the method itself separates the information lost from what *removal* costs, e.g. attention sinks that
a model misses when they are gone.
"""

from __future__ import annotations

import torch
from torch import Tensor

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
        keep, deep = self.inner.select(tokens, cut).keep, tokens.deepstack
        changed = None if deep is None else _replaced(deep, keep, tokens.valid)
        return Selection(tokens.valid, features=_replaced(tokens.features, keep, tokens.valid), deepstack=changed)


def _replaced(values: Tensor, keep: Tensor, valid: Tensor) -> Tensor:
    """[B N D]: `values`, those of tokens that are not kept set to the mean of their image's valid ones."""
    there = valid[..., None]
    total = values.where(there, 0.0).sum(1, keepdim=True, dtype=torch.float32)  # float16 ends at 65,504: 2,880 tokens of 23
    mean = total / there.sum(1, keepdim=True).clamp_min(1)
    return values.where(keep[..., None], mean.to(values.dtype))
