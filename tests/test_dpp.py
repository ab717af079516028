"""Tokens chosen by score and unlike each other: the definition token by token, its two ends, and jobs that ask for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from records import evaluate_cell, prediction, provenance

from diffprune.core import registry
from diffprune.core.budget import Above, Keep, Share
from diffprune.core.cell import describe, weights
from diffprune.core.pruner import Kind, ScorePruner
from diffprune.core.site import ENCODED, Cut
from diffprune.core.spec import Spec
from diffprune.core.tokens import VisualTokens
from diffprune.evaluate.cells import Evaluation
from diffprune.job.job import Job
from diffprune.job.plan import Plan
from diffprune.pruners.dpp import DPP
from diffprune.report import read
from diffprune.store import Store
from diffprune.timing.options import Measurement
from diffprune.train.context import LocalContext
from diffprune.train.loop import train
from diffprune.train.recipe import Recipe
from diffprune.tune.options import Tuning
from diffprune.vlm.load import load

BUDGETS = (Keep(1), Keep(3), Keep(9), Share(0.3), Share(0.6), Share(1.0))


class Column(ScorePruner):
    """Scores are the first channel, which is no part of what is compared."""

    label = "Column"

    def score(self, tokens: VisualTokens) -> torch.Tensor:
        return tokens.features[..., 0]


def tokens(width: int = 24) -> VisualTokens:
    torch.manual_seed(0)
    valid = torch.ones(4, 16, dtype=torch.bool)
    valid[0, 12:], valid[1, :3], valid[2, 1:] = False, False, False
    return VisualTokens(torch.randn(4, 16, width), valid)


def one_by_one(x: torch.Tensor, scores: torch.Tensor, count: int, weight: float) -> list[int]:
    """Of one image without padding: each token makes the determinant of the chosen ones' kernel as large as any other could."""
    unit = torch.nn.functional.normalize(x.double(), dim=1)
    s = scores.double()
    share = (weight * (s - s.mean()) / (s.std(correction=0) if len(s) > 1 else 1.0)).exp()
    kernel = share[:, None] * (unit @ unit.T) * share[None]
    kept: list[int] = []
    for _ in range(count):
        volume = {i: torch.linalg.det(kernel[[*kept, i]][:, [*kept, i]]).item() for i in range(len(x)) if i not in kept}
        kept.append(max(volume, key=lambda i: volume[i]))
    return kept


@pytest.mark.parametrize("weight", [0.25, 0.5, 2.0])
def test_the_choice_is_its_definition(weight: float) -> None:
    seen, pruner = tokens(), DPP(Column(), weight)
    other = 0
    for budget in BUDGETS:
        keep = pruner.select(seen, Cut(ENCODED, budget)).keep
        assert not (keep & ~seen.valid).any()
        other += int((keep != Column().select(seen, Cut(ENCODED, budget)).keep).sum())
        for row in range(4):
            x = seen.features[row, seen.valid[row]]
            wanted = one_by_one(x, x[:, 0], budget.count(len(x)), weight)
            assert set(keep[row, seen.valid[row]].nonzero()[:, 0].tolist()) == set(wanted), f"{budget}, image {row}"
    assert other > 0, "something else is kept than by score alone"


def test_without_weight_it_is_the_unconditional_process_of_cdpruner() -> None:
    seen = tokens()
    plain = registry.load("pruners", "cdpruner(question=False)")
    for budget in BUDGETS:
        cut = Cut(ENCODED, budget)
        assert torch.equal(DPP(Column(), 0.0).select(seen, cut).keep, plain.select(seen, cut).keep)


def test_of_tokens_that_have_nothing_in_common_it_keeps_the_best() -> None:
    features = torch.eye(16)[None].repeat(2, 1, 1)
    order = torch.stack([torch.randperm(16, generator=torch.Generator().manual_seed(i)) for i in range(2)]).float()

    class Given(ScorePruner):
        """x"""

        def score(self, tokens: VisualTokens) -> torch.Tensor:
            return order

    seen = VisualTokens(features, torch.ones(2, 16, dtype=torch.bool))
    for budget in BUDGETS:
        cut = Cut(ENCODED, budget)
        assert torch.equal(DPP(Given(), 0.5).select(seen, cut).keep, Given().select(seen, cut).keep)


def test_of_two_duplicates_one_is_kept_however_good_they_are() -> None:
    features = torch.randn(1, 16, 24, generator=torch.Generator().manual_seed(3))
    features[:, :, 0] = 0.0
    features[0, 4] = features[0, 9]
    features[0, [4, 9], 0] = 5.0
    features[0, 7, 0] = 4.0
    seen, cut = VisualTokens(features, torch.ones(1, 16, dtype=torch.bool)), Cut(ENCODED, Keep(2))
    assert Column().select(seen, cut).keep[0].nonzero()[:, 0].tolist() == [4, 9]
    assert DPP(Column(), 0.5).select(seen, cut).keep[0].nonzero()[:, 0].tolist() == [4, 7]


