"""What families with a CLIP encoder share: its numbers for cost, and the attention of its [CLS] token."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def clip_shape(vision: Any) -> dict[str, int]:
    """The encoder's part of a `Shape` from its configuration; one image of the encoder's own size, [CLS] included."""
    return {
        "vision_layers": vision.num_hidden_layers,
        "vision_width": vision.hidden_size,
        "vision_ffn": vision.intermediate_size,
        "patches": (vision.image_size // vision.patch_size) ** 2 + 1,
        "patch_inputs": 3 * vision.patch_size**2,
    }


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
