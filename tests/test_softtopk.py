"""Soft top-K against bisection and finite differences, over the range the paper and its neighbours use."""

from __future__ import annotations

import math

import pytest
import torch

from diffprune.pruners._soft_topk import centred, laplace_cdf, signal_and_noise, soft_top_k

GRID = [(n, k, tau) for n, k in ((50, 1), (50, 49), (144, 7), (576, 64), (2880, 320)) for tau in (2.0, 0.5, 0.1, 0.02)]


def bisection(r: torch.Tensor, budget: float) -> torch.Tensor:
    """The slow obvious computation: halve the bracket until the weights sum to the budget."""
    low, high = float(r.min()) - 40, float(r.max()) + 40
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if float(laplace_cdf(r - middle).sum()) > budget else (low, middle)
    return laplace_cdf(r - (low + high) / 2)


@pytest.mark.parametrize(("num", "budget", "tau"), GRID)
def test_equals_bisection_and_meets_the_budget(num: int, budget: int, tau: float) -> None:
    torch.manual_seed(num)
    scores = torch.randn(3, num, dtype=torch.float64)
    alpha = soft_top_k(scores, torch.ones(3, num, dtype=torch.bool), torch.full((3,), float(budget)), tau)
    torch.testing.assert_close(alpha.sum(1), torch.full((3,), float(budget), dtype=torch.float64), rtol=0, atol=1e-6)
    for row, scores_row in zip(alpha, scores, strict=True):
        torch.testing.assert_close(row, bisection(scores_row / tau, budget), rtol=0, atol=1e-8)


@pytest.mark.parametrize("tau", [1.0, 1e-2, 1e-3, 1e-6])
@pytest.mark.parametrize("budget", [1.0, 2.0, 2.5, 7.0, 11.0])
def test_tokens_that_stand_out_far_leave_the_budget_exact(budget: float, tau: float) -> None:
    """At the edge of the budget lies a gap whose exponential no number holds."""
    scores = torch.tensor([[9.0, 40.0, -3.0, 2.0, 5.0, 2.0, -80.0, 0.1, 0.0, -1.0, 2.2, 2.3]], dtype=torch.float64)
    alpha = soft_top_k(scores, torch.ones(1, 12, dtype=torch.bool), torch.tensor([budget]), tau)[0]
    assert float(alpha.sum()) == pytest.approx(budget, abs=1e-6)
    ranked = scores[0].argsort(descending=True, stable=True)
    assert (alpha[ranked].diff() <= 1e-9).all()
    if tau > 1e-3:
        torch.testing.assert_close(alpha, bisection(scores[0] / tau, budget), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("num", "budget", "tau"), GRID)
def test_gradient_equals_finite_differences_and_sums_to_zero(num: int, budget: int, tau: float) -> None:
    torch.manual_seed(num + budget)
    valid = torch.ones(1, num, dtype=torch.bool)
    size = torch.full((1,), float(budget))
    scores = torch.randn(1, num, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(1, num, dtype=torch.float64)
    (gradient,) = torch.autograd.grad((soft_top_k(scores, valid, size, tau) * weight).sum(), scores)
    direction = torch.randn(1, num, dtype=torch.float64)
    step = 1e-6 * tau
    with torch.no_grad():
        ahead = (soft_top_k(scores + step * direction, valid, size, tau) * weight).sum()
        behind = (soft_top_k(scores - step * direction, valid, size, tau) * weight).sum()
    expected = float((ahead - behind) / (2 * step))
    assert float((gradient * direction).sum()) == pytest.approx(expected, rel=2e-4, abs=1e-5)
    assert abs(float(gradient.sum())) < 1e-8


def test_padding_is_never_weighted_and_does_not_move_the_rest() -> None:
    torch.manual_seed(0)
    scores, budget = torch.randn(1, 20, dtype=torch.float64), torch.tensor([5.0])
    alone = soft_top_k(scores, torch.ones(1, 20, dtype=torch.bool), budget, 0.5)
    padded = torch.cat([scores, torch.full((1, 9), 100.0, dtype=torch.float64)], 1)
    valid = torch.arange(29)[None] < 20
    together = soft_top_k(padded, valid, budget, 0.5)
    torch.testing.assert_close(together[:, :20], alone, rtol=0, atol=1e-12)
    assert not together[:, 20:].any()


def test_padding_takes_no_share_of_the_gradient() -> None:
    """Finite differences of a row with padding: the threshold moves with valid scores alone, and padding's own move nothing."""
    torch.manual_seed(1)
    valid, weight = torch.arange(29)[None] < 20, torch.randn(1, 29, dtype=torch.float64)
    scores = torch.randn(1, 29, dtype=torch.float64, requires_grad=True)

    def summed(shift: torch.Tensor | float) -> torch.Tensor:
        return (soft_top_k(scores + shift, valid, torch.tensor([5.0]), 0.5) * weight).sum()

    (gradient,) = torch.autograd.grad(summed(0.0), scores)
    with torch.no_grad():
        moves = 1e-6 * torch.eye(29, dtype=torch.float64)
        expected = torch.stack([(summed(move) - summed(-move)) / 2e-6 for move in moves])
    torch.testing.assert_close(gradient[0], expected, rtol=0, atol=1e-8)
    assert not gradient[0, 20:].any()


def test_a_full_budget_keeps_everything_and_ties_share_alike() -> None:
    scores, valid = torch.zeros(2, 6), torch.ones(2, 6, dtype=torch.bool)
    assert soft_top_k(scores, valid, torch.tensor([6.0, 9.0]), 1.0).eq(1).all()
    torch.testing.assert_close(soft_top_k(scores, valid, torch.tensor([3.0, 1.5]), 0.1)[1], torch.full((6,), 0.25))


def test_a_full_row_passes_no_nan_gradient() -> None:
    scores = torch.randn(2, 6, requires_grad=True)
    u = centred(scores, torch.ones(2, 6, dtype=torch.bool), torch.tensor([6.0, 2.0]), 0.5)
    signal, noise = signal_and_noise(u)
    (gradient,) = torch.autograd.grad((signal + 2 * noise).sum(), scores)
    assert torch.isfinite(gradient).all() and not gradient[0].any() and gradient[1].any()


def test_square_roots_are_stable_where_alpha_underflows() -> None:
    u = torch.tensor([-3000.0, -60.0, -1.0, 0.0, 1.0, 60.0, 3000.0], dtype=torch.float64, requires_grad=True)
    signal, noise = signal_and_noise(u)
    alpha = laplace_cdf(u)
    torch.testing.assert_close(signal.square(), alpha, rtol=1e-12, atol=1e-300)
    torch.testing.assert_close(signal.square() + noise.square(), torch.ones_like(u), rtol=1e-12, atol=0)
    (slope,) = torch.autograd.grad(signal.sum() - noise.sum(), u)
    assert torch.isfinite(slope).all() and float(slope.abs().max()) <= math.sqrt(2) / 2
    (density,) = torch.autograd.grad(laplace_cdf(u).sum(), u)
    torch.testing.assert_close(density, (-u.detach().abs()).exp() / 2, rtol=1e-12, atol=0)
