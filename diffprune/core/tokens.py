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
    valid     [B N] bool: False for padding and for tokens an earlier cut removed.
    grid      (rows, columns) when the tokens are a raster of that size, else None.
    attention [B N] float | None: attention each token receives in the encoder (`Need.ENCODER_ATTENTION`).
    text      [B T D_text] float | None: embedded question of each image (`Need.TEXT`).
    text_valid [B T] bool | None: False for padding of `text`.
    identity  [B] int64 | None: hash of each image's pixels (`Need.IDENTITY`).
    line      [B N] int | None: number of the line a token stands in, 0 for none. A negative entry is no token but the
              separator (newline embedding) that ends that line: never valid, so never scored and counted apart.
    deepstack [B N C] float | None: what travels beside each token into later decoder layers, cut by the same mask.
    layout    [B K] int | None: what the family must know of each image to place its slots (rows, columns ...).
    projected: `features` are in the decoder's width.
    """

    features: Tensor
    valid: Tensor
    grid: tuple[int, int] | None = None
    attention: Tensor | None = None
    text: Tensor | None = None
    text_valid: Tensor | None = None
    identity: Tensor | None = None
    line: Tensor | None = None
    deepstack: Tensor | None = None
    layout: Tensor | None = None
    projected: bool = False

    def __len__(self) -> int:
        return self.features.shape[0]

    @property
    def counts(self) -> Tensor:
        """[B] int: living tokens per image."""
        return self.valid.sum(1)

    @property
    def present(self) -> Tensor:
        """[B N] bool: living tokens, and the separators of lines that have one."""
        if self.line is None:
            return self.valid
        return with_separators(self.valid, self.line, int(self.line.abs().max()))

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
        """Images of several encoder calls in one value, padded to the longest N."""
        first, longest = parts[0], max(p.valid.shape[1] for p in parts)
        parts = [p.padded(longest) for p in parts]
        names = [f.name for f in fields(first) if isinstance(getattr(first, f.name), Tensor)]
        joined: dict[str, Any] = {n: torch.cat([getattr(p, n) for p in parts]) for n in names}
        return replace(first, **joined, grid=first.grid if all(p.grid == first.grid for p in parts) else None)

    def padded(self, num: int) -> VisualTokens:
        """The same images with N = `num`: padding appended, or cut off where nothing stands in it."""
        here = self.valid.shape[1]
        if num == here:
            return self
        values = {n: v for n in ("features", "valid", "attention", "line", "deepstack") if (v := getattr(self, n)) is not None}
        short: dict[str, Any] = {n: v[:, :num] for n, v in values.items()}
        fill: dict[str, Any] = {
            n: torch.cat([v, v.new_zeros(len(v), max(0, num - here), *v.shape[2:])], 1) for n, v in short.items()
        }
        return replace(self, **fill)


def with_separators(valid: Tensor, line: Tensor, lines: int) -> Tensor:
    """[B N] bool: living tokens, and the separators of lines that have one. line: of `VisualTokens`; lines: its largest number."""
    lit = valid.new_zeros(len(valid), lines + 1, dtype=torch.long).scatter_add_(1, line.clamp_min(0), valid.long())
    return valid | ((line < 0) & (lit.gather(1, line.abs()) > 0))


@dataclass(frozen=True)
class Selection:
    """What a pruner answers: which tokens survive, and what the survivors carry.

    keep     [B N] bool: a subset of `VisualTokens.valid`, at least one per image that has any.
    features [B N D]: unchanged unless the method merges tokens.
    grid     (rows, columns) when the tokens are a raster of that size, else None; for drawing.
    """

    keep: Tensor
    features: Tensor
    grid: tuple[int, int] | None = None


@dataclass(frozen=True)
class Relaxation:
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
