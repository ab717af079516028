"""Prune inside a model's own calls: `with pruned(model, pruner, budget): model.generate(**inputs)`.

While the block runs there are a forward pre-hook and a patched `get_image_features`. The hook encodes the images at prefill, cuts
the rows and hands both to the model's own forward; at every later step it only shortens the attention mask, whose other columns
were never cached (`cached_rows`). `generate` encodes images before any forward sees them, so the patch records its arguments and
leaves the encoding to the hook. A forward hook leaves a note with the cache that a prefill filled. A method that cuts inside the
decoder has its own hooks there (`decoder_cuts`). All are removed on exit and nothing else is touched, so sampling, beams, streaming
and several answers per prompt are the library's own.
"""

from __future__ import annotations

import functools
import inspect
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import fields, replace
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor

from diffprune import pruning
from diffprune.core.budget import Budget
from diffprune.core.pruner import Pruner
from diffprune.core.tokens import Selection, VisualTokens
from diffprune.core.vlm import VLM, Prompts
from diffprune.pruning._arguments import budget_of, pruner_of
from diffprune.pruning.cached_rows import CachedRows, cache_in, check_whole, note, rows_of
from diffprune.pruning.decoder_cuts import DecoderCuts, Inside, check_positions
from diffprune.pruning.pretrained import make_ready
from diffprune.pruning.rows import longer
from diffprune.vlm.family import refuse_videos
from diffprune.vlm.load import wrap
from diffprune.vlm.windows import Windows

_active: WeakSet[torch.nn.Module] = WeakSet()
OURS = ("return_dict", "self", "kwargs")  # parameters of a family's `get_image_features` that choose nothing
ELSEWHERE = "another thread called a model inside a pruned() block that this thread did not enter: its call is not pruned"


