"""What plug-ins say of themselves, and the grammar of budgets and plug-ins."""

from __future__ import annotations

import gc
import math
from typing import Any

import pytest
import torch

from diffprune.core import garbage, registry
from diffprune.core.budget import Above, Budget, Keep, Share, parse, standardise, top
from diffprune.core.pruner import Kind, ScorePruner
from diffprune.core.tokens import VisualTokens
from tests.contracts import made, spellings, tokens


def test_a_plug_in_says_of_itself_what_tables_need() -> None:
    found = {name: made(spelled[0]) for name, spelled in spellings().items()}
    assert found["diffprune"].label == "DiffPrune" and found["diffprune"].kind is Kind.TRAINED
    assert {name for name, pruner in found.items() if pruner.kind is Kind.BOUND} == {"unpruned"}
    assert found["random"].kind is Kind.CONTROL and found["random"].replicate_options == {"seed"}
    assert not found["diffprune"].reads_question and registry.load("pruners", "diffprune(question_aware=True)").reads_question


def test_the_label_of_a_plug_in_is_its_file_name_unless_it_says_another() -> None:
    class Fresh(ScorePruner):
        def score(self, tokens: VisualTokens) -> torch.Tensor:
            return tokens.features.norm(dim=-1)

    assert Fresh.label == "test_core" and Fresh.kind is Kind.RULE and not Fresh().reads_question


def test_a_wrapper_never_loses_its_inner_method() -> None:
    inner, outer = (
        registry.load("pruners", text) for text in ("diffprune(question_aware=True)", "replaced(diffprune(question_aware=True))")
    )
    assert outer.kind is Kind.DIAGNOSTIC and outer.label == "DiffPrune, replaced"
    for name in ("reference", "needs", "reads_question", "option_labels"):
        assert getattr(outer, name) == getattr(inner, name), name


# --- budgets ----------------------------------------------------------------------------------------------------------


def test_top_equals_a_sort_with_ties_to_the_earlier() -> None:
    scores = torch.tensor([[1.0, 3.0, 3.0, 3.0, 2.0], [0.0, 0.0, 0.0, 0.0, 9.0]])
    valid = torch.tensor([[True, True, True, True, True], [True, True, True, True, False]])
    assert top(scores, valid, torch.tensor([2, 2])).int().tolist() == [[0, 1, 1, 0, 0], [1, 1, 0, 0, 0]]


@pytest.mark.parametrize("levels", [3, 1000])
def test_top_equals_a_stable_sort(levels: int) -> None:
    chance = torch.Generator().manual_seed(levels)
    scores, valid = torch.randint(levels, (50, 30), generator=chance).float(), torch.rand(50, 30, generator=chance) > 0.3
    count = torch.minimum(torch.randint(0, 25, (50,), generator=chance), valid.sum(1))
    for row, keep in enumerate(top(scores, valid, count)):
        order = sorted(valid[row].nonzero()[:, 0].tolist(), key=lambda i: (-float(scores[row, i]), i))
        assert set(keep.nonzero()[:, 0].tolist()) == set(order[: int(count[row])])


def test_thresholds_do_not_care_for_shift_or_scale_of_scores() -> None:
    seen = tokens()
    scores = torch.randn(3, 20, generator=torch.Generator().manual_seed(1))
    keep = Above(0.3).pick(scores, seen.valid)
    assert torch.equal(Above(0.3).pick(5 * scores - 40, seen.valid), keep)
    for row, valid in zip(scores, seen.valid, strict=True):
        values = row[valid].double()
        by_hand = (values - values.mean()) / values.std(unbiased=False)
        assert torch.allclose(standardise(row[None], valid[None])[0][valid].double(), by_hand, atol=1e-5)


def test_guards_of_a_threshold() -> None:
    valid, scores = torch.ones(1, 20, dtype=torch.bool), torch.arange(20.0)[None]
    assert Above(99.0, least=4).pick(scores, valid).sum() == 4
    assert Above(-99.0, most=6).pick(scores, valid).sum() == 6
    assert Above(0.0).pick(torch.zeros(1, 20), valid).sum() == 1, "equal scores: nothing lies above the mean"


@pytest.mark.parametrize(
    ("text", "budget"),
    [
        ("Keep(64)", Keep(64)), ("64", Keep(64)), ("Share(1/9)", Share(1 / 9)), ("1/9", Share(1 / 9)), ("22%", Share(0.22)),
        ("0.5", Share(0.5)), ("Above(0.5, least=4)", Above(0.5, least=4)), ("Above(-1, most=9)", Above(-1, most=9)),
    ],
)  # fmt: skip
def test_spellings_of_budgets(text: str, budget: Budget) -> None:
    assert parse(text) == budget


