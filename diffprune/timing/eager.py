"""Mode `eager`: one timed request through the same path as `pruning`, with marks around its parts.

What a method adds before prefill is *overhead*: reading the encoder beyond its plain output, embedding the question, scoring,
selecting, cutting ids, mask, positions and features, and handing them over. Projection is no overhead: every request needs it, the
unpruned one for all its tokens, so it is a span of its own (`project`) in both, taken out of `overhead` by its own marks. What a
method does inside the decoder happens during prefill; it is marked there, taken out of `prefill` and added to `overhead`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import torch

from diffprune import pruning
from diffprune.core.benchmark import Benchmark, Sample
from diffprune.core.budget import Budget
from diffprune.core.evidence import Evidence
from diffprune.core.pruner import Pruner
from diffprune.core.site import Cut
from diffprune.core.tokens import VisualTokens
from diffprune.core.vlm import VLM, Prompts
from diffprune.timing.clock import Clock, Marks

Spans = dict[str, float]  # name -> ms
UNTIMED: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Inputs:
    """One batch of real images and questions, with what is prepared outside every timed span.

    tokens: encoder output with everything the session's methods need; prompts: full-length rows.
    """

    images: Sequence[Any]
    questions: Sequence[str]
    pixels: dict[str, torch.Tensor]
    tokens: VisualTokens
    prompts: Prompts

    def for_(self, pruner: Pruner) -> VisualTokens:
        """The tokens with the evidence of this method, as if they had been encoded for it alone."""
        return self.tokens.showing(pruner.needs)


@dataclass(frozen=True)
class Ready:
    """Rows at the length that is left, and the keyword arguments of the model's own forward for them."""

    packed: pruning.Packed
    keywords: dict[str, Any]

    @property
    def sequence(self) -> int:
        """Tokens of the longest row."""
        return int(self.packed.prompts.input_ids.shape[1])


class Pass(NamedTuple):
    """A timed prefill. ms: of the decoder's own work; output: the model's, with its cache; overhead: ms of what a method adds
    inside the decoder (attention rows, choosing, shortening)."""

    ms: float
    output: Any
    overhead: float = 0.0


class Mode(Protocol):
    """How requests run. The functions of this module are mode "eager", and say what each does; `cuda_graph.Graphs` is "graph".

    UNTIMED: spans the mode cannot tell apart or does not run.
    """

    @property
    def UNTIMED(self) -> frozenset[str]:
        """See above."""

    def shrink(
        self, vlm: VLM, inputs: Inputs, pruner: Pruner, budget: Budget, clock: Clock, parts: bool = False
    ) -> tuple[Ready, Spans]:
        """Everything between encoder and prefill."""

    def native(self, vlm: VLM, inputs: Inputs, kept: Sequence[int]) -> Ready:
        """Rows that were always this short."""

    def prefill(self, vlm: VLM, ready: Ready, clock: Clock) -> Pass:
        """Decoder inputs to logits."""

    def prove_removed(self, ready: Ready, output: Any) -> int:
        """Bytes of keys and values."""

    def first_token(self, vlm: VLM, inputs: Inputs, pruner: Pruner, budget: Budget, clock: Clock) -> float:
        """Images and text to the first token."""

    def decode(self, vlm: VLM, ready: Ready, num_tokens: int, clock: Clock) -> float:
        """ms per token."""


def from_encoder(needs: frozenset[Evidence]) -> frozenset[Evidence]:
    """The part of a method's needs that makes the encoder slower; the question and the identity of an image do not."""
    return frozenset(evidence for evidence in needs if evidence.from_encoder)


def prepare(vlm: VLM, images: Sequence[Any], questions: Sequence[str], needs: frozenset[Evidence]) -> Inputs:
    """Encode and tokenise one batch, untimed."""
    pixels = vlm.pixels(images)
    tokens = vlm.encode(pixels, needs)
    return Inputs(images, questions, pixels, tokens, vlm.prompts(questions, tokens.present.sum(1).tolist(), tokens.layout))


