"""Attention of the [CLS] token of a CLIP encoder, from the layer's own queries and keys."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from diffprune.core.evidence import Evidence, EvidenceKind


def summary_attention(tower: Any, states: Tensor, index: int) -> Tensor:
    """[B N]: softmax row of the [CLS] query in encoder layer `index`, mean over heads, from that layer's own q and k.

    states: [B 1+N D], what enters the layer.
    """
    layer = getattr(tower, "vision_model", tower).encoder.layers[index]
    normed, mixer = layer.layer_norm1(states), layer.self_attn
    split = (len(states), -1, mixer.num_heads, mixer.head_dim)
    query = mixer.q_proj(normed[:, :1]).view(split).transpose(1, 2)
    key = mixer.k_proj(normed).view(split).transpose(1, 2)
    return (query @ key.transpose(2, 3) * mixer.head_dim**-0.5).softmax(-1)[:, :, 0, 1:].mean(1)


def attention_layers(config: Any, needs: Iterable[Evidence]) -> dict[Evidence, int]:
    """The encoder layer (from 0) of every attention asked for; by default the one whose output the projector reads."""
    layers, chosen = config.vision_config.num_hidden_layers, config.vision_feature_layer
    default = (chosen if isinstance(chosen, int) else chosen[-1]) % (layers + 1) - 1
    asked = [evidence for evidence in needs if evidence.kind is EvidenceKind.ENCODER_ATTENTION]
    return {evidence: default if evidence.layer is None else evidence.layer for evidence in asked}


def lacking_layer(config: Any, evidence: Evidence) -> str:
    """Why the encoder has no such layer, as a clause; empty where it has."""
    layers = config.vision_config.num_hidden_layers
    return "" if evidence.layer is None or 0 <= evidence.layer < layers else f"its encoder has the layers 0 to {layers - 1}"
