"""Budgeted soft top-K: weights in [0, 1] that sum to K, in closed form (LapSum, Struski et al., arXiv 2503.06242).

    F(u) = e^u / 2 for u <= 0, 1 - e^-u / 2 for u > 0        Laplace distribution function, density f(u) = e^-|u| / 2
    alpha_i = F(u_i),  u_i = s_i / tau - b,  b such that sum_i alpha_i = K

Everything runs in float32 or better, per row, over valid tokens only. The square roots that mixing with noise needs are
taken from u, never from an alpha that may have underflowed. How we differ from the authors' code: b is exact
for rows with padding, and the backward is the analytic Jacobian instead of autograd through the sort.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


def laplace_cdf(u: Tensor) -> Tensor:
    """F(u), each branch with its exponent clamped to its own side so that autograd never meets an overflow."""
    return torch.where(u <= 0, 0.5 * u.clamp_max(0).exp(), 1 - 0.5 * (-u.clamp_min(0)).exp())


def offset(r: Tensor, valid: Tensor, budget: Tensor) -> Tensor:
    """b [B 1] with sum_i F(r_i - b) = budget [B], for r = s / tau [B N]; needs 0 < budget < number valid.

    Between two neighbouring sorted values the sum is a quadratic in e^b; `m` valid values lie at or below b.
    """
    num = valid.sum(1, keepdim=True)
    r = r.masked_fill(~valid, math.inf).sort(1).values  # ascending, padding last
    finite = torch.arange(r.shape[1], device=r.device) < num
    safe = r.where(finite, r.gather(1, num - 1))
    below = _running_sum(safe, finite)  # A_m = sum_{i <= m} e^(r_i - r_m), index m-1
    above = _running_sum(-safe.flip(1), finite.flip(1)).flip(1)  # sum_{i >= m} e^(r_m - r_i)
    rank = torch.arange(1, r.shape[1] + 1, device=r.device, dtype=r.dtype)
    at_knots = (num - rank) + 0.5 + 0.5 * (below - 1) - 0.5 * (above - 1)  # T(r_m), falling in m
    m = ((at_knots >= budget[:, None]) & finite).sum(1, keepdim=True)  # r_m <= b <= r_{m+1}
    # e^x (x = b - r_m) solves a - B e^-gap e^2x + 2 kappa e^x = 0; by logarithms, as e^-gap underflows where tokens lie far apart
    ref = safe.gather(1, (m - 1).clamp_min(0))
    gap = safe.gather(1, m.minimum(num - 1)) - ref
    log_a = below.gather(1, (m - 1).clamp_min(0)).log().masked_fill(m == 0, -math.inf)
    log_b = above.gather(1, m.minimum(num - 1)).log().masked_fill(m == num, -math.inf)
    kappa = (num - m) - budget[:, None]
    log_kappa = kappa.abs().log()
    log_q = torch.logaddexp(2 * log_kappa, log_a + log_b - gap) / 2  # q^2 = kappa^2 + a B e^-gap
    total = torch.logaddexp(log_kappa, log_q)
    return ref + torch.where(kappa >= 0, total - log_b + gap, log_a - total)


def _running_sum(r: Tensor, finite: Tensor) -> Tensor:
    """sum_{i <= m} e^(r_i - r_m) for ascending r, kept relative to the running element: nothing overflows."""
    return (r.masked_fill(~finite, -math.inf).logcumsumexp(1) - r).exp().where(finite, 0.0)


class _Offset(torch.autograd.Function):
    """b as a function of r, with its analytic gradient: db/dr_j = f_j / sum_i f_i."""

    @staticmethod
    def forward(ctx: Any, r: Tensor, valid: Tensor, budget: Tensor) -> Tensor:
        b = offset(r, valid, budget)
        ctx.save_for_backward(r, valid, b)
        return b

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        r, valid, b = ctx.saved_tensors
        # relative to the largest density of the row, so that far-away tails do not become 0 / 0
        log_f = -(r - b).abs().masked_fill(~valid, math.inf)
        return grad * log_f.softmax(1), None, None


def centred(scores: Tensor, valid: Tensor, budget: Tensor, temperature: float) -> Tensor:
    """u [B N] = s / tau - b: the logits whose Laplace CDF sums to the budget. Differentiable in `scores` [B N].

    budget: [B] float, tokens to keep. Rows with a budget of everything get u = +inf at valid tokens (alpha 1);
    padding gets -inf (alpha 0).
    """
    # float64: with tau = 0.02 and thousands of tokens, float32 cannot hold both s / tau and a sum exact to 1e-6
    r = scores.double() / temperature
    num = valid.sum(1)
    full = budget >= num
    wanted = budget.double().where(~full, num.double() / 2).clamp_min(1e-9)
    u = r - _Offset.apply(r.masked_fill(~valid, 0.0), valid, wanted)
    u = u.masked_fill(full[:, None] & valid, math.inf)
    return u.masked_fill(~valid, -math.inf)


def soft_top_k(scores: Tensor, valid: Tensor, budget: Tensor, temperature: float) -> Tensor:
    """Retention weights alpha [B N] in [0, 1] with sum_i alpha_i = budget [B] in every row."""
    return laplace_cdf(centred(scores, valid, budget, temperature)).to(scores.dtype)


def signal_and_noise(u: Tensor) -> tuple[Tensor, Tensor]:
    """(sqrt(alpha), sqrt(1 - alpha)) from u, stable at both ends; both slopes stay below sqrt(2) / 4."""
    low, high = u.clamp_max(0), u.clamp_min(0)
    half = math.sqrt(0.5)
    signal = torch.where(u <= 0, half * (low / 2).exp(), (1 - 0.5 * (-high).exp()).sqrt())
    noise = torch.where(u <= 0, (1 - 0.5 * low.exp()).sqrt(), half * (-high / 2).exp())
    return signal, noise
