"""Attention of the [CLS] token of a CLIP encoder, from the layer's own queries and keys."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from diffprune.core.evidence import Evidence, EvidenceKind

CLIP = ("clip_vision_model", "clip")  # what a configuration calls this encoder


def cheap(evidence: Evidence) -> bool:
    """Whether it is what `summary_attention` gives, for which the encoder runs as it always does."""
    return evidence.kind is EvidenceKind.ENCODER_ATTENTION and not evidence.joint


def summary_attention(tower: Any, states: Tensor, index: int) -> Tensor:
    """[B 1+N]: softmax row of the [CLS] query in encoder layer `index`, mean over heads, from that layer's own q and k.

    states: [B 1+N D], what enters the layer.
    """
    layer = getattr(tower, "vision_model", tower).encoder.layers[index]
    normed, mixer = layer.layer_norm1(states), layer.self_attn
    split = (len(states), -1, mixer.num_heads, mixer.head_dim)
    query = mixer.q_proj(normed[:, :1]).view(split).transpose(1, 2)
    key = mixer.k_proj(normed).view(split).transpose(1, 2)
    return (query @ key.transpose(2, 3) * mixer.head_dim**-0.5).softmax(-1)[:, :, 0].mean(1)
