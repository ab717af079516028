"""Rows of fixed length against the path that shortens exactly; nothing that a graph would contain asks the device for a value."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from dataclasses import fields
from functools import cache
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from diffprune import pruning
from diffprune.core import registry
from diffprune.core.budget import Above, Budget, Keep, Share, parse, top
from diffprune.core.pruner import Pruner, ScorePruner
from diffprune.core.spec import Spec
from diffprune.core.tokens import VisualTokens
from diffprune.core.vlm import VLM, Prompts
from diffprune.measure import measure
from diffprune.timing import captured, cuda_graph, eager, fixed_shape
from diffprune.timing.captured import Captured
from diffprune.timing.clock import Clock
from diffprune.timing.cuda_graph import Graphs
from diffprune.timing.eager import Inputs
from diffprune.timing.options import Measurement
from diffprune.timing.session import Session

FAMILIES = {"llava": 32, "llava_next": 64, "qwen2_5_vl": 48}  # side of a picture, px
BUDGETS = ("Keep(3)", "Share(1/3)", "Share(1)")
QUESTIONS = ("which of the two?", "what?")


class Replayed:
    """`Captured` without CUDA: arguments are copied into tensors of its own, and the answer into the first answer's."""

    def __init__(self, call: Callable[..., Any], inputs: Sequence[Tensor], pool: Any) -> None:
        self.inputs, self.call = [tensor.clone() for tensor in inputs], call
        self.answer = call(*self.inputs)

    def __call__(self, *values: Tensor) -> Any:
        for own, value in zip(self.inputs, values, strict=True):
            own.copy_(value)
        _overwrite(self.answer, self.call(*self.inputs))
        return self.answer

    @staticmethod
    def pool() -> None:
        return None


def _overwrite(old: Any, new: Any) -> None:
    if isinstance(old, Tensor):
        old.copy_(new)
    elif isinstance(old, tuple):
        for first, second in zip(old, new, strict=True):
            _overwrite(first, second)


@pytest.fixture(autouse=True)
def no_gradient() -> Iterator[None]:
    with torch.inference_mode():
        yield


@cache
def tiny(family: str) -> VLM:
    made: VLM = registry.find("models", family).tiny()
    return made


def noise(family: str, questions: Sequence[str], seed: int) -> list[Image.Image]:
    """One picture for each question."""
    side, rng = FAMILIES[family], np.random.default_rng(seed)
    return [Image.fromarray(rng.integers(0, 255, (side, side, 3), dtype=np.uint8)) for _ in questions]


@cache
def asked(family: str, seed: int = 0, questions: tuple[str, ...] = QUESTIONS) -> Inputs:
    return eager.prepare(tiny(family), noise(family, questions, seed), questions, frozenset())


@cache
def scorer(family: str) -> Pruner:
    torch.manual_seed(0)
    made: Any = registry.load("pruners", "diffprune")
    made.build(asked(family).tokens)
    made.networks.eval().requires_grad_(False)
    return made  # type: ignore[no-any-return]


class Coarse(ScorePruner):
    """Scores with many ties."""

    spec = Spec("coarse")

    def score(self, tokens: VisualTokens) -> Tensor:
        return (tokens.features.float().sum(-1) * 2).round()


def same_prompts(one: Prompts, other: Prompts) -> bool:
    """All fields but those that are only read before the cut, and the index, by which windows are measured: mode graph has none."""
    names = [f.name for f in fields(Prompts) if f.name not in ("question", "labels", "index", "token_types")]
    return all(torch.equal(getattr(one, n).long(), getattr(other, n).long()) for n in names)


def both(family: str, pruner: Pruner, budget: Budget, mode: Graphs | None = None) -> tuple[eager.Ready, Any]:
    """(what mode eager makes of the rows, what mode graph does)."""
    vlm, inputs = tiny(family), asked(family)
    mode = mode or Graphs(vlm, 16, Replayed)
    return eager.shrink(vlm, inputs, pruner, budget, Clock())[0], mode.shrink(vlm, inputs, pruner, budget, Clock())[0]


