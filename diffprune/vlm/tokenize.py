"""Prompts as token ids with one slot per visual token, and hashes of weights and images."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

CUT = "\ufdd0"  # a code point that is no character in any text


def left_pad(rows: Sequence[Tensor], fill: int | bool) -> Tensor:
    """Rows of different length -> [B S], padded on the left."""
    longest = max(len(r) for r in rows)
    return torch.stack([torch.cat([r.new_full((longest - len(r),), fill), r]) for r in rows])


def mentions(tokens: Iterable[str]) -> re.Pattern[str]:
    """What finds any of these tokens in a text."""
    return re.compile("|".join(re.escape(token) for token in sorted({*tokens}, key=len, reverse=True)))


def picture_tokens(config: Any, tokenizer: Any) -> list[str]:
    """Tokens that a model replaces by pictures or videos, as text."""
    ids = [getattr(config, name, None) for name in ("image_token_id", "video_token_id")]
    return [tokenizer.convert_ids_to_tokens(number) for number in ids if number is not None and number < len(tokenizer)]


def special_tokens(tokenizer: Any) -> list[str]:
    """Tokens that control a model, as text."""
    return [*tokenizer.all_special_tokens, *(token.content for token in tokenizer.added_tokens_decoder.values() if token.special)]


def plain(text: str, tokens: re.Pattern[str]) -> str:
    """A text whose mentions of tokens are cut after their first letter, so that `token_ids` takes them for text."""
    done, start = "", 0
    while found := tokens.search(text, start):
        done, start = f"{done}{text[start : found.start() + 1]}{CUT}", found.start() + 1
    return done + text[start:]


def token_ids(tokenizer: Any, text: str, special: bool = False) -> list[int]:
    """Ids of a text, what stands between two cuts apart. special: with the token that starts a row."""
    first, *rest = text.split(CUT)
    ids = list(tokenizer(first, add_special_tokens=special)["input_ids"])
    for part in rest:
        ids += tokenizer(part, add_special_tokens=False)["input_ids"]
    return ids


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
    ids_of = cache(partial(token_ids, tokenizer))  # what stands around a question is the same in every text
    for text, count in zip(texts, images, strict=True):
        pieces = text.split(placeholder)
        if len(pieces) != count + 1:
            raise ValueError(
                f"a prompt needs exactly {count} x {placeholder}; this one has {len(pieces) - 1}: {text.replace(CUT, '')[:80]!r}"
            )
        start = tokenizer.bos_token
        special = not (start and text.startswith(start))  # a chat template may have written it already
        row = list(ids_of(pieces[0], special))
        for piece in pieces[1:]:
            row += next(waiting)
            tail = ids_of(piece)
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
