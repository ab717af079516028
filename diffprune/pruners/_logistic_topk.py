"""Budgeted soft top-K with the logistic function: alpha_i = sigmoid(s_i - b), b such that an image's sum is its budget."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def logistic_offset(scores: Tensor, valid: Tensor, budget: Tensor) -> Tensor:
    """b [B 1] with sum_i sigmoid(scores_i - b) = budget [B] over valid tokens, differentiable in `scores` [B N].

    Bisection without gradient, as in the release of VisionSelector (arXiv 2510.16598), then one Newton step, whose gradient is the
    implicit one, db/ds_j = f_j / sum_i f_i. A budget of all tokens, which no finite offset meets, is met up to a thousandth of one.
    """
    s, wanted = scores.double().where(valid, 0.0), budget.double().minimum(valid.sum(1) - 1e-3)[:, None]
    with torch.no_grad():
        low = s.where(valid, math.inf).amin(1, keepdim=True) - 40
        high = s.where(valid, -math.inf).amax(1, keepdim=True) + 40
        for _ in range(60):
            middle = (low + high) / 2
            over = (s - middle).sigmoid().where(valid, 0.0).sum(1, keepdim=True) > wanted
            low, high = middle.where(over, low), high.where(over, middle)
    share = (s - (low + high) / 2).sigmoid().where(valid, 0.0)
    slope = (share * (1 - share)).sum(1, keepdim=True).detach().clamp_min(1e-12)
    return ((low + high) / 2 + (share.sum(1, keepdim=True) - wanted) / slope).float()


def centred(scores: Tensor, valid: Tensor, budget: Tensor) -> Tensor:
    """u [B N] float32 = s - b: the logits whose sigmoid sums to `budget` [B] over valid tokens. Values at padding mean nothing."""
    return scores - logistic_offset(scores, valid, budget)
