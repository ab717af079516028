"""Rows in a key-value cache that are shorter than the caller knows, and the arguments of a call that goes on with them.

A prefill inside `hooks.pruned` leaves a note of its rows with the cache, so that the next step, another turn of `generate` and a
later block find it there, whatever the model did meanwhile. A cache without a note holds whole rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from diffprune.core.vlm import Prompts
from diffprune.pruning.decoder_cuts import Memory

NOTE = "_diffprune_rows"  # the attribute of a cache that has its rows
COUNTS = (
    "the cache holds {held}, the caller counts on another number: a cache that was cut or filled elsewhere cannot be used inside "
    "pruned(); give the whole conversation and an empty cache"
)


@dataclass(frozen=True)
class CachedRows:
    """What a prefill put into a cache.

    full, short: the rows as they came, and as they went on. offset: from their positions to those the model's forward expects.
    measures: `Windows.measures` of these rows. inside: what the cuts inside the decoder left, None where there were none.
    """

    full: Prompts
    short: Prompts
    offset: int
    measures: dict[int, Any] = field(default_factory=dict)
    inside: Memory | None = None

    def __deepcopy__(self, _: Any) -> CachedRows:
        """A copy of a cache holds the same rows."""
        return self

    def later(self, given: Mapping[str, Any], held: int, deltas: Tensor | None) -> dict[str, Any]:
        """A call behind the prefill: the mask and the positions of a sequence that is shorter than the caller knows.

        held: tokens in the cache. deltas [B 1]: by how much the model's newest pictures move M-RoPE, None in other models.

        Raises:
            ValueError: rows padded on the right, or a cache with another number of tokens than the caller counts on.
        """
        full, short, new = self.full, self.short, given["input_ids"].shape[1]
        since = held - short.input_ids.shape[1]  # tokens cached after the prompt
        mask, where = given.get("attention_mask"), given.get("position_ids")
        told = self._told(mask, where, new, since, deltas)
        removed = full.input_ids.shape[1] - short.input_ids.shape[1]
        if told == since - removed < since:  # another turn of generate, which cuts what it believes to be new by the cache's length
            given, new, told = {**given, "input_ids": given["input_ids"][:, removed:]}, new - removed, since
            where = None if where is None else where[..., removed:]
        if where is not None and where.ndim == 3 and len(where) != 3 and bool((where == where[:1]).all()):
            where = None  # generate derives those of M-RoPE from the pictures, which are those of an earlier turn
        steps = torch.arange(since, since + new, device=short.input_ids.device) + 1
        expected = _last(full) + self.offset + steps
        if not bool(full.attention_mask[:, -1].all()):
            raise ValueError("rows padded on the right cannot be continued inside pruned(): let the tokenizer pad on the left")
        if since < 0 or told != since or len(given["input_ids"]) != len(short) or not _agree(where, expected):
            raise ValueError(COUNTS.format(held=f"{held} tokens, {since} after the pruned prompt"))
        later = (
            torch.ones(len(short), since + new, dtype=torch.long, device=steps.device)
            if mask is None
            else mask[:, -(since + new) :]
        )
        going_on = _last(short) + self.offset + steps
        text = {name: value for name, value in given.items() if not name.endswith("token_type_ids")}  # those are of whole rows
        return {**text, "attention_mask": torch.cat([short.attention_mask, later], 1), "position_ids": going_on}

    def _told(self, mask: Tensor | None, where: Tensor | None, new: int, since: int, deltas: Tensor | None) -> int:
        """Tokens after the prompt that the caller believes to be cached: by its mask or, as generate drops one that hides nothing,
        by its positions; a caller who gives neither believes what is so."""
        if mask is not None:
            return mask.shape[1] - self.full.input_ids.shape[1] - new
        if where is None:
            return since
        last = _last(self.full) + self.offset
        if where.ndim == 3 and len(where) == 1:  # a later turn of M-RoPE: places in the text, moved by the newest pictures
            where, last = where[0] - (0 if deltas is None else deltas), last[0]
        elif where.ndim == 3:  # the text's coordinate where it is there
            where, last = where[0], last[-len(where)]
        elif last.ndim == 3:
            last = last[0]
        return int(where.flatten()[-1] - last.flatten()[-1]) - new


def note(cache: Any, rows: CachedRows | None) -> None:
    """Leave what is known of its rows with a cache; None: they are whole."""
    setattr(cache, NOTE, rows)


def rows_of(cache: Any) -> CachedRows | None:
    """What `note` left with a cache; None: its rows are whole."""
    found: CachedRows | None = getattr(cache, NOTE, None)
    return found


def check_whole(given: Mapping[str, Any], held: int) -> None:
    """Raises ValueError: a mask of another length than whole rows have of which `held` tokens are cached; a note may be lost."""
    mask = given.get("attention_mask")
    if held and mask is not None and mask.shape[1] != held + given["input_ids"].shape[1]:
        raise ValueError(COUNTS.format(held=f"{held} tokens"))


def cache_in(output: Any) -> Any:
    """The cache in what a model's forward returns, None where it made none."""
    found = output.values() if isinstance(output, Mapping) else output
    return next((value for value in found if hasattr(value, "get_seq_length")), None)


def _agree(where: Tensor | None, expected: Tensor) -> bool:
    """Whether the caller's positions, if it gives any, are those that follow the full rows."""
    if where is None:
        return True
    wanted = expected[-where.shape[0] :] if where.ndim == 3 else expected
    return bool((where.expand_as(wanted) == wanted).all())


def _last(prompts: Prompts) -> Tensor:
    """Position of each row's last token: [B 1] or [R B 1]."""
    where = prompts.position_ids[:, -1:]
    return where if where.ndim == 2 else where.permute(2, 0, 1)
