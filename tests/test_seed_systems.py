"""BTP, OC-VTP, ATP-LLaVA and PoRe on the tiny instance of every family, fitted on its own images or with random weights.

What they remove is hidden, from the layer on behind which it went, in a run of whole rows: that has the same logits.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch

import diffprune
from diffprune import data as training
from diffprune import pruning
from diffprune.core import registry
from diffprune.core.budget import Share
from diffprune.core.fitted import Artifact, FittedPruner, Progress, TrainablePruner
from diffprune.core.pruner import Pruner
from diffprune.core.tokens import VisualTokens
from diffprune.core.vlm import VLM
from diffprune.data.batch import batch as batch_of
from diffprune.pruning.first_cut import seen_at_first_cut
from diffprune.train.context import LocalContext
from diffprune.train.recipe import Recipe
from diffprune.train.scorer_trainer import ScorerTrainer
from tests.test_decoder_cuts import batch, chosen, columns, deep, hiding, whole
from tests.test_families import FAMILIES, close, own
from tests.test_families_train import drawn

FITTED = ("btp", "pore(attention)", "pore(fastv)")
TRAINED = ("ocvtp", "atp")
SYSTEMS = (*FITTED, *(f"{name}(untrained=True)" for name in TRAINED))
BUDGET = Share(0.6)  # of which four layers can have the average


@dataclass
class Fitting:
    """A run that fits on a family's own images and saves to a folder."""

    family: str
    seed: int = 0

    @property
    def vlm(self) -> VLM:
        return deep(self.family)

    def calibration(self, pruner: Pruner, images: int) -> VisualTokens:
        vlm, prompts, pixels, _ = batch(self.family)
        return seen_at_first_cut(vlm, prompts, vlm.encode(pixels, pruner.needs), pruner)

    def train(self, pruner: TrainablePruner) -> Artifact:
        raise AssertionError("these take no steps")

    def save(self, pruner: FittedPruner, **facts: Any) -> Artifact:
        pruner.save_pretrained("fitted", **facts)
        return Artifact(Path("fitted"), pruner.weights_sha256)


def ready(family: str, spelling: str) -> Pruner:
    """Fitted, saved and loaded, or with random weights."""
    pruner: Pruner = registry.load("pruners", spelling)
    if spelling in FITTED:
        assert isinstance(pruner, FittedPruner)
        with torch.inference_mode():
            return registry.make("pruners", pruner.spec.at(weights=pruner.fit(Fitting(family)).folder.absolute()))  # type: ignore[no-any-return]
    return pruner


@pytest.mark.parametrize("spelling", SYSTEMS)
@pytest.mark.parametrize("family", FAMILIES)
def test_removing_equals_hiding(family: str, spelling: str) -> None:
    vlm, prompts, pixels, _ = batch(family)
    pruner = ready(family, spelling)
    with torch.inference_mode():
        tokens = vlm.encode(pixels, pruner.needs)
        packed = pruning.shrink(vlm, prompts, tokens, pruner, BUDGET)
        output = pruning.forward(vlm, packed, logits_to_keep=1)
        left = {0: pruning.select(vlm, prompts, tokens, pruner, BUDGET)} | (chosen(vlm, packed) if packed.inside else {})
        inputs = whole(vlm, prompts, tokens)
        with hiding(vlm, {number: columns(prompts, tokens, one) for number, one in left.items()}):
            wanted = vlm.model(**inputs | {"position_ids": inputs["position_ids"] + vlm.position_offset}).logits
    close(output.logits[:, -1], wanted[:, -1])
    for average, total in zip(packed.averages(vlm.shape.layers), tokens.counts.tolist(), strict=True):
        assert 0.6 * total / pruner.slack - 1 <= average <= 0.6 * total * pruner.slack + 1 and average < total
    with torch.inference_mode(), diffprune.pruned(vlm.model, pruner, BUDGET):
        made = vlm.model.generate(**own(vlm, prompts, pixels), max_new_tokens=1, do_sample=False, pad_token_id=0)
    assert torch.equal(made[:, -1], wanted[:, -1].argmax(-1))


@pytest.mark.parametrize("name", TRAINED)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_teaches_its_scorer(family: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    vlm = deep(family)
    monkeypatch.setattr(type(training.SOURCES["world"]()), "draw", lambda self, index, questions, tally: drawn()[index.image % 2])
    recipe = Recipe(
        pruners=(name,), steps=2, images=2, questions=2, questions_alone=2, calibration_images=4, workers=1, validate_every=0,
        checkpoint_every=0, grad_cosine_every=0, budgets=(BUDGET,), ease_share=0.0,
    )  # fmt: skip
    trainer = ScorerTrainer(LocalContext("run"), vlm, recipe, registry.load("pruners", name), 0)
    shown = batch_of(vlm, drawn(), vlm.packs and not trainer.aware)
    loss = trainer.pruner.objective(trainer.run(shown, shown.num_labels), shown, BUDGET, Progress(0, 2), trainer.noise(shown, 0))
    loss.total.backward()
    reached = [float(p.grad.abs().sum()) for p in trainer.networks["scorer"].parameters() if p.grad is not None]
    assert torch.isfinite(loss.total) and fmean(reached) > 0 and all(x < float("inf") for x in reached)
