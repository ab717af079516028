"""One session: variants timed next to each other on the same inputs, round by round, in shuffled order.

Three variants: `full` (unpruned, through the same path), `pruned` (the cell's method and budget, tokens really gone), `native` (a
sequence that was always this short, made without any pruner). Every round runs all variants on the same batch of real images and
questions, so a slow moment of the machine meets all of them alike.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean

import numpy as np
import torch

from diffprune.core import registry
from diffprune.core.budget import Budget, Share
from diffprune.core.errors import with_class
from diffprune.core.evidence import Evidence
from diffprune.core.pruner import Pruner
from diffprune.core.records import Cost, Timing
from diffprune.core.vlm import VLM
from diffprune.timing import eager
from diffprune.timing.clock import Clock
from diffprune.timing.eager import Inputs, Mode, Ready
from diffprune.timing.machine import value_flags
from diffprune.timing.measured_cost import cost_of
from diffprune.timing.options import Measurement


@dataclass
class TimedVariant:
    """One thing to time, and what was found. fixed: rows made beforehand (native), per batch of inputs."""

    name: str
    pruner: Pruner
    budget: Budget
    fixed: list[Ready] = field(default_factory=list)
    sizes: list[tuple[float, int]] = field(default_factory=list)  # (mean kept, sequence) per batch of inputs
    found: dict[str, list[tuple[int, float]]] = field(default_factory=dict)  # span -> (round, ms)
    error: str = ""

    def add(self, turn: int, spans: Mapping[str, float]) -> None:
        for span, value in spans.items():
            self.found.setdefault(span, []).append((turn, value))

    @property
    def encoder_needs(self) -> frozenset[Evidence]:
        return eager.from_encoder(self.pruner.needs)


class Session:
    """Arms timed next to each other on the same inputs, in one mode."""

    def __init__(
        self, vlm: VLM, inputs: Sequence[Inputs], options: Measurement, clock: Clock, host: Clock, mode: Mode = eager
    ) -> None:
        self.vlm, self.inputs, self.options, self.clock, self.host = vlm, inputs, options, clock, host
        self.mode, self.spans = mode, frozenset(options.spans) - mode.UNTIMED
        none = registry.load("pruners", "unpruned")
        self.full = TimedVariant("full", none, Share(1))
        self.variants = [self.full]
        self.costs: dict[int, Cost] = {}  # by id of the variant
        self._natives: dict[tuple[tuple[int, ...], ...], TimedVariant] = {}
        self._order = random.Random(options.seed)

    def add(self, pruner: Pruner, budget: Budget) -> tuple[TimedVariant, TimedVariant]:
        """The (pruned, native) variants of a method at a budget; equal counts of different methods share one native variant."""
        ready = [self._counted(self.mode.shrink(self.vlm, inputs, pruner, budget, self.clock)[0]) for inputs in self.inputs]
        pruned = TimedVariant("pruned", pruner, budget, sizes=[self._size(r) for r in ready])
        counts = tuple(tuple(round(n) for n in r.packed.averages(self.vlm.shape.layers)) for r in ready)
        if counts not in self._natives:
            made = [self.mode.native(self.vlm, inputs, kept) for inputs, kept in zip(self.inputs, counts, strict=True)]
            self._natives[counts] = TimedVariant("native", self.full.pruner, Share(1), made, [self._size(r) for r in made])
            self.variants.append(self._natives[counts])
        for one in ready:
            self.mode.prove_removed(one, self.mode.prefill(self.vlm, one, self.clock).output)
        self.variants.append(pruned)
        return pruned, self._natives[counts]

    def run(self) -> None:
        """Warm up every variant on every input, then time all rounds."""
        self._guarded([self.full], lambda variant: variant.sizes.extend(self._size(self._once(variant, i)[0]) for i in self.inputs))
        for _ in range(self.options.warmup):
            self._guarded(self.variants, lambda variant: [self._once(variant, inputs, i) for i, inputs in enumerate(self.inputs)])
        for turn in range(self.options.rounds):
            self._round(turn)
        for turn in range(self.options.slow_rounds):
            self._slow_round(turn)

    def _once(self, variant: TimedVariant, inputs: Inputs, index: int = 0, parts: bool = False) -> tuple[Ready, dict[str, float]]:
        spans: dict[str, float] = {}
        if variant.fixed:
            ready = variant.fixed[index]
        else:
            ready, spans = self.mode.shrink(self.vlm, inputs, variant.pruner, variant.budget, self.clock, parts)
            if variant is self.full:
                spans = {"project": spans["project"]}  # nothing is added to an unpruned request
        if not parts:
            done = self.mode.prefill(self.vlm, ready, self.clock)
            spans["prefill"] = done.ms
            if "overhead" in spans:
                spans["overhead"] += done.overhead
        elif ready.packed.inside is not None:  # what happens inside cannot be told apart
            spans["select"] += self.mode.prefill(self.vlm, ready, self.clock).overhead
        return ready, spans

    def _round(self, turn: int) -> None:
        index = turn % len(self.inputs)
        inputs, extra = self.inputs[index], self._encoders(turn)
        variants = [variant for variant in self.variants if not variant.error]
        self._order.shuffle(variants)

        def once(variant: TimedVariant) -> None:
            spans = self._once(variant, inputs, index)[1]
            if "overhead" in spans:
                spans["overhead"] += extra.get(variant.encoder_needs, 0.0)
            variant.add(turn, spans)

        def again(variant: TimedVariant) -> None:
            spans = self._once(variant, inputs, index, parts=True)[1]
            spans["score"] += extra.get(variant.encoder_needs, 0.0)
            variant.add(turn, {name: spans[name] for name in ("score", "select", "gather")})

        self._guarded(variants, once)
        if "parts" in self.spans:
            self._guarded([variant for variant in variants if variant.name == "pruned"], again)

    def _encoders(self, turn: int) -> dict[frozenset[Evidence], float]:
        """Time the encoder once per set of needs; what each adds to it, which is overhead of the methods that ask for it."""
        inputs, added = self.inputs[turn % len(self.inputs)], {}
        asked = {variant.encoder_needs for variant in self.variants if variant.name == "pruned"} - {frozenset()}
        wanted = sorted(asked, key=lambda needs: sorted(map(str, needs)))
        wanted = [frozenset[Evidence](), *wanted] if "encoder" in self.spans else wanted
        self._order.shuffle(wanted)
        for needs in wanted:
            spent, more = eager.encode(self.vlm, inputs, needs, self.clock)
            added[needs] = 0.0 if np.isnan(more) else more
            if "encoder" in self.spans:
                for variant in (a for a in self.variants if a.name != "native" and a.encoder_needs == needs):
                    variant.add(turn, {"encoder": spent})
        return added

    def _slow_round(self, turn: int) -> None:
        index = turn % len(self.inputs)
        variants = [variant for variant in self.variants if not variant.error]
        self._order.shuffle(variants)
        for span, call in (("ttft", self._ttft), ("decode", self._decode)):
            asked = [variant for variant in variants if span == "decode" or variant.name != "native"]
            if span in self.spans:
                self._slow(span, call, asked, turn, index)

    def _slow(
        self, span: str, call: Callable[[TimedVariant, int], float], asked: list[TimedVariant], turn: int, index: int
    ) -> None:
        """Time a span that costs many times a prefill: once, and before its first time on these inputs once for nothing."""
        if turn < len(self.inputs) and self.options.warmup:
            self._guarded(asked, lambda variant: call(variant, index))
        self._guarded(asked, lambda variant: variant.add(turn, {span: call(variant, index)}))

    def _ttft(self, variant: TimedVariant, index: int) -> float:
        return self.mode.first_token(self.vlm, self.inputs[index], variant.pruner, variant.budget, self.host)

    def _decode(self, variant: TimedVariant, index: int) -> float:
        return self.mode.decode(self.vlm, self._ready(variant, index), self.options.decode_tokens, self.host)

    def _ready(self, variant: TimedVariant, index: int) -> Ready:
        """Rows of an variant, untimed."""
        if variant.fixed:
            return variant.fixed[index]
        return self._counted(self.mode.shrink(self.vlm, self.inputs[index], variant.pruner, variant.budget, self.clock)[0])

    def _counted(self, ready: Ready) -> Ready:
        """Rows, gone through the decoder once where cuts inside it decide how many tokens stay, so that this is known."""
        inside = ready.packed.inside
        if inside is not None and any(cut.adaptive for cut in inside.cuts):
            self.mode.prefill(self.vlm, ready, self.clock)
        return ready

    def _size(self, ready: Ready) -> tuple[float, int]:
        """(visual tokens, mean over images and decoder layers, length of the rows)."""
        return fmean(ready.packed.averages(self.vlm.shape.layers)), ready.sequence

    def _guarded(self, variants: Sequence[TimedVariant], call: Callable[[TimedVariant], object]) -> None:
        """`call` every variant; one that fails is out of the session, with its reason."""
        for variant in variants:
            if variant.error:
                continue
            try:
                call(variant)
            except Exception as error:  # out of memory, or whatever a method raises: an outcome, never a time
                variant.error = with_class(error)

    def cost(self, variant: TimedVariant) -> Cost:
        """Of the image whose count is nearest the variant's mean, alone."""
        if id(variant) not in self.costs:
            where, row = self._typical(variant)
            whole = self.inputs[where]
            pixels = self.vlm.part(whole.pixels, row, row + 1)
            alone = whole.tokens[torch.tensor([row], device=whole.prompts.input_ids.device)]
            prompts = self.vlm.prompts(whole.questions[row : row + 1], alone.present.sum(1).tolist(), alone.layout)
            one = Inputs(whole.images[row : row + 1], whole.questions[row : row + 1], pixels, alone, prompts)
            if variant.fixed:
                ready = self.mode.native(self.vlm, one, [int(variant.fixed[where].packed.kept[row])])
            else:
                ready = self._counted(self.mode.shrink(self.vlm, one, variant.pruner, variant.budget, self.clock)[0])
            self.costs[id(variant)] = cost_of(self.vlm, variant.name, ready, pixels, self.clock, self.mode)
        return self.costs[id(variant)]

    def _typical(self, variant: TimedVariant) -> tuple[int, int]:
        """(batch of inputs, row) of the image nearest the mean count."""
        counts = []
        for i in range(len(self.inputs)):
            counts += [(k, i, row) for row, k in enumerate(self._ready(variant, i).packed.averages(self.vlm.shape.layers))]
        mean = sum(k for k, _, _ in counts) / len(counts)
        return min(counts, key=lambda c: (abs(c[0] - mean), c))[1:]

    def timings(self, variant: TimedVariant, flags: Sequence[str]) -> list[Timing]:
        rows = []
        for span, values in variant.found.items():
            own = [*flags, *value_flags([v for _, v in values]), *self._excluded(variant, span)]
            for turn, value in values:
                kept, sequence = variant.sizes[turn % len(self.inputs)]
                rows.append(Timing(span, variant.name, turn, value, kept, sequence, " ".join(own)))
        return rows

    def _excluded(self, variant: TimedVariant, span: str) -> list[str]:
        """Flag an overhead that lacks what the method needs of an encoder whose end cannot be marked, or whose parts disagree."""
        if span != "overhead":
            return []
        unknown = bool(variant.encoder_needs) and not hasattr(self.vlm.model, "get_encoder")
        parts = [
            sum(v) for v in zip(*([x for _, x in variant.found.get(p, [])] for p in ("score", "select", "gather")), strict=False)
        ]
        whole = float(np.median([v for _, v in variant.found[span]]))
        differ = bool(parts) and abs(float(np.median(parts)) - whole) > max(0.1, 0.05 * whole)
        return ["overhead_excluded"] * unknown + ["parts_differ"] * differ
