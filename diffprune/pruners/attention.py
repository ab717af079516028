"""Attention in the vision encoder: a strong image-only rule (FasterVLM, arXiv 2412.01818)."""

from __future__ import annotations

from torch import Tensor

from diffprune.core.evidence import encoder_attention
from diffprune.core.pruner import Reference, ScorePruner
from diffprune.core.tokens import VisualTokens


class Attention(ScorePruner):
    """Keeps the tokens with the largest [CLS] attention in the layer whose output the projector reads.

    Where the encoder has no [CLS] token, those that receive most attention from all others, as VisionZip (arXiv 2412.04467) does.
    """

    label = "Attention"
    reference = Reference("[CLS] Attention is All You Need for Training-Free Visual Token Pruning (FasterVLM)", "2412.01818")
    needs = frozenset({encoder_attention()})

    def score(self, tokens: VisualTokens) -> Tensor:
        return tokens.given(encoder_attention())
