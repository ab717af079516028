"""Mode `graph`: a method's overhead, and prefill, each replayed as one CUDA graph of fixed shapes.

Launched one by one, the thousand and more kernels of a prefill can take the host longer than the device, and then removing tokens
saves nothing. A graph is launched once. It needs fixed shapes: rows are padded to a multiple of `STEP` tokens (a bucket), whose
padding counts as cost; the unpruned request runs at its own length, as it is the baseline. Scoring, choosing and cutting of one
method at one count are a graph, prefill of one bucket is another; both are compared with the path of mode `eager` when captured.

A threshold keeps as many tokens as the image asks for, so its shapes are not fixed: it is refused. A method keyed by the image
(`IDENTITY`: random), which no graph is given, is scored outside the graph, at its own cost.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffprune import pruning
from diffprune.core.budget import Budget
from diffprune.core.evidence import IDENTITY
from diffprune.core.pruner import Pruner, ScorePruner
from diffprune.core.site import ENCODED
from diffprune.core.tokens import VisualTokens
from diffprune.core.vlm import VLM, Prompts, Shape
from diffprune.timing import eager, fixed_shape
from diffprune.timing.clock import Clock, Marks
from diffprune.timing.eager import Inputs, Pass, Ready, Spans
from diffprune.vlm.windows import window_of

STEP = 64  # bucket edges are its multiples: the tile of a matrix product, so finer buckets save little
WARMUPS = 3  # runs on a side stream before capture: libraries set themselves up, nothing of which may be captured
TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 5e-2}  # of logits, relative to their norm
OTHERS = 0.02  # share of kept tokens in which the modes may differ: kernels round differently, which can swap tokens at the edge


class Captured:
    """A function of tensors as one CUDA graph: a call copies its arguments into the graph's own and replays.

    The answer is overwritten by the next call. inputs: examples, whose shapes are fixed from then on.
    """

    def __init__(self, call: Callable[..., Any], inputs: Sequence[Tensor], pool: Any) -> None:
        self.inputs = [tensor.clone() for tensor in inputs]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARMUPS):
                call(*self.inputs)
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, pool=pool):
            self.answer = call(*self.inputs)

    def __call__(self, *values: Tensor) -> Any:
        for own, value in zip(self.inputs, values, strict=True):
            own.copy_(value)
        self.graph.replay()
        return self.answer

    @staticmethod
    def pool() -> Any:
        """Memory that graphs share: they never run at the same time."""
        return torch.cuda.graph_pool_handle()


class Prefilled(NamedTuple):
    """What a prefill leaves: logits [B 1 V], the length of the cache, bytes of its keys and values."""

    logits: Tensor
    length: int
    bytes: int


@dataclass(frozen=True)
class Fitted(Ready):
    """Rows of fixed length. `packed` has them with their padding; `keywords` is empty, as the model is not called with them."""

    rows: fixed_shape.Rows
    padded: bool


def refuse(vlm: VLM) -> None:
    """Raises ValueError where a model cannot run in this mode."""
    if vlm.device.type != "cuda":
        raise ValueError(f"mode graph needs a CUDA device, the model is on {vlm.device}; use mode eager")
    refuse_family(vlm)


def refuse_family(vlm: VLM) -> None:
    """Raises ValueError for decoders that need more than embedded rows and a causal mask."""
    if not vlm.packs:
        raise ValueError(
            f"{vlm.name}: its decoder reads pictures in both directions, which mode graph does not serve; use mode eager"
        )
    if window_of(vlm.model) is not None:
        raise ValueError(f"{vlm.name}: its decoder has sliding windows, which mode graph does not serve; use mode eager")


class Graphs:
    """Mode `graph` of `session.Session`, in place of the module `eager`.

    record: makes a replayable function; another one than `Captured` lets the path run without CUDA.
    """

    UNTIMED = frozenset({"parts", "decode"})  # score, select and gather are one graph; decoding is not captured

    def __init__(self, vlm: VLM, step: int = STEP, record: Any = None) -> None:
        if record is None:
            refuse(vlm)
        refuse_family(vlm)
        self.vlm, self.step, self.record = vlm, step, record or Captured
        self._pool = self.record.pool()
        self._made: dict[tuple[Any, ...], Any] = {}
        self._asked: dict[tuple[int, str], tuple[Inputs, fixed_shape.Plan, fixed_shape.Request]] = {}
        self.differences: dict[str, float] = {}  # largest relative difference to eager of logits, share of other tokens chosen

    # -- before prefill ------------------------------------------------------------------------------------------------

    def shrink(
        self, vlm: VLM, inputs: Inputs, pruner: Pruner, budget: Budget, clock: Clock, parts: bool = False
    ) -> tuple[Ready, Spans]:
        """As `eager.shrink`; scoring, choosing and cutting are one graph, so `parts` cannot be told apart.

        What it returns is overwritten by the next call with the same method and budget.

        Raises:
            ValueError: a budget or a method without fixed shapes.
        """
        assert not parts, "one of UNTIMED"
        if not pruner.cuts(budget, vlm.shape):
            ready, spans = eager.shrink(vlm, inputs, pruner, budget, clock)
            return self._fit(ready, 1), spans
        tokens = inputs.for_(pruner)
        key = (id(inputs), str(budget))
        if key not in self._asked:
            found = fixed_shape.plan(tokens, inputs.prompts, budget, self.step)
            self._asked[key] = inputs, found, fixed_shape.request(tokens, inputs.prompts, found.length)
        _, plan, request = self._asked[key]
        choose = self._chooser(inputs, request, plan, pruner, budget)
        marks = Marks(clock)
        clock.wait()
        with marks.span("whole"):
            rows = choose(*_values(request), *_scores_outside(pruner, tokens))[0]
            with marks.span("project"):
                rows = fixed_shape.projected(vlm, rows, tokens.row_id is not None)
        spent = marks.totals()
        spans = {"project": spent["project"], "overhead": spent["whole"] - spent["project"]}
        kept = torch.full((len(tokens),), plan.count, device=tokens.valid.device)
        return _fitted(rows, plan.padded, kept, tokens.counts), spans

    def _chooser(self, inputs: Inputs, request: fixed_shape.Request, plan: fixed_shape.Plan, pruner: Pruner, budget: Budget) -> Any:
        """The graph of a method at a count and its shapes; checked against the method itself when made."""
        key = ("choose", id(pruner), plan, *(tuple(value.shape) for value in _values(request)))
        if key not in self._made:
            tokens, own = inputs.for_(pruner), len(_values(request))
            score = _scores(pruner, budget, self.vlm.shape)

            def call(*values: Tensor) -> tuple[fixed_shape.Rows, Tensor]:
                asked = fixed_shape.Request(*values[:own])
                seen = replace(tokens, features=asked.features, valid=asked.valid, row_id=asked.row_id)
                return fixed_shape.choose(asked, values[own] if len(values) > own else score(seen), plan)

            examples = (*_values(request), *_scores_outside(pruner, tokens))
            made = self.record(call, examples, self._pool)
            self._check_choice(made(*examples)[1], inputs, pruner, budget)
            self._made[key] = made, pruner  # which is held, so that its id stays its own
        return self._made[key][0]

    def _check_choice(self, keep: Tensor, inputs: Inputs, pruner: Pruner, budget: Budget) -> None:
        """Raises RuntimeError where the graph chose other tokens than the method does."""
        wanted = pruning.select(self.vlm, inputs.prompts, inputs.for_(pruner), pruner, budget).valid
        other = 1 - float((keep & wanted).sum() / wanted.sum())
        self._note("choice", other)
        if other > OTHERS:
            raise RuntimeError(f"mode graph keeps {other:.1%} other tokens than mode eager, where {OTHERS:.0%} could be rounding")

    def native(self, vlm: VLM, inputs: Inputs, kept: Sequence[int]) -> Ready:
        """As `eager.native`, in the bucket its length falls into."""
        return self._fit(eager.native(vlm, inputs, kept), self.step)

    def _fit(self, ready: Ready, step: int) -> Fitted:
        length = fixed_shape.bucket(ready.sequence, step)
        rows = fixed_shape.fitted(ready.packed, length, self.vlm.model.dtype)
        padded = length > ready.sequence or not bool(rows.mask.all())
        return _fitted(rows, padded, ready.packed.kept, ready.packed.total)

    # -- prefill -------------------------------------------------------------------------------------------------------

    def prefill(self, vlm: VLM, ready: Ready, clock: Clock) -> Pass:
        """ms to copy the rows into the graph and replay it; the output is `Prefilled`.

        Raises:
            RuntimeError: the first replay differs from the model's own forward on the same rows.
        """
        assert isinstance(ready, Fitted), "rows of this mode"
        key = ("prefill", ready.padded, *(tuple(v.shape) for v in ready.rows))
        new = key not in self._made
        if new:
            self._made[key] = self.record(
                lambda *rows: _prefilled(vlm, fixed_shape.Rows(*rows), ready.padded), ready.rows, self._pool
            )
        graph, marks = self._made[key], Marks(clock)
        clock.wait()
        with marks.span("prefill"):
            output = graph(*ready.rows)
        spent = marks.totals()["prefill"]
        if new:
            self._check_logits(ready, output)
        return Pass(spent, output)

    def _check_logits(self, ready: Fitted, output: Prefilled) -> None:
        packed = fixed_shape.unfitted(ready.rows, ready.packed.kept, ready.packed.total)
        wanted = pruning.forward(self.vlm, packed, use_cache=True, logits_to_keep=1).logits[:, -1].float()
        found = output.logits[:, -1].float()
        difference = float((found - wanted).norm() / wanted.norm())
        self._note("logits", difference)
        if not difference <= TOLERANCE[self.vlm.model.dtype]:
            raise RuntimeError(f"logits of mode graph differ from those of mode eager by {difference:.2%} of their norm")

    def _note(self, what: str, difference: float) -> None:
        self.differences[what] = max(self.differences.get(what, 0.0), difference)

    def prove_removed(self, ready: Ready, output: Any) -> int:
        """Bytes of keys and values in the cache, padding included, once it is certain that it holds no more than a bucket.

        Raises:
            RuntimeError: the cache is longer than the bucket of kept + text.
        """
        assert isinstance(ready, Fitted), "rows of this mode"
        if output.length != ready.sequence:
            raise RuntimeError(f"the cache holds {output.length} tokens where the bucket has {ready.sequence}")
        return int(output.bytes)

    def first_token(self, vlm: VLM, inputs: Inputs, pruner: Pruner, budget: Budget, clock: Clock) -> float:
        """As `eager.first_token`, with the graphs in their places; the encoder is launched as in mode eager."""
        marks = Marks(clock)
        with marks.span("ttft"):
            pixels = vlm.pixels(inputs.images)
            tokens = vlm.encode(pixels, pruner.needs)
            prompts = vlm.prompts(inputs.questions, tokens.present.sum(1).tolist(), tokens.layout)
            fresh = replace(inputs, pixels=pixels, tokens=tokens, prompts=prompts)
            ready = self.shrink(vlm, fresh, pruner, budget, Clock())[0]  # the host's clock: no mark waits for the device
            self.prefill(vlm, ready, Clock())[1].logits[:, -1].argmax(-1).tolist()
        self._asked.pop((id(fresh), str(budget)), None)
        return marks.totals()["ttft"]

    def decode(self, vlm: VLM, ready: Ready, num_tokens: int, clock: Clock) -> float:
        """One of UNTIMED."""
        raise AssertionError("mode graph does not decode")


def _fitted(rows: fixed_shape.Rows, padded: bool, kept: Tensor, total: Tensor) -> Fitted:
    """Beside its rows, what the rest of `measure` reads of them."""
    slots = rows.rank >= 0
    prompts = Prompts(rows.input_ids, rows.mask.long(), rows.position_ids, slots, torch.zeros_like(slots))
    return Fitted(pruning.Packed(prompts, rows.visual, kept, total, slots.sum(1)), {}, rows, padded)


def _prefilled(vlm: VLM, rows: fixed_shape.Rows, padded: bool) -> Prefilled:
    """The cache itself is let go: graphs of other buckets may use its memory."""
    output = fixed_shape.prefill(vlm, rows, padded)
    cache = output.past_key_values
    held = sum(t.numel() * t.element_size() for layer in cache.layers for t in (layer.keys, layer.values))
    return Prefilled(output.logits, int(cache.get_seq_length()), held)


def _values(request: fixed_shape.Request) -> tuple[Tensor, ...]:
    return tuple(value for value in request if value is not None)


def _scores_outside(pruner: Any, tokens: VisualTokens) -> tuple[Tensor, ...]:
    """Scores of a method that are made outside the graph; nothing where the graph makes them."""
    return (pruner.score(tokens),) if IDENTITY in pruner.needs else ()


def _scores(pruner: Pruner, budget: Budget, shape: Shape) -> Callable[[VisualTokens], Tensor]:
    """The scores of a method.

    Raises:
        ValueError: a method that does more than score, looks at more than features, or cuts elsewhere than before the projector.
    """
    own: Callable[[VisualTokens], Tensor] | None = getattr(pruner, "score", None)
    served = getattr(type(pruner), "select", None) is ScorePruner.select and not pruner.needs - {IDENTITY}
    if own is None or not served or [cut.site for cut in pruner.cuts(budget, shape)] != [ENCODED]:
        raise ValueError(
            f"{pruner.spec.name or type(pruner).__name__}: mode graph serves methods that score the encoder's tokens "
            "by their features, in one cut; use mode eager"
        )
    return own
