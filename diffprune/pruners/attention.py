"""Attention the encoder's summary token pays to each patch: the strongest simple image-only rule (METHODS 6.2)."""

from __future__ import annotations

from torch import Tensor

from diffprune.core.pruner import Need, Reference, ScorePruner
from diffprune.core.tokens import VisualTokens


class Attention(ScorePruner):
    """Keeps the tokens with the largest [CLS] attention (received attention where an encoder has no [CLS])."""

    label = "Attention"
    kind = "rule"

    reference = Reference("[CLS] Attention is All You Need for Training-Free Visual Token Pruning (FasterVLM)", "2412.01818")
    needs = frozenset({Need.ENCODER_ATTENTION})

    def score(self, tokens: VisualTokens) -> Tensor:
        assert tokens.attention is not None, "the path provides what `needs` asks for"
        return tokens.attention
