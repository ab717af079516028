"""What cuts inside the decoder cost: time charged to whom it belongs, tokens per layer from the plan, FLOPs and bytes."""

from __future__ import annotations

from dataclasses import replace
from statistics import fmean

import pytest
import torch

from diffprune import pruning
from diffprune.core import registry
from diffprune.core.budget import Budget, Keep, Share
from diffprune.core.site import ENCODED, Cut, Plan, Site, Stage
from diffprune.core.spec import Spec
from diffprune.core.tokens import Selection, VisualTokens
from diffprune.evaluate.backend import Question, Refused, Shown
from diffprune.evaluate.transformers_backend import TransformersBackend
from diffprune.job.preflight import _try
from diffprune.models.llava import Llava
from diffprune.timing import eager, flops
from diffprune.timing.clock import Clock
from diffprune.timing.measured_cost import cost_of, counted_flops
from diffprune.timing.session import Session
from tests.test_decoder_cuts import Staged, deep
from tests.test_families import pictures
from tests.test_measure import TIMED, Fake, _asked, run, slowed, tiny  # noqa: F401

LAYERS = 4


def inside(layer: int, budget: Budget) -> Cut:
    return Cut(Site(Stage.DECODER, layer), budget)


@pytest.mark.parametrize(
    ("name", "left"), [("fastv", (144, 24, 24, 24)), ("dart", (144, 24, 24, 24)), ("pyramiddrop", (144, 55, 21, 8))]
)
def test_cost_rows_follow_from_the_plan_and_are_what_is_counted(tiny: Llava, name: str, left: tuple[int, ...]) -> None:  # noqa: F811
    budget = str(Keep(round(fmean(left))))
    found = run(tiny, Fake(), [name], [budget])[name, budget]
    costs = {c.arm: c for c in found.costs}
    pruned, native = costs["pruned"], costs["native"]
    assert pruned.visual_kept == fmean(left) and native.visual_kept == round(fmean(left))
    assert pruned.kv_measured_bytes == pruned.kv_bytes == flops.kv_bytes(tiny.shape, left, pruned.text_tokens, 4)
    assert pruned.prefill_flops == flops.prefill_flops(tiny.shape, left, pruned.text_tokens)
    counted = pruned.prefill_flops + flops.causal_half(tiny.shape, left, pruned.text_tokens)
    if name == "pyramiddrop":  # looks at the next layer's queries and keys, which come with its values, of all that is still there
        shape, before = tiny.shape, (n + pruned.text_tokens for n in left[:3])
        counted += sum(2 * n * shape.width * (shape.heads + 2 * shape.kv_heads) * shape.head_dim for n in before)
    assert pruned.counted_flops == pytest.approx(counted, rel=0.02)
    assert {t.visual_kept for t in found.timings if t.arm == "pruned"} == {fmean(left)}


@torch.inference_mode()
def test_counted_flops_are_those_of_the_plan_alone_where_nothing_is_looked_at(tiny: Llava) -> None:  # noqa: F811
    """torch's counter against the formula, exactly the same matrix products."""
    inputs = eager.prepare(tiny, *_asked(1), frozenset())
    plans: tuple[Plan, ...] = ((inside(2, Keep(10)),), (Cut(ENCODED, Keep(90)), inside(1, Keep(40)), inside(3, Keep(5))))
    for plan in plans:
        ready, _ = eager.shrink(tiny, inputs, Staged(plan), Share(1), Clock())
        visual = ready.packed.per_layer(LAYERS)[0]
        text = int(ready.packed.prompts.attention_mask.sum()) - visual[0]
        counter = counted_flops(tiny, ready)
        wanted = flops.prefill_flops(tiny.shape, visual, text) + flops.causal_half(tiny.shape, visual, text)
        plain = counted_flops(tiny, eager.native(tiny, inputs, [144]))
        more = flops.prefill_flops(tiny.shape, (144,) * LAYERS, text) + flops.causal_half(tiny.shape, (144,) * LAYERS, text)
        assert plain - counter == pytest.approx(more - wanted, rel=1e-6), "what is saved is what the plan says"


@torch.inference_mode()
@pytest.mark.parametrize("family", ["llava_next", "llava_onevision"])
def test_separators_that_leave_with_their_rows_are_in_no_later_layers_cost(family: str) -> None:
    vlm, clock, plan = deep(family), Clock(), (inside(1, Share(0.25)), inside(3, Keep(5)))
    inputs = eager.prepare(vlm, pictures()[:1], ["what is this"], frozenset())
    rows = [eager.native(vlm, inputs, inputs.tokens.counts.tolist()), eager.shrink(vlm, inputs, Staged(plan), Share(1), clock)[0]]
    full, pruned = (cost_of(vlm, "pruned", ready, inputs.pixels, clock, eager) for ready in rows)
    beside = rows[1].packed.separators(LAYERS)[0]
    assert beside[0] > beside[1] >= beside[3] >= 0 and rows[0].packed.separators(LAYERS)[0] == (beside[0],) * LAYERS
    assert pruned.kv_bytes == pruned.kv_measured_bytes and full.kv_bytes == full.kv_measured_bytes
    text = int(pruned.text_tokens)
    others = [text - beside[0] + there for there in beside]
    more = full.prefill_flops + flops.causal_half(vlm.shape, [full.visual_kept] * LAYERS, full.text_tokens)
    wanted = pruned.prefill_flops + flops.causal_half(vlm.shape, rows[1].packed.per_layer(LAYERS)[0], others)
    assert full.counted_flops - pruned.counted_flops == pytest.approx(more - wanted, rel=1e-6)