# --- against `prune` ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("family", FAMILIES)
def test_rows_of_fixed_length_are_those_that_prune_cuts(family: str, budget: str) -> None:
    parsed = parse(budget)
    for pruner in (scorer(family), Coarse()):
        plain, graph = both(family, pruner, parsed)
        back = fixed_shape.unfitted(graph.rows, graph.packed.kept, graph.packed.total)
        assert graph.sequence % 16 == 0 and plain.sequence <= graph.sequence
        assert same_prompts(back.prompts, plain.packed.prompts)
        live = plain.packed.prompts.attention_mask.bool()
        assert torch.equal(graph.rows.position_ids[graph.rows.mask], plain.packed.prompts.position_ids[live])
        assert torch.equal(back.kept, plain.packed.kept) and torch.allclose(back.features, plain.packed.features, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_prefill_of_a_bucket_says_what_the_models_own_forward_says(family: str) -> None:
    vlm, mode = tiny(family), Graphs(tiny(family), 16, Replayed)
    for pruner, budget in ((scorer(family), Keep(5)), (registry.load("pruners", "unpruned"), Share(1))):
        plain, graph = both(family, pruner, budget, mode)
        wanted = pruning.forward(vlm, plain.packed, use_cache=True, logits_to_keep=1).logits[:, -1]
        found = mode.prefill(vlm, graph, Clock())[1]
        assert torch.allclose(found.logits[:, -1], wanted, atol=1e-5)
        assert mode.prove_removed(graph, found) == found.bytes == graph.sequence * _per_token(vlm) * len(graph.rows.mask)
    assert mode.differences["logits"] < 1e-5 and mode.differences["choice"] == 0


def _per_token(vlm: VLM) -> int:
    return 2 * vlm.shape.layers * vlm.shape.kv_heads * vlm.shape.head_dim * 4


def test_a_native_row_falls_into_the_same_bucket() -> None:
    vlm, mode = tiny("llava"), Graphs(tiny("llava"), 16, Replayed)
    native = mode.native(vlm, asked("llava"), [5, 5])
    pruned = both("llava", scorer("llava"), Keep(5), mode)[1]
    assert native.sequence == pruned.sequence
    wanted = eager.native(vlm, asked("llava"), [5, 5])
    logits = pruning.forward(vlm, wanted.packed, use_cache=True, logits_to_keep=1).logits
    assert torch.allclose(mode.prefill(vlm, native, Clock())[1].logits, logits, atol=1e-5)


def test_a_replay_reads_its_new_arguments() -> None:
    vlm, mode, pruner = tiny("llava"), Graphs(tiny("llava"), 16, Replayed), scorer("llava")
    for seed in (0, 1, 0):
        inputs = asked("llava", seed)
        found = mode.prefill(vlm, mode.shrink(vlm, inputs, pruner, Keep(5), Clock())[0], Clock())[1].logits.clone()
        plain = eager.shrink(vlm, inputs, pruner, Keep(5), Clock())[0]
        assert torch.allclose(found, pruning.forward(vlm, plain.packed, use_cache=True, logits_to_keep=1).logits, atol=1e-5)
    assert len(mode._made) == 2  # one choice, one prefill


def test_a_row_that_fills_its_bucket_needs_no_mask() -> None:
    text = int(asked("llava", questions=("x",)).prompts.attention_mask.sum()) - 16 - 1
    exact = asked("llava", questions=("x" * (32 - 8 - text),))
    assert not fixed_shape.plan(exact.tokens, exact.prompts, Keep(8), 16).padded
    assert fixed_shape.plan(exact.tokens, exact.prompts, Keep(7), 16).padded
    uneven = asked("llava")
    assert fixed_shape.plan(uneven.tokens, uneven.prompts, Keep(8), 1).padded


def test_compacting_is_sorting() -> None:
    torch.manual_seed(0)
    mask = torch.rand(5, 30) > torch.linspace(0.2, 1, 5)[:, None]
    places, real = fixed_shape.compact(mask, 32)
    for row, own, at in zip(mask, places, real, strict=True):
        assert own[at].tolist() == row.nonzero()[:, 0].tolist() and at.tolist() == sorted(at.tolist())


def test_equal_scores_go_to_the_earlier_token() -> None:
    inputs = asked("llava")
    plan = fixed_shape.plan(inputs.tokens, inputs.prompts, Keep(4), 16)
    scores = torch.zeros(2, 16)
    scores[1, 9] = 1
    keep = fixed_shape.choose(fixed_shape.request(inputs.tokens, inputs.prompts, plan.length), scores, plan)[1]
    assert torch.equal(keep, top(scores, inputs.tokens.valid, torch.tensor([4, 4])))


# --- nothing asks the device -------------------------------------------------------------------------------------------


class FromTheDevice(TorchDispatchMode):
    """Refuses operations that read or make values on the host: a capture cannot contain their copies."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for value in tree_leaves((args, kwargs, found)):
            assert not isinstance(value, Tensor) or value.is_meta or not value.numel(), f"{func} touches the host"
        return found


class Valueless:
    """Runs what is to be captured on torch's meta device, where any question for a value is an error."""

    def __init__(self, call: Callable[..., Any], inputs: Sequence[Tensor], pool: Any) -> None:
        given = [tensor.to("meta") for tensor in inputs]
        with FromTheDevice():
            call(*given)
        raise Done

    pool = Replayed.pool


class Done(Exception):
    """What was to be captured ran to its end."""


def on_meta(family: str, monkeypatch: pytest.MonkeyPatch) -> tuple[VLM, Any]:
    """(model without values, scorer without values), as they are while a graph is captured."""
    vlm, pruner = registry.find("models", family).tiny(), deepcopy(scorer(family))
    vlm.model.to("meta")
    pruner.to("meta")  # type: ignore[attr-defined]
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    return vlm, pruner


@pytest.mark.parametrize("family", FAMILIES)
def test_choosing_asks_the_device_for_nothing(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = asked(family)
    vlm, pruner = on_meta(family, monkeypatch)
    with pytest.raises(Done):
        Graphs(vlm, 16, Valueless).shrink(vlm, inputs, pruner, Keep(5), Clock())
    with pytest.raises(AssertionError, match="touches the host"), FromTheDevice():  # the oracle can fail
        torch.tensor([1.0]).to("meta")
    with pytest.raises(RuntimeError):  # and the exact path does ask
        tokens = inputs.tokens.map(lambda t: t.to("meta"))
        pruning.shrink(vlm, inputs.prompts.to("meta"), tokens, pruner, Keep(5))


@pytest.mark.parametrize("family", FAMILIES)
def test_prefill_asks_the_device_for_nothing(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    graph = both(family, scorer(family), Keep(5))[1]
    vlm, _ = on_meta(family, monkeypatch)
    with pytest.raises(Done):
        Graphs(vlm, 16, Valueless).prefill(vlm, graph, Clock())


# --- refusals ----------------------------------------------------------------------------------------------------------


def test_a_device_without_graphs_is_refused() -> None:
    with pytest.raises(ValueError, match=r"needs a CUDA device.*mode eager"):
        Graphs(tiny("llava"))
    with pytest.raises(ValueError, match="needs a CUDA device"):
        measure.cells(tiny("llava"), [registry.spec("pruners", "random")], [Keep(4)], Measurement(modes=("eager", "graph")))


@pytest.mark.parametrize(
    "pruner, budget, message",
    [
        ("random", Above(0.5), "different number"),
        ("grid", Keep(4), "methods that score"),
        ("attention", Keep(4), "methods that score"),
    ],
)
def test_what_has_no_fixed_shape_is_refused(pruner: str, budget: Budget, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Graphs(tiny("llava"), 16, Replayed).shrink(tiny("llava"), asked("llava"), registry.load("pruners", pruner), budget, Clock())


def test_a_decoder_that_reads_both_ways_is_refused() -> None:
    with pytest.raises(ValueError, match="both directions"):
        Graphs(registry.find("models", "gemma3").tiny(), 16, Replayed)


def test_a_wrong_graph_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    vlm, right = tiny("llava"), fixed_shape.choose
    mode = Graphs(vlm, 16, Replayed)
    monkeypatch.setattr(fixed_shape, "choose", lambda own, scores, plan: right(own, -scores, plan))
    with pytest.raises(RuntimeError, match="other tokens than mode eager"):
        mode.shrink(vlm, asked("llava"), scorer("llava"), Keep(5), Clock())
    monkeypatch.undo()
    ready: Any = mode.shrink(vlm, asked("llava"), scorer("llava"), Keep(5), Clock())[0]
    monkeypatch.setattr(fixed_shape, "causal", lambda mask: torch.ones_like(mask)[:, None, None].expand(-1, 1, mask.shape[1], -1))
    with pytest.raises(RuntimeError, match="logits of mode graph differ"):
        mode.prefill(vlm, ready, Clock())


# --- in a session ------------------------------------------------------------------------------------------------------


def test_a_session_times_this_mode_beside_the_same_arms() -> None:
    vlm, options = tiny("llava"), Measurement(rounds=2, warmup=1, slow_rounds=2, inputs=1, threads=1)
    cells = measure.cells(vlm, [registry.spec("pruners", "random")], [Keep(5)], options.model_copy(update={"batches": (2,)}))
    inputs = eager.prepare(vlm, asked("llava").images, QUESTIONS, registry.load("pruners", "random").needs)
    session = Session(vlm, [inputs], options, Clock(), Clock(), Graphs(vlm, 16, Replayed))
    found = measure.side_by_side(session, {cells[0]: measure.method(vlm, cells[0])}, 1)[cells[0]]
    assert found.outcome.status == "ok", found.outcome.reason
    spans = {(row.arm, row.span) for row in found.timings}
    assert spans >= {("full", "prefill"), ("native", "prefill"), ("pruned", "overhead"), ("pruned", "ttft")}
    assert not {"score", "decode"} & {span for _, span in spans}
    assert {row.sequence for row in found.timings if row.arm == "pruned"} == {32}
    cost = {row.arm: row for row in found.costs}["pruned"]
    assert cost.kv_measured_bytes % 16 == 0 and cost.kv_measured_bytes >= cost.kv_bytes and np.isnan(cost.counted_flops)


def test_a_graph_is_made_on_the_device_of_its_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the devices that torch is asked for; all else is made up, as no CUDA is at hand here."""
    told: list[str] = []
    quiet = SimpleNamespace(wait_stream=lambda _: None)

    def stream(device: torch.device) -> Any:
        told.append(f"stream of {device}")
        return quiet

    @contextmanager
    def on(device: torch.device) -> Iterator[None]:
        told.append(f"on {device}")
        yield
        told.append("done")

    fakes = {
        "Stream": stream, "device": on, "stream": lambda _: nullcontext(), "current_stream": lambda: quiet,
        "synchronize": lambda: None, "CUDAGraph": SimpleNamespace,
        "graph": lambda *_, stream, **__: nullcontext(told.append("made")),
    }  # fmt: skip
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(captured, "_stream", captured._stream.__wrapped__)
    captured.Captured(lambda value: value + 1, [torch.zeros(2)], None)
    assert told == ["on cpu", "stream of cpu", "made", "done"]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_captured_graphs_say_what_the_model_says(family: str, dtype: torch.dtype) -> None:
    vlm = registry.find("models", family).tiny()
    vlm.model.to("cuda", dtype)
    vlm.device = torch.device("cuda")
    inputs = eager.prepare(vlm, asked(family).images, QUESTIONS, frozenset())
    pruner: Any = registry.load("pruners", "diffprune")
    pruner.build(inputs.tokens)
    mode = Graphs(vlm, 16, Captured)
    for budget in (Keep(3), Keep(5), Keep(3)):
        ready, spans = mode.shrink(vlm, inputs, pruner, budget, Clock())
        assert mode.prefill(vlm, ready, Clock())[1].logits.isfinite().all() and spans["overhead"] > 0
    assert mode.differences["logits"] <= cuda_graph.TOLERANCE[dtype]
