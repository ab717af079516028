"""Position reweighting: the fit against scipy's least squares, the ranking written out, its artefact, its refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.optimize import curve_fit

import diffprune
from diffprune import data as training
from diffprune import pruning
from diffprune.core import registry
from diffprune.core.budget import Keep, Share
from diffprune.core.cell import describe
from diffprune.core.evidence import encoder_attention
from diffprune.core.pruner import Pruner, ScorePruner
from diffprune.core.site import ENCODED, PROJECTED, Cut
from diffprune.core.tokens import VisualTokens
from diffprune.pruners.attention import Attention
from diffprune.pruners.pore import PoRe, along, slope
from diffprune.train import loop
from diffprune.train.context import LocalContext
from diffprune.train.drawn_batches import DrawnBatches
from diffprune.train.recipe import Recipe
from diffprune.vlm.load import load
from tests.contracts import SHAPE, tokens


@pytest.mark.parametrize("sigma", [2.3, 0.0, -1.2, 8.0])
def test_the_slope_is_that_of_least_squares(sigma: float) -> None:
    """Oracle: both parameters fitted to the mean over images, which the sum over images must equal."""
    rng, x = np.random.default_rng(0), np.linspace(0, 1, 50)
    scores = 0.01 * np.exp(sigma * x) * rng.uniform(0.5, 1.5, (30, 50))
    (_, wanted), _ = curve_fit(lambda x, mu, s: mu * np.exp(s * x), x, scores.mean(0), p0=(0.01, sigma))
    found = slope(torch.from_numpy(np.tile(x, 30)), torch.from_numpy(scores.flatten()))
    assert found == pytest.approx(wanted, abs=1e-4)


@pytest.mark.parametrize("sigma", [-45.0, -19.0, 19.0, 45.0])
def test_no_slope_is_steeper_than_twenty(sigma: float) -> None:
    x = torch.linspace(0, 1, 50, dtype=torch.float64)
    assert slope(x, (sigma * x).exp()) == pytest.approx(max(-20.0, min(20.0, sigma)), abs=1e-4)


def test_scores_are_divided_by_the_curve_at_each_images_own_places() -> None:
    seen, method = tokens(), registry.load("pruners", "pore(attention)")
    method.sigma = 1.7
    found, attention = method.score(seen), seen.given(encoder_attention())
    for row, num in enumerate(seen.counts.tolist()):
        for i in range(num):
            assert float(found[row, i]) == pytest.approx(float(attention[row, i]) / np.exp(1.7 * i / (num - 1)), rel=1e-5)
    assert along(torch.tensor([[True, False]])).tolist() == [[0.0, 0.0]], "an image of one token"


@pytest.fixture(scope="module")
def vlm() -> Any:
    return load("embedded", device="cpu")


def test_it_is_fitted_by_the_training_verb_saved_and_loaded(vlm: Any) -> None:
    recipe = Recipe(pruners=("pore(attention)",), workers=1)
    method = registry.load("pruners", "pore(attention)")
    artifact = method.fit(loop.Run(LocalContext("run"), vlm, recipe, recipe.pruners[0], 0, DrawnBatches(0)))
    seen = vlm.encode(training.validation(vlm, "world", images=3, questions=1).pixels, method.needs)
    again: Pruner = diffprune.from_pretrained(artifact.folder)
    assert isinstance(again, PoRe) and again.sigma == method.sigma and again.weights_sha256 == artifact.weights_sha256 != ""
    keep = [pruner.select(seen, Cut(ENCODED, Keep(9))).keep for pruner in (method, again)]
    assert torch.equal(*keep) and keep[0].sum(1).tolist() == [9, 9, 9]
    assert again.trained_on is not None and again.trained_on.weights_sha256 == vlm.weights_hash
    assert json.loads((artifact.folder / "config.json").read_text())["facts"]["images"] == 64
    told = describe(again)
    assert (told.label, told.kind, told.reads_question, told.reference) == ("PoRe of Attention", "calibrated", False, "2508.17807")
    assert (told.recipe, told.scorer_seed) == (recipe.key(recipe.pruners[0]), 0)


def test_its_card_counts_the_pictures_that_the_data_have(vlm: Any, own_folder: Path) -> None:
    """Of 40 pictures two are for calibration, and 64 were told."""
    Path("pictures").mkdir()
    rows = [{"image": f"{i}.png", "text": "what?", "label": "a"} for i in range(40)]
    for i in range(40):
        Image.new("RGB", (32, 32), (6 * i, 0, 0)).save(f"pictures/{i}.png")
    Path("rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = "jsonl('rows.jsonl', images='pictures', question='text', answer='label')"
    recipe = Recipe(pruners=("pore(attention)",), workers=1, data=data)
    artifact = registry.load("pruners", "pore(attention)").fit(
        loop.Run(LocalContext("run"), vlm, recipe, recipe.pruners[0], 0, DrawnBatches(0))
    )
    assert "\n- images: 2\n" in (artifact.folder / "README.md").read_text()


@pytest.mark.slow
def test_inside_the_decoder_it_is_fitted_to_what_the_first_cut_sees(vlm: Any) -> None:
    """Oracle: the decoder's own eager attention of the last token before the answer, layer 0, mean over heads."""
    recipe = Recipe(pruners=("pore(fastv(after=1))",), workers=1)
    method = registry.load("pruners", "pore(fastv(after=1))")
    artifact = method.fit(loop.Run(LocalContext("run"), vlm, recipe, recipe.pruners[0], 0, DrawnBatches(0)))
    batch = training.calibration(vlm, recipe.data, 64)
    full = pruning.shrink(vlm, batch.prompts, vlm.encode(batch.pixels), registry.load("pruners", "unpruned"), Share(1.0))
    vlm.model.set_attn_implementation("eager")
    try:
        with torch.inference_mode():
            weights = pruning.forward(vlm, full, output_attentions=True).attentions[0].mean(1)
    finally:
        vlm.model.set_attn_implementation("sdpa")
    labels, slots = batch.prompts.labels, batch.prompts.slots
    assert labels is not None
    rows = [row[int((said >= 0).int().argmax()) - 1, at] for row, said, at in zip(weights, labels, slots, strict=True)]
    scores = torch.stack(rows)
    assert method.sigma == pytest.approx(
        slope(along(torch.ones_like(scores, dtype=torch.bool)).flatten(), scores.flatten()), abs=2e-3
    )
    again = diffprune.from_pretrained(artifact.folder)
    picture = [np.full((96, 96, 3), 90, np.uint8)]
    made = pruning.generate(vlm, [Image.fromarray(p) for p in picture], ["what is on the left"], pruner=again, budget=Keep(72))
    assert len(made) == 1 and describe(again).label == "PoRe of FastV, after layer 1" and again.reads_question


def test_what_cannot_be_reweighted_is_refused_in_a_sentence(tmp_path: Path) -> None:
    for text, name in (("pore(grid)", "Grid"), ("pore(random)", "Random")):
        with pytest.raises(ValueError, match=f"{name} does not rank tokens by attention"):
            registry.load("pruners", text)
    with pytest.raises(ValueError, match=r"pore\(attention\) is not fitted yet: train it"):
        registry.load("pruners", "pore(attention)").score(tokens())

    class Twice(ScorePruner):
        label = "Twice"
        needs = frozenset({encoder_attention()})

        def cuts(self, budget: Any, shape: Any) -> Any:
            return (Cut(ENCODED, budget), Cut(PROJECTED, budget))

        def score(self, tokens: VisualTokens) -> torch.Tensor:
            return tokens.given(encoder_attention())

    with pytest.raises(ValueError, match="Twice cuts 2 times"):
        PoRe(Twice()).cuts(Keep(3), SHAPE)
    fitted = PoRe(Attention())
    fitted.sigma = 1.0
    fitted.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"these weights belong to pore\(\), not to pore\(attention\)"):
        registry.load("pruners", f"pore(attention, weights='{tmp_path}')")
