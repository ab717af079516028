"""What DiffPrune keeps beside the best by score: sinks and unlike tokens, for any weights that were trained without them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from diffprune.core import registry
from diffprune.core.budget import Above, Keep, Share
from diffprune.core.site import ENCODED, Cut
from diffprune.core.tokens import VisualTokens

BUDGETS = (Keep(1), Keep(2), Keep(7), Keep(12), Share(0.3), Share(0.55), Share(1.0))


def tokens() -> VisualTokens:
    torch.manual_seed(0)
    valid = torch.ones(4, 20, dtype=torch.bool)
    valid[0, 15:], valid[1, :3], valid[2, 1:] = False, False, False
    return VisualTokens(torch.randn(4, 20, 16) * (1 + torch.rand(4, 20, 1)), valid)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: Any) -> Path:
    pruner = registry.load("pruners", "diffprune")
    torch.manual_seed(1)
    pruner.build(tokens())
    folder: Path = tmp_path_factory.mktemp("scorer")
    pruner.save_pretrained(folder)
    return folder


def asked(weights: Path, options: str) -> Any:
    return registry.load("pruners", f"diffprune({options}{', ' if options else ''}weights='{weights}')")


def one_by_one(x: torch.Tensor, scores: list[float], count: int, diversity: float, sinks: int) -> set[int]:
    """The definition, token by token, of one image without padding."""
    unlike = min(int(diversity * count + 0.5), count - 1)
    norms, cosine = x.norm(dim=1).tolist(), torch.cosine_similarity(x[:, None], x[None], dim=2).tolist()
    kept = sorted(range(len(x)), key=lambda i: -norms[i])[: min(sinks, (count - unlike) // 2)]
    kept += [i for i in sorted(range(len(x)), key=lambda i: -scores[i]) if i not in kept][: count - unlike - len(kept)]
    while len(kept) < count:
        likeness = {i: max(cosine[i][j] for j in kept) for i in range(len(x)) if i not in kept}
        kept.append(min(likeness, key=lambda i: likeness[i]))
    return set(kept)


@pytest.mark.parametrize(("diversity", "sinks"), [(0.0, 3), (0.3, 0), (0.3, 2), (0.95, 4)])
def test_sinks_best_and_unlike_tokens_are_their_definition(weights: Path, diversity: float, sinks: int) -> None:
    seen, pruner = tokens(), asked(weights, f"diversity={diversity}, sinks={sinks}")
    scores = pruner.score(seen).detach()
    apart = 0
    for budget in BUDGETS:
        keep = pruner.select(seen, Cut(ENCODED, budget)).keep
        assert not (keep & ~seen.valid).any()
        assert keep.sum(1).tolist() == [budget.count(n) for n in seen.counts.tolist()], "exactly the budget"
        apart += int((keep != asked(weights, "").select(seen, Cut(ENCODED, budget)).keep).sum())
        for row in range(4):
            live = seen.valid[row]
            wanted = one_by_one(seen.features[row, live], scores[row, live].tolist(), int(keep[row].sum()), diversity, sinks)
            assert set(keep[row, live].nonzero()[:, 0].tolist()) == wanted, f"{budget}, image {row}"
            alone = seen[torch.tensor([row])]
            loud = replace(alone, features=alone.features.where(alone.valid[..., None], 1e3))
            assert torch.equal(pruner.select(loud, Cut(ENCODED, budget)).keep[0], keep[row])
    assert apart > 0, "something else is kept than by score alone"


def test_weights_trained_once_are_asked_with_both(weights: Path) -> None:
    plain, both = asked(weights, ""), asked(weights, "diversity=0.2, sinks=2")
    assert plain.weights_sha256 == both.weights_sha256 and plain.spec.identity != both.spec.identity


@pytest.mark.parametrize("option", ["diversity=0.2", "sinks=1"])
def test_parts_of_a_budget_need_a_count(weights: Path, option: str) -> None:
    with pytest.raises(ValueError, match="needs a count"):
        asked(weights, option).select(tokens(), Cut(ENCODED, Above(0.5)))


@pytest.mark.parametrize("option", ["diversity=1.0", "diversity=-0.1", "diversity=True", "sinks=-1", "sinks=0.5", "sinks=True"])
def test_parts_that_cannot_be_are_refused(option: str) -> None:
    with pytest.raises(ValueError, match=rf"diffprune\({option}\)"):
        registry.load("pruners", f"diffprune({option})")
