"""Balanced Token Pruning: its choice written out token by token, where calibration puts its cuts, its artefact, its refusals."""

from __future__ import annotations

import json
import math
from itertools import accumulate
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn import functional

import diffprune
from diffprune import data as training
from diffprune import pruning
from diffprune.core import registry
from diffprune.core.budget import Keep, Share
from diffprune.core.cell import describe
from diffprune.core.pruner import Pruner
from diffprune.core.site import Cut, Site, Stage, tokens_per_layer
from diffprune.core.tokens import VisualTokens
from diffprune.measure import measure as measuring
from diffprune.models.llava import Llava
from diffprune.pruners import btp
from diffprune.pruners.btp import ATTENTION, Btp
from diffprune.pruning.first_cut import seen_at_first_cut
from diffprune.timing import flops
from diffprune.train import loop
from diffprune.train.context import LocalContext
from diffprune.train.drawn_batches import DrawnBatches
from diffprune.train.recipe import Recipe
from diffprune.vlm.load import load
from tests.contracts import Calibration
from tests.test_decoder_cuts import MODES, batch, entering, generate, whole
from tests.test_families import own
from tests.test_measure import TIMED, Fake, slowed, tiny  # noqa: F401

GRID = (5, 7)


def calibrated(after: tuple[int, ...] = (1, 2, 3, 4), layers: int = 8, **options: Any) -> Btp:
    method = Btp(**options)
    method.after, method.layers, method.weights_sha256 = after, layers, "0" * 20
    return method


def seen(valid: tuple[int, ...] = (35, 29)) -> VisualTokens:
    """Images that lack tokens at their end, with near-duplicates; padding is full of NaN."""
    chance, num = torch.Generator().manual_seed(3), math.prod(GRID)
    real = torch.arange(num) < torch.tensor(valid)[:, None]
    base = torch.randn(len(valid), 9, 12, generator=chance)[:, torch.randint(9, (num,), generator=chance)]
    features = base + 0.3 * torch.randn(len(valid), num, 12, generator=chance)
    attention = torch.randn(len(valid), num, generator=chance)
    return VisualTokens(
        features.where(real[..., None], torch.nan), real, grid=GRID, evidence={ATTENTION: attention}, projected=True
    )  # fmt: skip


def at(layer: int, count: int) -> Cut:
    return Cut(Site(Stage.DECODER, layer), Keep(count))


def away(chosen: list[int], among: list[int], distance: Any, count: int) -> list[int]:
    """Max-min, written out: again and again the token whose nearest chosen one is farthest; with none chosen, the first."""
    chosen = list(chosen)
    while len(chosen) < count:
        rest = [i for i in among if i not in chosen]
        chosen.append(max(rest, key=lambda i: (min((distance(i, j) for j in chosen), default=0.0), -i)))
    return chosen


