"""What decoder-only families share: tokenising framed prompts with one slot per visual token, and attention backends.

Only this folder and the embedded model import transformers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask


def left_pad(rows: Sequence[Tensor], fill: int | bool) -> Tensor:
    """Rows of different length -> [B S], padded on the left."""
    longest = max(len(r) for r in rows)
    return torch.stack([torch.cat([r.new_full((longest - len(r),), fill), r]) for r in rows])


def tokenise(
    tokenizer: Any, texts: Sequence[str], marker: str, places: Sequence[Sequence[int]], images: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Framed texts with image markers -> (ids [B S], mask [B S], question [B S] bool), left-padded.

    places: token ids that stand for each image, one after the other; images: of each text. The text before and after a marker
    is tokenised apart, as LLaVA's own code does (BENCHMARKS 1.3). The question is what follows the last image.

    Raises:
        ValueError: a text with another number of image markers.
    """
    ids, question, waiting = [], [], iter(places)
    for text, count in zip(texts, images, strict=True):
        pieces = text.split(marker)
        if len(pieces) != count + 1:
            raise ValueError(f"a prompt needs exactly {count} x {marker}; this one has {len(pieces) - 1}: {text[:80]!r}")
        start = tokenizer.bos_token
        special = not (start and text.startswith(start))  # a chat template may have written it already
        row = list(tokenizer(pieces[0], add_special_tokens=special)["input_ids"])
        for piece in pieces[1:]:
            row += next(waiting)
            tail = tokenizer(piece, add_special_tokens=False)["input_ids"]
            row += tail
        ids.append(torch.tensor(row))
        question.append(torch.arange(len(row)) >= (len(row) - len(tail) if count else 0))
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    mask = left_pad([torch.ones(len(i), dtype=torch.long) for i in ids], 0)
    return left_pad(ids, pad), mask, left_pad(question, False)


def weights_hash(model: torch.nn.Module) -> str:
    """sha256 (20 digits) over names, shapes, types and bytes of every parameter: which weights really ran."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        digest.update(value.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes() if value.numel() else b"")
    return digest.hexdigest()[:20]


def identities(pixel_values: Tensor) -> Tensor:
    """[B ...] -> [B] int64: a hash of each image's pixels, equal whatever batch it comes in."""
    rows = pixel_values.detach().float().cpu().contiguous()
    return torch.tensor(
        [int.from_bytes(hashlib.sha256(r.numpy().tobytes()).digest()[:8], "big") >> 1 for r in rows], device=pixel_values.device
    )


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
    """Attention in which each key counts by its retention weight [B S] in [0, 1] (DynamicViT Eq. 10-11, METHODS 3.2).

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
