"""PyramidDrop: a share is dropped after every quarter of the decoder, by the attention of the next layer (arXiv 2410.17247)."""

from __future__ import annotations

from torch import Tensor

from diffprune.core.budget import Budget
from diffprune.core.evidence import decoder_attention
from diffprune.core.pruner import Reference, ScorePruner
from diffprune.core.site import Plan, staged
from diffprune.core.tokens import VisualTokens
from diffprune.core.vlm import Shape

ATTENTION = decoder_attention(None)  # of the layer behind the cut, computed ahead


class PyramidDrop(ScorePruner):
    """Keeps the tokens to which the prompt's last token would attend most in the next layer; every cut leaves the same share.

    stages: cuts, which part the decoder evenly: 3 are the paper's after 8, 16 and 24 of 32 layers.

    From the authors' code: the next layer's norm, projections and rotary embedding on the states at the cut, softmax over the
    whole sequence, mean over heads. A layer average of 270 of 576 tokens is the paper's half of what is left at each cut. As the
    layers before the first cut see every token, no average below that share, a quarter with 3 stages, can be met. How we differ:
    tokens keep their positions, where the release numbers what is left anew.
    """

    label = "PyramidDrop"
    reference = Reference(
        "PyramidDrop: Accelerating Your Large Vision-Language Models via Pyramid Visual Redundancy Reduction", "2410.17247"
    )
    needs = frozenset({ATTENTION})

    def __init__(self, stages: int = 3) -> None:
        if stages < 1:
            raise ValueError(f"stages={stages}: PyramidDrop cuts at least once")
        self.stages = stages

    def cuts(self, budget: Budget, shape: Shape) -> Plan:
        parts = self.stages + 1
        after = sorted({max(1, round(shape.layers * i / parts)) for i in range(1, parts)} - {shape.layers})
        return staged(budget, shape.layers, after)

    def score(self, tokens: VisualTokens) -> Tensor:
        return tokens.given(ATTENTION)
