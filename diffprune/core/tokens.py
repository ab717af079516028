"""What a pruner looks at and what it answers.

Axes, one letter each, everywhere: B images or rows, N visual tokens, D feature width, S sequence, T text tokens, L layers,
H heads.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class VisualTokens:
    """The visual tokens of B images, padded to N.

    features  [B N D] float: one row per token, in raster order.
    alive     [B N] bool: False for padding and for tokens an earlier cut removed.
    grid      (rows, columns) when the tokens are a raster of that size, else None.
    attention [B N] float | None: attention each token receives in the encoder (`Need.ENCODER_ATTENTION`).
    text      [B T D_text] float | None: embedded question of each image (`Need.TEXT`).
    text_alive [B T] bool | None: False for padding of `text`.
    identity  [B] int64 | None: hash of each image's pixels (`Need.IDENTITY`).
    """

    features: Tensor
    alive: Tensor
    grid: tuple[int, int] | None = None
    attention: Tensor | None = None
    text: Tensor | None = None
    text_alive: Tensor | None = None
    identity: Tensor | None = None

    def __len__(self) -> int:
        return self.features.shape[0]

    @property
    def counts(self) -> Tensor:
        """[B] int: living tokens per image."""
        return self.alive.sum(1)

    def map(self, change: Callable[[Tensor], Tensor]) -> VisualTokens:
        """The same tokens with `change` applied to every tensor (indexing images, moving devices)."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        changed: dict[str, Any] = {k: change(v) for k, v in values.items() if isinstance(v, Tensor)}
        return replace(self, **changed)

    def __getitem__(self, index: Tensor) -> VisualTokens:
        """The images at `index` [M] int, repeats allowed: several questions share one encoding."""
        return self.map(lambda tensor: tensor[index])

    @staticmethod
    def cat(parts: list[VisualTokens]) -> VisualTokens:
        """Images of several encoder calls with the same N in one value."""
        first = parts[0]
        names = [f.name for f in fields(first) if isinstance(getattr(first, f.name), Tensor)]
        joined: dict[str, Any] = {n: torch.cat([getattr(p, n) for p in parts]) for n in names}
        return replace(first, **joined)


@dataclass(frozen=True)
class Selection:
    """What a pruner answers: which tokens survive, and what the survivors carry.

    keep     [B N] bool: a subset of `VisualTokens.alive`, at least one per image that has any.
    features [B N D]: unchanged unless the method merges tokens.
    """

    keep: Tensor
    features: Tensor


@dataclass(frozen=True)
class Throttle:
    """What a learned pruner does to the tokens while it trains; nothing is removed.

    features  [B N D]: throttled, in the space the projector expects.
    retention [B N] in [0, 1] | None: weight of each token as a key in every decoder layer (the masked softmax of
              DynamicViT, METHODS 3.2); None leaves attention alone, as DiffPrune does.
    penalty   scalar: added to the answer loss (0 for methods whose budget is exact).
    kept      [B] float: tokens the throttle lets through on average, for the step record.
    """

    features: Tensor
    kept: Tensor
    retention: Tensor | None = None
    penalty: Tensor | float = 0.0