@pytest.mark.parametrize("weight", [0.5, 2.0, 8.0])
@pytest.mark.parametrize("num", [144, 2880])
def test_scores_that_stand_out_far_do_not_overflow(weight: float, num: int) -> None:
    chance = torch.Generator().manual_seed(5)
    features = torch.randn(1, num, 96, generator=chance)
    features[..., 0] = 1e-3 * torch.rand(1, num, generator=chance)
    features[0, [7, 50, 90], 0] = torch.tensor([1.0, 0.9, 0.8])
    seen = VisualTokens(features, torch.ones(1, num, dtype=torch.bool))
    keep = DPP(Column(), weight).select(seen, Cut(ENCODED, Keep(12))).keep
    best = Column().select(seen, Cut(ENCODED, Keep(3))).keep
    assert best[0].nonzero()[:, 0].tolist() == [7, 50, 90] and (keep & best).sum() == 3
    scores = (
        weight * (features[0, :, 0].double() - features[0, :, 0].double().mean()) / features[0, :, 0].double().std(correction=0)
    )
    unit = torch.nn.functional.normalize(features[0].double(), dim=1)
    kept: list[int] = []  # by logarithms of determinants of the unit kernel, which no weight can overflow
    for _ in range(12):
        gain = {}
        for i in range(num) if num == 144 else {*range(0, num, 5), *keep[0].nonzero()[:, 0].tolist()}:
            if i not in kept:
                chosen = unit[[*kept, i]]
                gain[i] = torch.linalg.slogdet(chosen @ chosen.T).logabsdet.item() + 2 * scores[[*kept, i]].sum().item()
        kept.append(max(gain, key=lambda i: gain[i]))
    assert {*kept} == {*keep[0].nonzero()[:, 0].tolist()}


def test_where_more_is_asked_than_tokens_span_the_best_by_score_follow() -> None:
    features = torch.randn(1, 12, 4, generator=torch.Generator().manual_seed(1))
    keep = DPP(Column(), 1.0).select(VisualTokens(features, torch.ones(1, 12, dtype=torch.bool)), Cut(ENCODED, Keep(7))).keep
    wanted = one_by_one(features[0], features[0, :, 0], 4, 1.0)
    left = [i for i in range(12) if i not in wanted]
    wanted += sorted(left, key=lambda i: -features[0, i, 0].item())[:3]
    assert sorted(wanted[4:]) != left[:3], "nor the earlier, as without scores"
    assert keep[0].nonzero()[:, 0].tolist() == sorted(wanted)


@pytest.mark.parametrize("text", ["dpp(diffprune, weight=-0.1)", "dpp(diffprune, weight=9.0)", "dpp(diffprune, weight=True)"])
def test_a_weight_that_cannot_be_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="lies from 0 to 8"):
        registry.load("pruners", text)


def test_a_method_that_does_not_rank_and_a_budget_that_is_no_count_are_refused() -> None:
    with pytest.raises(ValueError, match=r"dpp weighs diversity by scores, but ToMe .* does not rank tokens by a score"):
        registry.load("pruners", "dpp(tome)")
    with pytest.raises(ValueError, match="needs a count"):
        DPP(Column()).select(tokens(), Cut(ENCODED, Above(0.5)))


def test_it_is_what_it_wraps_trained_or_a_rule() -> None:
    about = describe(registry.load("pruners", "dpp(attention)"))
    assert (about.label, about.base, about.kind) == ("DPP of Attention", "DPP of Attention", Kind.RULE)
    about = describe(registry.load("pruners", "dpp(learnpruner, weight=1.0)"))
    assert about.label == "DPP (weight 1.0) of LearnPruner (stage 1)" and about.kind == Kind.TRAINED
    assert describe(registry.load("pruners", "dpp(fastv)")).reads_question


# --- jobs ------------------------------------------------------------------------------------------------------------


def job(**changed: Any) -> Job:
    recipe = Recipe(
        pruners=("diffprune", "learnpruner"), seeds=(0, 1), steps=1, images=1, questions=1, calibration_images=2, validate_every=0,
        grad_cosine_every=0, workers=1, budgets=("Keep(16)",),
    )  # fmt: skip
    told = {
        "name": "x", "train": recipe, "wrapped": ("dpp(diffprune)", "dpp(learnpruner, weight=1.0)"), "baselines": ("unpruned",),
        "evaluate": Evaluation(benchmarks=("world('gqa')",), limit=4), "measure": Measurement(),
        "tune": Tuning(targets=(1.5,)), "budgets": ("Keep(16)", "Keep(7)"),
    }  # fmt: skip
    return Job(**(told | changed))