class Pruned:
    """State of a `pruned` block.

    selection: survivors of the newest prefill, after the last cut, for `diffprune.overlay`; of repeated rows, the first's.
    """

    def __init__(self, vlm: VLM, pruner: Pruner, budget: Budget, positions: str) -> None:
        self.vlm, self.pruner, self.budget, self.positions = vlm, pruner, budget, positions
        self.selection: Selection | None = None
        self.parameters = inspect.signature(vlm.model.forward).parameters
        self.windows, self.thread = Windows(vlm), threading.get_ident()
        encoding = inspect.signature(vlm.model.base_model.get_image_features).parameters
        self.settings = {*encoding, "interpolate_pos_encoding"} - {*vlm.encoder_inputs, *OURS}
        inside = pruning.inside_decoder(pruning.plan_of(vlm, pruner, budget))
        self.cuts = DecoderCuts(vlm, pruner, inside, self.windows) if inside else None
        if inside:
            check_positions(pruner, positions)
        self._asked: tuple[Any, dict[str, Any]] = (None, {})  # a deferred encoder output, and the pictures it stands for
        self._chosen: tuple[VisualTokens, VisualTokens] | None = None  # of those pictures: all tokens, and what is left of them
        self._filled: CachedRows | None = None  # of the prefill that is under way

    def elsewhere(self) -> bool:
        """Whether this is another thread than the one that entered the block; it is told so."""
        if threading.get_ident() == self.thread:
            return False
        warnings.warn(ELSEWHERE, stacklevel=3)
        return True

    def deferring(self, encode: Callable[..., Any]) -> Callable[..., Any]:
        """A `get_image_features` that records its arguments and encodes nothing yet."""
        signature = inspect.signature(encode)

        @functools.wraps(encode)
        def record(*args: Any, **options: Any) -> Any:
            if self.elsewhere():
                return encode(*args, **options)
            given = dict(signature.bind(*args, **options).arguments)
            self._check_settings(given | given.get("kwargs", {}))
            self._asked, self._chosen = (self.vlm.deferred(), given), None
            return self._asked[0]

        return record

    def before(self, module: Any, args: tuple[Any, ...], given: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The forward pre-hook: arguments of the model's own forward, changed.

        Raises:
            ValueError: a call that cannot be pruned; the sentence says which and what to do.
        """
        if self.elsewhere():
            return args, given
        if module is not self.vlm.model:
            raise ValueError("this model is a copy that was made inside a pruned() block, hooks and all; copy it outside the block")
        self._filled = None
        given = {**dict(zip(self.parameters, args, strict=False)), **given}
        past = given.get("past_key_values")
        held = int(past.get_seq_length()) if past is not None else 0
        encoded = dict(given.pop("mm_encoder_outputs", None) or {})
        again = encoded.get("image") is not None and encoded["image"] is self._asked[0]
        if again:
            given |= {name: value for name, value in self._asked[1].items() if name in self.vlm.encoder_inputs}
            del encoded["image"]
        pictures = any(given.get(name) is not None for name in self.vlm.encoder_inputs)
        self._refuse(given, encoded, held, pictures)
        if pictures:
            return (), self._prefill(given, again)
        if past is not None and not held:
            note(past, None)  # it may have been emptied
        return (), self._go_on(given, held)

    def _refuse(self, given: dict[str, Any], encoded: dict[str, Any], held: int, pictures: bool) -> None:
        mask = given.get("attention_mask")
        refuse_videos(given | {f"{kind} features": output for kind, output in encoded.items() if kind == "video"})
        if any(output is not None for output in encoded.values()):
            raise ValueError("these pictures are already encoded; inside pruned() give their pixel values")
        if given.get("inputs_embeds") is not None:
            raise ValueError("inputs_embeds hide where the visual tokens are; inside pruned() give input_ids and pixel values")
        if getattr(given.get("past_key_values"), "is_compileable", False):
            raise ValueError(
                "inside pruned() rows get shorter than the masks that static caches and compiled generation make beforehand: leave "
                "cache_implementation unset, and past_key_values too or give a DynamicCache"
            )
        if mask is not None and (not isinstance(mask, Tensor) or mask.ndim != 2):
            raise ValueError("inside pruned() the attention mask must be [rows, length], as the processor makes it")
        if pictures and isinstance(given.get("logits_to_keep"), Tensor):
            raise ValueError(
                "logits_to_keep by places: inside pruned() rows get shorter, so that places mean others; give how many of the last "
                "logits are wanted, or 0 for all"
            )
        if pictures and held:
            raise ValueError(f"a picture in a later turn: the cache already holds {held} tokens; start with an empty cache")
        self._check_settings(given)

    def _check_settings(self, given: Mapping[str, Any]) -> None:
        """Raises ValueError: an argument of this call that would encode otherwise than the configuration says."""
        for name in self.settings & given.keys():
            usual = getattr(self.vlm.model.config, name, None)
            if given[name] is not None and given[name] != usual:
                raise ValueError(
                    f"{name}={given[name]!r:.40} at this call: inside pruned() pictures are encoded as the configuration says "
                    f"({usual!r:.40}); set model.config.{name} before the block"
                )

    def _prefill(self, given: dict[str, Any], again: bool) -> dict[str, Any]:
        """again: the pictures are those of the newest `get_image_features`, as in generation without a cache."""
        given, drafts = _without_drafts(given, again)
        vlm, times = self.vlm, self._times(given, again)
        pixels, prompts, own = self._read(given, times)
        offset = 0 if given.get("position_ids") is not None else vlm.position_offset  # what generate passes counts it already
        known = again and self._chosen is not None
        if not again or self._chosen is None:
            tokens = vlm.encode(pixels, self.pruner.needs)
            pruning.rows_of_images(own, tokens)  # refuses rows whose slots are not those of the pictures
            self._chosen = tokens, pruning.select(vlm, own, tokens, self.pruner, self.budget)
        tokens, left = self._chosen
        self.selection, self._first = Selection(left.valid, grid=left.grid), torch.arange(len(left))
        if times > 1:
            owner = pruning.rows_of_images(own, tokens)
            order = torch.cat([(owner == row).nonzero().squeeze(1).repeat(times) for row in range(len(own))])
            tokens, left, self._first = tokens[order], left[order], order.argsort(stable=True)[::times]
        if (labels := given.get("labels")) is not None:
            prompts = replace(prompts, labels=labels)
        packed = pruning.shortened(vlm, prompts, tokens, left, self.positions, self._inside(left))
        self._filled = CachedRows(prompts, packed.prompts, offset)
        whole = packed.prompts if drafts is None else _with_drafts(vlm, packed.prompts, drafts)
        made = pruning.decoder_inputs(vlm, replace(packed, prompts=whole))
        made["position_ids"] = made["position_ids"] + offset
        types = {name: made.pop(name) for name in vlm.token_inputs(whole)}
        types = {name: value for name, value in types.items() if given.get(name) is not None}  # given none, the model has none
        self.windows.measure_by(packed.prompts.index, types)
        if self.cuts is not None:
            self.cuts.expect(packed.prompts, left, again=known)
        kept = {name: value for name, value in given.items() if name not in (*vlm.encoder_inputs, "labels")}
        return kept | made | types | ({} if labels is None else {"labels": packed.prompts.labels})

    def _go_on(self, given: dict[str, Any], held: int) -> dict[str, Any]:
        """A call without pictures: more text behind what the cache holds, or a prompt of text alone."""
        rows = rows_of(given.get("past_key_values")) if held else None
        inside = None if rows is None else rows.inside
        if inside is not None and (self.cuts is None or self.cuts.cuts.keys() != inside.layers):
            raise ValueError(
                f"this cache was filled in a pruned() block whose method cuts after the decoder layers {sorted(inside.layers)}: go "
                "on with it in a block of that method"
            )
        self._chosen = None
        self.windows.measures = {} if rows is None else rows.measures
        if self.cuts is not None:
            self.cuts.recall(inside)
        if rows is None:
            check_whole(given, held)
            return given
        return rows.later(given, held, getattr(self.vlm.model.base_model, "rope_deltas", None))

    def after(self, _: Any, __: Any, output: Any) -> None:
        """The forward hook: the cache of a prefill takes along what was done to its rows."""
        if threading.get_ident() != self.thread or self._filled is None:
            return
        filled, self._filled = replace(self._filled, measures=self.windows.measures), None
        if self.cuts is not None and (left := self.cuts.left) is not None:
            self.selection = Selection(left.valid[self._first], grid=left.grid)
            filled = replace(filled, inside=self.cuts.memory)
        if (cache := cache_in(output)) is not None:
            note(cache, filled)

    def _inside(self, left: VisualTokens) -> Inside | None:
        return None if self.cuts is None else Inside(self.pruner, self.cuts.plan, left)

    def _times(self, given: dict[str, Any], again: bool) -> int:
        """How often each prompt stands in the rows: generate repeats it for beams and several answers, its pictures not.

        again: see `_prefill`; a direct call of the model repeats nothing.

        Raises:
            ValueError: rows that do not fit the pictures.
        """
        ids = given.get("input_ids")
        if ids is None or len(ids) < 2:
            return 1
        pixels = {name: given[name] for name in self.vlm.encoder_inputs if given.get(name) is not None}
        slots = int((ids == self.vlm.model.config.image_token_id).sum())
        tokens = sum(self.vlm.slots(pixels))
        times = max(slots // tokens, 1)
        repeated = slots % tokens == 0 and len(ids) % times == 0 and (times == 1 or again)
        if repeated and self._chosen is None:  # later rows of one prompt differ in what was generated
            groups = ids.unflatten(0, (-1, times))
            repeated = bool((groups == groups[:, :1]).all())
        if not repeated:
            raise ValueError(f"the prompts have {slots} places for visual tokens, the pictures have {tokens} of them")
        return times

    def _read(self, given: dict[str, Any], times: int) -> tuple[dict[str, Tensor], Prompts, Prompts]:
        """(encoder inputs, all rows, one row per prompt); without a cache the rows of a prompt differ in what was generated."""
        names = [name for name, value in given.items() if _is_row_wise(name, value, len(given["input_ids"]))] if times > 1 else []
        read = []
        for first in range(times):
            pixels, rows = self.vlm.read(given | {name: given[name][first::times] for name in names})
            if (where := given.get("position_ids")) is not None:
                rows = replace(rows, position_ids=_as_rows(where, rows, first, times))
            read.append((pixels, rows))
        return read[0][0], _alternating([rows for _, rows in read]), read[0][1]


def _without_drafts(given: dict[str, Any], again: bool) -> tuple[dict[str, Any], Tensor | None]:
    """The arguments of the prompt alone, and the ids [B M] behind it that assisted decoding only guesses; None where it does not.

    again: see `Pruned._prefill`. `generate` asks for the logits of these guesses and of the token before them.
    """
    asked = given.get("logits_to_keep")
    if not again or not isinstance(asked, int) or asked < 2:
        return given, None
    ids = given["input_ids"]
    length = ids.shape[1] - asked + 1
    names = [name for name in given if name in ("input_ids", "attention_mask", "position_ids") or name.endswith("token_type_ids")]
    return given | {name: given[name][..., :length] for name in names if given[name] is not None}, ids[:, length:]


def _with_drafts(vlm: VLM, short: Prompts, drafts: Tensor) -> Prompts:
    """Rows with the first guesses at their answers, ids [B M], behind them."""
    rows = longer(short, torch.ones_like(drafts, dtype=torch.bool))
    if short.token_types is not None:
        (types,) = vlm.token_inputs(rows).values()  # what the family says of an answer
        rows = replace(rows, token_types=torch.cat([short.token_types, types[:, short.token_types.shape[1] :]], 1))
    return replace(rows, input_ids=torch.cat([short.input_ids, drafts], 1))


def _is_row_wise(name: str, value: Any, rows: int) -> bool:
    """Whether an argument has one line per row of ids, [B S]."""
    named = name in ("input_ids", "attention_mask", "labels") or name.endswith("token_type_ids")
    return named and isinstance(value, Tensor) and value.ndim == 2 and len(value) == rows


def _as_rows(where: Tensor, prompts: Prompts, first: int, times: int) -> Tensor:
    """Positions as a caller passes them ([B S], [3 B S] or [4 B S]) -> [B S] or [B S 4] of every `times`-th row from `first` on."""
    if where.ndim == 2:
        return where.expand(len(prompts) * times, -1)[first::times]
    text = (prompts.attention_mask.cumsum(1) - 1).clamp_min(0)
    return torch.stack([text, *where[-3:, first::times]], -1)


def _alternating(parts: list[Prompts]) -> Prompts:
    """The first row of every part, then the second of every part ..."""
    found = {f.name: [getattr(part, f.name) for part in parts] for f in fields(Prompts)}
    joined: dict[str, Any] = {name: None if v[0] is None else torch.stack(v, 1).flatten(0, 1) for name, v in found.items()}
    return Prompts(**joined)


@contextmanager
def pruned(
    model: Any, pruner: Pruner | str, budget: Budget | int | float | str, *, positions: str = "original"
) -> Iterator[Pruned]:
    """Inside the block `model`'s own forward and generate run with pruned visual tokens; on exit it is as it was.

        with diffprune.pruned(model, pruner, Keep(64)):
            model.generate(**processor(images=images, text=prompts, return_tensors="pt", padding=True))

    model: a loaded transformers VLM of a supported family, compiled or not, or what `diffprune.load` gives. pruner, budget: values
    or their spellings, as in `pruned(model, "attention", 64)`. positions: "original" or "compact" (`pruning.cut`). A direct call of
    the model returns logits of the shortened rows, whose padding stands on the left.

    A cache that a call inside has filled goes on in this block or in a later one of the same model, and nowhere else: outside, the
    model would count tokens that are not in it.

    The block holds for the thread that enters it. To read a stream in one thread while another generates, enter it in the thread
    that calls generate; a call from elsewhere runs unpruned, with a warning.

    Raises:
        ValueError: no supported VLM, one that is already pruned, or that lacks what the method needs; later, a call that cannot be
            pruned: videos, chunked prefill, static caches, pictures that are already encoded, encoder settings at the call.
    """
    pruner, budget = pruner_of(pruner), budget_of(budget)
    vlm = model if isinstance(model, VLM) else wrap(model)
    model = vlm.model
    vlm.check_evidence(pruner.needs)
    make_ready(pruner, vlm)
    if positions not in pruning.POSITIONS:
        raise ValueError(f"positions is {positions!r}; it is one of {', '.join(pruning.POSITIONS)}")
    if model in _active:
        raise ValueError("this model is already inside a pruned() block; leave it before starting another")
    session = Pruned(vlm, pruner, budget, positions)
    _active.add(model)
    before = torch.compiler.disable(session.before)  # of a compiled model, choosing what is left is none of its graphs
    hooks = [
        model.register_forward_pre_hook(before, with_kwargs=True),
        model.register_forward_hook(torch.compiler.disable(session.after)),
    ]
    base, name = model.base_model, "get_image_features"
    own = vars(base).get(name)
    setattr(base, name, session.deferring(getattr(base, name)))
    try:
        with session.windows.hooked(), nullcontext() if session.cuts is None else session.cuts.hooked():
            yield session
    finally:
        for hook in hooks:
            hook.remove()
        delattr(base, name)
        if own is not None:
            setattr(base, name, own)
        _active.discard(model)
