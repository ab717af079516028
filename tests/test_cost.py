"""FLOPs and bytes against a hand count, the specification's table, and torch's own counter on a real model."""

from dataclasses import replace
from statistics import fmean

import pytest
import torch

from diffprune.core.budget import Above, Keep, Share
from diffprune.core.site import (
    ENCODED,
    PROJECTED,
    Cut,
    Site,
    Stage,
    in_order,
    layer_average,
    share_per_cut,
    staged,
    tokens_per_layer,
)
from diffprune.core.vlm import Shape
from diffprune.embedded import vlm as embedded
from diffprune.models.llava import Llava
from diffprune.timing import eager, flops, roofline
from diffprune.timing.clock import Clock
from diffprune.timing.eager import native, prepare
from diffprune.timing.measured_cost import cost_of, counted_encoder_flops, counted_flops
from diffprune.vlm.load import load

SEVEN = Shape(
    layers=32, width=4096, heads=32, kv_heads=32, head_dim=128, ffn=11008, vocabulary=32064,
    vision_layers=24, vision_width=1024, vision_ffn=4096, patches=577, patch_inputs=3 * 14 * 14,
)  # fmt: skip
QWEN = Shape(
    layers=28, width=3584, heads=28, kv_heads=4, head_dim=128, ffn=18944, vocabulary=152064,
    vision_layers=32, vision_width=1280, vision_ffn=5130, patches=5120, patch_inputs=1176,
)  # fmt: skip
TOY = Shape(
    layers=2, width=4, heads=2, kv_heads=1, head_dim=2, ffn=8, vocabulary=10,
    vision_layers=1, vision_width=2, vision_ffn=4, patches=5, patch_inputs=12,
)  # fmt: skip


@pytest.fixture(scope="module")
def tiny() -> Llava:
    return Llava(embedded.build(0), embedded.processor(), "tiny")


def test_hand_count_on_a_toy() -> None:
    # Loops over every multiply-add of a layer: 3 tokens, query width 4, key and value width 2, FFN 8.
    adds = 0
    for _ in range(TOY.layers):
        for position in range(3):
            adds += 4 * 4 + 4 * 2 + 4 * 2 + 4 * 4 + 3 * 4 * 8  # q, k, v, output, three FFN matrices
            for _key in range(position + 1):
                adds += 4 + 4  # q.k and weight x v, over both heads
    adds += 4 * 10
    assert flops.prefill_flops(TOY, (1, 1), 2) == 2 * adds
    assert flops.kv_bytes(TOY, (1, 1), 2, element_bytes=4) == TOY.layers * 3 * 2 * 2 * 4


@pytest.mark.parametrize("visual, tera", [(576, 8.397), (192, 3.333), (128, 2.497), (64, 1.662)])
def test_llava_7b_as_the_specification_computes_it(visual: int, tera: float) -> None:
    assert flops.prefill_flops(SEVEN, (visual,) * 32, 64) / 1e12 == pytest.approx(tera, abs=5e-4)


def test_llava_7b_encoder_and_cache() -> None:
    assert flops.encoder_flops(SEVEN) / 1e12 == pytest.approx(0.381, rel=0.02)
    assert flops.projector_flops(SEVEN, 576) / 1e12 == pytest.approx(0.024, rel=0.02)
    assert flops.kv_bytes(SEVEN, (128,) * 32, 64, element_bytes=2) == 96 * 2**20


# Computed by the specification, ms: H200 at batch 1 and 8, A100 at batch 1 and 8, 64 text tokens.
@pytest.mark.parametrize(
    "shape, visual, expected",
    [
        (SEVEN, 576, (11.46, 91.28, 28.89, 230.2)),
        (SEVEN, 192, (4.62, 36.55, 11.63, 92.15)),
        (SEVEN, 64, (3.05, 18.30, 7.31, 46.14)),
        (SEVEN, 2880, (54.74, 437.6, 138.1, 1104)),
        (QWEN, 1280, (24.47, 194.2, 61.72, 490.0)),
        (QWEN, 64, (3.23, 18.45, 7.75, 46.50)),
    ],
)
def test_roofline_as_the_specification_computes_it(shape: Shape, visual: int, expected: tuple[float, ...]) -> None:
    devices = [device for _, device in roofline.KNOWN if device.name in ("H200", "A100 80 GB")]
    found = [roofline.prefill_ms(device, shape, visual, 64, batch) for device in devices for batch in (1, 8)]
    assert found == pytest.approx(expected, rel=2e-3)


