"""Key-value caches that begin with what was prefilled before: the states of a prefix, read from one call and laid into another.

The rows of the new cache are filled once and grow in place, so that a step copies nothing but its own tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers.cache_utils import Cache, CacheLayerMixin

STEPS = 16  # room for so many further calls of the same length is made at once


def states_of(cache: Any, lengths: Sequence[int]) -> list[Tensor]:
    """[L 2 H P_i D] of each row: keys and values of its last P_i tokens, `lengths`, in every layer; a copy."""
    layers = [(layer.keys, layer.values) for layer in cache.layers]
    return [
        torch.stack([torch.stack((keys[i, :, -length:], values[i, :, -length:])) for keys, values in layers])
        for i, length in enumerate(lengths)
    ]


def prefilled(states: Sequence[Tensor], rows: Sequence[int], more: int) -> Cache:
    """A cache whose row r begins with `states[rows[r]]` [L 2 H P D], zeros behind the shorter ones, and room for `more` tokens."""
    first, longest = states[0], max(one.shape[3] for one in states)
    layers, two, heads, _, width = first.shape
    whole = first.new_empty(layers, two, len(rows), heads, longest + more, width)
    for row, number in enumerate(rows):
        length = states[number].shape[3]
        whole[:, :, row, :, :length] = states[number]
        whole[:, :, row, :, length:longest] = 0  # what is masked must still be a number
    return Cache(layers=[_Layer(keys, values, longest) for keys, values in whole])


class _Layer(CacheLayerMixin):
    """Keys and values [B H room D] of one layer, the first `used` of them in use."""

    def __init__(self, keys: Tensor, values: Tensor, used: int) -> None:
        super().__init__()
        self.keys, self.values, self.used, self.is_initialized = keys, values, used, True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """There is nothing left to do."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **options: Any) -> tuple[Tensor, Tensor]:
        """Append; what is returned are views of all that is in use."""
        assert self.keys is not None and self.values is not None
        start, new = self.used, key_states.shape[2]
        self.used += new
        if (missing := self.used - self.keys.shape[2]) > 0:
            room = (0, 0, 0, missing + STEPS * new)
            self.keys, self.values = pad(self.keys, room), pad(self.values, room)
        self.keys[:, :, start : self.used], self.values[:, :, start : self.used] = key_states, value_states
        return self.keys[:, :, : self.used], self.values[:, :, : self.used]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(keys that `query_length` new tokens will see, keys before the first that is held)."""
        return self.used + query_length, 0

    def get_seq_length(self) -> int:
        """Tokens held."""
        return self.used

    def get_max_length(self) -> int:
        """There is no limit."""
        return -1
