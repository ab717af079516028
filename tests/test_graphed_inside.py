"""Cuts inside the decoder with fixed shapes: what mode graph captures, against the path that shortens exactly."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from statistics import fmean
from typing import Any

import pytest
import torch
from torch import Tensor

from diffprune import pruning
from diffprune.core import registry
from diffprune.core.budget import Budget, Share
from diffprune.core.pruner import Pruner
from diffprune.core.site import tokens_per_layer
from diffprune.core.tokens import VisualTokens
from diffprune.pruning.decoder_cuts import Inside
from diffprune.pruning.stages import Length, Stage
from diffprune.timing import cuda_graph, eager, fixed_shape, flops
from diffprune.timing.captured import Captured
from diffprune.timing.clock import Clock, clocks
from diffprune.timing.cuda_graph import Graphs
from diffprune.timing.eager import Inputs
from diffprune.timing.options import Measurement
from diffprune.timing.session import Session
from tests.test_decoder_cuts import LAYERS, deep
from tests.test_graphed import FAMILIES, QUESTIONS, Done, Replayed, Valueless, noise
from tests.test_measure import Fake

SERVED = ("fastv", "fastv(after=2)", "pyramiddrop", "dynamic_llava", "pore(fastv)")


@pytest.fixture(autouse=True)
def no_gradient() -> Iterator[None]:
    with torch.inference_mode():
        yield


@cache
def asked(family: str, seed: int = 0) -> Inputs:
    return eager.prepare(deep(family), noise(family, QUESTIONS, seed), QUESTIONS, frozenset())


def made(spelling: str, vlm: Any) -> Pruner:
    pruner: Any = registry.load("pruners", spelling)
    if spelling.startswith("pore"):
        pruner.sigma, pruner.weights_sha256 = 1.0, "0" * 20
    if spelling == "dynamic_llava":
        chance = torch.Generator().manual_seed(5)
        states = torch.randn(2, 16, vlm.shape.width, generator=chance)
        torch.manual_seed(0)
        pruner.build(VisualTokens(states, torch.ones(2, 16, dtype=torch.bool)))
        pruner.networks.eval().requires_grad_(False)
    return pruner  # type: ignore[no-any-return]


def exact(vlm: Any, inputs: Inputs, pruner: Pruner, budget: Budget) -> tuple[pruning.Packed, Any]:
    packed = pruning.shrink(vlm, inputs.prompts, inputs.for_(pruner), pruner, budget)
    return packed, pruning.forward(vlm, packed, use_cache=True, logits_to_keep=1)


@pytest.mark.parametrize("spelling", SERVED)
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_choices_and_caches_are_those_of_the_exact_path(family: str, spelling: str) -> None:
    """Two questions of different length, so that rows are padded from the start; buckets are wider than what is left."""
    vlm, inputs = deep(family), asked(family)
    pruner, mode = made(spelling, vlm), Graphs(vlm, 8, Replayed)
    for budget in (Share(0.6), Share(0.8), Share(1.0)):
        ready, spans = mode.shrink(vlm, inputs, pruner, budget, Clock())
        found = mode.prefill(vlm, ready, Clock()).output
        packed, wanted = exact(vlm, inputs, pruner, budget)
        torch.testing.assert_close(found.logits[:, -1], wanted.logits[:, -1], rtol=0, atol=1e-5)
        for kept, theirs in zip(found.left, packed.inside.left.values(), strict=True):
            assert torch.equal(kept, theirs)
        held = [layer.keys.shape[2] for layer in wanted.past_key_values.layers]
        assert all(own <= bucket <= max(held[0], own + 7) for own, bucket in zip(held, found.lengths, strict=True))
        assert (found.lengths[-1] < found.lengths[0]) == (budget != Share(1.0))
        assert mode.prove_removed(ready, found) == found.bytes == sum(found.lengths) * 2 * _per_token(vlm)
        assert ready.packed.averages(LAYERS) == packed.averages(LAYERS) and spans["overhead"] == 0 < spans["project"]
    assert mode.differences["logits"] < 1e-5 and mode.differences["choice"] == 0


def _per_token(vlm: Any) -> int:
    return int(flops.kv_bytes(vlm.shape, (1,) * LAYERS, 0, 4)) // LAYERS


def test_a_replay_reads_its_new_arguments() -> None:
    vlm = deep("llava_next")
    pruner, mode = made("pyramiddrop", vlm), Graphs(vlm, 8, Replayed)
    for seed in (0, 1, 0):
        inputs = asked("llava_next", seed)
        found = mode.prefill(vlm, mode.shrink(vlm, inputs, pruner, Share(0.6), Clock())[0], Clock()).output
        wanted = exact(vlm, inputs, pruner, Share(0.6))[1]
        torch.testing.assert_close(found.logits, wanted.logits, rtol=0, atol=1e-5)
    assert len(mode._made) == 1
    mode.prefill(vlm, mode.shrink(vlm, inputs, made("pyramiddrop", vlm), Share(0.6), Clock())[0], Clock())
    assert len(mode._made) == 2, "another method is another graph"


def test_lengths_are_those_of_the_plan() -> None:
    vlm, inputs = deep("llava"), asked("llava")
    pruner = made("pyramiddrop", vlm)
    packed = pruning.shrink(vlm, inputs.prompts, inputs.tokens, pruner, Share(0.6))
    left = tokens_per_layer(packed.inside.cuts, inputs.tokens.valid.shape[1], LAYERS)
    text = (packed.prompts.attention_mask.sum(1) - left[0]).tolist()
    assert fixed_shape.lengths(packed.inside, packed.prompts, 1) == {
        number: Length(left[number] + max(text), False) for number in range(LAYERS)
    }
    same = packed.prompts[torch.tensor([0, 0])]
    shown = Inside(pruner, packed.inside.cuts, inputs.tokens[torch.tensor([0, 0])])
    assert all(length.whole for length in fixed_shape.lengths(shown, pruning.cut(same, same.attention_mask.bool()), 1).values())


# --- nothing asks the device ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spelling", SERVED)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_prefill_with_cuts_asks_the_device_for_nothing(family: str, spelling: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of what is captured, layers and cuts and choices, on torch's meta device."""
    inputs, pruner = asked(family), made(spelling, deep(family))
    mode = Graphs(deep(family), 8, Replayed)
    ready = mode.shrink(deep(family), inputs, pruner, Share(0.6), Clock())[0]
    packed = pruning.shrink(deep(family), inputs.prompts, inputs.tokens, pruner, Share(0.6))
    vlm = deep.__wrapped__(family)
    vlm.model.to("meta")
    if hasattr(pruner, "networks"):
        pruner.to("meta")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    valueless = Graphs(vlm, 8, Valueless)
    with pytest.raises(Done):
        valueless.prefill(vlm, ready, Clock())
    with pytest.raises((RuntimeError, NotImplementedError)):  # the exact path does ask
        Stage.entering(packed.prompts.to("meta"), packed.inside.tokens.map(lambda value: value.to("meta")))


