"""Objectives of a user's own that fail, or give no loss to learn from: told with method, seed, step and place, once and for all."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diffprune.core import registry
from diffprune.core.fitted import Loss
from diffprune.pruners.diffprune import DiffPrune
from diffprune.train.context import LocalContext
from diffprune.train.loop import batches
from diffprune.train.objective import TERMS, BadObjective, read, recorded, told
from diffprune.train.recipe import Recipe
from diffprune.train.scorer_trainer import ScorerTrainer
from diffprune.vlm.load import load
from tests.test_train_ahead import Member, together

HERE = Path(__file__).name
RECIPE = Recipe(
    pruners=("diffprune",), steps=2, images=2, questions=1, calibration_images=2, validate_every=0, grad_cosine_every=0, workers=1,
    budgets=("Keep(32)",),
)  # fmt: skip


def trained(objective: Callable[[Loss], Any], monkeypatch: pytest.MonkeyPatch, folder: Path, **options: Any) -> ScorerTrainer:
    """One step with what a method makes of DiffPrune's loss."""
    plain = DiffPrune.objective
    monkeypatch.setattr(DiffPrune, "objective", lambda self, *given: objective(plain(self, *given)))
    recipe = RECIPE.model_copy(update=options)
    pruner, vlm = registry.make("pruners", recipe.pruners[0]), load("embedded", device="cpu")
    trainer = ScorerTrainer(LocalContext(folder), vlm, recipe, pruner, 7)
    trainer.step(next(batches(trainer)))
    return trainer


def fails(_: Loss) -> Loss:
    raise KeyError("depth")


def in_torch(_: Loss) -> Loss:
    return torch.ones(2, 3) @ torch.ones(2, 3)  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("objective", "said"),
    [
        (fails, f"its objective fails: KeyError: 'depth' ({HERE}:"),
        (in_torch, "its objective fails: RuntimeError: mat1 and mat2 shapes cannot be multiplied"),
        (lambda loss: None, "its objective gives NoneType, no Loss"),
        (lambda loss: replace(loss, total=loss.total.detach()), "its loss has no gradient: nothing that trains has a part in it"),
        (lambda loss: replace(loss, total=loss.total[None].repeat(2)), "its loss has a tensor of shape [2] as 'total'"),
        (lambda loss: replace(loss, terms={"kept": 3.0}), "its loss has float as 'kept', which must be a tensor of one number"),
    ],
)
def test_a_mistake_in_an_objective_is_told_with_its_place(
    objective: Callable[[Loss], Any], said: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with pytest.raises(BadObjective) as caught:
        trained(objective, monkeypatch, tmp_path)
    assert str(caught.value).startswith("diffprune, seed 7, step 0: ") and said in str(caught.value)


@pytest.mark.parametrize("error", [OSError("gone"), MemoryError(), torch.OutOfMemoryError("CUDA out of memory")])
def test_what_may_pass_is_no_mistake(error: Exception) -> None:
    with pytest.raises(type(error)), told("x", others=False):
        raise error


def test_of_a_spread_decoder_an_error_may_be_another_worker_that_ended() -> None:
    with pytest.raises(RuntimeError, match="Connection closed by peer"), told("x", others=True):
        raise RuntimeError("Connection closed by peer")
    with pytest.raises(BadObjective, match="TypeError"), told("x", others=True):
        raise TypeError("no")


def test_networks_without_parameters_that_train_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    build = DiffPrune.build
    monkeypatch.setattr(DiffPrune, "build", lambda self, seen: build(self, seen).requires_grad_(False))
    with pytest.raises(BadObjective, match="diffprune: its networks have no parameter that trains"):
        trained(lambda loss: loss, monkeypatch, tmp_path)


def loss_of(**terms: float) -> Loss:
    return Loss(torch.tensor(2.0, requires_grad=True), {name: torch.tensor(value) for name, value in terms.items()})


def test_a_term_is_recorded_where_every_part_has_it_and_all_workers_send_as_much() -> None:
    """Another length on another worker would end both, and a sum over some parts would be no sum."""

    def work(context: Member) -> Mapping[str, float]:
        terms: dict[str, float] = {"nll": 3.0, "kept": 1.5} if context.rank else {"nll": 4.0, "own": 9.0}
        return read(context.sum(recorded(loss_of(**terms))).tolist())

    assert together(2, work) == [{"total": 4.0, "nll": 7.0}] * 2
    everything = dict.fromkeys(TERMS, 1.0)
    assert read(recorded(loss_of(**everything)).tolist()) == {"total": 2.0, **everything}


def test_buffers_that_move_are_refused_on_several_workers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Each would have those of its own images, and the first one's would be saved."""
    count = Tensor.add_

    def counting(loss: Loss) -> Loss:
        count(trainer.networks.get_buffer("seen"), 1)
        return loss

    plain, build = DiffPrune.objective, DiffPrune.build
    monkeypatch.setattr(DiffPrune, "objective", lambda self, *given: counting(plain(self, *given)))

    def built(self: DiffPrune, seen: Any) -> nn.ModuleDict:
        networks = build(self, seen)
        networks.register_buffer("seen", torch.zeros(()))
        return networks

    monkeypatch.setattr(DiffPrune, "build", built)
    pruner, vlm = registry.make("pruners", RECIPE.pruners[0]), load("embedded", device="cpu")
    trainer = ScorerTrainer(LocalContext(tmp_path), vlm, RECIPE, pruner, 0)
    trainer.step(next(batches(trainer)))  # alone it may
    trainer._alike = False
    with pytest.raises(BadObjective, match=r"its networks keep seen from batch to batch.*train\.workers=1"):
        trainer.step(next(batches(trainer)))
