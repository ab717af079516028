"""Contracts every pruner keeps, parametrised over the file names, and the grammar of budgets and plug-ins."""

from __future__ import annotations

import inspect
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from diffprune.core import registry
from diffprune.core.budget import Above, Budget, Keep, Share, parse, standardise, top
from diffprune.core.evidence import (
    IDENTITY,
    QUESTION,
    Evidence,
    Question,
    decoder_attention,
    decoder_features,
    decoder_keys,
    encoder_attention,
    encoder_keys,
)
from diffprune.core.fitted import Artifact, FittedPruner, TrainablePruner
from diffprune.core.pruner import Kind, Pruner, Reference, ScorePruner
from diffprune.core.site import ENCODED, PROJECTED, Cut, Site
from diffprune.core.tokens import Selection, VisualTokens
from diffprune.core.vlm import Shape
from diffprune.pruning import merged

PRUNERS = registry.names("pruners")
WRAPPERS = {"replaced", "pore"}
KEEPS_ALL = {"unpruned", "replaced"}  # the unpruned bound, and a diagnostic that replaces instead of removing
ROWS, COLUMNS, WIDTH = 4, 5, 16
SHAPE = Shape(
    layers=4, width=32, heads=4, kv_heads=4, head_dim=8, ffn=64, vocabulary=99, vision_layers=3, vision_width=16, vision_ffn=32,
    patches=20, patch_inputs=12, visual_tokens=20,
)  # fmt: skip


def tokens(
    num_images: int = 3, seed: int = 0, dtype: torch.dtype = torch.float32, padded: bool = True, projected: bool = False
) -> VisualTokens:
    """Random images of up to 20 tokens with everything a pruner can ask for; image i lacks its last 3i tokens."""
    chance = torch.Generator().manual_seed(seed)
    num = ROWS * COLUMNS
    valid = torch.ones(num_images, num, dtype=torch.bool)
    for i in range(num_images if padded else 0):
        valid[i, num - 3 * i :] = i == 0
    return VisualTokens(
        features=torch.randn(num_images, num, 2 * WIDTH if projected else WIDTH, generator=chance).to(dtype),
        valid=valid,
        grid=(ROWS, COLUMNS),
        evidence={
            encoder_attention(): torch.rand(num_images, num, generator=chance).to(dtype),
            encoder_attention(-1, joint=True): torch.rand(num_images, num, generator=chance).to(dtype),
            encoder_keys(): torch.randn(num_images, num, 2, 8, generator=chance).to(dtype),
            encoder_keys(-1): torch.randn(num_images, num, 2, 8, generator=chance).to(dtype),
            QUESTION: Question(
                torch.randn(num_images, 6, 2 * WIDTH, generator=chance).to(dtype), torch.ones(num_images, 6, dtype=torch.bool)
            ),
            IDENTITY: torch.arange(num_images) + 100 * seed,
            **inside_decoder(num_images, num, chance, dtype),
        },
        projected=projected,
    )


def inside_decoder(
    num_images: int, num: int, chance: torch.Generator, dtype: torch.dtype
) -> dict[Evidence, torch.Tensor | Question]:
    """What cuts inside the decoder may look at."""

    def words(width: int) -> Question:
        made = torch.randn(num_images, 6, width, generator=chance).to(dtype)
        return Question(made, torch.tensor([[False] + [True] * 5] * num_images))

    return {
        **{decoder_attention(at): torch.rand(num_images, num, generator=chance).to(dtype) for at in (-1, None)},
        decoder_attention(-1, "text"): torch.rand(num_images, num, generator=chance).to(dtype),
        decoder_attention(queries="image", raw=True): torch.randn(num_images, num, generator=chance).to(dtype),
        decoder_features(): torch.randn(num_images, num, 2 * WIDTH, generator=chance).to(dtype),
        decoder_attention(-1, "each"): torch.rand(num_images, num, 6, generator=chance).to(dtype),
        decoder_keys(): torch.randn(num_images, num, 8, generator=chance).to(dtype),
        **{decoder_features(i): torch.randn(num_images, num, 2 * WIDTH, generator=chance).to(dtype) for i in range(SHAPE.layers)},
        decoder_attention(raw=True): torch.randn(num_images, num, generator=chance).to(dtype),
        decoder_keys(-1, "text"): words(8),
        decoder_features(None, "text"): words(2 * WIDTH),
    }


def shown(pruner: Pruner, dtype: torch.dtype = torch.float32) -> VisualTokens:
    """The tokens as they are where a pruner cuts first."""
    return tokens(dtype=dtype, projected=site(pruner) >= PROJECTED)


