"""Learned methods with a scorer of their own paper: their formulas written out, their budgets, their files, their training."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from diffprune import data as training
from diffprune import pruning
from diffprune.core import registry
from diffprune.core.budget import Above, Keep, Share
from diffprune.core.fitted import Annealing, Progress
from diffprune.core.noise import Noise
from diffprune.core.site import ENCODED, Cut
from diffprune.core.tokens import VisualTokens
from diffprune.pruning.pretrained import from_pretrained
from diffprune.train import loop
from diffprune.train.checkpoints import read_steps
from diffprune.train.context import LocalContext
from diffprune.train.estimate import scorer_bytes, scorer_flops
from diffprune.train.loss import answer_nll
from diffprune.train.recipe import Recipe
from diffprune.train.scorer_trainer import ScorerTrainer
from diffprune.vlm.load import load

NAMES = ("learnpruner", "visionselector")
SMALL: dict[str, Any] = {
    "steps": 3, "images": 2, "questions": 2, "workers": 1, "calibration_images": 4, "validation_images": 2, "checkpoint_every": 0,
    "validate_every": 3, "grad_cosine_every": 2, "budgets": (Share(0.25),), "ease_share": 0.0,
}  # fmt: skip


def tokens(batch: int = 3, num: int = 20, width: int = 48, dead: int = 4) -> VisualTokens:
    torch.manual_seed(0)
    valid = torch.ones(batch, num, dtype=torch.bool)
    valid[0, num - dead :] = False
    return VisualTokens(3 + 2 * torch.randn(batch, num, width), valid)


def made(spelling: str, seen: VisualTokens, spread: float = 0.3) -> Any:
    """Built, with weights far from where training starts, so that scores differ."""
    pruner = registry.load("pruners", spelling)
    pruner.build(seen)
    torch.manual_seed(1)
    for parameter in pruner.networks.parameters():
        torch.nn.init.normal_(parameter, std=spread)
    return pruner


def noise(seen: VisualTokens) -> Noise:
    return Noise(0, rows=range(len(seen)))


@pytest.fixture(scope="module")
def vlm() -> Any:
    return load("embedded", device="cpu")


def bisected(scores: list[float], count: float) -> list[float]:
    """sigmoid(s - b) in plain numbers, b such that they add up to `count`."""
    low, high = min(scores) - 60, max(scores) + 60
    for _ in range(200):
        b = (low + high) / 2
        alpha = [1 / (1 + math.exp(min(b - s, 700))) for s in scores]
        low, high = (b, high) if sum(alpha) > count else (low, b)
    return alpha


def best(scores: list[float], count: int) -> set[int]:
    return set(sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:count])


def test_scorers_have_the_sizes_that_the_papers_state() -> None:
    """0.53 million on the 1,024 channels of CLIP-L; 12.85 million on the 3,584 of Qwen2.5-VL-7B."""
    built = [registry.load("pruners", name).outline(features) for name, features in zip(NAMES, (1024, 3584), strict=True)]
    sizes = [sum(p.numel() for p in networks.parameters()) for networks in built]
    assert [round(size / 1e6, 2) for size in sizes] == [0.53, 12.85]
    assert sizes == [1024 * 512 + 512 + 512 * 2, 2 * (3584 * 1792 + 1792)], "the last layer of keep and drop has no constant"
    asked: list[Any] = [registry.load("pruners", f"{name}(width=7)").outline(1024)["scorer"] for name in NAMES]
    assert [scorer.inlet.out_features for scorer in asked] == [7, 7]


def test_the_scores_of_visionselector_are_mean_attention_written_out() -> None:
    seen = tokens()
    pruner = made("visionselector", seen)
    query, key = pruner.networks["scorer"].inlet, pruner.networks["scorer"].key
    z = pruner.standardised(seen.features)
    for row in range(3):
        live = z[row][seen.valid[row]]
        wanted = ((query(live) @ key(live).T) / math.sqrt(24)).mean(1)
        torch.testing.assert_close(pruner.score(seen)[row][seen.valid[row]], wanted, rtol=1e-4, atol=1e-4)


def test_visionselector_starts_where_every_token_weighs_the_same() -> None:
    seen = tokens()
    pruner = registry.load("pruners", "visionselector")
    pruner.build(seen)
    let = pruner.relax(seen, Keep(5), 1.0, noise(seen)).let
    torch.testing.assert_close(let, seen.valid * (5 / seen.counts[:, None]), rtol=1e-4, atol=1e-5)


def test_the_relaxation_of_visionselector_is_its_formula() -> None:
    """alpha by bisection in plain numbers, tokens scaled towards the mean, BCE against the hard top-K, one token at a time."""
    seen = tokens()
    pruner = made("visionselector", seen)
    out = pruner.relax(seen, Keep(5), 1.0, noise(seen))
    apart = []
    for row in range(3):
        live = seen.valid[row].nonzero()[:, 0]
        scores = pruner.score(seen)[row, live].tolist()
        alpha, hard = bisected(scores, 5), best(scores, 5)
        torch.testing.assert_close(out.let[row, live], torch.tensor(alpha), rtol=1e-3, atol=1e-5)
        losses = [-math.log(a if i in hard else 1 - a) for i, a in enumerate(alpha)]
        apart.append(sum(losses) / len(losses))
        scaled = pruner.mean + torch.tensor(alpha)[:, None] * (seen.features[row, live] - pruner.mean)
        torch.testing.assert_close(out.features[row, live], scaled, rtol=1e-3, atol=1e-3)
    assert out.features.requires_grad and not out.let.requires_grad
    assert float(out.penalty.detach()) == pytest.approx(sum(apart) / 3, rel=1e-3)
    torch.testing.assert_close(out.kept, torch.full((3,), 5.0), rtol=0, atol=1e-3)


def test_the_penalty_of_visionselector_grows_twentyfold_and_is_counted_once(vlm: Any) -> None:
    trainer = ScorerTrainer(LocalContext("run"), vlm, Recipe(**SMALL), made("visionselector(agreement=4.0)", tokens()), 0)
    pruner: Any = trainer.pruner
    assert [pruner.weight(Progress(step, 5)) for step in range(5)] == pytest.approx([0.2, 1.15, 2.1, 3.05, 4.0])
    released: Any = registry.load("pruners", "visionselector")
    assert [released.weight(Progress(step, 5)) for step in (0, 4)] == pytest.approx([0.1, 2.0])
    batch = next(training.batches(vlm, "world", seed=0, images=2, questions=2))
    run = trainer.run(batch, batch.num_labels)
    loss = pruner.objective(run, batch, Keep(9), Progress(2, 5), trainer.noise(batch, 2))
    seen, image = run.tokens(batch)
    relaxed = pruner.relax(seen, Keep(9), 1.0, trainer.noise(batch, 2))
    nll = run.answer_nll(batch, seen, relaxed, image)
    torch.testing.assert_close(loss.terms["penalty"], 2.1 * relaxed.penalty)
    torch.testing.assert_close(loss.total, nll / batch.num_labels + 2.1 * relaxed.penalty, rtol=1e-4, atol=1e-5)


def test_the_relaxation_of_learnpruner_is_its_formula() -> None:
    """Forward 0 or 1 by the larger logit once an image's are shifted to the budget; backward the softmax, by differences."""
    seen = tokens()
    pruner = made("learnpruner", seen)
    logits, weight = pruner.logits(seen).detach().double(), torch.randn(3, 20).double()
    asked = logits.float().requires_grad_()
    pruner.logits = lambda _: asked
    out = pruner.relax(seen, Keep(5), 1.0, noise(seen))
    (out.retention * weight.float()).sum().backward()
    assert out.features is seen.features and out.penalty == 0 and torch.equal(out.retention.detach(), out.let)

    def softmax(changed: torch.Tensor, row: int) -> float:
        live = seen.valid[row].nonzero()[:, 0]
        soft = bisected((changed[row, live, 0] - changed[row, live, 1]).tolist(), 5)
        return sum(a * w for a, w in zip(soft, weight[row, live].tolist(), strict=True))

    for row in range(3):
        live = seen.valid[row].nonzero()[:, 0]
        margin = (logits[row, live, 0] - logits[row, live, 1]).tolist()
        assert set(out.let[row, live].nonzero()[:, 0].tolist()) == best(margin, 5) and int(out.let[row].sum()) == 5
    for row, token, which in ((0, 3, 0), (1, 17, 1), (2, 9, 0)):
        step = torch.zeros_like(logits)
        step[row, token, which] = 1e-4
        slope = (softmax(logits + step, row) - softmax(logits - step, row)) / 2e-4
        assert asked.grad is not None and float(asked.grad[row, token, which]) == pytest.approx(slope, rel=1e-2, abs=1e-4)