class Slow(Staged):
    """Choosing takes 3 ms on a fake clock, before the decoder and inside it."""

    def __init__(self, clock: Fake, plan: Plan) -> None:
        super().__init__(plan)
        self.clock, self.spec = clock, Spec("slow")

    def select(self, tokens: VisualTokens, cut: Cut) -> Selection:
        self.clock.advance(3.0)
        return super().select(tokens, cut)


@pytest.mark.parametrize("plan", [(inside(1, Keep(9)),), (Cut(ENCODED, Keep(60)), inside(1, Keep(9)), inside(2, Keep(4)))])
@torch.inference_mode()
def test_choosing_inside_the_decoder_is_overhead_and_no_prefill(tiny: Llava, plan: Plan) -> None:  # noqa: F811
    clock = Fake()
    vlm, method = slowed(tiny, clock), Slow(clock, plan)
    inputs = eager.prepare(vlm, *_asked(2), frozenset())
    session = Session(vlm, [inputs], TIMED, clock, clock)
    pruned, _ = session.add(method, Share(1))
    session.run()
    assert not pruned.error, pruned.error
    spans: dict[str, list[float]] = {name: [ms for _, ms in values] for name, values in pruned.found.items()}
    for ms in spans["overhead"]:
        assert ms == pytest.approx(3.0 * len(plan))
    for ms in spans["prefill"]:
        assert ms == pytest.approx(1 + 0.1 * pruned.sizes[0][1])
    for parts in zip(spans["score"], spans["select"], spans["gather"], strict=True):
        assert sum(parts) == pytest.approx(3.0 * len(plan))


class Uneven(Staged):
    """Keeps as many as are above its mean."""

    spec = Spec("uneven")

    def select(self, tokens: VisualTokens, cut: Cut) -> Selection:
        score = self.score(tokens).where(tokens.valid, torch.nan)
        return Selection(score > score.nanmean(1, keepdim=True))


@torch.inference_mode()
def test_counts_that_a_method_chooses_inside_the_decoder_are_those_it_has_chosen(tiny: Llava) -> None:  # noqa: F811
    inputs, clock = eager.prepare(tiny, *_asked(3), frozenset()), Clock()
    method = Uneven((replace(inside(1, Share(1 / 2)), adaptive=True),))
    session = Session(tiny, [inputs], TIMED, clock, clock)
    pruned, native = session.add(method, Share(1))
    session.run()
    assert not pruned.error and not native.error, (pruned.error, native.error)
    ready = eager.shrink(tiny, inputs, method, Share(1), clock)[0]
    with pruning.running(tiny, ready.packed):
        tiny.model(**ready.keywords)
    chosen = [row[1] for row in ready.packed.per_layer(LAYERS)]
    assert len(set(chosen)) > 1, "every image keeps as many: nothing is tried"
    averages = [(144 + (LAYERS - 1) * num) / LAYERS for num in chosen]
    assert pruned.sizes[0][0] == pytest.approx(fmean(averages))
    assert native.sizes[0][0] == fmean(round(one) for one in averages)
    cost = session.cost(pruned)
    assert cost.visual_kept == min(averages, key=lambda one: abs(one - fmean(averages)))


@pytest.mark.parametrize("name", ["llava", "llava_next"])
@torch.inference_mode()
def test_tokens_that_are_only_hidden_in_one_layer_are_found_out(name: str) -> None:
    vlm = deep(name)
    inputs = eager.prepare(vlm, pictures()[:1], ["what?"], frozenset())
    ready, _ = eager.shrink(vlm, inputs, Staged((inside(1, Keep(6)), inside(3, Keep(3)))), Share(1), Clock())
    output = eager.prefill(vlm, ready, Clock()).output
    assert eager.prove_removed(ready, output) == sum(
        2 * layer.keys.numel() * layer.keys.element_size() for layer in output.past_key_values.layers
    )
    layer = output.past_key_values.layers[2]
    for kind in ("keys", "values"):
        held = getattr(layer, kind)
        setattr(layer, kind, torch.cat([held] * 3, 2))
    with pytest.raises(RuntimeError, match=r"hidden, not removed \(layer 2\)"):
        eager.prove_removed(ready, output)


def test_answers_say_the_average_over_layers(tiny: Llava) -> None:  # noqa: F811
    backend = TransformersBackend(tiny)
    asked = [Question((Shown(str(i), lambda i=i: pictures()[i]),), "what?") for i in range(2)]
    answers = backend.answer(asked, registry.load("pruners", "pyramiddrop"), Keep(57), 2)
    assert [answer.visual_kept for answer in answers] == [57, 57]
    with pytest.raises(Refused, match="the layers before it alone make"):
        backend.answer(asked, registry.load("pruners", "fastv"), Keep(20), 2)


def test_a_job_tries_methods_through_the_decoder_before_it_starts(tiny: Llava) -> None:  # noqa: F811
    class Broken(Staged):
        def select(self, tokens: VisualTokens, cut: Cut) -> Selection:
            raise ValueError("no such layer")

    with pytest.raises(ValueError, match="no such layer"):
        _try(tiny, Broken((inside(1, Keep(4)),)), ((pictures()[0],), "what?"), [Share(1)])