def site(pruner: Pruner) -> Site:
    plan = pruner.cuts(Share(0.6), SHAPE)
    return plan[0].site if plan else ENCODED


def chosen(pruner: Pruner, seen: VisualTokens, budget: Budget) -> Selection:
    with torch.no_grad():
        return pruner.select(seen, Cut(site(pruner), budget))


def make(name: str) -> Pruner:
    """A pruner ready to select: learned ones are built untrained on other images, with a fixed seed."""
    pruner = registry.load("pruners", f"{name}(attention)" if name in WRAPPERS else name)
    if isinstance(pruner, TrainablePruner):
        torch.manual_seed(0)
        pruner.build(tokens(8, seed=7, padded=False, projected=site(pruner) >= PROJECTED)).eval()
    elif isinstance(pruner, FittedPruner):
        pruner.fit(Calibration())
    return pruner


class Calibration:
    """A run that fits on other images."""

    vlm: Any = SimpleNamespace(shape=SHAPE)
    seed = 0

    def calibration(self, pruner: Pruner, images: int) -> VisualTokens:
        return tokens(8, seed=7, projected=site(pruner) >= PROJECTED)

    def train(self, pruner: TrainablePruner) -> Artifact:
        raise AssertionError("a calibrated method takes no steps")

    def save(self, pruner: FittedPruner, **facts: Any) -> Artifact:
        return Artifact(Path(), "")


def expected(budget: Budget, valid: int) -> int:
    """The count a budget asks of an image, by the words of its docstring."""
    return min(budget.num, valid) if isinstance(budget, Keep) else max(1, math.floor(budget.share * valid + 0.5))  # type: ignore[union-attr]


@pytest.mark.parametrize("budget", [Keep(1), Keep(7), Keep(16), Share(1 / 9), Share(0.5), Share(1.0)], ids=str)
@pytest.mark.parametrize("name", sorted(set(PRUNERS) - KEEPS_ALL))
def test_budget_is_met_and_padding_never_selected(name: str, budget: Budget) -> None:
    pruner = make(name)
    seen = shown(pruner)
    keep = chosen(pruner, seen, budget).keep
    assert not (keep & ~seen.valid).any()
    for kept, num in zip(keep.sum(1).tolist(), seen.counts.tolist(), strict=True):
        asked = expected(budget, num)
        assert asked / pruner.slack <= kept <= asked * pruner.slack and 1 <= kept <= num, "exactly, or adaptive within its guards"


@pytest.mark.parametrize("name", PRUNERS)
def test_a_full_budget_changes_nothing(name: str) -> None:
    pruner = make(name)
    seen = shown(pruner)
    for budget in (Keep(20), Keep(99), Share(1.0)):
        left = chosen(pruner, seen, budget)
        assert torch.equal(left.keep, seen.valid)
        if left.mix is not None:
            after = merged(seen, left.keep, left.mix)
            assert torch.equal(after.features, seen.features) and torch.equal(after.valid, seen.valid)


@pytest.mark.parametrize("name", PRUNERS)
def test_what_merges_says_so_and_its_sums_are_of_real_tokens(name: str) -> None:
    pruner = make(name)
    seen = shown(pruner)
    left = chosen(pruner, seen, Keep(5))
    if left.mix is None:
        return
    assert left.mix.shape[1] >= int(left.keep.sum(1).max()) and torch.isfinite(left.mix).all()
    loud = replace(seen, features=seen.features.where(seen.valid[..., None], float("nan")))
    after, other = (merged(t, left.keep, left.mix).features[left.keep] for t in (seen, loud))
    assert torch.isfinite(other).all() and torch.equal(after, other), "padding is never merged"
    assert not torch.equal(after, seen.features[left.keep])


@pytest.mark.parametrize("name", PRUNERS)
def test_the_order_of_images_does_not_matter(name: str) -> None:
    pruner = make(name)
    seen, order = shown(pruner), torch.tensor([2, 0, 1])
    first, second = chosen(pruner, seen, Keep(5)), chosen(pruner, seen[order], Keep(5))
    assert torch.equal(second.keep, first.keep[order])
    if first.mix is not None and second.mix is not None:
        torch.testing.assert_close(second.mix, first.mix[order])


@pytest.mark.parametrize("name", sorted(KEEPS_ALL & set(PRUNERS)))
def test_exceptions_keep_every_living_token(name: str) -> None:
    seen = tokens()
    assert torch.equal(chosen(make(name), seen, Keep(3)).keep, seen.valid)


