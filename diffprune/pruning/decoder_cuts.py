"""Cuts inside the decoder: visual tokens leave after a decoder layer, the model's own forward and generate run on.

Forward pre-hooks on the layers behind a cut shorten what they are given: hidden states, rotary embeddings and the mask lose the
same entries, so these layers compute and cache fewer tokens than those before them. Tokens keep their positions. In later steps
only the mask is another one, as the cache of each layer has the length its cuts left. What the decoder gives back has its usual
length; at a removed token stands what the token left before it has.

What a method looks at inside the decoder is made while the layers before the cut run (`vlm/attention_rows.py`), from the tokens
that are there. Choosing happens once per prompt: passes that come again over a longer row (generation without a cache) repeat it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Set
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from diffprune.core.evidence import Evidence, Question
from diffprune.core.pruner import Pruner
from diffprune.core.site import Plan, for_images
from diffprune.core.tokens import Selection, VisualTokens
from diffprune.core.vlm import VLM, Prompts
from diffprune.pruning.decoder_evidence import evidence_of, layer_of, of_states
from diffprune.pruning.layer_arguments import Given, LayerArguments
from diffprune.pruning.rows import longer, taken
from diffprune.pruning.selection import applied, chosen
from diffprune.pruning.stages import Length, Stage
from diffprune.vlm.activation_checkpointing import decoder_layers
from diffprune.vlm.attention_rows import Seen, ahead, watched
from diffprune.vlm.windows import Windows


@dataclass(frozen=True)
class Inside:
    """What is to happen inside the decoder. tokens: of the rows' images, as cuts before the decoder left them.

    left: what happened there in the newest forward pass: by the first layer (from 0) behind each cut, tokens [I N] bool.
    beside: separators of each image [I] int that were left there, as `left`.
    """

    pruner: Pruner
    cuts: Plan
    tokens: VisualTokens
    left: dict[int, Tensor] = field(default_factory=dict, compare=False)
    beside: dict[int, Tensor] = field(default_factory=dict, compare=False)

    @staticmethod
    def of(pruner: Pruner, cuts: Plan, tokens: VisualTokens) -> Inside | None:
        """None where there are no such cuts."""
        return Inside(pruner, cuts, tokens) if cuts else None

    def check(self, prompts: Prompts, positions: str) -> None:
        """Raises ValueError: rows in which nothing can be removed inside the decoder, or images that cannot meet the budget."""
        check_positions(self.pruner, positions)
        if any(cut.average for cut in self.cuts):
            for_images(self.cuts, self.tokens.counts.tolist())
        if prompts.attention_mask.ndim != 2:
            raise ValueError(f"{self.pruner.label} cuts inside the decoder, which takes rows of one question each, not packed ones")


def check_positions(pruner: Pruner, positions: str) -> None:
    """Raises ValueError: rows that are renumbered before the decoder, inside which tokens keep their positions."""
    if positions != "original":
        raise ValueError(f"{pruner.label} cuts inside the decoder, where tokens keep their positions: leave positions='original'")


class Memory(NamedTuple):
    """What steps after a prefill need of its cuts: the rows expected, those that entered, and by layer those behind a cut."""

    rows: tuple[Prompts, VisualTokens]
    entered: Stage
    stages: dict[int, Stage]

    @property
    def layers(self) -> Set[int]:
        """The first layers (from 0) behind a cut."""
        return self.stages.keys()


class DecoderCuts:
    """Hooks that carry out a method's cuts inside the decoder; `expect` says which rows come next.

    around: a context for what is no part of the model's own work, so that it can be timed apart. lengths: of the rows, where they
    are known beforehand, by the first layer (from 0) behind each cut and 0 for the rows that enter; then rows have one image each,
    and nothing is asked of the device. The hooks hold for the thread that made them. After a forward pass `stages` has, by the
    first layer behind each cut, what was left.
    """

    def __init__(
        self,
        vlm: VLM,
        pruner: Pruner,
        cuts: Plan,
        windows: Windows,
        around: Callable[[], AbstractContextManager[Any]] = nullcontext,
        lengths: Mapping[int, Length] | None = None,
    ) -> None:
        self.vlm, self.pruner, self.windows, self.around, self.lengths = vlm, pruner, windows, around, lengths or {}
        self.plan = cuts
        self.cuts = {step.site.layer: step for step in cuts}  # set against the images that `expect` is told of
        self.layers, self.thread = decoder_layers(vlm.model), threading.get_ident()
        self.asked = [(key, layer) for key in pruner.needs if key.from_decoder for layer in self.cuts]
        self._rows: tuple[Prompts, VisualTokens] | None = None
        self._chosen: dict[int, Selection] = {}
        self.stages: dict[int, Stage] = {}
        self._entered: Stage | None = None  # the rows of this forward pass, whole
        self._found: dict[tuple[Evidence, int], Tensor | Question] = {}
        self._held = 0  # tokens in the cache before this forward pass
        self._arguments: LayerArguments  # of a forward pass, made where it begins
        deepest_first = sorted(self.cuts, reverse=True)
        self._behind = [[cut for cut in deepest_first if cut <= number] for number in range(len(self.layers))]  # cuts, by layer

    def expect(self, prompts: Prompts | None, tokens: VisualTokens | None = None, again: bool = False) -> None:
        """The rows that enter the decoder next, and the tokens in their slots; None for rows without pictures.

        again: they are those of the last time and longer, and lose the same tokens.

        Raises:
            ValueError: see `Cut.of`.
        """
        self._rows = None if prompts is None or tokens is None else (prompts, tokens)
        if tokens is not None and any(step.average for step in self.plan):
            self.cuts = {step.site.layer: step for step in for_images(self.plan, tokens.counts.tolist())}
        self._chosen = self._chosen if again else {}
        self._entered, self.stages = None, {}

    @property
    def memory(self) -> Memory:
        """Of the newest forward pass, for `recall`."""
        assert self._rows is not None
        return Memory(self._rows, self._whole, self.stages)

    def recall(self, memory: Memory | None) -> None:
        """Go on behind the prefill whose `memory` this is; None: rows without pictures, or without cuts."""
        if memory is None:
            self.expect(None)
        else:
            self._rows, self._entered, self.stages = memory

    @property
    def left(self) -> VisualTokens | None:
        """The tokens that every cut has left in the newest forward pass."""
        return self.stages[max(self.stages)].tokens if self.stages else None

    @contextmanager
    def hooked(self) -> Iterator[None]:
        """The hooks are in place inside the block."""
        first, model = min(self.cuts), self.vlm.model
        watch = {n for key, layer in self.asked if (n := layer_of(key, layer)) is not None and not of_states(key)}
        enter = {n for key, layer in self.asked if (n := layer_of(key, layer)) is not None and of_states(key)}
        with ExitStack() as hooks:
            hooks.callback(model.register_forward_pre_hook(self._enter, with_kwargs=True).remove)
            hooks.enter_context(watched(model, watch, self._see, lambda: self._is_on() and not self._held))
            for number, layer in enumerate(self.layers):
                if number >= first or number in enter:
                    before = self._before(number)
                    hooks.callback(layer.register_forward_pre_hook(before, with_kwargs=True, prepend=True).remove)
                if number >= first and self.vlm.joins_deepstack:
                    hooks.callback(layer.register_forward_hook(self._after(number)).remove)
            hooks.callback(model.get_decoder().norm.register_forward_pre_hook(self._leave).remove)
            yield

    # -- a forward pass begins -----------------------------------------------------------------------------------------

    def _is_on(self) -> bool:
        return self._rows is not None and threading.get_ident() == self.thread

    def _enter(self, _: Any, args: tuple[Any, ...], given: Given) -> None:
        """Pre-hook of the model: whether this is a prefill, and which tokens come after its rows."""
        if not self._is_on():
            return
        assert self._rows is not None
        prompts, past, mask = self._rows[0], given.get("past_key_values"), given.get("attention_mask")
        ids = args[0] if args else given["inputs_embeds"] if given.get("input_ids") is None else given["input_ids"]
        self._held, known = 0 if past is None else int(past.get_seq_length()), prompts.input_ids.shape[1]
        more = self._held + ids.shape[1] - known
        if isinstance(mask, Tensor) and mask.ndim == 2:
            later = mask[:, known:].bool()
        else:
            later = ids.new_ones(len(ids), more, dtype=torch.bool)
        self._arguments = self._arguments_of(later)
        if self._held:
            return
        if more == 0 and self._entered is not None:  # the same rows once more choose anew
            self._chosen = {}
        self._entered = Stage.entering(prompts if more == 0 else longer(prompts, later), self._rows[1], self.lengths.get(0))
        self.stages, self._found = {}, {}

    def _arguments_of(self, later: Tensor) -> LayerArguments:
        layer: Any = self.layers[0]
        return LayerArguments(str(layer.self_attn.config._attn_implementation), later)

    @property
    def _whole(self) -> Stage:
        assert self._entered is not None, "layers run after the model was entered"
        return self._entered

    def _stage(self, number: int) -> Stage:
        """The rows that layer `number` works on."""
        for cut in self._behind[number] if self.stages and number >= 0 else ():
            if cut in self.stages:
                return self.stages[cut]
        return self._whole

    def _before_cut(self, number: int) -> Stage:
        """The rows that enter layer `number`, before the cut there; also when activation checkpointing runs a layer again."""
        return self._stage(number - 1) if number in self.cuts else self._stage(number)

    # -- layers --------------------------------------------------------------------------------------------------------

    def _before(self, number: int) -> Any:
        """The pre-hook of layer `number`."""

        def before(layer: Any, args: tuple[Any, ...], given: Given) -> tuple[tuple[Any, ...], Given] | None:
            if not self._is_on() or (self._held and number < min(self.cuts)):
                return None
            states = args[0] if args else given["hidden_states"]
            if self._held:
                length = given["past_key_values"].get_mask_sizes(states.shape[1], number)[0]
                return args, {**given, "attention_mask": self._arguments.step(self._stage(number), states, length)}
            rows = self._before_cut(number)
            if rows is not self._entered and self._restores(number - 1):
                states = taken(states, rows.order)
            for key, at in self.asked:
                if of_states(key) and layer_of(key, at) == number and at not in self._chosen:
                    self._found[key, at] = evidence_of(key, states, rows)
            if number in self.cuts:
                with self.around():
                    states = self._cut(layer, number, states, given)
            given = self._short(number, given)
            return ((states, *args[1:]), given) if args else ((), {**given, "hidden_states": states})

        return before

    def _cut(self, layer: Any, number: int, states: Tensor, given: Given) -> Tensor:
        """Hidden states of what the method leaves at this cut; remembers the rows they belong to."""
        rows = self._before_cut(number)
        tokens = self._tokens(layer, number, states, rows, given)
        if number not in self._chosen:
            self._chosen[number] = chosen(self.pruner, tokens, self.cuts[number])
        left = applied(tokens, self._chosen[number])
        if left.features is not tokens.features:
            states = rows.standing(left.features, states)
        stage, places = rows.cut(left, self.lengths.get(number))
        self.stages[number] = stage
        if self.windows.window is not None:
            assert stage.prompts.index is not None, "rows that got shorter know their places"
            self.windows.cut_from(number, stage.prompts.index, stage.order)
        return taken(states, places)

    def _restores(self, number: int) -> bool:
        """Whether rows leave layer `number` as long as they entered the decoder, since DeepStack features join behind it."""
        deepstack = None if self._rows is None else self._rows[1].deepstack
        return deepstack is not None and number < deepstack.shape[-1] // self.vlm.shape.width

    def _after(self, number: int) -> Any:
        """The forward hook of layer `number`."""

        def after(_: Any, args: Any, output: Any) -> Any:
            return self._restored(number, output) if self._is_on() and not self._held and self._restores(number) else None

        return after

    def _leave(self, _: Any, args: tuple[Any, ...]) -> tuple[Tensor] | None:
        """Pre-hook of the decoder's last norm."""
        last = len(self.layers) - 1
        return (self._restored(last, args[0]),) if self._is_on() and not self._held and not self._restores(last) else None

    def _restored(self, number: int, states: Tensor) -> Tensor:
        """Hidden states behind layer `number` at the length of the rows that entered. A removed token has those of the token left
        before it, which predicts in its stead what comes next; zeros where there is none."""
        stage, entered = self._stage(number), self._whole
        if stage is entered:
            return states
        stays = torch.zeros_like(entered.real).scatter(1, stage.order, stage.real)
        left = stays.cumsum(1)  # up to each place; rows are padded on the left
        padding = 0 if stage.whole else (~stage.real).sum(1, keepdim=True)
        return taken(functional.pad(states, (0, 0, 1, 0)), (left + padding).masked_fill(left == 0, 0))

    def _short(self, number: int, given: Given) -> Given:
        """The arguments of layer `number` in prefill, for the rows that are left."""
        stage = self._stage(number)
        if stage is self._entered:
            return given
        return self._arguments.prefill(given, stage)

    # -- what a method looks at ----------------------------------------------------------------------------------------

    def _tokens(self, layer: Any, number: int, states: Tensor, rows: Stage, given: Given) -> VisualTokens:
        """The tokens as a method sees them before the cut at `number`: hidden states as features, and its evidence."""
        evidence = dict(rows.tokens.evidence)
        coming = [key for key, at in self.asked if at == number and key.layer is None]
        if any(not of_states(key) for key in coming) and number not in self._chosen:
            short = self._short(number - 1, given)
            mask = self.windows.narrowed(number, short.get("attention_mask"), states, None)
            seen = ahead(layer, states, short | {"attention_mask": mask})
            evidence |= {key: evidence_of(key, seen, rows) for key in coming if not of_states(key)}
        evidence |= {key: evidence_of(key, states, rows) for key in coming if of_states(key)}
        evidence |= {key: found for (key, at), found in self._found.items() if at == number}
        return replace(rows.tokens, features=rows.placed(states), evidence=evidence, projected=True)

    def _see(self, number: int, seen: Seen) -> None:
        """Note what later cuts ask of a layer's attention while it runs."""
        with self.around():
            for key, at in self.asked:
                if not of_states(key) and layer_of(key, at) == number and at not in self._chosen:
                    self._found[key, at] = evidence_of(key, seen, self._stage(number))
