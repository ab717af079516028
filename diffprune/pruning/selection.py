"""What a selection does to the visual tokens: some are replaced, some merged into others, some no longer valid."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from diffprune.core.tokens import Selection, VisualTokens


def applied(tokens: VisualTokens, chosen: Selection) -> VisualTokens:
    """The tokens after a selection: `valid` reduced to the survivors, features replaced or merged as it says."""
    if chosen.features is not None:
        tokens = replace(tokens, features=chosen.features)
    if chosen.into is not None:
        tokens = merged(tokens, chosen.keep, chosen.into, chosen.weight)
    return replace(tokens, valid=chosen.keep)


def merged(tokens: VisualTokens, keep: Tensor, into: Tensor, weight: Tensor | None = None) -> VisualTokens:
    """Survivors as weighted means of themselves and the tokens merged into them; sizes add up. `valid` is left as it is.

        x_i <- (w_i x_i + sum_j w_j x_j) / (w_i + sum_j w_j),  s_i <- s_i + sum_j s_j,  over removed tokens j with into_j = i

    keep, into, weight: of `Selection`; w is `weight`, or the sizes s. Features and DeepStack features go the same way. A survivor
    that nothing is merged into, or only tokens of weight 0 while its own is 0, stays as it is, bit by bit.
    """
    size = torch.ones_like(into, dtype=torch.float32) if tokens.size is None else tokens.size
    weight = size if weight is None else weight.float()
    moves = tokens.valid & ~keep & (into >= 0)
    target, num = into.masked_fill(~moves, into.shape[1]), into.shape[1]  # what goes nowhere is added up behind the last token

    def arriving(values: Tensor) -> Tensor:
        index = target if values.ndim == 2 else target[..., None].expand_as(values)
        return values.new_zeros(len(values), num + 1, *values.shape[2:]).scatter_add_(1, index, values)[:, :num]

    total = weight + arriving(weight)
    changed = ((arriving(moves.float()) > 0) & (total > 0))[..., None]

    def mean(values: Tensor) -> Tensor:
        weighted = values.float() * weight[..., None]
        return torch.where(changed, ((weighted + arriving(weighted)) / total[..., None]).to(values.dtype), values)

    deepstack = None if tokens.deepstack is None else mean(tokens.deepstack)
    return replace(tokens, features=mean(tokens.features), deepstack=deepstack, size=size + arriving(size))