@pytest.mark.parametrize("name", PRUNERS)
def test_a_threshold_keeps_at_least_one_or_is_refused(name: str) -> None:
    pruner = make(name)
    seen = shown(pruner)
    if not isinstance(pruner, ScorePruner) and name not in KEEPS_ALL:
        with pytest.raises(ValueError, match="needs a count"):
            chosen(pruner, seen, Above(99.0))
        return
    for threshold in (-99.0, 0.0, 99.0):
        keep = chosen(pruner, seen, Above(threshold)).keep
        assert not (keep & ~seen.valid).any()
        assert (keep.sum(1) >= 1).all()


@pytest.mark.parametrize("name", PRUNERS)
def test_a_batch_equals_one_by_one_and_padding_changes_nothing(name: str) -> None:
    pruner = make(name)
    seen = shown(pruner)
    together = chosen(pruner, seen, Keep(5))
    for i, num in enumerate(seen.counts.tolist()):
        alone = seen[torch.tensor([i])]
        loud = replace(alone, features=alone.features.where(alone.valid[..., None], 1e3))
        for one, why in ((alone, "alone"), (loud, "with values in its padding"), (alone.padded(num), "without padding")):
            found = chosen(pruner, one, Keep(5))
            wanted = together.keep[i, : one.valid.shape[1]]
            assert torch.equal(found.keep[0], wanted), f"image {i} {why}"
            if found.mix is not None and together.mix is not None:
                torch.testing.assert_close(found.mix[0], together.mix[i, :, : one.valid.shape[1]], msg=f"image {i} {why}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", PRUNERS)
def test_dtype_device_and_survivors_are_kept(name: str, dtype: torch.dtype) -> None:
    pruner = make(name)
    seen = shown(pruner, dtype)
    before = seen.features.clone()
    left = chosen(pruner, seen, Keep(5))
    assert (left.keep.dtype, left.keep.device) == (torch.bool, before.device)
    assert torch.equal(seen.features, before), "the input was changed in place"
    if pruner.kind is Kind.DIAGNOSTIC:
        assert left.features is not None and left.features.dtype == dtype
    else:
        assert left.features is None, "features are changed by the path, from where tokens go"


@pytest.mark.parametrize("name", PRUNERS)
def test_the_same_tokens_give_the_same_answer(name: str) -> None:
    first = chosen(pruner := make(name), shown(pruner), Keep(5))
    torch.rand(3)  # the global generator must not matter
    again = chosen(pruner := make(name), shown(pruner), Keep(5))
    assert torch.equal(again.keep, first.keep)
    assert (again.mix is None and first.mix is None) or torch.equal(again.mix, first.mix)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", [name for name in PRUNERS if issubclass(registry.find("pruners", name), FittedPruner)])
def test_what_was_learnt_is_saved_and_loaded_with_equal_selections(name: str, tmp_path: Path) -> None:
    pruner = make(name)
    assert isinstance(pruner, FittedPruner)
    pruner.save_pretrained(tmp_path)
    again = registry.make("pruners", pruner.spec.at(weights=tmp_path))
    assert again.weights_sha256 == pruner.weights_sha256 != ""
    seen = shown(pruner)
    for budget in (Keep(5), Share(0.7)):
        one, other = chosen(pruner, seen, budget), chosen(again, seen, budget)
        assert torch.equal(one.keep, other.keep) and (one.mix is None) == (other.mix is None)


@pytest.mark.parametrize("name", PRUNERS)
def test_the_file_is_the_registration(name: str) -> None:
    pruner = make(name)
    assert isinstance(pruner, Pruner) and pruner.spec.name == name
    assert inspect.getdoc(type(pruner)), "tables and --help print the first line"
    assert all(isinstance(evidence, Evidence) for evidence in pruner.needs)
    assert pruner.label and isinstance(pruner.kind, Kind) and isinstance(pruner.reference, Reference)
    assert {*pruner.option_labels, *pruner.replicate_options} <= set(inspect.signature(type(pruner)).parameters)


def test_a_plug_in_says_of_itself_what_tables_need() -> None:
    found = {name: make(name) for name in PRUNERS}
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


@pytest.mark.parametrize("budget", [Keep(7), Share(1 / 9), Share(0.5), Share(1.0)], ids=str)
def test_counts_are_the_count_of_each_image(budget: Budget) -> None:
    totals = list(range(25))
    assert budget.counts(torch.tensor(totals)).tolist() == [budget.count(n) for n in totals]


def test_nan_is_refused() -> None:
    with pytest.raises(ValueError, match="threshold"):
        Above(math.nan)


@pytest.mark.parametrize("budget", [Keep(64), Share(0.25), Above(0.5, least=2, most=9), Above(-0.25)], ids=str)
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