@pytest.mark.parametrize(
    ("diversity", "budget", "unlike"),
    [(0.1, Keep(10), [1, 1, 1]), (0.1, Share(0.5), [1, 1, 1]), (0.1, Keep(18), [0, 2, 2]), (0.9, Keep(4), [3, 3, 3])],
    ids=str,
)
def test_diversity_tokens_one_by_one(diversity: float, budget: Any, unlike: list[int]) -> None:
    seen = tokens()
    pruner = made(f"learnpruner(diversity={diversity})", seen)
    keep, scores = pruner.select(seen, Cut(ENCODED, budget)).keep, pruner.score(seen).detach()
    for row in range(3):
        live = seen.valid[row].nonzero()[:, 0].tolist()
        count = budget.count(len(live))
        chosen = sorted(live, key=lambda i: (-float(scores[row, i]), i))[: count - unlike[row]]
        while len(chosen) < count:
            largest = {
                i: max(float(torch.cosine_similarity(seen.features[row, i], seen.features[row, j], dim=0)) for j in chosen)
                for i in live
                if i not in chosen
            }
            chosen.append(min(largest, key=lambda i: (largest[i], i)))
        assert keep[row].nonzero()[:, 0].tolist() == sorted(chosen)
    assert not torch.equal(keep, made("learnpruner(diversity=0.0)", seen).select(seen, Cut(ENCODED, budget)).keep)