def check_timed(benchmark: Benchmark, samples: Sequence[Sample]) -> None:
    """Refuse questions that no request can be made of.

    Raises:
        ValueError: one of them shows several images; a request has one image per row.
    """
    for sample in samples:
        if (num := len(sample.image_ids)) > 1:
            raise ValueError(
                f"question {sample.id} of {benchmark.spec} shows {num} images, and only questions about one are timed: name "
                "another benchmark, as in --set measure.benchmark=pope --set 'tune.benchmarks=[\"pope\"]'"
            )


def marked(value: Any, **calls: Callable[..., Any]) -> Any:
    """A shallow copy whose named methods are replaced; frozen values included."""
    probe = copy(value)
    for name, call in calls.items():
        object.__setattr__(probe, name, call)
    return probe


def _marked_pruner(pruner: Pruner, marks: Marks) -> Pruner:
    """The method with marks around `select`, and around the budget's `pick` inside it where it uses one."""

    def select(tokens: VisualTokens, cut: Cut) -> Any:
        probe = marked(cut.budget, pick=marks.around("select", cut.budget.pick))
        with marks.span("choose"):
            return pruner.select(tokens, replace(cut, budget=probe))

    probe: Pruner = marked(pruner, select=select)
    return probe


def shrink(vlm: VLM, inputs: Inputs, pruner: Pruner, budget: Budget, clock: Clock, parts: bool = False) -> tuple[Ready, Spans]:
    """Everything between encoder and prefill: (rows ready, times of `overhead` and `project`).

    parts: also `score` (with the embedding of the question), `select` and `gather`. They are taken in a pass of their own, so that
    marks do not burden the whole; a method that picks without a budget's help has its whole choice under `select`.
    """
    marks = Marks(clock)
    probe = marked(vlm, project=marks.around("project", vlm.project))
    if parts:
        probe = marked(probe, embed=marks.around("embed", vlm.embed))
    method = _marked_pruner(pruner, marks) if parts else pruner
    tokens = inputs.for_(pruner)
    clock.wait()
    with marks.span("whole"):
        packed = pruning.shrink(probe, inputs.prompts, tokens, method, budget)
        keywords = pruning.decoder_inputs(vlm, packed)
    spent = marks.totals()
    project, whole = spent.get("project", 0.0), spent["whole"]
    found = {"project": project, "overhead": whole - project}
    if parts:
        choose, embed = spent.get("choose", 0.0), spent.get("embed", 0.0)
        select = spent.get("select", choose)
        found |= {"score": choose - select + embed, "select": select, "gather": whole - project - choose - embed}
    return Ready(packed, keywords), found


def native(vlm: VLM, inputs: Inputs, kept: Sequence[int]) -> Ready:
    """Rows that were always this short: the first `kept` visual tokens of each image, no gaps in positions; no pruner."""
    tokens, prompts = inputs.tokens, inputs.prompts
    rank = tokens.valid.cumsum(1)
    first = replace(tokens, valid=tokens.valid & (rank <= torch.tensor(list(kept), device=rank.device)[:, None]))
    live = prompts.attention_mask.bool()
    live[prompts.slots] = first.present[tokens.present]
    lengths = None if tokens.row_id is None else first.present.sum(1)
    deepstack = None if tokens.deepstack is None else tokens.deepstack[first.present]
    short, features = pruning.cut(prompts, live, positions="compact"), pruning.embeddings(vlm, first)
    packed = pruning.Packed(short, features, first.counts, first.counts, lengths, deepstack)
    return Ready(packed, pruning.decoder_inputs(vlm, packed))


def prefill(vlm: VLM, ready: Ready, clock: Clock) -> Pass:
    """From decoder inputs to the logits of the last position."""
    marks = Marks(clock)
    clock.wait()
    with pruning.running(vlm, ready.packed, lambda: marks.span("inside")), marks.span("prefill"):
        output = vlm.model(**ready.keywords, use_cache=True, logits_to_keep=1)
    spent = marks.totals()
    inside = spent.get("inside", 0.0)
    return Pass(spent["prefill"] - inside, output, inside)


