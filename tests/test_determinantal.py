"""DiffPrune trained for a determinantal point process: what is left of a token, the soft choice, and its gradient."""

from __future__ import annotations

import pytest
import torch

from diffprune.core import registry
from diffprune.core.budget import Above, Keep, Share, standardise, top
from diffprune.core.noise import Noise
from diffprune.core.site import ENCODED, Cut
from diffprune.core.tokens import VisualTokens
from diffprune.pruners._determinantal import length_left
from diffprune.pruners._greedy import EPSILON
from diffprune.pruners.diffprune import DiffPrune
from diffprune.pruners.dpp import DPP


def tokens(width: int) -> VisualTokens:
    """Four images of 12, 13, 1 and 16 tokens."""
    torch.manual_seed(0)
    valid = torch.ones(4, 16, dtype=torch.bool)
    valid[0, 12:], valid[1, :3], valid[2, 1:] = False, False, False
    return VisualTokens(torch.randn(4, 16, width), valid)


def method(seen: VisualTokens, weight: float) -> DiffPrune:
    pruner = DiffPrune(dpp=weight, denoiser=False)
    torch.manual_seed(1)
    for parameter in pruner.build(seen).parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return pruner


def beside(x: torch.Tensor, taken: list[int], i: int) -> float:
    """Squared length of unit vector i [N D] that no combination of those taken reaches."""
    if not taken:
        return 1.0
    others = x[taken].T
    best = torch.linalg.lstsq(others, x[i][:, None], driver="gelsd").solution
    return float((x[i] - (others @ best)[:, 0]).square().sum())


@pytest.mark.parametrize("weight", [0.25, 0.5, 2.0])
@pytest.mark.parametrize("width", [24, 5])  # five dimensions hold five tokens that are unlike
def test_it_keeps_and_lets_through_what_greedy_inference_takes_one_by_one(width: int, weight: float) -> None:
    seen = tokens(width)
    pruner = method(seen, weight)
    with torch.no_grad():
        scores, alone = standardise(pruner.score(seen), seen.valid), 0
        for budget in (*map(Keep, (1, 3, 4, 7, 12, 16)), Share(0.4)):
            counts = budget.counts(seen.counts)
            found = length_left(seen, weight * scores, counts)
            keep = pruner.select(seen, Cut(ENCODED, budget)).keep
            for row, num in enumerate(counts.tolist()):
                own = seen.valid[row].nonzero()[:, 0].tolist()
                x, taken = torch.nn.functional.normalize(seen.features[row].double(), dim=1), list[int]()
                while len(taken) < num:
                    gain = {
                        i: 2 * weight * scores[row, i].item() + torch.tensor(max(beside(x, taken, i), EPSILON)).log().item()
                        for i in own
                        if i not in taken
                    }
                    taken.append(max(gain, key=lambda i: gain[i]))
                assert keep[row].nonzero()[:, 0].tolist() == sorted(taken), f"{budget} of image {row}"
                for i in own:
                    before = taken[: taken.index(i)] if i in taken else taken
                    assert found[row, i].item() == pytest.approx(max(beside(x, before, i), EPSILON), abs=2e-5)
            soft = scores + found.log() / (2 * weight)
            assert torch.equal(top(soft, seen.valid, counts), keep)
            alone += int((keep != top(scores, seen.valid, counts)).sum())
            let = pruner.relax(seen, budget, 1e-4, Noise("x", rows=range(4))).let
            torch.testing.assert_close(let.where(seen.valid, 0.0), keep.float(), rtol=0, atol=0.2)
    assert alone or weight == 2.0, "the best by score are others"


def test_it_keeps_what_dpp_keeps_of_the_same_scorer() -> None:
    seen = tokens(24)
    pruner = method(seen, 0.5)
    for count in (1, 5, 9):
        cut = Cut(ENCODED, Keep(count))
        assert torch.equal(pruner.select(seen, cut).keep, DPP(pruner, 0.5).select(seen, cut).keep)


def test_the_gradient_through_scores_is_that_of_small_steps() -> None:
    seen = tokens(24)
    pruner, budget = method(seen, 0.5), Keep(5)
    weights = torch.randn(seen.valid.shape, generator=torch.Generator().manual_seed(2)).double()

    def total(shift: torch.Tensor) -> torch.Tensor:
        pruner.logits = lambda tokens: base + shift  # type: ignore[method-assign]
        u = pruner._logits_of_alpha(seen, budget.counts(seen.counts).float(), 0.7)
        return (u.where(seen.valid & (seen.counts > 5)[:, None], 0.0) * weights).sum()

    base = pruner.logits(seen).detach().double()
    shift = torch.zeros_like(base, requires_grad=True)
    (gradient,) = torch.autograd.grad(total(shift), shift)
    assert gradient[3].abs().max() > 0.1
    for row, i in ((0, 2), (0, 7), (1, 5), (3, 0), (3, 9)):
        step = torch.zeros_like(base)
        step[row, i] = 1e-3
        slope = (total(step) - total(-step)).item() / 2e-3
        assert slope == pytest.approx(gradient[row, i].item(), abs=2e-3)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ("dpp=9.0", r"diffprune\(dpp=9.0\): the weight .* lies from 0 to 8"),
        ("dpp=True", "lies from 0 to 8"),
        ("dpp=0.5, sinks=2", "leave diversity, sinks, scale and total out"),
        ("dpp=0.5, scale='free'", "leave diversity, sinks, scale and total out"),
    ],
)
def test_what_does_not_go_with_it_is_refused(options: str, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        registry.load("pruners", f"diffprune({options})")


def test_a_threshold_has_no_count_to_fill() -> None:
    seen = tokens(24)
    with pytest.raises(ValueError, match="needs a count"):
        method(seen, 0.5).select(seen, Cut(ENCODED, Above(0.5)))