def test_small_images_and_shares_get_all_the_diversity_tokens_they_are_due() -> None:
    torch.manual_seed(5)
    seen = VisualTokens(torch.randn(20, 20, 48), torch.arange(20) <= torch.arange(20)[:, None])
    for share in (0.05, 0.1, 0.33, 0.5, 0.9):
        for diversity in (0.1, 0.4, 0.9):
            keep = made(f"learnpruner(diversity={diversity})", seen).select(seen, Cut(ENCODED, Share(share))).keep
            assert keep.sum(1).tolist() == [Share(share).count(num) for num in range(1, 21)] and not (keep & ~seen.valid).any()


def test_a_threshold_takes_no_diversity_tokens() -> None:
    seen = tokens()
    first, second = (made(f"learnpruner(diversity={d})", seen).select(seen, Cut(ENCODED, Above(0.5))).keep for d in (0.0, 0.5))
    assert torch.equal(first, second)


def test_training_learnpruner_sees_what_removing_its_tokens_gives(vlm: Any) -> None:
    """Oracle: the model's loss with the tokens removed that `select` removes."""
    trainer = ScorerTrainer(LocalContext("run"), vlm, Recipe(**SMALL), made("learnpruner(diversity=0.0)", tokens()), 0)
    pruner: Any = trainer.pruner
    batch = training.validation(vlm, "world", images=2, questions=2)
    run = trainer.run(batch, batch.num_labels)
    seen, image = run.tokens(batch)
    with torch.no_grad():
        relaxed = pruner.relax(seen, Keep(30), 1.0, trainer.noise(batch, 0))
        assert torch.equal(relaxed.let > 0, pruner.select(seen, Cut(ENCODED, Keep(30))).keep)
        with trainer.attention():
            soft = run.answer_nll(batch, seen, relaxed, image)
        hard = answer_nll(vlm, pruning.shrink(vlm, batch.prompts, seen[image], pruner, Keep(30)))
    torch.testing.assert_close(soft, hard, rtol=1e-4, atol=1e-4)


def test_visionselector_with_large_scores_is_its_selection() -> None:
    seen = tokens()
    pruner = made("visionselector", seen, spread=30.0)
    out, keep = pruner.relax(seen, Keep(6), 1.0, noise(seen)), pruner.select(seen, Cut(ENCODED, Keep(6))).keep
    torch.testing.assert_close(out.let, keep.float(), rtol=0, atol=1e-3)
    torch.testing.assert_close(out.features[keep], seen.features[keep], rtol=1e-3, atol=1e-3)
    gone = seen.valid & ~keep
    torch.testing.assert_close(out.features[gone], pruner.mean.expand(int(gone.sum()), -1), rtol=1e-2, atol=1e-2)
    assert float(out.penalty.detach()) < 1e-3


