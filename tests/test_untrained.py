"""Trained methods without weights: refused in one sentence before any work, unless their user asks for random ones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

import diffprune
from diffprune import pruning
from diffprune.cli import commands
from diffprune.cli.listing import shown
from diffprune.core import registry
from diffprune.core.budget import Share
from diffprune.core.cell import describe
from diffprune.core.fitted import FittedPruner, TrainablePruner
from diffprune.core.vlm import VLM
from diffprune.evaluate.cells import Evaluation, cells
from diffprune.job.job import Job, explain
from diffprune.measure import measure
from diffprune.timing.options import Measurement
from diffprune.train.recipe import Recipe
from tests.test_families import pictures, tiny

FITTED = [name for name in registry.names("pruners") if issubclass(registry.find("pruners", name), FittedPruner)]
TRAINED = [name for name in FITTED if issubclass(registry.find("pruners", name), TrainablePruner)]
BUDGET = Share(0.75)


def spelled(name: str) -> str:
    """A method that needs weights and names none."""
    return "pore(attention)" if name == "pore" else name


@pytest.fixture(scope="module")
def embedded() -> VLM:
    return diffprune.load("embedded")


@pytest.mark.parametrize("wrapped", [False, True], ids=["alone", "wrapped"])
@pytest.mark.parametrize("name", FITTED)
def test_without_weights_it_is_refused_before_any_work(
    name: str, wrapped: bool, embedded: VLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = f"replaced({spelled(name)})" if wrapped else spelled(name)

    def worked(*_: Any, **__: Any) -> None:
        raise AssertionError("work has begun")

    for work in ("encode", "pixels"):
        monkeypatch.setattr(type(embedded), work, worked)
    inner = str(registry.spec("pruners", spelled(name)))
    says = f"{inner} is not trained: train it (diffprune train, or train.pruners in a job), then write "
    says += f"{inner.removesuffix(')')}, weights='folder')" if "(" in inner else f"{inner}(weights='folder')"
    if name in TRAINED:
        says += f", or, for random weights, {name}(untrained=True)"
    (cell,) = measure.cells(
        embedded, [registry.spec("pruners", text)], [BUDGET], Measurement(batches=(1,), modes=("eager",), sessions=1)
    )
    asked: list[Callable[[], Any]] = [
        lambda: Job(name="x", evaluate={}, baselines=(text,)),
        lambda: diffprune.pruned(embedded.model, text, BUDGET).__enter__(),
        lambda: diffprune.generate(embedded, pictures()[0], "what?", pruner=text, budget=BUDGET),
        lambda: measure.method(embedded, cell),
    ]
    for ask in asked:
        with pytest.raises(ValueError) as refused:
            ask()
        said = explain(refused.value) if isinstance(refused.value, ValidationError) else str(refused.value)
        assert says in said and "\n" not in said
    if not wrapped:
        code, sentence = commands.call(["evaluate", "--pruner", text, "--budget", "75%"])
        assert (code, says in sentence, "\n" in sentence) == (2, True, False), sentence


@pytest.mark.parametrize("name", TRAINED)
def test_random_weights_are_asked_for_and_said(name: str, embedded: VLM) -> None:
    """As a job's baseline, in a name and in a key; the same in every process, whatever was drawn before."""
    text = f"{name}(untrained=True)"
    (spec,) = Job(name="x", evaluate={}, baselines=(text,)).baselines
    made = registry.make("pruners", spec)
    method = describe(made)
    assert (
        str(made.spec) == text
        and method.label == f"{made.label}, untrained"
        and (method.kind, made.weights_sha256) == ("control", "")
    )
    assert "untrained" in {option.name: option.meaning for _, _, found in shown(name) for option in found if option.meaning}
    (cell,) = cells(embedded, [spec], [BUDGET], Evaluation(benchmarks=("world('pope')",)))
    assert cell.pruner is not None and cell.pruner.identity["options"] == {"untrained": True}
    left = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        again = registry.load("pruners", text)
        state = torch.get_rng_state()
        tokens = embedded.encode(embedded.pixels(pictures()), again.needs)
        prompts = embedded.prompts(["what is there?"] * len(tokens), tokens.present.sum(1).tolist())
        packed = pruning.shrink(embedded, prompts, tokens, again, BUDGET)
        with torch.inference_mode():
            pruning.forward(embedded, packed, logits_to_keep=1)
        assert torch.equal(torch.get_rng_state(), state)
        inside = packed.inside.left if packed.inside else {}
        left.append(torch.cat([packed.selection.keep, *inside.values()]))  # type: ignore[union-attr]
        x = torch.randn(2, 3, len(again.mean))
        torch.testing.assert_close(again.standardised(x), x)
        assert not any(p.requires_grad for p in again.networks.parameters())
    assert torch.equal(*left) and 0 < float(left[0].double().mean()) < 1


def test_the_scores_of_a_random_scorer_depend_on_no_other_image() -> None:
    """Nothing of the first batch it sees stays with it."""
    vlm = tiny("llava")
    asked = [("diffprune(untrained=True)", slice(None)), ("diffprune(untrained=True)", slice(1, 2))]
    found = []
    for text, part in asked:
        method = registry.load("pruners", text)
        tokens = vlm.encode(vlm.pixels(pictures()[part]), method.needs)
        prompts = vlm.prompts(["what?"] * len(tokens), tokens.present.sum(1).tolist())
        pruning.select(vlm, prompts, tokens, method, BUDGET)
        found.append(method.score(tokens)[1 if part == slice(None) else 0])
    torch.testing.assert_close(*found)


def test_one_object_serves_models_of_other_widths() -> None:
    method = registry.load("pruners", "diffprune(untrained=True)")
    for vlm in (tiny("llava"), diffprune.load("embedded"), tiny("gemma3")):
        assert diffprune.generate(vlm, pictures()[0], "what?", pruner=method, budget=4, max_new_tokens=1)


def test_random_weights_are_not_saved() -> None:
    method = registry.load("pruners", "diffprune(untrained=True)")
    diffprune.generate(tiny("llava"), pictures()[0], "what?", pruner=method, budget=4, max_new_tokens=1)
    with pytest.raises(ValueError, match=r"random weights \(untrained=True\), so nothing was learnt"):
        method.save_pretrained("scorer")
    assert not Path("scorer").exists()


def test_a_question_aware_scorer_has_random_weights_for_words_too() -> None:
    vlm = tiny("llava")
    for text in ("diffprune(question_aware=True, untrained=True)", "replaced(diffprune(question_aware='cross', untrained=True))"):
        assert diffprune.generate(vlm, pictures()[0], "what?", pruner=text, budget=4, max_new_tokens=1)


def test_what_contradicts_itself_is_refused_in_a_sentence() -> None:
    vlm = tiny("llava")
    method = registry.load("pruners", "diffprune")
    method.build(vlm.encode(vlm.pixels(pictures())))
    method.save_pretrained("scorer")
    for text, says in (
        ("diffprune(weights='scorer', untrained=True)", "with weights and with untrained=True: give one of the two"),
        ("diffprune(untrained=1)", "untrained is True or False, not 1"),
        ("grid(untrained=True)", "grid has no option 'untrained'"),
        ("btp(untrained=True)", "btp has no option 'untrained'"),
    ):
        with pytest.raises(ValueError, match=says.replace("(", r"\(")):
            registry.load("pruners", text)
    with pytest.raises(ValueError, match=r"diffprune\(untrained=True\) cannot be trained"):
        Recipe(pruners=("diffprune(untrained=True)",))
    assert not registry.load("pruners", "diffprune(untrained=False)").spec.options
