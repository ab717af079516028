"""One session: arms timed next to each other on the same inputs, round by round, in shuffled order.

Three arms: `full` (unpruned, through the same path), `pruned` (the cell's method and budget, tokens really gone), `native` (a
sequence that was always this short, made without any pruner). Every round runs all arms on the same batch of real images and
questions, so a slow moment of the machine meets all of them alike.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

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
class Arm:
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
        self.full = Arm("full", none, Share(1))
        self.arms = [self.full]
        self.costs: dict[int, Cost] = {}  # by id of the arm
        self._natives: dict[tuple[tuple[int, ...], ...], Arm] = {}
        self._order = random.Random(options.seed)

    def add(self, pruner: Pruner, budget: Budget) -> tuple[Arm, Arm]:
        """The (pruned, native) arms of a method at a budget; equal counts of different methods share one native arm."""
        ready = [self.mode.shrink(self.vlm, inputs, pruner, budget, self.clock)[0] for inputs in self.inputs]
        pruned = Arm("pruned", pruner, budget, sizes=[_size(r) for r in ready])
        counts = tuple(tuple(r.packed.kept.tolist()) for r in ready)
        if counts not in self._natives:
            made = [self.mode.native(self.vlm, inputs, kept) for inputs, kept in zip(self.inputs, counts, strict=True)]
            self._natives[counts] = Arm("native", self.full.pruner, Share(1), made, [_size(r) for r in made])
            self.arms.append(self._natives[counts])
        for one in ready:
            self.mode.prove_removed(one, self.mode.prefill(self.vlm, one, self.clock)[1])
        self.arms.append(pruned)
        return pruned, self._natives[counts]

    def run(self) -> None:
        """Warm up every arm on every input, then time all rounds."""
        self._guarded([self.full], lambda arm: arm.sizes.extend(_size(self._once(arm, i)[0]) for i in self.inputs))
        for _ in range(self.options.warmup):
            self._guarded(self.arms, lambda arm: [self._once(arm, inputs, i) for i, inputs in enumerate(self.inputs)])
        for turn in range(self.options.rounds):
            self._round(turn)
        for turn in range(self.options.slow_rounds):
            self._slow_round(turn)

    def _once(self, arm: Arm, inputs: Inputs, index: int = 0, parts: bool = False) -> tuple[Ready, dict[str, float]]:
        spans: dict[str, float] = {}
        if arm.fixed:
            ready = arm.fixed[index]
        else:
            ready, spans = self.mode.shrink(self.vlm, inputs, arm.pruner, arm.budget, self.clock, parts)
            if arm is self.full:
                spans = {"project": spans["project"]}  # nothing is added to an unpruned request
        if not parts:
            spans["prefill"] = self.mode.prefill(self.vlm, ready, self.clock)[0]
        return ready, spans

    def _round(self, turn: int) -> None:
        index = turn % len(self.inputs)
        inputs, extra = self.inputs[index], self._encoders(turn)
        arms = [arm for arm in self.arms if not arm.error]
        self._order.shuffle(arms)

        def once(arm: Arm) -> None:
            spans = self._once(arm, inputs, index)[1]
            if "overhead" in spans:
                spans["overhead"] += extra.get(arm.encoder_needs, 0.0)
            arm.add(turn, spans)

        def again(arm: Arm) -> None:
            spans = self._once(arm, inputs, index, parts=True)[1]
            spans["score"] += extra.get(arm.encoder_needs, 0.0)
            arm.add(turn, {name: spans[name] for name in ("score", "select", "gather")})

        self._guarded(arms, once)
        if "parts" in self.spans:
            self._guarded([arm for arm in arms if arm.name == "pruned"], again)

    def _encoders(self, turn: int) -> dict[frozenset[Evidence], float]:
        """Time the encoder once per set of needs; what each adds to it, which is overhead of the methods that ask for it."""
        inputs, added = self.inputs[turn % len(self.inputs)], {}
        asked = {arm.encoder_needs for arm in self.arms if arm.name == "pruned"} - {frozenset()}
        wanted = sorted(asked, key=lambda needs: sorted(map(str, needs)))
        wanted = [frozenset[Evidence](), *wanted] if "encoder" in self.spans else wanted
        self._order.shuffle(wanted)
        for needs in wanted:
            spent, more = eager.encode(self.vlm, inputs, needs, self.clock)
            added[needs] = 0.0 if np.isnan(more) else more
            if "encoder" in self.spans:
                for arm in (a for a in self.arms if a.name != "native" and a.encoder_needs == needs):
                    arm.add(turn, {"encoder": spent})
        return added

    def _slow_round(self, turn: int) -> None:
        index = turn % len(self.inputs)
        arms = [arm for arm in self.arms if not arm.error]
        self._order.shuffle(arms)
        if "ttft" in self.spans:
            asked = [arm for arm in arms if arm.name != "native"]
            if turn == 0 and self.options.warmup:
                self._guarded(asked, lambda arm: self._ttft(arm, index))
            self._guarded(asked, lambda arm: arm.add(turn, {"ttft": self._ttft(arm, index)}))
        if "decode" in self.spans:
            self._guarded(arms, lambda arm: self._decode(arm, turn, index))

    def _ttft(self, arm: Arm, index: int) -> float:
        return self.mode.first_token(self.vlm, self.inputs[index], arm.pruner, arm.budget, self.host)

    def _decode(self, arm: Arm, turn: int, index: int) -> None:
        ready = self._ready(arm, index)
        arm.add(turn, {"decode": self.mode.decode(self.vlm, ready, self.options.decode_tokens, self.host)})

    def _ready(self, arm: Arm, index: int) -> Ready:
        """Rows of an arm, untimed."""
        if arm.fixed:
            return arm.fixed[index]
        return self.mode.shrink(self.vlm, self.inputs[index], arm.pruner, arm.budget, self.clock)[0]

    def _guarded(self, arms: Sequence[Arm], call: Callable[[Arm], object]) -> None:
        """`call` every arm; one that fails is out of the session, with its reason."""
        for arm in arms:
            if arm.error:
                continue
            try:
                call(arm)
            except Exception as error:  # out of memory, or whatever a method raises: an outcome, never a time
                arm.error = with_class(error)

    def cost(self, arm: Arm) -> Cost:
        """Of the image whose count is nearest the arm's mean, alone."""
        if id(arm) not in self.costs:
            where, row = self._typical(arm)
            whole = self.inputs[where]
            pixels = self.vlm.part(whole.pixels, row, row + 1)
            alone = whole.tokens[torch.tensor([row], device=whole.prompts.input_ids.device)]
            prompts = self.vlm.prompts(whole.questions[row : row + 1], alone.present.sum(1).tolist(), alone.layout)
            one = Inputs(whole.images[row : row + 1], whole.questions[row : row + 1], pixels, alone, prompts)
            if arm.fixed:
                ready = self.mode.native(self.vlm, one, [int(arm.fixed[where].packed.kept[row])])
            else:
                ready = self.mode.shrink(self.vlm, one, arm.pruner, arm.budget, self.clock)[0]
            self.costs[id(arm)] = cost_of(self.vlm, arm.name, ready, self.clock, self.mode)
        return self.costs[id(arm)]

    def _typical(self, arm: Arm) -> tuple[int, int]:
        """(batch of inputs, row) of the image nearest the mean count."""
        counts = []
        for i in range(len(self.inputs)):
            counts += [(int(k), i, row) for row, k in enumerate(self._ready(arm, i).packed.kept)]
        mean = sum(k for k, _, _ in counts) / len(counts)
        return min(counts, key=lambda c: (abs(c[0] - mean), c))[1:]

    def timings(self, arm: Arm, flags: Sequence[str]) -> list[Timing]:
        rows = []
        for span, values in arm.found.items():
            own = [*flags, *value_flags([v for _, v in values]), *self._excluded(arm, span)]
            for turn, value in values:
                kept, sequence = arm.sizes[turn % len(self.inputs)]
                rows.append(Timing(span, arm.name, turn, value, kept, sequence, " ".join(own)))
        return rows

    def _excluded(self, arm: Arm, span: str) -> list[str]:
        """Flag an overhead that lacks what the method needs of an encoder whose end cannot be marked, or whose parts disagree."""
        if span != "overhead":
            return []
        unknown = bool(arm.encoder_needs) and not hasattr(self.vlm.model, "get_encoder")
        parts = [sum(v) for v in zip(*([x for _, x in arm.found.get(p, [])] for p in ("score", "select", "gather")), strict=False)]
        whole = float(np.median([v for _, v in arm.found[span]]))
        differ = bool(parts) and abs(float(np.median(parts)) - whole) > max(0.1, 0.05 * whole)
        return ["overhead_excluded"] * unknown + ["parts_differ"] * differ


def _size(ready: Ready) -> tuple[float, int]:
    return float(ready.packed.kept.float().mean()), ready.sequence
