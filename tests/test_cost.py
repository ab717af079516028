"""FLOPs and bytes against a hand count, the specification's table, and torch's own counter on a real model."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from diffprune.core import cost
from diffprune.core.budget import Above, Keep, Share
from diffprune.core.pruner import Cut, Stage
from diffprune.core.vlm import Shape
from diffprune.embedded import vlm as embedded
from diffprune.measure import counted_flops
from diffprune.models.llava import Llava
from diffprune.timed import native, prepare

SEVEN = Shape(
    layers=32, width=4096, heads=32, kv_heads=32, head_dim=128, ffn=11008, vocabulary=32064,
    vision_layers=24, vision_width=1024, vision_ffn=4096, patches=577, patch_inputs=3 * 14 * 14,
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
    assert cost.prefill_flops(TOY, (1, 1), 2) == 2 * adds
    assert cost.kv_bytes(TOY, (1, 1), 2, element_bytes=4) == TOY.layers * 3 * 2 * 2 * 4


@pytest.mark.parametrize("visual, tera", [(576, 8.397), (192, 3.333), (128, 2.497), (64, 1.662)])
def test_llava_7b_as_the_specification_computes_it(visual: int, tera: float) -> None:
    assert cost.prefill_flops(SEVEN, (visual,) * 32, 64) / 1e12 == pytest.approx(tera, abs=5e-4)


def test_llava_7b_encoder_and_cache() -> None:
    assert cost.encoder_flops(SEVEN) / 1e12 == pytest.approx(0.381, rel=0.02)
    assert cost.projector_flops(SEVEN, 576) / 1e12 == pytest.approx(0.024, rel=0.02)
    assert cost.kv_bytes(SEVEN, (128,) * 32, 64, element_bytes=2) == 96 * 2**20


def test_tokens_follow_from_the_plan_alone() -> None:
    cuts = (Cut(Stage.ENCODED, Share(0.5)), Cut(Stage.PROJECTED, Keep(20)))
    assert cost.tokens_per_layer(cuts, 144, 4) == (20, 20, 20, 20)
    assert cost.tokens_per_layer((), 144, 2) == (144, 144)
    assert cost.layer_average((576, 576, 64, 64)) == 320
    with pytest.raises(ValueError, match="different number"):
        cost.tokens_per_layer((Cut(Stage.ENCODED, Above(0.0)),), 144, 4)


@pytest.mark.parametrize("kept", [144, 32, 8])
@torch.inference_mode()
def test_decoder_against_torchs_counter(tiny: Llava, kept: int) -> None:
    inputs = prepare(tiny, _pictures(1), ["is there a red circle"], frozenset())
    ready = native(tiny, inputs, [kept])
    visual, text = (kept,) * tiny.shape.layers, ready.sequence - kept
    expected = cost.prefill_flops(tiny.shape, visual, text) + cost.causal_half(tiny.shape, visual, text)
    assert counted_flops(tiny, ready) == pytest.approx(expected, rel=0.02)


@torch.inference_mode()
def test_encoder_against_torchs_counter(tiny: Llava) -> None:
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        tiny.encode(tiny.pixels(_pictures(1)))
    assert counter.get_total_flops() == pytest.approx(cost.encoder_flops(tiny.shape), rel=0.02)


def _pictures(number: int) -> list:  # type: ignore[type-arg]
    from PIL import Image

    from diffprune.embedded.world import scene

    return [Image.fromarray(scene(2_000_000_000 + i).image) for i in range(number)]
