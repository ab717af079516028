"""Mode `graph`: a method's overhead, and prefill, each replayed as one CUDA graph of fixed shapes.

Launched one by one, the thousand and more kernels of a prefill can take the host longer than the device, and then removing tokens
saves nothing. A graph is launched once. It needs fixed shapes: rows are padded to a multiple of `STEP` tokens (a bucket), whose
padding counts as cost; the unpruned request runs at its own length, as it is the baseline. Scoring, choosing and cutting of one
method at one count are a graph, prefill of one bucket is another; both are compared with the path of mode `eager` when captured.

A method that cuts inside the decoder has one graph for its whole prefill: rows enter as the unpruned request's do, so nothing is
added before them, and are as long as a bucket behind every cut. What it adds inside is marked in the graph, taken out of `prefill`
and added to `overhead`, as in mode `eager`.

A threshold keeps as many tokens as the image asks for, so its shapes are not fixed: it is refused, and so are adaptive counts. A
method keyed by the image (`IDENTITY`: random), which no graph is given, is scored outside the graph, at its own cost.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffprune import pruning
from diffprune.core.budget import Budget
from diffprune.core.evidence import IDENTITY
from diffprune.core.pruner import Pruner, ScorePruner
from diffprune.core.site import ENCODED, Cut, for_images
from diffprune.core.site import Plan as Cuts
from diffprune.core.tokens import Selection, VisualTokens
from diffprune.core.vlm import VLM
from diffprune.pruning.decoder_cuts import Inside
from diffprune.pruning.stages import Length
from diffprune.timing import eager, fixed_shape
from diffprune.timing.captured import Captured
from diffprune.timing.clock import Clock, Marks, clocks
from diffprune.timing.eager import Inputs, Pass, Ready, Spans
from diffprune.vlm.windows import window_of

STEP = 64  # bucket edges are its multiples: the tile of a matrix product, so finer buckets save little
TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 5e-2}  # of logits, relative to their norm
OTHERS = 0.02  # share of kept tokens in which the modes may differ: kernels round differently, which can swap tokens at the edge


class Prefilled(NamedTuple):
    """What a prefill leaves: logits [B 1 V], lengths of the layers' caches, bytes of their keys and values; left: what every cut
    inside the decoder kept [B N] bool."""

    logits: Tensor
    lengths: tuple[int, ...]
    bytes: int
    left: tuple[Tensor, ...] = ()


@dataclass(frozen=True)
class Fitted(Ready):
    """Rows of fixed length. `packed` has them with their padding; `keywords` is empty, as the model is not called with them.

    known: lengths of the rows behind each cut inside the decoder, 0 for those that enter.
    """

    rows: fixed_shape.Rows
    padded: bool
    known: Mapping[int, Length]

    @property
    def values(self) -> tuple[Tensor, ...]:
        """What a graph takes."""
        if self.packed.inside is None:
            return tuple(self.rows)
        tokens = self.packed.inside.tokens
        return (*self.rows, *(value for value in (tokens.valid, tokens.row_id) if value is not None))

    def lengths(self, layers: int) -> list[int]:
        """Of the rows in each decoder layer."""
        return [self.known[max(at for at in self.known if at <= number)].tokens for number in range(layers)]


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
        self.marks = clocks(vlm.device)[0]  # of what a graph marks in itself
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
        plan = pruning.plan_of(vlm, pruner, budget)
        _check_served(pruner, plan)
        if not plan or pruning.inside_decoder(plan):
            ready, spans = eager.shrink(vlm, inputs, pruner, budget, clock)
            return self._fit(ready, 1), spans if not plan else spans | {"overhead": 0.0}
        tokens = inputs.for_(pruner)
        key = (id(inputs), str(budget))
        if key not in self._asked:
            found = fixed_shape.plan(tokens, inputs.prompts, budget, self.step)
            self._asked[key] = inputs, found, fixed_shape.request(tokens, inputs.prompts, found.length)
        _, shapes, request = self._asked[key]
        choose = self._chooser(inputs, request, shapes, pruner, budget)
        marks = Marks(clock)
        clock.wait()
        with marks.span("whole"):
            rows = choose(*_values(request), *_scores_outside(pruner, tokens))[0]
            with marks.span("project"):
                rows = fixed_shape.projected(vlm, rows, tokens.row_id is not None)
        spent = marks.totals()
        spans = {"project": spent["project"], "overhead": spent["whole"] - spent["project"]}
        kept = torch.full((len(tokens),), shapes.count, device=tokens.valid.device)
        return _fitted(rows, shapes.padded, kept, tokens.counts), spans

    def _chooser(self, inputs: Inputs, request: fixed_shape.Request, plan: fixed_shape.Plan, pruner: Pruner, budget: Budget) -> Any:
        """The graph of a method at a count and its shapes; checked against the method itself when made."""
        key = ("choose", id(pruner), plan, *(tuple(value.shape) for value in _values(request)))
        if key not in self._made:
            tokens, own = inputs.for_(pruner), len(_values(request))
            assert isinstance(pruner, ScorePruner), "others are refused"

            def call(*values: Tensor) -> tuple[fixed_shape.Rows, Tensor]:
                asked = fixed_shape.Request(*values[:own])
                seen = replace(tokens, features=asked.features, valid=asked.valid, row_id=asked.row_id)
                return fixed_shape.choose(asked, values[own] if len(values) > own else pruner.score(seen), plan)

            examples = (*_values(request), *_scores_outside(pruner, tokens))
            made = self.record(call, examples, self._pool)
            self._check_choice(made(*examples)[1], inputs, pruner, budget)
            self._made[key] = made, pruner  # which is held, so that its id stays its own
        return self._made[key][0]

    def _check_choice(self, keep: Tensor, inputs: Inputs, pruner: Pruner, budget: Budget) -> None:
        """Raises RuntimeError where the graph chose other tokens than the method does."""
        self._compare(keep, pruning.select(self.vlm, inputs.prompts, inputs.for_(pruner), pruner, budget).valid)

    def _compare(self, keep: Tensor, wanted: Tensor) -> None:
        other = 1 - float((keep & wanted).sum() / wanted.sum())
        self._note("choice", other)
        if other > OTHERS:
            raise RuntimeError(f"mode graph keeps {other:.1%} other tokens than mode eager, where {OTHERS:.0%} could be rounding")

    def native(self, vlm: VLM, inputs: Inputs, kept: Sequence[int]) -> Ready:
        """As `eager.native`, in the bucket its length falls into."""
        return self._fit(eager.native(vlm, inputs, kept), self.step)

    def _fit(self, ready: Ready, step: int) -> Fitted:
        length, inside = fixed_shape.bucket(ready.sequence, step), ready.packed.inside
        if inside is not None:  # set against the images here, as a graph can ask no device how large they are
            inside = replace(inside, cuts=for_images(inside.cuts, inside.tokens.counts.tolist()))
        rows = fixed_shape.fitted(ready.packed, length, self.vlm.model.dtype)
        padded = length > ready.sequence or not bool(rows.mask.all())
        known = None if inside is None else fixed_shape.lengths(inside, ready.packed.prompts, self.step)
        return _fitted(rows, padded, ready.packed.kept, ready.packed.total, inside, known)

    # -- prefill -------------------------------------------------------------------------------------------------------

    def prefill(self, vlm: VLM, ready: Ready, clock: Clock) -> Pass:
        """ms to copy the rows into the graph and replay it; the output is `Prefilled`.

        Raises:
            RuntimeError: the first replay differs from the model's own forward on the same rows.
        """
        assert isinstance(ready, Fitted), "rows of this mode"
        graph, added, new = self._prefiller(ready)
        marks = Marks(clock)
        clock.wait()
        with marks.span("prefill"):
            output = graph(*ready.values)
        spent, inside = marks.totals()["prefill"], added.totals().get("inside", 0.0)
        if new:
            self._check_prefill(ready, output)
        return Pass(spent - inside, output, inside)

    def _prefiller(self, ready: Fitted) -> tuple[Any, Marks, bool]:
        """The graph of a prefill of these shapes, marks around what a method adds in it, and whether it has been made just now."""
        inside, shapes = ready.packed.inside, tuple(tuple(value.shape) for value in ready.values)
        own = () if inside is None else (id(inside.pruner), inside.cuts, tuple(ready.known.items()), inside.tokens.grid)
        key = ("prefill", ready.padded, shapes, *own)
        if new := key not in self._made:
            marks = Marks(self.marks)
            call = partial(_prefilled, self.vlm, ready, marks)
            self._made[key] = self.record(call, ready.values, self._pool), marks, inside  # held, so that ids stay its own
        return (*self._made[key][:2], new)

    def _check_prefill(self, ready: Fitted, output: Prefilled) -> None:
        """Raises RuntimeError where logits or choices are not those of mode eager on the same rows."""
        packed, inside = fixed_shape.unfitted(ready.rows, ready.packed.kept, ready.packed.total), ready.packed.inside
        if inside is not None:
            chosen = Inside(inside.pruner, inside.cuts, inside.tokens)
            pruning.forward(self.vlm, replace(packed, inside=chosen), logits_to_keep=1)
            for keep, wanted in zip(output.left, chosen.left.values(), strict=True):
                self._compare(keep, wanted)
            packed = replace(packed, inside=replace(inside, pruner=Given(inside.cuts, output.left)))
        wanted = pruning.forward(self.vlm, packed, use_cache=True, logits_to_keep=1).logits[:, -1].float()
        found = output.logits[:, -1].float()
        difference = float((found - wanted).norm() / wanted.norm())
        self._note("logits", difference)
        if not difference <= TOLERANCE[self.vlm.model.dtype]:
            raise RuntimeError(f"logits of mode graph differ from those of mode eager by {difference:.2%} of their norm")

    def _note(self, what: str, difference: float) -> None:
        self.differences[what] = max(self.differences.get(what, 0.0), difference)

    def prove_removed(self, ready: Ready, output: Any) -> int:
        """Bytes of keys and values in the cache, padding included, once it is certain that no layer holds more than a bucket.

        Raises:
            RuntimeError: a layer's cache is longer than the bucket of kept + text.
        """
        assert isinstance(ready, Fitted), "rows of this mode"
        for number, (found, length) in enumerate(zip(output.lengths, ready.lengths(len(output.lengths)), strict=True)):
            if found != length:
                raise RuntimeError(f"the cache holds {found} tokens where the bucket has {length} (layer {number})")
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
            assert isinstance(ready, Fitted), "rows of this mode"
            self._prefiller(ready)[0](*ready.values).logits[:, -1].argmax(-1).tolist()
        self._asked.pop((id(fresh), str(budget)), None)
        return marks.totals()["ttft"]

    def decode(self, vlm: VLM, ready: Ready, num_tokens: int, clock: Clock) -> float:
        """One of UNTIMED."""
        raise AssertionError("mode graph does not decode")


class Given(Pruner):
    """Keeps at every cut inside the decoder what a graph kept there."""

    def __init__(self, cuts: Cuts, left: Sequence[Tensor]) -> None:
        self.kept = dict(zip((cut.site for cut in cuts), left, strict=True))

    def select(self, tokens: VisualTokens, cut: Cut) -> Selection:
        return Selection(self.kept[cut.site])


def _fitted(
    rows: fixed_shape.Rows,
    padded: bool,
    kept: Tensor,
    total: Tensor,
    inside: Inside | None = None,
    known: Mapping[int, Length] | None = None,
) -> Fitted:
    """Beside its rows, what the rest of `measure` reads of them."""
    prompts = fixed_shape.as_prompts(rows)
    packed = pruning.Packed(prompts, rows.visual, kept, total, prompts.slots.sum(1), inside=inside)
    return Fitted(packed, {}, rows, padded, known or {0: Length(rows.mask.shape[1], not padded)})


def _prefilled(vlm: VLM, ready: Fitted, marks: Marks, *values: Tensor) -> Prefilled:
    """What is captured of a prefill. The cache itself is let go: graphs of other buckets may use its memory."""
    rows, inside = fixed_shape.Rows(*values[: len(ready.rows)]), ready.packed.inside
    marks.clear()
    if inside is None:
        return _outcome(fixed_shape.prefill(vlm, rows, ready.padded))
    valid, *row_id = values[len(ready.rows) :]
    own = replace(inside, tokens=replace(inside.tokens, valid=valid, row_id=row_id[0] if row_id else None))
    with fixed_shape.cutting(vlm, rows, own, ready.known, lambda: marks.span("inside")) as cuts:
        output = fixed_shape.prefill(vlm, rows, ready.padded)
    return _outcome(output, tuple(stage.tokens.valid for stage in cuts.stages.values()))


def _outcome(output: Any, left: tuple[Tensor, ...] = ()) -> Prefilled:
    layers = output.past_key_values.layers
    held = sum(t.numel() * t.element_size() for layer in layers for t in (layer.keys, layer.values))
    return Prefilled(output.logits, tuple(int(layer.get_seq_length()) for layer in layers), held, left)


def _values(request: fixed_shape.Request) -> tuple[Tensor, ...]:
    return tuple(value for value in request if value is not None)


def _scores_outside(pruner: Any, tokens: VisualTokens) -> tuple[Tensor, ...]:
    """Scores of a method that are made outside the graph; nothing where the graph makes them."""
    return (pruner.score(tokens),) if IDENTITY in pruner.needs else ()


def _check_served(pruner: Pruner, plan: Cuts) -> None:
    """Raises ValueError: a method that does more than score, looks at more than it may here, or cuts in other places."""
    if not plan:
        return
    needs, sites = pruner.needs, [cut.site for cut in plan]
    before = sites == [ENCODED] and not needs - {IDENTITY}
    inside = plan == pruning.inside_decoder(plan) and all(key.from_decoder and key.queries in ("", "last") for key in needs)
    if not (isinstance(pruner, ScorePruner) and pruner.by_score_alone and (before or inside)):
        raise ValueError(
            f"{pruner.spec.name or type(pruner).__name__}: mode graph serves methods that score the encoder's tokens by their "
            "features, in one cut, or tokens inside the decoder by their states or the prompt's last token; use mode eager"
        )