def written_out(tokens: VisualTokens, row: int, stage: int, share: float, count: int) -> list[int]:
    """What a cut leaves of one image, by the words of the class."""
    real = tokens.valid[row].nonzero().flatten().tolist()
    count = min(count, len(real))
    unit = functional.normalize(tokens.features[row].double(), dim=-1)
    attention = tokens.given(ATTENTION)[row]
    chosen: list[int] = []
    if stage == 0:
        spread = min(math.floor(count * min(0.5, 1 - share)), count - math.floor(count * share + 1e-9))
        chosen = away([], real, lambda i, j: abs(i // 7 - j // 7) + abs(i % 7 - j % 7), spread)
    wanted = math.floor(count * share + 1e-9)
    pool = sorted(real, key=lambda i: -float(attention[i]))[: math.floor(wanted * btp.POOLS[stage] + 1e-9)]
    first = [i for i in pool if i < count] + [i for i in pool if i >= count]
    chosen += [i for i in first[:wanted] if i not in chosen]
    return sorted(away(chosen, real, lambda i, j: 1 - float(unit[i] @ unit[j]), count))


@pytest.mark.parametrize("count", [1, 2, 9, 20, 29, 35])
@pytest.mark.parametrize("lambdas", [(0.3, 0.9, 1.0, 1.0), (0.5, 0.8, 1.0, 0.0), (1.0, 0.0, 0.5, 0.2), (0.75, 1.0, 0.0, 0.9)])
def test_choices_equal_the_definition(lambdas: tuple[float, ...], count: int) -> None:
    tokens, method = seen(), calibrated(lambdas=lambdas)
    for stage in range(4):
        keep = method.select(tokens, at(stage + 1, count)).keep
        for row in range(2):
            assert keep[row].nonzero().flatten().tolist() == written_out(tokens, row, stage, lambdas[stage], count), stage
            assert int(keep[row].sum()) == min(count, int(tokens.valid[row].sum()))


def test_shares_and_pools_are_the_authors_for_llava() -> None:
    """Of 288, 144 and 48 tokens so many are taken by attention, among so many candidates."""
    shares = [int(left * share) for left, share in zip((288, 144, 48), Btp().lambdas, strict=False)]
    assert shares == [86, 129, 48]
    assert [round(num * pool) for num, pool in zip(shares, btp.POOLS, strict=False)] == [318, 193, 57]
    assert [576 * 0.5**power for power in accumulate(btp.POWERS)] == pytest.approx([288, 144, 48, 1])


def test_balancing_takes_early_candidates_before_better_late_ones() -> None:
    attention = torch.tensor([[0.0, 5.0, 1.0, 9.0, 8.0, 7.0]])
    valid, two = torch.ones(1, 6, dtype=torch.bool), torch.tensor([2])
    assert btp.balanced(attention, valid, two, 1.0, torch.tensor([3])).nonzero()[:, 1].tolist() == [3, 4], "no pool, no balance"
    assert btp.balanced(attention, valid, two, 2.0, torch.tensor([3])).nonzero()[:, 1].tolist() == [1, 3]
    assert btp.balanced(attention, valid, two, 9.0, torch.tensor([3])).nonzero()[:, 1].tolist() == [1, 2]


def test_the_first_cut_starts_from_points_spread_over_the_raster() -> None:
    tokens = VisualTokens(torch.zeros(3, 576, 4), torch.ones(3, 576, dtype=torch.bool), grid=(24, 24))
    every = btp.spread(tokens, torch.tensor([144] * 3))
    assert torch.equal(every, btp.spread(tokens, torch.tensor([144, 144, 7]))[:1].expand(3, -1)), "alone or among others"
    found = every[0].nonzero().flatten()
    nearest = btp.raster(576, 24)[:, found].amin(1)
    assert 0 in found and 575 in found and len(found) == 144 and nearest.max() <= 2, "no hole of more than two steps"
    loose = VisualTokens(torch.zeros(1, 5, 4), torch.ones(1, 5, dtype=torch.bool))
    assert btp.spread(loose, torch.tensor([3]))[0].tolist() == [True, False, True, False, True], "without a raster: the sequence"


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_attention_before_the_softmax_is_what_an_eager_run_puts_through_it(family: str) -> None:
    """Oracle: log of eager attention is the product less one number per head and row, so differences of means are equal."""
    with torch.inference_mode():
        vlm, prompts, _, tokens = batch(family)
        found = seen_at_first_cut(vlm, prompts, tokens, registry.load("pruners", "btp")).given(ATTENTION)
        inputs = whole(vlm, prompts, tokens)
        vlm.model.set_attn_implementation({"text_config": "eager"})
        try:
            told, _ = entering(vlm, inputs | {"position_ids": inputs["position_ids"] + vlm.position_offset})
        finally:
            vlm.model.set_attn_implementation({"text_config": "sdpa"})
        rows = told.attentions[0][:, :, -1].double().log().mean(1)
        flat, image = torch.cat([row[slots] for row, slots in zip(rows, prompts.slots, strict=True)]), 0
        for valid, scores in zip(tokens.present, found, strict=True):
            wanted = flat[image : image + int(valid.sum())]
            image += int(valid.sum())
            torch.testing.assert_close((scores[valid] - scores[valid][0]).double(), wanted - wanted[0], rtol=1e-4, atol=1e-5)


# --- calibration ------------------------------------------------------------------------------------------------------


def test_cuts_go_behind_the_layers_that_change_most_tokens() -> None:
    shift = torch.full((31,), 0.1)
    assert btp.published(32) == btp.chosen(shift, btp.published(32)) == (3, 6, 14, 22), "nothing to choose by: the published depths"
    shift[[1, 4, 16, 30]] = torch.tensor([0.5, 0.4, 0.3, 0.2])
    assert btp.chosen(shift, (3, 6, 14, 22)) == (2, 5, 17, 31)
    shift[3] = 0.9
    assert btp.chosen(shift, (3, 6, 14, 22)) == (4, 5, 17, 31), "layers up to the fourth belong to the first cut"
    steps = btp.joined((1, 1, 2, 3))
    assert [(step.layer, step.stage) for step in steps] == [(1, 0), (2, 2), (3, 3)]
    assert [2.0**-step.power for step in steps] == pytest.approx([1 / 4, 1 / 3, 1 / 48])


def test_shifts_are_those_of_the_models_own_hidden_states() -> None:
    with torch.inference_mode():
        vlm, prompts, _, tokens = batch("llava")
        inputs = whole(vlm, prompts, tokens)
        inputs["position_ids"] = inputs["position_ids"] + vlm.position_offset
        states = vlm.model(**inputs, output_hidden_states=True).hidden_states
        for layer in range(vlm.shape.layers - 1):
            found = btp.shifted(seen_at_first_cut(vlm, prompts, tokens, btp._Before(layer)), layer)
            pairs = [(a[s], b[s]) for a, b, s in zip(states[layer], states[layer + 1], prompts.slots, strict=True)]
            cosine = torch.cat([functional.cosine_similarity(a, b, dim=-1) for a, b in pairs])
            assert found == pytest.approx(float((cosine < 0.93).float().mean()), abs=1e-6)
            assert found > 0, "a case in which nothing shifts says nothing"


@pytest.fixture(scope="module")
def vlm() -> Any:
    return load("embedded", device="cpu")


@pytest.mark.slow
def test_it_is_calibrated_by_the_training_verb_saved_and_loaded(vlm: Any) -> None:
    recipe = Recipe(pruners=("btp",), workers=1)
    method = registry.load("pruners", "btp")
    artifact = method.fit(loop.Run(LocalContext("run"), vlm, recipe, recipe.pruners[0], 0, DrawnBatches(0)))
    again: Pruner = diffprune.from_pretrained(artifact.folder)
    assert isinstance(again, Btp) and again.after == method.after and again.weights_sha256 == artifact.weights_sha256 != ""
    facts = json.loads((artifact.folder / "config.json").read_text())["facts"]
    assert facts["after"] == list(method.after) and len(facts["shift"]) == vlm.shape.layers - 1 and facts["images"] == 64
    assert (
        f"after the decoder layers {', '.join(map(str, sorted(set(method.after))))}." in (artifact.folder / "README.md").read_text()
    )
    told = describe(again)
    assert (told.label, told.kind, told.reads_question, told.reference) == ("BTP", "calibrated", True, "2505.22038")
    held = training.validation(vlm, "world", images=2, questions=1)
    tokens = vlm.encode(held.pixels)
    with torch.inference_mode():
        packed = pruning.shrink(vlm, held.prompts, tokens, again, Share(0.5))
        with pruning.running(vlm, packed) as cuts:
            vlm.model(**pruning.decoder_inputs(vlm, packed))
    assert cuts is not None
    plan = tokens_per_layer(again.cuts(Share(0.5), vlm.shape), vlm.num_visual_tokens, vlm.shape.layers)
    left = {layer: stage.tokens.counts.tolist() for layer, stage in cuts.stages.items()}
    assert left == {step.layer: [plan[step.layer]] * 2 for step in btp.joined(method.after)}
    assert abs(sum(plan) / len(plan) - vlm.num_visual_tokens / 2) <= 0.5


def test_what_it_costs_is_what_its_plan_says(tiny: Llava, tmp_path: Path) -> None:  # noqa: F811
    """Oracles: bytes that the cache holds, products that torch counts."""
    calibrated(btp.published(tiny.shape.layers), tiny.shape.layers).save_pretrained(tmp_path)
    spec = registry.spec("pruners", f"btp(weights='{tmp_path}')")
    left = tokens_per_layer(registry.make("pruners", spec).cuts(Keep(57), tiny.shape), 144, tiny.shape.layers)
    asked, clock = measuring.cells(tiny, [spec], [Keep(57)], TIMED), Fake()
    (found,) = measuring.measure(slowed(tiny, clock), asked, TIMED, clock).values()
    assert found.outcome.status == "ok", found.outcome.reason
    pruned = next(cost for cost in found.costs if cost.arm == "pruned")
    assert abs(pruned.visual_kept - 57) <= 0.5 and pruned.visual_kept == fmean(left) and len(set(left)) == 4
    assert pruned.kv_measured_bytes == pruned.kv_bytes == flops.kv_bytes(tiny.shape, left, pruned.text_tokens, 4)
    assert pruned.prefill_flops == flops.prefill_flops(tiny.shape, left, pruned.text_tokens)
    counted = pruned.prefill_flops + flops.causal_half(tiny.shape, left, pruned.text_tokens)
    shape, before = tiny.shape, [n + pruned.text_tokens for n in left[:3]]
    counted += sum(2 * n * shape.heads * shape.head_dim for n in before)  # one row of attention before each cut
    counted += 3 * 2 * 144 * 144 * shape.width  # cosines, in the places of all tokens
    assert pruned.counted_flops == pytest.approx(counted, rel=0.01)


@pytest.mark.parametrize("family", ["llava", "qwen3_vl", "gemma3"])
def test_it_generates_inside_the_models_own_calls(family: str) -> None:
    vlm, prompts, pixels, _ = batch(family)
    method = calibrated(btp.published(vlm.shape.layers), vlm.shape.layers)
    with torch.inference_mode(), diffprune.pruned(vlm.model, method, Share(0.5)) as session:
        made = generate(vlm, own(vlm, prompts, pixels), **MODES["greedy"])
        assert session.selection is not None and session.selection.keep.any(1).all()
        assert torch.equal(generate(vlm, own(vlm, prompts, pixels), **MODES["no cache"]), made)


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_what_cannot_be_is_refused_in_a_sentence(tmp_path: Path) -> None:
    for text in ("btp(lambdas=(0.5,))", "btp(lambdas=(2, 0, 0, 0))", "btp(lambdas='high')"):
        with pytest.raises(ValueError, match="give four shares from 0 to 1"):
            registry.load("pruners", text)
    with pytest.raises(ValueError, match="btp is not calibrated yet: train it"):
        Btp().select(seen(), at(1, 5))
    method = registry.load("pruners", "btp")
    method.fit(Calibration())
    other = SimpleNamespace(layers=9, visual_tokens=20)
    with pytest.raises(ValueError, match="calibrated for a decoder of 4 layers, this one has 9"):
        method.cuts(Keep(9), other)  # type: ignore[arg-type]
    method.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for change, message in (
        ({"layers": 2}, "must be four depths in order"),
        ({"method": "pore"}, "belong to 'pore', not to 'btp'"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(ValueError, match=message):
            registry.load("pruners", f"btp(weights='{tmp_path}')")
