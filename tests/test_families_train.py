"""Training rows of every family: the loss of an answer is what the model says of it token by token, packed rows or not."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from diffprune import data as training
from diffprune import pruning
from diffprune.core import registry
from diffprune.core.budget import Keep, parse
from diffprune.core.site import ENCODED, Cut
from diffprune.core.tokens import Relaxation
from diffprune.core.vlm import VLM
from diffprune.data.batch import batch as batch_of
from diffprune.data.sources import Example
from diffprune.pruning.selection import applied
from diffprune.train.context import LocalContext
from diffprune.train.loss import answer_nll, relaxed_nll
from diffprune.train.recipe import Recipe
from diffprune.train.scorer_trainer import ScorerTrainer
from diffprune.vlm.attention import decoder_attention
from tests.test_families import FAMILIES, extended, pictures, tiny

ASKED = [[("what?", "red"), ("how many?", "2 of")], [("where is it?", "up")]]


def drawn() -> list[Example]:
    """Two pictures of different size, two questions about the first."""
    return [Example([picture], pairs) for picture, pairs in zip(pictures()[1:3], ASKED, strict=True)]


def stepwise(vlm: VLM) -> float:
    """Oracle: -log p of every answer token from a row of its own that ends right before it."""
    total = 0.0
    for (picture,), pairs in drawn():
        for question, answer in pairs:
            tokens = vlm.encode(vlm.pixels([picture]))
            prompts = vlm.prompts([question], tokens.present.sum(1).tolist(), tokens.layout)
            row = pruning.shrink(vlm, prompts, tokens, registry.load("pruners", "unpruned"), parse("Share(1)"))
            text = vlm.processor.tokenizer
            for token in [*text(answer, add_special_tokens=False)["input_ids"], text.eos_token_id]:
                logits = pruning.forward(vlm, row, logits_to_keep=1, use_cache=False).logits[0, -1]
                total -= float(logits.float().log_softmax(-1)[token])
                row = pruning.Packed(
                    extended(row.prompts, torch.tensor([[token]])), row.features, row.kept, row.total, row.lengths, row.deepstack
                )
    return total


@pytest.mark.parametrize("family", FAMILIES)
def test_the_loss_is_what_the_model_says_token_by_token(family: str) -> None:
    vlm = tiny(family)
    with torch.no_grad():
        wanted = stepwise(vlm)
        for packed in (False, True) if vlm.packs else (False,):
            batch = batch_of(vlm, drawn(), packed)
            tokens = vlm.encode(batch.pixels)
            nothing = Relaxation(tokens.features, tokens.counts.float())
            found = relaxed_nll(vlm, batch.prompts, tokens, nothing, batch.image)
            assert float(found) == pytest.approx(wanted, rel=1e-5), f"packed={packed}"
            assert batch.num_labels == sum(len(a) + 1 for pairs in ASKED for _, a in pairs)


def test_what_is_not_let_through_does_not_come_in_by_deepstack() -> None:
    """Inner features of a token that is drowned are drowned, too; where features are whole, and keys are weighed, they are."""
    vlm = tiny("qwen3_vl")
    with torch.no_grad():
        batch = batch_of(vlm, drawn(), False)
        tokens = vlm.encode(batch.pixels)
        assert tokens.deepstack is not None
        let = (torch.arange(tokens.valid.shape[1]) % 2).expand(tokens.valid.shape).float()
        other = replace(tokens, deepstack=tokens.deepstack + 3.0 * (1 - let)[..., None])
        noised, whole = Relaxation(tokens.features * let[..., None], let), Relaxation(tokens.features, let)
        drowned, same, seen, changed = (
            float(relaxed_nll(vlm, batch.prompts, asked, relaxed, batch.image))
            for relaxed in (noised, whole)
            for asked in (tokens, other)
        )
        through = Relaxation(tokens.features + 0.0, torch.ones_like(let))
        assert float(relaxed_nll(vlm, batch.prompts, tokens, through, batch.image)) == seen
    assert drowned == same and seen != changed


def test_the_diagnostic_replaces_deepstack_as_well() -> None:
    vlm = tiny("qwen3_vl")
    with torch.no_grad():
        tokens = vlm.encode(batch_of(vlm, drawn(), False).pixels)
        method = registry.load("pruners", "replaced(grid)")
        keep = registry.load("pruners", "grid").select(tokens, Cut(ENCODED, Keep(2))).keep
        left = applied(tokens, method.select(tokens, Cut(ENCODED, Keep(2))))
    for before, after in ((tokens.features, left.features), (tokens.deepstack, left.deepstack)):
        assert before is not None and after is not None and torch.equal(after[keep], before[keep])
        for row in range(len(keep)):
            mean = before[row, tokens.valid[row]].mean(0)
            for token in (tokens.valid & ~keep)[row].nonzero().flatten():
                torch.testing.assert_close(after[row, token], mean)


@pytest.mark.parametrize("family", [f for f in FAMILIES if registry.find("models", f).packs])  # type: ignore[attr-defined]
def test_retention_of_one_is_the_models_own_attention_and_of_zero_removal(family: str) -> None:
    vlm, rule, budget = tiny(family), registry.load("pruners", "grid"), Keep(2)
    with torch.no_grad():
        batch = batch_of(vlm, drawn(), True)
        tokens = vlm.encode(batch.pixels)
        full = torch.ones(tokens.valid.shape)
        plain = relaxed_nll(vlm, batch.prompts, tokens, Relaxation(tokens.features, full.sum(1)), batch.image)
        with decoder_attention(vlm.model, "masked_softmax"):
            found = relaxed_nll(vlm, batch.prompts, tokens, Relaxation(tokens.features, full.sum(1), full), batch.image)
        single = batch_of(vlm, drawn(), False)
        left = answer_nll(vlm, pruning.shrink(vlm, single.prompts, tokens[single.image], rule, budget))
        let = rule.select(tokens, Cut(ENCODED, budget)).keep.float()
        with decoder_attention(vlm.model, "masked_softmax"):
            hidden = relaxed_nll(vlm, single.prompts, tokens, Relaxation(tokens.features, let, let), single.image)
    assert float(found) == pytest.approx(float(plain), rel=1e-4)
    assert abs(float(hidden) - float(plain)) > 1e-3
    assert float(hidden) == pytest.approx(float(left), rel=1e-4), "separators, too, go with the last token of their row"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_scorer_trains_and_prunes(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One real step through the relaxation, the decoder and back, then a run with tokens removed."""
    vlm = tiny(family)
    source = training.SOURCES["world"]()
    monkeypatch.setattr(type(source), "draw", lambda self, index, questions, tally: drawn()[index.image % 2])
    recipe = Recipe(
        pruners=("diffprune",),
        steps=1,
        images=2,
        questions=2,
        calibration_images=4,
        validation_images=2,
        workers=1,
        validate_every=0,
    )
    arm = ScorerTrainer(LocalContext("run"), vlm, recipe, registry.load("pruners", "diffprune"), 0)
    row = arm.step(batch_of(vlm, drawn(), vlm.packs))
    assert row.grad_norm > 0 and row.loss == row.loss
    answers = pruning.generate(vlm, pictures()[:2], ["what?", "where?"], pruner=arm.pruner, budget=Keep(3), max_new_tokens=2)
    assert len(answers) == 2
