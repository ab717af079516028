"""Masked softmax for training: attention in which each key is weighted by its retention."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask


def masked_softmax(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    retention: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention in which each key counts by its retention weight [B S] in [0, 1] (DynamicViT, arXiv 2106.02034, Eq. 10-11).

    A_ij = p_ij / sum_j p_ij,  p_ij = exp(a_ij - max_j a_ij) E_ij,  E_ij = m_j + (1 - m_j) [i = j].
    A dropped token still attends to itself, and a token with m_j = 0 still receives gradient, which an additive bias
    log m could not give it. How we differ from the authors' code: no epsilon, as no row is ever empty. No fused kernel
    computes this, so a step costs more than with fused attention.

    Raises:
        ValueError: fewer queries than keys; this is for training, without a cache.
    """
    if query.shape[2] != key.shape[2]:
        raise ValueError("masked_softmax serves training rows, which have as many queries as keys")
    heads = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(heads, 1), value.repeat_interleave(heads, 1)
    scores = ((query * (scaling or query.shape[-1] ** -0.5)) @ key.transpose(2, 3)).float()
    if attention_mask is None:
        forbidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
    else:
        forbidden = ~attention_mask if attention_mask.dtype == torch.bool else attention_mask < 0
    scores = scores.masked_fill(forbidden, torch.finfo(scores.dtype).min)
    weights = (scores - scores.amax(-1, keepdim=True).detach()).exp()
    if retention is None:
        mixed, total = weights.to(value.dtype) @ value, weights.sum(-1)
    else:
        columns = retention.float()[:, None, :]
        own = weights.diagonal(dim1=-2, dim2=-1) * (1 - columns)  # [B H S]: what a token loses of itself and keeps
        weights = weights * columns[:, :, None, :]
        mixed, total = weights.to(value.dtype) @ value + own[..., None].to(value.dtype) * value, weights.sum(-1) + own
    return (mixed / total[..., None].to(value.dtype)).transpose(1, 2).contiguous(), None


AttentionInterface.register("masked_softmax", masked_softmax)
AttentionMaskInterface.register("masked_softmax", sdpa_mask)


@contextmanager
def decoder_attention(model: Any, implementation: str) -> Iterator[None]:
    """Run the decoder with another attention implementation, the vision encoder untouched; restored on exit."""
    before = model.config.text_config._attn_implementation
    model.set_attn_implementation({"text_config": implementation})
    try:
        yield
    finally:
        model.set_attn_implementation({"text_config": before})