@pytest.mark.parametrize(
    "text",
    ["0", "-3", "Keep(0)", "Keep(1.5)", "Keep(True)", "0.0", "101%", "1/0", "Share(1/0)", "Share(True)",
        "Share(0)", "Share(2)", "Share('x')",
     "Above(float('nan'))",
     "Above(0, least=0)", "Above(0, least=5, most=2)", "Above('a')", "many", "Keep(many)", "Keep(1, 2)", "Hold(3)", ""],
)  # fmt: skip
def test_budgets_out_of_range_are_refused_in_one_sentence(text: str) -> None:
    with pytest.raises(ValueError) as refused:
        parse(text)
    assert str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("Above(0.5, least=2.5)", "least is a number of tokens, a whole one"),
        ("Above(0.5, most=2.7)", "most is a number of tokens, a whole one"),
        ("Above(0.5, least=True)", "as in Above(0.5, least=4)"),
        ("Above(0.5, least='x')", "as in Above(0.5, least=4)"),
        ("Above(1e400)", "a number of standard deviations, as in Above(0.5)"),
        ("Above(0.5, leest=2)", "Above has no option 'leest': did you mean 'least'?, as in Above(0.5)"),
        ("Above(0.5, threshold=1)", "Above is given 'threshold' twice"),
        (f"Keep({10**30})", "at most 1,000,000,000"),
        (f"{10**30}", "at most 1,000,000,000"),
        ("Keep(10**30)", "is not a plain value: write Keep(64)"),
        ("Keep()", "Keep lacks its num: write Keep(64)"),
        ("Keep(4, 5)", "Keep takes 1 value at most, not 2: write Keep(64)"),
    ],
)  # fmt: skip
def test_a_refused_budget_says_what_would_be_right(text: str, says: str) -> None:
    with pytest.raises(ValueError) as refused:
        parse(text)
    assert says in str(refused.value) and "__init__" not in str(refused.value)


@pytest.mark.parametrize(
    ("threshold", "guards"), [(0.5, {"least": 2.5}), (0.5, {"most": 2.7}), (0.5, {"least": True}), (math.inf, {}), (-math.inf, {})]
)
def test_guards_of_a_threshold_are_counts_and_a_threshold_is_finite(threshold: float, guards: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"Above\("):
        Above(threshold, **guards)
    with pytest.raises(ValueError, match="at most 1,000,000,000"):
        Keep(10**30)


@pytest.mark.parametrize("budget", [Keep(7), Share(1 / 9), Share(0.5), Share(1.0)], ids=str)
def test_counts_are_the_count_of_each_image(budget: Budget) -> None:
    totals = list(range(25))
    assert budget.counts(torch.tensor(totals)).tolist() == [budget.count(n) for n in totals]


def test_nan_is_refused() -> None:
    with pytest.raises(ValueError, match="threshold"):
        Above(math.nan)


@pytest.mark.parametrize("budget", [Keep(64), Share(0.25), Above(0.5, least=2, most=9), Above(-0.25), Above(1 / 3)], ids=str)
def test_a_budget_prints_as_it_is_spelled(budget: Budget) -> None:
    assert parse(str(budget)) == budget


# --- plug-ins ---------------------------------------------------------------------------------------------------------


def test_near_misses_are_named() -> None:
    with pytest.raises(ValueError, match="did you mean 'attention'"):
        registry.load("pruners", "atention")
    with pytest.raises(ValueError, match="did you mean 'seed'"):
        registry.load("pruners", "random(sed=1)")
    with pytest.raises(ValueError, match="it takes none"):
        registry.load("pruners", "grid(x=1)")


def test_spelling_is_canonical_and_nothing_is_evaluated() -> None:
    assert str(registry.load("pruners", "random(seed=0)").spec) == "random"
    assert str(registry.load("pruners", " random( 3 )").spec) == "random(seed=3)"
    with pytest.raises(ValueError, match="not a plain value"):
        registry.load("pruners", "random(seed=6 * 7)")
    assert str(registry.load("pruners", "replaced(random(3))").spec) == "replaced(method=random(seed=3))"


def test_garbage_is_looked_for_as_before_when_a_sweep_has_failed() -> None:
    before = gc.get_threshold()
    with pytest.raises(KeyError), garbage.looked_for_seldom():
        assert gc.get_threshold() == garbage.SELDOM and gc.get_freeze_count() > 0
        raise KeyError
    assert gc.get_threshold() == before
