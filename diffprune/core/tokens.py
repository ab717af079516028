"""Visual tokens, as pruners see them, and what pruners answer: a selection, or a relaxation of it in training.

Axes, one letter each, everywhere: B images or rows, N visual tokens, D feature width, S sequence, T text tokens, L layers,
H heads.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

from diffprune.core.evidence import Evidence, Question


@dataclass(frozen=True)
class VisualTokens:
    """The visual tokens of B images, padded to N.

    features  [B N D] float: one row per token, in raster order.
    valid     [B N] bool: False for padding and for tokens an earlier cut removed.
    grid      (rows, columns) when the tokens are a raster of that size, else None.
    evidence  what was asked for beside the features, by what was asked (`core/evidence.py` says what each is).
    row_id    [B N] int | None: number of the row of tokens a token belongs to, 0 for none. A negative entry is no token but
              the separator (newline embedding) that ends that row: never valid, so never scored and counted apart.
    deepstack [B N C] float | None: features of inner encoder layers that join early decoder layers, cut and merged alike.
    size      [B N] float | None: tokens of the encoder each one stands for, after merging; None is one each.
    layout    [B K] int | None: what the family must know of each image to place its slots (rows, columns ...).
    projected: `features` are in the decoder's width.
    """

    features: Tensor
    valid: Tensor
    grid: tuple[int, int] | None = None
    evidence: Mapping[Evidence, Tensor | Question] = field(default_factory=dict)
    row_id: Tensor | None = None
    deepstack: Tensor | None = None
    size: Tensor | None = None
    layout: Tensor | None = None
    projected: bool = False

    def __len__(self) -> int:
        return self.features.shape[0]

    @property
    def counts(self) -> Tensor:
        """[B] int: valid tokens per image."""
        return self.valid.sum(1)

    @property
    def present(self) -> Tensor:
        """[B N] bool: valid tokens, and the separators of rows that have one."""
        if self.row_id is None:
            return self.valid
        return with_separators(self.valid, self.row_id)

    def given(self, evidence: Evidence) -> Tensor:
        """The tensor that was asked for as `evidence`: one value per token or image."""
        found = self.evidence[evidence]
        assert isinstance(found, Tensor), "the question is embedding and mask"
        return found

    def showing(self, asked: Set[Evidence]) -> VisualTokens:
        """Without evidence that was not asked for: a method sees the same, whoever shares its encoding."""
        return replace(self, evidence={key: value for key, value in self.evidence.items() if key in asked})

    def map(self, change: Callable[[Tensor], Tensor]) -> VisualTokens:
        """The same tokens with `change` applied to every tensor (indexing images, moving devices)."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        changed: dict[str, Any] = {k: change(v) for k, v in values.items() if isinstance(v, Tensor)}
        evidence = {k: change(v) if isinstance(v, Tensor) else Question(*map(change, v)) for k, v in self.evidence.items()}
        return replace(self, **changed, evidence=evidence)

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
        evidence = {key: torch.cat([p.given(key) for p in parts]) for key in first.evidence}
        return replace(first, **joined, evidence=evidence, grid=first.grid if all(p.grid == first.grid for p in parts) else None)

    def padded(self, num: int) -> VisualTokens:
        """The same images with N = `num`: padding appended, or cut off where nothing stands in it."""
        if num == self.valid.shape[1]:
            return self

        def at(value: Tensor) -> Tensor:
            short = value[:, :num]
            return torch.cat([short, short.new_zeros(len(short), num - short.shape[1], *short.shape[2:])], 1)

        names = ("features", "valid", "row_id", "deepstack", "size")
        values: dict[str, Any] = {n: at(v) for n in names if (v := getattr(self, n)) is not None}
        evidence = {key: at(self.given(key)) if key.per_token else value for key, value in self.evidence.items()}
        return replace(self, **values, evidence=evidence)


def with_separators(valid: Tensor, row_id: Tensor) -> Tensor:
    """[B N] bool: valid tokens, and the separators of rows that have one. row_id: of `VisualTokens`, at most N rows."""
    lit = valid.new_zeros(len(valid), valid.shape[1] + 1, dtype=torch.long).scatter_add_(1, row_id.clamp_min(0), valid.long())
    return valid | ((row_id < 0) & (lit.gather(1, row_id.abs()) > 0))


@dataclass(frozen=True)
class Selection:
    """What a pruner answers: which tokens survive, and where the content of the others goes.

    keep     [B N] bool: a subset of `VisualTokens.valid`, at least one per image that has any.
    mix      [B K N] float | None: for a method that merges, the weights with which tokens add up to an image's k-th survivor, in
             raster order; rows behind its last survivor and columns of padding are not read. None leaves survivors as they are.
             `means` makes it where every removed token goes into one survivor.
    features, deepstack [B N D] | None: what stands in place of all features; for diagnostics that change tokens instead of removing
             them.
    grid     (rows, columns) when the tokens are a raster of that size, else None; for drawing.
    """

    keep: Tensor
    mix: Tensor | None = None
    features: Tensor | None = None
    deepstack: Tensor | None = None
    grid: tuple[int, int] | None = None


def means(tokens: VisualTokens, keep: Tensor, into: Tensor, weight: Tensor | None = None) -> Tensor:
    """`Selection.mix` [B K N] of survivors that become weighted means of themselves and the tokens that go into them.

        x_i <- (w_i x_i + sum_j w_j x_j) / (w_i + sum_j w_j),  over removed tokens j with into_j = i

    keep:   [B N] bool, the survivors.
    into:   [B N] int, the survivor a removed token goes into, -1 for none; read at removed tokens alone.
    weight: [B N], w of each token, survivors included; None is its size. Where all weights of a mean are 0, the survivor stays.
    """
    size = torch.ones_like(into, dtype=torch.float32) if tokens.size is None else tokens.size
    moves = tokens.valid & ~keep & (into >= 0)
    weight = (size if weight is None else weight.float()).where(moves | keep, 0.0)
    slot, num = keep.cumsum(1) - 1, int(keep.sum(1).max())
    target = torch.where(keep, slot, slot.gather(1, into.clamp_min(0)).masked_fill(~moves, num))  # row `num` goes nowhere
    mix = weight.new_zeros(len(keep), num + 1, keep.shape[1]).scatter_(1, target[:, None], weight[:, None])[:, :num]
    total = mix.sum(-1, keepdim=True)
    own = (slot[:, None] == torch.arange(num, device=keep.device)[:, None]) & keep[:, None]
    return torch.where(total > 0, mix / total, own.to(mix.dtype))


@dataclass(frozen=True)
class Relaxation:
    """A differentiable stand-in for removal, while a scorer trains; nothing is removed.

    features  [B N D]: degraded, in the space the projector expects.
    let       [B N] in [0, 1]: how far each token was let through in this draw, without gradient; for the step record.
    retention [B N] in [0, 1] | None: weight of each token as a key in every decoder layer (the masked softmax of
              DynamicViT, arXiv 2106.02034, Eq. 10-11); None leaves attention alone, as DiffPrune does.
    penalty   scalar: added to the answer loss (0 for methods whose budget is exact).
    """

    features: Tensor
    let: Tensor
    retention: Tensor | None = None
    penalty: Tensor | float = 0.0

    @property
    def kept(self) -> Tensor:
        """[B] float: tokens that were let through."""
        return self.let.sum(1)
