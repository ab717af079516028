"""What a method is shown at its first cut, before or inside the decoder, with nothing removed: for methods that are calibrated."""

from __future__ import annotations

from diffprune.core.budget import Budget, Share
from diffprune.core.pruner import Pruner
from diffprune.core.site import Cut, Plan, in_order
from diffprune.core.tokens import Selection, VisualTokens
from diffprune.core.vlm import VLM, Prompts, Shape
from diffprune.pruning.path import forward, shrink


class _Onlooker(Pruner):
    """Looks where another method would cut first, and keeps every token."""

    def __init__(self, method: Pruner) -> None:
        self.method, self.needs, self.label = method, method.needs, method.label  # type: ignore[misc]
        self.seen: VisualTokens | None = None

    def cuts(self, budget: Budget, shape: Shape) -> Plan:
        return in_order(Cut(cut.site, budget) for cut in self.method.cuts(Share(1.0), shape))[:1]

    def select(self, tokens: VisualTokens, cut: Cut) -> Selection:
        self.seen = tokens
        return Selection(tokens.valid)


def seen_at_first_cut(vlm: VLM, prompts: Prompts, tokens: VisualTokens, pruner: Pruner) -> VisualTokens:
    """`tokens` of the rows' images as the method's first cut sees them, with the evidence that is there.

    Raises:
        ValueError: the method cuts nowhere, or where nothing can be cut.
    """
    onlooker = _Onlooker(pruner)
    packed = shrink(vlm, prompts, tokens, onlooker, Share(1.0))
    if packed.inside is not None:
        forward(vlm, packed, logits_to_keep=1, use_cache=False)
    if onlooker.seen is None:
        raise ValueError(f"{pruner.label} cuts nowhere, so there is nothing to calibrate")
    return onlooker.seen
