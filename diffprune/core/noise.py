"""Random numbers of a training step: a stream of its own for every row, so that they do not depend on how a batch is split."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor


def generator(*key: Hashable) -> torch.Generator:
    """A generator of its own for every key."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


class Noise:
    """Random numbers for B rows of visual tokens, drawn row by row.

    A row's numbers depend on the key, the row's own name and its number of tokens alone: not on the other rows, on padding, on
    the worker or on the part of a batch that it is in. Each call goes on in every row's stream.

    key:  what all rows share, such as a stream, a seed and a step.
    rows: [B] names, such as the number of each row's image in the whole step.
    """

    def __init__(self, *key: Hashable, rows: Sequence[Hashable]) -> None:
        self._streams = [generator(*key, row) for row in rows]

    def normal(self, valid: Tensor, width: int) -> Tensor:
        """Standard normal numbers [B N width] at the `valid` [B N] tokens, 0 at padding, float32."""
        return self._drawn(torch.randn, valid, width)

    def uniform(self, valid: Tensor, width: int = 1) -> Tensor:
        """Uniform numbers [B N width] at the `valid` [B N] tokens, a millionth away from 0 and 1; 0.5 at padding, float32."""
        return self._drawn(torch.rand, valid, width, fill=0.5).clamp(1e-6, 1 - 1e-6)

    def _drawn(self, draw: Callable[..., Tensor], valid: Tensor, width: int, fill: float = 0.0) -> Tensor:
        assert len(valid) == len(self._streams), "one stream for every row"
        counts = valid.sum(1).tolist()
        drawn = torch.cat([draw(num, width, generator=stream) for num, stream in zip(counts, self._streams, strict=True)])
        found = torch.full((*valid.shape, width), fill, device=valid.device)
        return found.masked_scatter(valid[..., None], drawn.to(valid.device))
