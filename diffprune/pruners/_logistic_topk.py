"""Budgeted soft top-K with the logistic function: alpha_i = sigmoid(s_i - b), b such that an image's sum is its budget."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def centred(scores: Tensor, valid: Tensor, budget: Tensor) -> Tensor:
    """u [B N] float32 = s - b: the logits whose sigmoid sums to `budget` [B] over valid tokens. Differentiable in `scores` [B N].

    64 bisections without gradient, as in the release of VisionSelector (arXiv 2510.16598), then a Newton step, whose gradient is
    the implicit one, db/ds_j = f_j / sum_i f_i. A budget of all tokens, which no finite b meets, is met up to a thousandth of a
    token. Values at padding mean nothing.
    """
    s, wanted = scores.double().where(valid, 0.0), budget.double().minimum(valid.sum(1) - 1e-3)[:, None]
    with torch.no_grad():
        low = s.where(valid, math.inf).amin(1, keepdim=True) - 40
        high = s.where(valid, -math.inf).amax(1, keepdim=True) + 40
        for _ in range(64):
            b = (low + high) / 2
            over = _sum(s - b, valid) > wanted
            low, high = torch.where(over, b, low), torch.where(over, high, b)
        alpha = (s - b).sigmoid()
        slope = (alpha * (1 - alpha)).where(valid, 0.0).sum(1, keepdim=True).clamp_min(1e-12)
    return (s - b - (_sum(s - b, valid) - wanted) / slope).float()


def _sum(u: Tensor, valid: Tensor) -> Tensor:
    return u.sigmoid().where(valid, 0.0).sum(1, keepdim=True)