def test_every_seed_of_a_scorer_is_asked_in_its_wrapper_trained_or_not_yet(tmp_path: Path) -> None:
    vlm = load("embedded")
    before = Plan(job(), tmp_path, vlm)
    waiting = [cell for cell in before.cells("evaluate") if cell.method.base.startswith("DPP")]
    assert len(waiting) == len({cell.key for cell in waiting}) == 2 * 2 * 2, "methods, seeds and budgets"
    before.try_methods(["evaluate"])
    recipe = job().train
    assert recipe is not None
    places = train(recipe, LocalContext(tmp_path), lambda *_, **__: vlm)
    plan = Plan(job(), tmp_path, vlm)
    found = [cell for cell in plan.cells("evaluate") if cell.method.base.startswith("DPP")]
    assert len(found) == 8 and not {cell.key for cell in found} & {cell.key for cell in waiting}
    assert {cell.method.scorer_seed for cell in found} == {0, 1}
    plain = {weights(cell.pruner) for cell in plan.cells("evaluate") if cell.method.base == "DiffPrune" and cell.pruner}
    assert plain == {weights(cell.pruner) for cell in found if "DiffPrune" in cell.method.label and cell.pruner}
    assert {cell.method.recipe for cell in found} == {recipe.key(spec) for spec in recipe.pruners}
    timed = {cell.method.label for cell in plan.cells("measure")}
    assert {"DPP of DiffPrune", "DiffPrune"} <= timed and len(places) == 4
    only = Plan(job(tuned=("dpp(diffprune)",)), tmp_path, vlm)
    assert {cell.method.label for cell in only.cells("tune")} == {"DPP of DiffPrune"}
    chosen = Plan(job(subject="dpp(diffprune)"), tmp_path, vlm)
    assert chosen.subject == "DPP of DiffPrune"
    also = Plan(job(replaced=("dpp(diffprune)",)), tmp_path, vlm).cells("evaluate")
    assert {cell.method.label for cell in also if cell.method.kind == Kind.DIAGNOSTIC} == {"DPP of DiffPrune"}


def test_beside_its_diagnostic_it_has_its_own_name(tmp_path: Path) -> None:
    for asked in ("dpp(attention)", "replaced(dpp(attention))", "replaced(pore(attention))", "unpruned"):
        cell = evaluate_cell(asked, budget="Keep(16)")
        Store(tmp_path).publish({"predictions": [prediction(i) for i in range(4)]}, cell=cell, provenance=provenance())
    assert {*read(tmp_path).cells["label"]} == {"DPP of Attention", "PoRe of Attention", "Unpruned"}


def test_wrappers_that_cannot_be_asked_are_refused() -> None:
    with pytest.raises(ValueError, match=r"wrapped names 'dpp\(method=attention\)', which wraps no method of train.pruners"):
        job(wrapped=("dpp(attention)",))
    with pytest.raises(ValueError, match=r"wraps no method of train.pruners \(none\): make it a baseline, or leave it out"):
        job(train=None, wrapped=("dpp(diffprune)",))
    with pytest.raises(ValueError, match=r"'pore\(method=attention\)', which learns something itself: put it into train.pruners"):
        recipe = job().train
        assert recipe is not None
        job(train=recipe.model_copy(update={"pruners": (Spec("attention"),)}), wrapped=("pore(attention)",))


def test_scorers_in_different_places_are_two_inside_a_wrapper_as_well() -> None:
    two = tuple(f"replaced(dpp(diffprune(weights='{place}')))" for place in "ab")
    found = job(train=None, wrapped=(), baselines=two)
    assert [spec.all_places for spec in found.baselines] == [(("weights", "a"),), (("weights", "b"),)]
    with pytest.raises(ValueError, match="is named twice"):
        job(train=None, wrapped=(), baselines=(two[0], two[0].replace("'", '"')))


def test_a_spec_is_wrapped_around_another_as_deep_as_it_lies() -> None:
    deep, inner = registry.spec("pruners", "replaced(dpp(diffprune, weight=1.0))"), registry.spec("pruners", "diffprune")
    other = registry.spec("pruners", "diffprune(depth=2)")
    assert deep.wraps(inner) and not deep.wraps(other) and not inner.wraps(inner)
    assert str(deep.around(inner, other)) == "replaced(method=dpp(method=diffprune(depth=2), weight=1.0))"
    assert deep.around(other, inner) == deep
    placed = deep.around(inner, inner.at(weights="here"))
    assert placed == deep and str(placed.without_places()) == str(deep)
