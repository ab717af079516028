"""Cuts inside the decoder: visual tokens leave after a decoder layer, the model's own forward and generate run on.

Forward pre-hooks on the layers behind a cut shorten what they are given: hidden states, rotary embeddings and the mask lose the
same entries, so these layers compute and cache fewer tokens than those before them. Tokens keep their positions. In later steps
only the mask is another one, as the cache of each layer has the length its cuts left. What the decoder gives back has its usual
length, with zeros at removed tokens.

What a method looks at inside the decoder is made while the layers before the cut run (`vlm/attention_rows.py`), from the tokens
that are there. Choosing happens once per prompt: passes that come again over a longer row (generation without a cache) repeat it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from diffprune.core.evidence import Evidence, EvidenceKind, Question
from diffprune.core.pruner import Pruner
from diffprune.core.site import Plan
from diffprune.core.tokens import Selection, VisualTokens
from diffprune.core.vlm import VLM, Prompts
from diffprune.pruning.rows import cut, places_left, places_of_question, rows_of_images
from diffprune.pruning.selection import applied
from diffprune.vlm.activation_checkpointing import decoder_layers
from diffprune.vlm.attention_rows import Seen, ahead, attention_rows, watched
from diffprune.vlm.windows import Windows

Given = dict[str, Any]


@dataclass(frozen=True)
class Inside:
    """What is to happen inside the decoder. tokens: of the rows' images, as cuts before the decoder left them.

    left: what happened there in the newest forward pass: by the first layer (from 0) behind each cut, tokens [I N] bool.
    """

    pruner: Pruner
    cuts: Plan
    tokens: VisualTokens
    left: dict[int, Tensor] = field(default_factory=dict, compare=False)

    @staticmethod
    def of(pruner: Pruner, cuts: Plan, tokens: VisualTokens) -> Inside | None:
        """None where there are no such cuts."""
        return Inside(pruner, cuts, tokens) if cuts else None

    def check(self, prompts: Prompts, positions: str) -> None:
        """Raises ValueError: rows in which nothing can be removed inside the decoder."""
        check_positions(self.pruner, positions)
        if prompts.attention_mask.ndim != 2:
            raise ValueError(f"{self.pruner.label} cuts inside the decoder, which takes rows of one question each, not packed ones")


def check_positions(pruner: Pruner, positions: str) -> None:
    """Raises ValueError: rows that are renumbered before the decoder, inside which tokens keep their positions."""
    if positions != "original":
        raise ValueError(f"{pruner.label} cuts inside the decoder, where tokens keep their positions: leave positions='original'")


@dataclass(frozen=True)
class Stage:
    """Rows between two cuts.

    order [B S']: places in the rows that entered the decoder. prompts: what is left of them; its mask says what is padding.
    tokens: those left. whole: no row is padded. weight [I N]: how far each token is there; None where that is all or nothing.
    """

    order: Tensor
    prompts: Prompts
    tokens: VisualTokens
    whole: bool
    weight: Tensor | None = None

    @property
    def real(self) -> Tensor:
        """[B S'] bool: not padding."""
        return self.prompts.attention_mask.bool()


class DecoderCuts:
    """Hooks that carry out a method's cuts inside the decoder; `expect` says which rows come next.

    around: a context for what is no part of the model's own work, so that it can be timed apart. They hold for the thread that
    made them. After a forward pass `stages` has, by the first layer (from 0) behind each cut, what was left.
    """

    def __init__(
        self,
        vlm: VLM,
        pruner: Pruner,
        cuts: Plan,
        windows: Windows,
        around: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        self.vlm, self.pruner, self.windows, self.around = vlm, pruner, windows, around
        self.cuts = {step.site.layer: step for step in cuts}
        self.layers, self.thread = decoder_layers(vlm.model), threading.get_ident()
        self.asked = [(key, layer) for key in pruner.needs if key.from_decoder for layer in self.cuts]
        self._rows: tuple[Prompts, VisualTokens] | None = None
        self._chosen: dict[int, Selection] = {}
        self.stages: dict[int, Stage] = {}
        self._entered: Stage | None = None  # the rows of this forward pass, whole
        self._found: dict[tuple[Evidence, int], Tensor | Question] = {}
        self._later = torch.ones(0, 0)  # [B ...] bool: tokens after the rows that may be attended to, in steps after prefill
        self._held = 0
        self._shared: dict[tuple[int, int], tuple[Any, Any]] = {}  # arguments that layers share, as given and as cut

    def expect(self, prompts: Prompts | None, tokens: VisualTokens | None = None, again: bool = False) -> None:
        """The rows that enter the decoder next, and the tokens in their slots; None for rows without pictures.

        again: they are those of the last time and longer, and lose the same tokens.
        """
        self._rows = None if prompts is None or tokens is None else (prompts, tokens)
        self._chosen = self._chosen if again else {}
        self._entered, self.stages = None, {}

    @property
    def left(self) -> VisualTokens | None:
        """The tokens that every cut has left in the newest forward pass."""
        return self.stages[max(self.stages)].tokens if self.stages else None

    @contextmanager
    def hooked(self) -> Iterator[None]:
        """The hooks are in place inside the block."""
        first, model = min(self.cuts), self.vlm.model
        watch = {n for key, layer in self.asked if (n := _layer(key, layer)) is not None and key.kind is not _STATES}
        enter = {n for key, layer in self.asked if (n := _layer(key, layer)) is not None and key.kind is _STATES}
        with ExitStack() as hooks:
            hooks.callback(model.register_forward_pre_hook(self._enter, with_kwargs=True).remove)
            hooks.enter_context(watched(model, watch, self._see, lambda: self._is_on() and not self._held))
            for number, layer in enumerate(self.layers):
                if number >= first or number in enter:
                    before = self._before(number)
                    hooks.callback(layer.register_forward_pre_hook(before, with_kwargs=True, prepend=True).remove)
                if number >= first:
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
        ids = args[0] if args else given["input_ids"]
        self._held = 0 if past is None else int(past.get_seq_length())
        self._shared, known = {}, prompts.input_ids.shape[1]
        more = self._held + ids.shape[1] - known
        if isinstance(mask, Tensor) and mask.ndim == 2:
            self._later = mask[:, known:].bool()
        else:
            self._later = ids.new_ones(len(ids), more, dtype=torch.bool)
        if self._held:
            return
        if more == 0 and self._entered is not None:  # the same rows once more choose anew
            self._chosen = {}
        rows = prompts if more == 0 else _longer(prompts, self._later)
        places = torch.arange(known + more, device=ids.device).expand(len(ids), -1)
        self._entered = Stage(places, rows, self._rows[1], bool(rows.attention_mask.all()))
        self._owner = rows_of_images(prompts, self._rows[1])
        self.stages, self._found = {}, {}

    @property
    def _whole(self) -> Stage:
        assert self._entered is not None, "layers run after the model was entered"
        return self._entered

    def _stage(self, number: int) -> Stage:
        """The rows that layer `number` works on."""
        layers = [layer for layer in self.stages if layer <= number]
        return self.stages[max(layers)] if layers else self._whole

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
                return args, {**given, "attention_mask": self._later_mask(number, states, given)}
            rows = self._before_cut(number)
            states = _gathered(states, rows.order) if self._is_full(states, rows) else states
            for key, at in self.asked:
                if key.kind is _STATES and _layer(key, at) == number and at not in self._chosen:
                    self._found[key, at] = self._of(key, states, rows)
            if number in self.cuts:
                with self.around():
                    states = self._cut(layer, number, states, given)
            given = self._short(number, given)
            return ((states, *args[1:]), given) if args else ((), {**given, "hidden_states": states})

        return before

    def _is_full(self, states: Tensor, rows: Stage) -> bool:
        """Whether hidden states have the length of the rows that entered, though tokens have been removed."""
        return rows is not self._entered and states.shape[1] == self._whole.order.shape[1]

    def _cut(self, layer: Any, number: int, states: Tensor, given: Given) -> Tensor:
        """Hidden states of what the method leaves at this cut; remembers the rows they belong to."""
        rows = self._before_cut(number)
        tokens = self._tokens(layer, number, states, rows, given)
        if number not in self._chosen:
            self._chosen[number] = self.pruner.select(tokens, self.cuts[number])
        left = applied(tokens, self._chosen[number])
        before = tokens.present
        if left.features is not tokens.features:
            states = states.masked_scatter(rows.prompts.slots[..., None], left.features[before].to(states.dtype))
        live = rows.real.masked_scatter(rows.prompts.slots, left.present[before])
        order, _ = places_left(live)
        short = cut(rows.prompts, live)
        self.stages[number] = Stage(rows.order.gather(1, order), short, left, bool(short.attention_mask.all()))
        assert short.index is not None
        self.windows.cut_from(number, short.index, self.stages[number].order)
        return _gathered(states, order)

    def _after(self, number: int) -> Any:
        """Forward hook: where DeepStack features join behind the layer, its output has the length the model expects."""

        def after(_: Any, args: Any, output: Any) -> Any:
            deepstack = None if self._rows is None or not self._is_on() else self._rows[1].deepstack
            if self._held or deepstack is None or number >= deepstack.shape[-1] // self.vlm.shape.width:
                return None
            return self._restored(output)

        return after

    def _leave(self, _: Any, args: tuple[Any, ...]) -> tuple[Tensor] | None:
        """Pre-hook of the decoder's last norm."""
        return (self._restored(args[0]),) if self._is_on() and not self._held and self.stages else None

    def _restored(self, states: Tensor) -> Tensor:
        """Hidden states at the length of the rows that entered, zeros at removed tokens."""
        stage, entered = self._stage(len(self.layers)), self._whole
        if states.shape[1] != stage.order.shape[1]:
            return states
        full = states.new_zeros(*entered.order.shape, states.shape[2])
        return full.scatter(1, _wide(stage.order, states), states.masked_fill(~stage.real[..., None], 0))

    # -- arguments of the layers ---------------------------------------------------------------------------------------

    def _short(self, number: int, given: Given) -> Given:
        """The arguments of a layer in prefill, which the model made for whole rows, for the rows that are left."""
        if not (made := [layer for layer in self.stages if layer <= number]):
            return given
        stage, since = self.stages[max(made)], max(made)
        short = {
            "position_embeddings": self._once(since, given["position_embeddings"], lambda pair: _turned(pair, stage.order)),
            "attention_mask": self._once(since, given.get("attention_mask"), lambda mask: self._mask(mask, stage)),
        }
        if given.get("position_ids") is not None:  # tells sequences apart, so without gaps
            short["position_ids"] = self._once(since, given["position_ids"], lambda _: _counted(stage.real))
        return {**given, **short}

    def _once(self, since: int, given: Any, make: Callable[[Any], Any]) -> Any:
        """Layers share their arguments, so each is cut once per forward pass and cut."""
        key = since, id(given)
        if key not in self._shared:
            self._shared[key] = given, make(given)  # held, so that its id stays its own
        return self._shared[key][1]

    def _mask(self, mask: Tensor | None, stage: Stage) -> Tensor | None:
        """A mask of whole rows, [B 1 S S] or, for flash attention, [B S], at what is left; None is plain causal."""
        real = stage.real
        if mask is None and stage.whole:
            return None
        if "flash" in self._implementation:
            return real if mask is None else mask.gather(1, stage.order) * real.to(mask.dtype)
        own = torch.eye(real.shape[1], dtype=torch.bool, device=real.device) & ~real[:, None, :, None]  # padding sees itself
        if mask is None:
            return real[:, None, None, :] & torch.ones_like(own).tril() | own
        rows = torch.arange(len(real), device=real.device)[:, None, None]
        short = mask.expand(len(real), -1, -1, -1)[rows, 0, stage.order[:, :, None], stage.order[:, None, :]][:, None]
        if mask.dtype == torch.bool:
            return short & real[:, None, None, :] | own
        return short.masked_fill(~real[:, None, None, :], torch.finfo(mask.dtype).min)

    def _later_mask(self, number: int, states: Tensor, given: Given) -> Tensor | None:
        """The mask of a step after prefill, over what this layer has cached: the rows it was left and what came after."""
        stage, new = self._stage(number), states.shape[1]
        length = given["past_key_values"].get_mask_sizes(new, number)[0]
        key = length, id(stage)
        if key not in self._shared:
            self._shared[key] = None, self._step(stage, new, length, states)
        return self._shared[key][1]

    def _step(self, stage: Stage, new: int, length: int, states: Tensor) -> Tensor | None:
        columns = torch.cat([stage.real, self._later], 1)[:, -length:]
        plain = new == 1 and bool(columns.all())
        if "flash" in self._implementation:
            return None if plain else columns
        if plain and self._implementation != "eager":
            return None
        seen = columns[:, None, None, :] & torch.ones(new, length, dtype=torch.bool, device=states.device).tril(length - new)
        if self._implementation != "eager":
            return seen
        return torch.zeros_like(seen, dtype=states.dtype).masked_fill(~seen, torch.finfo(states.dtype).min)

    @property
    def _implementation(self) -> str:
        return str(self.vlm.model.config.get_text_config()._attn_implementation)

    # -- what a method looks at ----------------------------------------------------------------------------------------

    def _tokens(self, layer: Any, number: int, states: Tensor, rows: Stage, given: Given) -> VisualTokens:
        """The tokens as a method sees them before the cut at `number`: hidden states as features, and its evidence."""
        evidence = dict(rows.tokens.evidence)
        coming = [key for key, at in self.asked if at == number and key.layer is None]
        if any(key.kind is not _STATES for key in coming) and number not in self._chosen:
            short = self._short(number - 1, given)
            mask = self.windows.narrowed(number, short.get("attention_mask"), states, None)
            seen = ahead(layer, states, short | {"attention_mask": mask})
            evidence |= {key: self._of(key, seen, rows) for key in coming if key.kind is not _STATES}
        evidence |= {key: self._of(key, states, rows) for key in coming if key.kind is _STATES}
        evidence |= {key: found for (key, at), found in self._found.items() if at == number}
        return replace(rows.tokens, features=_placed(states, rows), evidence=evidence, projected=True)

    def _see(self, number: int, seen: Seen) -> None:
        """Note what later cuts ask of a layer's attention while it runs."""
        with self.around():
            for key, at in self.asked:
                if key.kind is not _STATES and _layer(key, at) == number and at not in self._chosen:
                    self._found[key, at] = self._of(key, seen, self._stage(number))

    @torch.no_grad()
    def _of(self, key: Evidence, found: Seen | Tensor, rows: Stage) -> Tensor | Question:
        """Evidence for each image from hidden states, or from queries and keys, of its row."""
        if key.kind is EvidenceKind.DECODER_ATTENTION:
            assert isinstance(found, Seen)
            if key.queries == "last":
                return _placed(attention_rows(found, _last(rows.prompts), key.raw).transpose(1, 2), rows)[..., 0]
            places, real = places_of_question(rows.prompts)
            each = attention_rows(found, places, key.raw).masked_fill(~real[..., None], 0).transpose(1, 2)
            if key.queries == "each":
                return _placed(each, rows)
            return _placed((each.sum(2) / real.sum(1)[:, None].clamp_min(1))[..., None], rows)[..., 0]
        if key.kind is EvidenceKind.DECODER_SCORES:
            assert isinstance(found, Seen)
            return _received(found, rows)
        values = found.key.transpose(1, 2).flatten(2) if isinstance(found, Seen) else found
        if key.queries != "text":
            return _placed(values, rows)
        places, real = places_of_question(rows.prompts)
        return Question(_gathered(values, places)[self._owner], real[self._owner])


def _received(seen: Seen, rows: Stage) -> Tensor:
    """[I N]: scores of each visual token as a key of its image's tokens, by how far these are there (`decoder_scores`)."""
    query, key = (_placed(values.transpose(1, 2).flatten(2), rows) for values in (seen.query, seen.key))
    groups, size = seen.key.shape[1], seen.key.shape[3]
    here = rows.tokens.valid.float() if rows.weight is None else rows.weight.where(rows.tokens.valid, 0.0)
    asked = (here[:, None] @ query.float())[:, 0] / here.sum(1, keepdim=True).clamp_min(1e-6)
    asked = asked.view(len(asked), groups, -1, size).mean(2)  # heads of a group share their key
    return torch.einsum("igd,ingd->in", asked, key.float().view(*key.shape[:2], groups, size)) * (seen.scaling / groups)


_STATES = EvidenceKind.DECODER_FEATURES


def _layer(key: Evidence, cut_at: int) -> int | None:
    """The layer (from 0) that evidence for a cut before layer `cut_at` is read in; None where it is made at the cut itself."""
    return None if key.layer is None else key.layer if key.layer >= 0 else cut_at + key.layer


def _last(prompts: Prompts) -> Tensor:
    """[B 1]: place of each row's last token before its answer, if it has one."""
    end = prompts.input_ids.shape[1]
    if prompts.labels is None:
        return prompts.slots.new_full((len(prompts), 1), end - 1, dtype=torch.long)
    said = prompts.labels >= 0
    return torch.where(said.any(1), said.int().argmax(1), end)[:, None] - 1


def _longer(prompts: Prompts, later: Tensor) -> Prompts:
    """The rows with text after them [B ...] bool, of which nothing is looked at."""
    more, last = later.shape[1], prompts.position_ids[:, -1:]
    steps = torch.arange(1, more + 1, device=later.device)
    where = last + (steps if last.ndim == 2 else steps[:, None])
    assert prompts.index is not None
    return Prompts(
        functional.pad(prompts.input_ids, (0, more)),
        torch.cat([prompts.attention_mask, later.long()], 1),
        torch.cat([prompts.position_ids, where], 1),
        functional.pad(prompts.slots, (0, more)),
        functional.pad(prompts.question, (0, more)),
        index=torch.cat([prompts.index, prompts.index[:, -1:] + steps], 1),
    )


def _wide(order: Tensor, values: Tensor) -> Tensor:
    return order[..., None].expand(-1, -1, values.shape[2])


def _gathered(values: Tensor, order: Tensor) -> Tensor:
    """[B S D] at the places [B S'] -> [B S' D]."""
    return values.gather(1, _wide(order, values))


def _turned(pair: tuple[Tensor, ...], order: Tensor) -> tuple[Tensor, ...]:
    """Rotary embeddings ([1 or B S d], or with coordinates before) at the places that are left."""
    index = order[..., None]
    shapes = [(*part.shape[:-3], len(order), *part.shape[-2:]) for part in pair]
    return tuple(part.expand(s).gather(-2, index.expand(*s[:-2], -1, s[-1])) for part, s in zip(pair, shapes, strict=True))


def _counted(real: Tensor) -> Tensor:
    return (real.cumsum(1) - 1).clamp_min(0)


def _placed(values: Tensor, rows: Stage) -> Tensor:
    """[B S' D] at the slots of the rows -> [I N D] at the tokens that are present, zeros elsewhere."""
    present = rows.tokens.present
    flat = values.new_zeros(*present.shape, values.shape[2])
    flat[present] = values[rows.prompts.slots]
    return flat
