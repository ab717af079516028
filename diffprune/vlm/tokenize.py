"""Prompts as token ids with one slot per visual token, and hashes of weights and images."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def left_pad(rows: Sequence[Tensor], fill: int | bool) -> Tensor:
    """Rows of different length -> [B S], padded on the left."""
    longest = max(len(r) for r in rows)
    return torch.stack([torch.cat([r.new_full((longest - len(r),), fill), r]) for r in rows])


def tokenise(
    tokenizer: Any, texts: Sequence[str], placeholder: str, placeholder_ids: Sequence[Sequence[int]], images: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Prompts with image placeholders -> (ids [B S], mask [B S], question [B S] bool), left-padded.

    placeholder_ids: of each image, one after the other; images: of each text. The text before and after a placeholder is
    tokenised apart, as LLaVA's own code does. The question is what follows the last image.

    Raises:
        ValueError: a text with another number of image placeholders.
    """
    ids, question, waiting = [], [], iter(placeholder_ids)
    for text, count in zip(texts, images, strict=True):
        pieces = text.split(placeholder)
        if len(pieces) != count + 1:
            raise ValueError(f"a prompt needs exactly {count} x {placeholder}; this one has {len(pieces) - 1}: {text[:80]!r}")
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


def weights_hash(model: torch.nn.Module, dtype: torch.dtype | None = None) -> str:
    """sha256 (20 digits) over names, shapes, types and bytes of every parameter: which weights really ran.

    dtype: as if they had been loaded in this type.
    """
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        value = value.to(dtype) if dtype is not None and value.is_floating_point() else value
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        digest.update(value.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes() if value.numel() else b"")
    return digest.hexdigest()[:20]


def identities(pixel_values: Tensor) -> Tensor:
    """[B ...] -> [B] int64: a hash of each image's pixels, equal whatever batch it comes in."""
    rows = pixel_values.detach().float().cpu().contiguous()
    return torch.tensor(
        [int.from_bytes(hashlib.sha256(r.numpy().tobytes()).digest()[:8], "big") >> 1 for r in rows], device=pixel_values.device
    )