# --- what it costs ----------------------------------------------------------------------------------------------------


def test_what_a_method_adds_inside_is_overhead_and_no_prefill(monkeypatch: pytest.MonkeyPatch) -> None:
    vlm, inputs, clock = deep("llava"), asked("llava"), Fake()
    pruner, mode = made("pyramiddrop", vlm), Graphs(vlm, 8, Replayed)
    mode.marks = clock
    monkeypatch.setattr(pruner, "score", clock.costing(3.0, pruner.score))
    layers = vlm.model.get_decoder().layers
    hooks = [layer.register_forward_pre_hook(lambda *_: clock.advance(10.0)) for layer in layers]
    try:
        ready = mode.shrink(vlm, inputs, pruner, Share(0.6), clock)[0]
        for _ in range(2):
            done = mode.prefill(vlm, ready, clock)
            assert done.overhead == pytest.approx(3.0 * len(ready.packed.inside.cuts)) and done.ms == pytest.approx(10.0 * LAYERS)
    finally:
        for hook in hooks:
            hook.remove()


def test_a_session_times_it_beside_its_native_rows() -> None:
    vlm, options = deep("qwen2_5_vl"), Measurement(rounds=2, warmup=1, slow_rounds=2, inputs=1, threads=1)
    session = Session(vlm, [asked("qwen2_5_vl")], options, Clock(), Clock(), Graphs(vlm, 8, Replayed))
    pruned, native = session.add(made("fastv", vlm), Share(0.6))
    session.run()
    assert not pruned.error and not native.error, (pruned.error, native.error)
    assert {"prefill", "overhead", "ttft"} <= pruned.found.keys() and all(ms > 0 for _, ms in pruned.found["overhead"])
    cost, total = session.cost(pruned), asked("qwen2_5_vl").tokens.valid.shape[1]
    left = tokens_per_layer(pruned.pruner.cuts(Share(0.6), vlm.shape), total, LAYERS)
    assert cost.visual_kept == fmean(left) == pruned.sizes[0][0] and native.sizes[0][0] == round(fmean(left))
    assert cost.kv_measured_bytes >= cost.kv_bytes and cost.prefill_flops == flops.prefill_flops(vlm.shape, left, cost.text_tokens)