def test_the_parts_of_a_roofline_sum_to_the_flops() -> None:
    parts = flops.prefill_work(TOY, (3, 3), 2, 5, 2)
    assert sum(part.flops for part in parts) == 5 * flops.prefill_flops(TOY, (3, 3), 2)
    # One layer of the toy by hand, 25 rows: weights of q, k, v, then both sides of the product.
    assert parts[0].bytes == 2 * (4 * 8 + 25 * (4 + 8)) and parts[3].bytes == 2 * (4 * 16 + 25 * (4 + 16))


def test_tokens_follow_from_the_plan_alone() -> None:
    cuts = (Cut(ENCODED, Share(0.5)), Cut(PROJECTED, Keep(20)))
    assert tokens_per_layer(cuts, 144, 4) == (20, 20, 20, 20)
    assert tokens_per_layer((), 144, 2) == (144, 144)
    with pytest.raises(ValueError, match="different number"):
        tokens_per_layer((Cut(ENCODED, Above(0.0)),), 144, 4)


def after(*layers: int) -> tuple[Site, ...]:
    return tuple(Site(Stage.DECODER, layer) for layer in layers)


def test_sites_are_ordered_along_the_model() -> None:
    late, early = after(16, 2)
    assert ENCODED < PROJECTED < early < late
    plan = (Cut(late, Keep(4)), Cut(ENCODED, Keep(9)), Cut(early, Keep(6)))
    assert [cut.site for cut in in_order(plan)] == [ENCODED, early, late]
    for stage, layer in ((Stage.DECODER, 0), (Stage.ENCODED, 3), (Stage.DECODER, -1)):
        with pytest.raises(ValueError, match="after layer 1 or later"):
            Site(stage, layer)


def test_cuts_inside_the_decoder_save_in_the_layers_behind_them() -> None:
    two, three = after(2, 3)
    cuts = (Cut(three, Share(0.5)), Cut(two, Keep(100)))
    assert tokens_per_layer(cuts, 144, 5) == (144, 144, 100, 50, 50)
    assert tokens_per_layer((Cut(PROJECTED, Keep(60)), *cuts), 144, 5) == (60, 60, 60, 30, 30)
    with pytest.raises(ValueError, match="saves nothing in a decoder of 3 layers"):
        tokens_per_layer(cuts, 144, 3)


def test_cost_of_a_staged_plan_is_the_sum_of_its_layers() -> None:
    """Oracle: a decoder of one layer, once per layer, with as many tokens as that layer sees."""
    shape, (two,) = replace(TOY, layers=4), after(2)
    visual, one = tokens_per_layer((Cut(two, Keep(3)),), 10, 4), replace(TOY, layers=1)
    head = 2 * shape.width * shape.vocabulary
    assert flops.prefill_flops(shape, visual, 2) == sum(flops.prefill_flops(one, (n,), 2) - head for n in (10, 10, 3, 3)) + head
    assert flops.kv_bytes(shape, visual, 2, 2) == sum(flops.kv_bytes(one, (n,), 2, 2) for n in (10, 10, 3, 3))


@pytest.mark.parametrize("layers, cuts", [(32, (2,)), (32, (8, 16, 24)), (28, (1, 5, 9, 20)), (2, (1,))])
@pytest.mark.parametrize("average", [0.2, 1 / 3, 0.64, 1.0])
def test_the_budget_of_a_staged_plan_is_its_layer_average(layers: int, cuts: tuple[int, ...], average: float) -> None:
    """Oracle: the mean, layer by layer, of the share that is left there."""
    if cuts[0] / layers >= average:
        with pytest.raises(ValueError, match="cannot be met by a cut after layer"):
            share_per_cut(average, layers, cuts)
        return
    share = share_per_cut(average, layers, cuts)
    left = [share ** sum(layer >= cut for cut in cuts) for layer in range(layers)]
    assert sum(left) / layers == pytest.approx(average, abs=1e-12) == pytest.approx(layer_average(share, layers, cuts), abs=1e-12)
    if len(cuts) == 1:  # closed form
        assert share == pytest.approx((average * layers - cuts[0]) / (layers - cuts[0]))
    for budget in (Share(average), Keep(round(576 * average))):
        seen = tokens_per_layer(staged(budget, layers, cuts), 576, layers)
        assert fmean(seen) == pytest.approx(budget.count(576), abs=1.5)
        assert list(seen) == sorted(seen, reverse=True) and seen[0] == 576


