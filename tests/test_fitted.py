"""Fitted methods: an objective of a method's own trained by the ordinary trainer, and a calibration saved and loaded."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diffprune import data as training
from diffprune import pruning
from diffprune.core.budget import Budget, Keep
from diffprune.core.evidence import QUESTION
from diffprune.core.fitted import Artifact, FittedPruner, FittingRun, Loss, Progress, RelaxedPruner, TrainingRun
from diffprune.core.noise import Noise
from diffprune.core.pruner import Kind, ScorePruner
from diffprune.core.site import ENCODED, Cut, Plan, Site, Stage
from diffprune.core.spec import Spec
from diffprune.core.tokens import Relaxation, VisualTokens
from diffprune.core.vlm import Shape
from diffprune.io import checkpoint
from diffprune.pruners.diffprune import DiffPrune
from diffprune.train import loop
from diffprune.train.checkpoints import read_steps
from diffprune.train.context import LocalContext
from diffprune.train.drawn_batches import DrawnBatches
from diffprune.train.recipe import Recipe
from diffprune.train.scorer_trainer import ScorerTrainer
from diffprune.vlm.load import load

SMALL: dict[str, Any] = {
    "pruners": ("diffprune",), "steps": 3, "images": 2, "questions": 2, "questions_alone": 2, "calibration_images": 4,
    "validation_images": 2, "validate_every": 3, "grad_cosine_every": 2, "checkpoint_every": 0, "workers": 1,
}  # fmt: skip


@pytest.fixture(scope="module")
def vlm() -> Any:
    return load("embedded", device="cpu")


class Reconstructing(RelaxedPruner):
    """Learns from the tokens alone: a soft selection must rebuild all tokens of the image from those it lets through."""

    def __init__(self, question_aware: bool = False) -> None:
        self.networks, self.spec = nn.ModuleDict(), Spec("reconstructing")
        self.needs = frozenset({QUESTION}) if question_aware else frozenset()

    def outline(self, features: int, text: int | None = None) -> nn.ModuleDict:
        with torch.device("meta"):
            return nn.ModuleDict({"score": nn.Linear(features, 1), "rebuild": nn.Linear(features, features)})

    def build(self, tokens: VisualTokens) -> nn.ModuleDict:
        self.networks = self.outline(tokens.features.shape[-1]).to_empty(device=tokens.features.device)
        for layer in self.networks.values():
            layer.reset_parameters()  # type: ignore[operator]
        return self.networks

    def score(self, tokens: VisualTokens) -> Tensor:
        return self.networks["score"](tokens.features.float()).squeeze(-1)

    def relax(self, tokens: VisualTokens, budget: Budget, temperature: float, noise: Noise) -> Relaxation:
        gate = ((self.score(tokens) + noise.normal(tokens.valid, 1).squeeze(-1)) / temperature).sigmoid().where(tokens.valid, 0.0)
        return Relaxation(tokens.features * gate[..., None], gate)

    def objective(self, run: TrainingRun, batch: Any, budget: Budget, progress: Progress, noise: Noise) -> Loss:
        tokens, _ = run.tokens(batch)
        relaxed = self.relax(tokens, budget, self.temperature(progress, run.annealing), noise)
        pooled = relaxed.features.sum(1, keepdim=True) / relaxed.kept[:, None, None].clamp_min(1e-3)
        error = (self.networks["rebuild"](pooled) - tokens.features).square().mean()
        rows = len(relaxed.kept)
        return Loss(run.per_row(error, rows), {"kept": run.per_row(relaxed.kept.mean(), rows)})

    def save_pretrained(self, folder: Path | str, **facts: Any) -> None:
        checkpoint.write(folder, dict(self.networks.state_dict()), {"method": "reconstructing", "facts": facts}, "# card")
        self.weights_sha256 = checkpoint.sha256(Path(folder) / checkpoint.FILE)[:20]


class PositionPrior(FittedPruner, ScorePruner):
    """Ranks positions by how far tokens there lie from the mean of their image, on average over a few images."""

    def __init__(self, weights: str | None = None) -> None:
        self.prior = torch.zeros(0)
        if weights is not None:
            self.prior = checkpoint.read(Path(weights))[0]["prior"]

    def fit(self, run: FittingRun) -> Artifact:
        tokens = run.calibration(self, 4)
        away = tokens.features - tokens.features.mean(1, keepdim=True)
        self.prior = away.norm(dim=-1).mean(0)
        return run.save(self, images=len(tokens))

    def score(self, tokens: VisualTokens) -> Tensor:
        return self.prior.expand(len(tokens), -1)

    def save_pretrained(self, folder: Path | str, **facts: Any) -> None:
        checkpoint.write(folder, {"prior": self.prior}, {"method": "position_prior", "facts": facts}, "# card")
        self.weights_sha256 = checkpoint.sha256(Path(folder) / checkpoint.FILE)[:20]


class Deep(DiffPrune):
    """A scorer trained before the decoder that would cut inside it."""

    label = "Deep"

    def cuts(self, budget: Budget, shape: Shape) -> Plan:
        return (Cut(Site(Stage.DECODER, 1), budget),)


def test_cuts_inside_the_decoder_do_not_train_something_else(vlm: Any) -> None:
    method, run = Deep(), SimpleNamespace(vlm=vlm)
    with pytest.raises(ValueError, match="Deep cuts after decoder layer 1, but a relaxation of the encoder's tokens would train"):
        method.objective(run, None, Keep(4), Progress(0, 1), None)  # type: ignore[arg-type]


@pytest.mark.parametrize("question_aware", [False, True])
def test_an_objective_of_its_own_trains_through_the_ordinary_trainer(vlm: Any, question_aware: bool) -> None:
    recipe, method = Recipe(**SMALL), Reconstructing(question_aware)
    artifact = method.fit(loop.Run(LocalContext("run"), vlm, recipe, recipe.pruners[0], 0, DrawnBatches(0)))
    (rows,) = read_steps(Path("run")).values()
    assert len(rows) == 3 and method.kind is Kind.TRAINED
    assert all(row.loss > 0 and row.grad_norm > 0 and row.penalty == 0 and 0 < row.kept < 144 for row in rows)
    assert (
        math.isfinite(rows[0].grad_cosine) and math.isfinite(rows[-1].validation_soft) and math.isfinite(rows[-1].validation_hard)
    )
    facts = json.loads((artifact.folder / "config.json").read_text())["facts"]
    assert (
        artifact.weights_sha256 == method.weights_sha256 != "" and facts["steps"] == 3 and facts["model_hash"] == vlm.weights_hash
    )
    assert facts["recipe_key"] == recipe.key(recipe.pruners[0]) and facts["seed"] == 0


def test_the_gradient_of_an_objective_of_its_own_is_that_of_plain_code(vlm: Any) -> None:
    trainer = ScorerTrainer(LocalContext("run"), vlm, Recipe(**SMALL), Reconstructing(), 0)
    batch = next(training.batches(vlm, "world", seed=0, images=4, questions=1))
    run = trainer.run(batch, batch.num_labels)
    whole = trainer.pruner.objective(run, batch, Keep(9), Progress(0, 3), trainer.noise(batch, 1))
    wanted = torch.autograd.grad(whole.total, trainer.parameters)
    summed = [torch.zeros_like(p) for p in trainer.parameters]
    for start in (2, 0):  # parts of a batch, as micro-batches take it, in any order
        part = batch.part(vlm, start, start + 2)
        loss = trainer.pruner.objective(run, part, Keep(9), Progress(0, 3), trainer.noise(part, 1))
        for total, gradient in zip(summed, torch.autograd.grad(loss.total, trainer.parameters), strict=True):
            total += gradient
    for found, gradient in zip(summed, wanted, strict=True):
        torch.testing.assert_close(found, gradient, rtol=1e-4, atol=1e-6)


def test_the_loss_of_answers_is_the_default(vlm: Any) -> None:
    """Oracle: the relaxation and the loss written out, scaled to the mean over answer tokens."""

    class Plain(Reconstructing):
        objective = RelaxedPruner.objective

    trainer = ScorerTrainer(LocalContext("run"), vlm, Recipe(**SMALL), Plain(), 0)
    batch = next(training.batches(vlm, "world", seed=0, images=2, questions=2))
    loss = trainer.pruner.objective(trainer.run(batch, batch.num_labels), batch, Keep(9), Progress(1, 3), trainer.noise(batch, 2))
    tokens = vlm.encode(batch.pixels)
    relaxed = trainer.pruner.relax(
        tokens, Keep(9), trainer.pruner.temperature(Progress(1, 3), trainer.annealing), trainer.noise(batch, 2)
    )
    packed = pruning.Packed(batch.prompts, vlm.project(relaxed.features[tokens.valid]), tokens.counts, tokens.counts)
    logits = pruning.forward(vlm, packed).logits[:, :-1].log_softmax(-1)
    target = batch.prompts.labels[:, 1:]
    said = target >= 0
    wanted = -logits[said].gather(1, target[said][:, None]).sum()
    torch.testing.assert_close(loss.terms["nll"], wanted, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(loss.total, wanted / batch.num_labels, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(loss.terms["kept"], relaxed.kept.mean())


def test_a_calibration_is_saved_and_loaded_with_equal_selections(vlm: Any) -> None:
    recipe, method = Recipe(**SMALL), PositionPrior()
    artifact = method.fit(loop.Run(LocalContext("run"), vlm, recipe, recipe.pruners[0], 0, DrawnBatches(0)))
    assert method.kind is Kind.CALIBRATED and artifact.weights_sha256 == method.weights_sha256 != ""
    again = PositionPrior(str(artifact.folder))
    tokens = vlm.encode(training.validation(vlm, "world", images=3, questions=1).pixels)
    keep = [pruner.select(tokens, Cut(ENCODED, Keep(9))).keep for pruner in (method, again)]
    assert torch.equal(*keep) and keep[0].sum(1).tolist() == [9, 9, 9]
    facts = json.loads((artifact.folder / "config.json").read_text())["facts"]
    assert facts["images"] == 4 and facts["seed"] == 0 and facts["recipe_key"] == recipe.key(recipe.pruners[0])
