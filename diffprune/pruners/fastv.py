"""FastV: one cut after the first decoder layers, by the attention of the prompt's last token (arXiv 2403.06764)."""

from __future__ import annotations

from torch import Tensor

from diffprune.core.budget import Budget
from diffprune.core.evidence import decoder_attention
from diffprune.core.pruner import Reference, ScorePruner
from diffprune.core.site import Plan, staged
from diffprune.core.tokens import VisualTokens
from diffprune.core.vlm import Shape
from diffprune.pruners._depth import scaled

ATTENTION = decoder_attention()  # of the layer before the cut


class FastV(ScorePruner):
    """Keeps the tokens to which the last token of the prompt attends most, mean over heads, in the layer before its one cut.

    after: decoder layers that see every token; 0 is the paper's 2 of 32, the same fraction of another depth and at least one.

    From the authors' code. How we differ: the budget is the average over layers, from which the number behind the cut follows
    (64 tokens after 2 of 32 layers are an average of 96).
    """

    label = "FastV"
    reference = Reference(
        "An Image is Worth 1/2 Tokens After Layer 2: Plug-and-Play Inference Acceleration for LVLMs", "2403.06764"
    )
    option_labels = {"after": "after layer"}
    needs = frozenset({ATTENTION})

    def __init__(self, after: int = 0) -> None:
        if after < 0:
            raise ValueError(f"after={after}: FastV cuts after so many decoder layers, or after the paper's share of them with 0")
        self.after = after

    def cuts(self, budget: Budget, shape: Shape) -> Plan:
        after = (self.after,) if self.after else scaled((2,), shape.layers)
        return staged(budget, shape.layers, after)

    def score(self, tokens: VisualTokens) -> Tensor:
        return tokens.given(ATTENTION)
