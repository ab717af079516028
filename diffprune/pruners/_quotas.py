"""Budgets shared out over groups of tokens, without loops: who is taken follows from each token's rank in its group."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def sizes_of(group: Tensor, mask: Tensor, num: int) -> Tensor:
    """[B num] int: tokens of each group where `mask` [B N]. group: [B N] int, from 0."""
    return torch.zeros(len(group), num, dtype=torch.long, device=group.device).scatter_add_(1, group, mask.long())


def ranks(scores: Tensor, group: Tensor, valid: Tensor, num: int) -> Tensor:
    """[B N] int: how many of its own group each valid token has before it, by falling score; ties go to the earlier token."""
    group = group.where(valid, num)
    order = scores.masked_fill(~valid, -math.inf).argsort(dim=1, descending=True, stable=True)
    order = order.gather(1, group.gather(1, order).argsort(dim=1, stable=True))
    sizes = sizes_of(group, torch.ones_like(valid), num + 1)
    start = (sizes.cumsum(1) - sizes).gather(1, group.gather(1, order))
    return torch.empty_like(group).scatter_(1, order, torch.arange(group.shape[1], device=group.device) - start)


def lowest(keys: list[Tensor], valid: Tensor, counts: Tensor) -> Tensor:
    """Mask [B N] of the `counts` [B] valid tokens that come first by `keys` [B N], the first of which matters most."""
    order = torch.arange(valid.shape[1], device=valid.device).expand(valid.shape)
    for key in [*reversed(keys), (~valid).long()]:
        order = order.gather(1, key.gather(1, order).argsort(dim=1, stable=True))
    taken = (torch.arange(valid.shape[1], device=valid.device) < counts[:, None]).expand(valid.shape)
    return torch.zeros_like(valid).scatter_(1, order, taken) & valid
