"""Choosing by a determinantal point process that scores weigh, and what that choice says of every token.

The kernel is e^(w s_i) cos(x_i, x_j) e^(w s_j): CDPruner's (arXiv 2506.10967) with e^(w s) for its relevance. Greedy MAP inference
takes the token of largest 2 w s_i + log r_i, with r_i the squared length of x_i / |x_i| that is orthogonal to those taken before.
"""

from __future__ import annotations

import torch
from torch import Tensor

from diffprune.core.budget import Budget, standardise
from diffprune.core.tokens import Selection, VisualTokens
from diffprune.pruners._greedy import EPSILON, cosines, first, most_volume

MOST = 8.0  # e^8 per standard deviation of scores: only near-duplicates count beside them


def checked(weight: object, of: str) -> float:
    """A weight w as it is.

    Raises:
        ValueError: it is no number from 0 to `MOST`; the text begins with what it is `of`.
    """
    if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 <= weight <= MOST:
        raise ValueError(f"{of}={weight!r}): the weight of a standard deviation of scores lies from 0 to {MOST:g}")
    return weight


def determinantal(tokens: VisualTokens, scores: Tensor, weight: float, budget: Budget) -> Selection:
    """The greedy choice by scores [B N], which have unit deviation in each image then.

    Raises:
        ValueError: the budget is a threshold, or tokens are NaN or infinite.
    """
    counts, num = budget.counts(tokens.counts), tokens.valid.shape[1]
    logits = weight * standardise(scores, tokens.valid)
    order, _ = most_volume(cosines(tokens.features, tokens.valid), tokens.valid, budget.count(num), logits)
    return Selection(first(order, counts, num))


@torch.no_grad()
def length_left(tokens: VisualTokens, logits: Tensor, counts: Tensor) -> Tensor:
    """r [B N], from `EPSILON` to 1, of the choice of `counts` [B] int tokens: orthogonal to those taken before a token, or to all
    where it is not taken. logits: w s [B N]."""
    order, basis = most_volume(cosines(tokens.features, tokens.valid), tokens.valid, int(counts.max()), logits)
    steps = torch.arange(order.shape[1], device=order.device)
    turn = torch.full_like(tokens.valid, len(steps), dtype=torch.long)  # a row that has run out repeats a token it took before
    turn = turn.scatter_reduce_(1, order, steps.expand_as(order), "amin")
    before = steps[:, None] < turn.minimum(counts[:, None])[:, None]  # [B steps N]
    return (1 - basis.square().where(before, 0.0).sum(1)).clamp_min(EPSILON)