def test_plans_that_make_no_sense_are_refused() -> None:
    for cuts in ((), (0,), (5, 3), (2, 2), (32,)):
        with pytest.raises(ValueError, match="give each layer once, in order, from 1 to 31"):
            share_per_cut(0.5, 32, cuts)
    with pytest.raises(ValueError, match="needs a count"):
        staged(Above(0.5), 32, (2,))


@pytest.mark.parametrize("kept", [144, 32, 8])
@torch.inference_mode()
def test_decoder_against_torchs_counter(tiny: Llava, kept: int) -> None:
    inputs = prepare(tiny, _pictures(1), ["is there a red circle"], frozenset())
    ready = native(tiny, inputs, [kept])
    visual, text = (kept,) * tiny.shape.layers, ready.sequence - kept
    expected = flops.prefill_flops(tiny.shape, visual, text) + flops.causal_half(tiny.shape, visual, text)
    assert counted_flops(tiny, ready) == pytest.approx(expected, rel=0.02)


@torch.inference_mode()
def test_encoder_against_torchs_counter(tiny: Llava) -> None:
    assert counted_encoder_flops(tiny, tiny.pixels(_pictures(1))) == pytest.approx(flops.encoder_flops(tiny.shape), rel=0.02)


def test_the_encoder_of_a_picture_in_tiles_is_counted_by_its_tiles() -> None:
    """Oracle: that of one tile, by the tiles that the processor made. The formula leaves out what joins patches."""
    from PIL import Image

    vlm = load("tiny(internvl)", device="cpu")
    one, several = (vlm.pixels([Image.new("RGB", size)]) for size in ((16, 16), (64, 16)))
    tiles = int(several["num_tiles"].sum())
    assert tiles > 1 and int(one["num_tiles"].sum()) == 1
    assert counted_encoder_flops(vlm, several) == tiles * counted_encoder_flops(vlm, one)
    assert counted_encoder_flops(vlm, one) == pytest.approx(flops.encoder_flops(vlm.shape), rel=0.2)


@pytest.mark.parametrize("family", ["paligemma", "gemma3", "qwen2_vl"])
@torch.inference_mode()
def test_tokens_that_see_each_other_both_ways_are_counted_so(family: str) -> None:
    """Oracle: the pairs one by one. PaliGemma's prompt is all of one block, which is what torch counts; Gemma's pictures are."""
    vlm, clock = load(f"tiny({family})", device="cpu"), Clock()
    inputs = prepare(vlm, _pictures(1), ["is there a red circle"], frozenset())
    kept = 3
    ready = native(vlm, inputs, [kept])
    found, shape = cost_of(vlm, "native", ready, inputs.pixels, clock, eager), vlm.shape
    length = ready.sequence
    visual = set(ready.packed.prompts.slots[0].nonzero()[:, 0].tolist())
    assert len(visual) == kept
    block = {"paligemma": set(range(length)), "gemma3": visual, "qwen2_vl": set()}[family]
    pairs = sum(key <= query or {key, query} <= block for query in range(length) for key in range(length))
    attended = shape.layers * shape.heads * shape.head_dim
    causal = flops.prefill_flops(shape, (kept,) * shape.layers, length - kept)
    assert found.prefill_flops == causal + 4 * attended * (pairs - length * (length + 1) // 2)
    more = flops.causal_half(shape, (kept,) * shape.layers, length - kept, (len(block),) * shape.layers)
    assert found.counted_flops == pytest.approx(found.prefill_flops + more, rel=0.02) and (more == 0) == (family == "paligemma")


def _pictures(number: int) -> list:  # type: ignore[type-arg]
    from PIL import Image

    from diffprune.embedded.world import scene

    return [Image.fromarray(scene(2_000_000_000 + i).image) for i in range(number)]