# --- what is found out and refused ------------------------------------------------------------------------------------


def test_a_wrong_graph_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    vlm, inputs, pruner = deep("llava"), asked("llava"), made("fastv", deep("llava"))
    ready: Any = Graphs(vlm, 8, Replayed).shrink(vlm, inputs, pruner, Share(0.6), Clock())[0]
    right: Any = cuda_graph._prefilled

    def wrong(change: Any) -> Graphs:
        monkeypatch.setattr(cuda_graph, "_prefilled", lambda *given: change(right(*given)))
        return Graphs(vlm, 8, Replayed)

    with pytest.raises(RuntimeError, match="other tokens than mode eager"):
        wrong(lambda found: found._replace(left=tuple(one.roll(1, 1) for one in found.left))).prefill(vlm, ready, Clock())
    with pytest.raises(RuntimeError, match="logits of mode graph differ"):
        wrong(lambda found: found._replace(logits=found.logits * 1.1)).prefill(vlm, ready, Clock())
    mode = wrong(lambda found: found._replace(lengths=(*found.lengths[:-1], found.lengths[0])))
    with pytest.raises(RuntimeError, match=r"\(layer 3\)"):
        mode.prove_removed(ready, mode.prefill(vlm, ready, Clock()).output)


@pytest.mark.parametrize(
    ("spelling", "message"),
    [
        ("sparsevlm", "sparsevlm: mode graph serves methods that score"), ("dart", "dart: mode graph serves methods that score"),
        ("btp", "btp: mode graph serves methods that score"), ("atp", "atp: mode graph serves methods that score"),
        ("replaced(fastv)", "replaced: mode graph serves methods that score"),
    ],
)  # fmt: skip
def test_what_has_no_fixed_shape_inside_is_refused(spelling: str, message: str) -> None:
    vlm = deep("llava")
    with pytest.raises(ValueError, match=message):
        Graphs(vlm, 8, Replayed).shrink(vlm, asked("llava"), registry.load("pruners", spelling), Share(0.6), Clock())


def test_counts_that_differ_are_refused() -> None:
    vlm, pruner = deep("llava"), made("fastv", deep("llava"))
    packed = pruning.shrink(vlm, asked("llava").prompts, asked("llava").tokens, pruner, Share(0.6))
    adaptive = Inside(pruner, tuple(replace(cut, adaptive=True) for cut in packed.inside.cuts), packed.inside.tokens)
    with pytest.raises(ValueError, match="FastV keeps a different number of tokens per image"):
        fixed_shape.lengths(adaptive, packed.prompts, 8)
    fewer: Tensor = packed.inside.tokens.valid.clone()
    fewer[1, -4:] = False
    with pytest.raises(ValueError, match="images of one size"):
        fixed_shape.lengths(Inside(pruner, packed.inside.cuts, replace(packed.inside.tokens, valid=fewer)), packed.prompts, 8)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("spelling", SERVED)
@pytest.mark.parametrize("family", FAMILIES)
def test_captured_prefills_with_cuts_say_what_the_model_says(family: str, spelling: str, dtype: torch.dtype) -> None:
    vlm = deep.__wrapped__(family)
    vlm.model.to("cuda", dtype)
    vlm.device = torch.device("cuda")
    inputs = eager.prepare(vlm, noise(family, QUESTIONS, 0), QUESTIONS, frozenset())
    pruner, mode, (clock, _) = made(spelling, vlm), Graphs(vlm, 8, Captured), clocks(vlm.device)
    for budget in (Share(0.6), Share(0.8), Share(0.6)):
        ready, _ = mode.shrink(vlm, inputs, pruner, budget, clock)
        done = mode.prefill(vlm, ready, clock)
        assert done.output.logits.isfinite().all() and done.ms > 0
        assert 0 < done.overhead < 100, "marks in the graph are set anew by every replay"
    assert mode.differences["logits"] <= cuda_graph.TOLERANCE[dtype]