@pytest.mark.parametrize("name", NAMES)
def test_a_full_budget_lets_everything_through_with_finite_gradients(name: str) -> None:
    seen = tokens()
    pruner = made(name, seen)
    out = pruner.relax(seen, Keep(20), 1.0, noise(seen))
    (out.features.sum() + out.penalty + (0 if out.retention is None else out.retention.sum())).backward()
    torch.testing.assert_close(out.let, seen.valid.float(), rtol=0, atol=1e-3)
    assert all(p.grad is None or p.grad.isfinite().all() for p in pruner.networks.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_padding_and_the_split_of_a_batch_change_nothing(name: str) -> None:
    seen = tokens()
    pruner = made(name, seen)
    loud = replace(seen, features=seen.features.where(seen.valid[..., None], 1e3))
    whole = pruner.relax(loud, Share(0.3), 1.0, noise(seen))
    alone = [pruner.relax(seen[torch.tensor([i])], Share(0.3), 1.0, Noise(0, rows=[i])) for i in range(3)]
    torch.testing.assert_close(whole.let, torch.cat([one.let for one in alone]), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.as_tensor(whole.penalty), sum(torch.as_tensor(one.penalty) for one in alone) / 3)


@pytest.mark.parametrize("name", NAMES)
def test_a_few_steps_train_the_scorer_and_its_folder_selects_alike(name: str, vlm: Any) -> None:
    (folder,) = loop.train(Recipe(**SMALL, pruners=(name,)), LocalContext("run"), lambda _: vlm)
    (rows,) = read_steps(Path("run")).values()
    assert [row.kept for row in rows] == pytest.approx([36.0] * 3, abs=0.1), "a quarter of 144 tokens"
    assert all(row.grad_norm > 0 and math.isfinite(row.loss) for row in rows) and math.isfinite(rows[-1].validation_hard)
    assert all((row.penalty > 0) == (name == "visionselector") for row in rows)
    pruner, seen = from_pretrained(folder), vlm.encode(training.validation(vlm, "world", images=3, questions=1).pixels)
    pruner.save_pretrained("again")  # type: ignore[attr-defined]
    again = registry.load("pruners", f"{name}(weights='again')")
    keep = [method.select(seen, Cut(ENCODED, Keep(9))).keep for method in (pruner, again)]
    assert torch.equal(*keep) and keep[0].sum(1).tolist() == [9, 9, 9]
    assert pruner.weights_sha256 == again.weights_sha256 != "" and pruner.trained_on is not None
    with pytest.raises(ValueError, match="belong to"):
        registry.load("pruners", f"diffprune(weights='{folder}')")


@pytest.mark.parametrize("name", NAMES)
def test_what_an_estimate_asks_of_a_scorer(name: str) -> None:
    method = registry.load("pruners", name)
    networks = method.outline(1024)
    assert scorer_bytes(networks, 576) > 0 and scorer_flops(networks, 576) == 3 * networks["scorer"].flops(576) > 0
    assert method.temperature(Progress(0, 10), Annealing(2.0, 0.1, 0.9)) == 1.0


@pytest.mark.parametrize("num", [18, 40])
@pytest.mark.parametrize("name", [*NAMES, "ocvtp", "dynamic_llava", "atp", "diffprune(attention=True)"])
def test_the_work_of_a_scorer_is_what_torch_counts(name: str, num: int) -> None:
    """Of one image, forward: a slot for nine tokens, and the thresholds of every cut."""
    net: Any = registry.load("pruners", name).outline(48)["scorer"].to_empty(device="cpu")
    z, valid = torch.randn(1, num, 48), torch.ones(1, num, dtype=torch.bool)
    slots = torch.randn(1, num // 9, 24), torch.ones(1, num // 9, dtype=torch.bool)
    given: Any = {"ocvtp": [(z, valid, *slots)], "atp": [(torch.randn(1, 3), cut) for cut in range(3)]}
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        for told in given.get(name, [(z, valid)]):
            net(*told)
    assert net.flops(num) == counter.get_total_flops() > 0


@pytest.mark.parametrize(
    "spelling", ["learnpruner(diversity=1.0)", "learnpruner(diversity=-0.1)", "visionselector(agreement=-1.0)"]
)
def test_options_out_of_range_are_refused(spelling: str) -> None:
    with pytest.raises(ValueError, match=spelling.partition("(")[0]):
        registry.load("pruners", spelling)