def encode(vlm: VLM, inputs: Inputs, needs: frozenset[Evidence], clock: Clock) -> tuple[float, float]:
    """(ms of the encoder with what `needs` asks of it, ms that the needs add to it).

    What they add is the time behind the vision tower's end less that of a pass without needs, run right before: projecting, packing
    and padding come there in most families, and every request runs them. It is nan where the family does not say which module its
    encoder is, 0 without needs, and may be a little below 0 where it is less than the two passes differ by themselves.

    Not in it: an encoder with flash attention, which shows nobody its attention, runs its tower with sdpa where attention or keys
    are asked for; what the tower takes longer by that is in the first figure alone.
    """
    if not (needs := from_encoder(needs)):
        return _encoded(vlm, inputs, needs, clock)[0], 0.0
    plain = _encoded(vlm, inputs, frozenset(), clock)[1]
    spent, behind = _encoded(vlm, inputs, needs, clock)
    return spent, behind - plain


def _encoded(vlm: VLM, inputs: Inputs, needs: frozenset[Evidence], clock: Clock) -> tuple[float, float]:
    """(ms of one pass of the encoder, ms of it behind the vision tower's end, nan where that is not known)."""
    marks, ends = Marks(clock), []
    tower = getattr(vlm.model, "get_encoder", lambda **_: None)(modality="image")
    hook = tower.register_forward_hook(lambda *_: ends.append(clock.mark())) if isinstance(tower, torch.nn.Module) else None
    try:
        clock.wait()
        with marks.span("encoder"):
            vlm.encode(inputs.pixels, needs)
        end = clock.mark()
    finally:
        if hook is not None:
            hook.remove()
    spent = marks.totals()["encoder"]
    return spent, clock.between(ends[-1], end) if ends else float("nan")


def first_token(vlm: VLM, inputs: Inputs, pruner: Pruner, budget: Budget, clock: Clock) -> float:
    """ms from PIL images and text in host memory to the first token ids on the host; nothing prepared."""
    marks = Marks(clock)
    with marks.span("ttft"):
        tokens = vlm.encode(vlm.pixels(inputs.images), pruner.needs)
        prompts = vlm.prompts(inputs.questions, tokens.present.sum(1).tolist(), tokens.layout)
        output = pruning.forward(vlm, pruning.shrink(vlm, prompts, tokens, pruner, budget), use_cache=True, logits_to_keep=1)
        output.logits[:, -1].argmax(-1).tolist()
    return marks.totals()["ttft"]


def decode(vlm: VLM, ready: Ready, num_tokens: int, clock: Clock) -> float:
    """ms per token and batch: the slope between answers of 1 and of 1 + `num_tokens` tokens, the end token forbidden."""
    marks = Marks(clock)
    for name, length in (("short", 1), ("long", 1 + num_tokens)):
        with marks.span(name):
            pruning.answer(vlm, ready.packed, length, min_new_tokens=length, stop_strings=None)
    spent = marks.totals()
    return (spent["long"] - spent["short"]) / num_tokens


def prove_removed(ready: Ready, output: Any) -> int:
    """Bytes of keys and values in the cache after prefill, once it is certain that no layer holds more than kept + text.

    Raises:
        RuntimeError: a layer's cache is longer than its rows: tokens were hidden, not removed.
    """
    layers = output.past_key_values.layers
    for number, (layer, wanted) in enumerate(zip(layers, _lengths(ready.packed, len(layers)), strict=True)):
        if (found := int(layer.get_seq_length())) != wanted:
            raise RuntimeError(
                f"the cache holds {found} tokens where {wanted} were kept: tokens were hidden, not removed (layer {number})"
            )
    return sum(t.numel() * t.element_size() for layer in layers for t in (layer.keys, layer.values))


def _lengths(packed: pruning.Packed, layers: int) -> list[int]:
    """The longest row in each layer, of one image each, as the forward pass left them."""
    text = packed.prompts.attention_mask.sum(1) - packed.prompts.slots.sum(1)
    visual, beside = (torch.tensor(counts, device=text.device) for counts in (packed.per_layer(layers), packed.separators(layers)))
    longest: list[int] = (visual + beside + text[:, None]).amax(0).tolist()
    return longest
