"""Prune inside a model's own calls: `with pruned(model, pruner, budget): model.generate(**inputs)`.

While the block runs there are a forward pre-hook and a patched `get_image_features`. The hook encodes the images at prefill, cuts
the rows and hands both to the model's own forward; at every later step it only shortens the attention mask, whose other columns
were never cached. `generate` encodes images before any forward sees them, so the patch records its arguments and leaves the
encoding to the hook. A method that cuts inside the decoder has its own hooks there (`decoder_cuts`). All are removed on exit and
nothing else is touched, so sampling, beams, streaming and several answers per prompt are the library's own.
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
from diffprune.pruning.decoder_cuts import DecoderCuts, Inside, check_positions
from diffprune.pruning.pretrained import make_ready
from diffprune.vlm.family import refuse_videos
from diffprune.vlm.load import wrap
from diffprune.vlm.windows import Windows

_active: WeakSet[torch.nn.Module] = WeakSet()
OURS = ("return_dict", "self", "kwargs")  # parameters of a family's `get_image_features` that choose nothing
ELSEWHERE = "another thread called a model inside a pruned() block that this thread did not enter: its call is not pruned"


class Pruned:
    """State of a `pruned` block."""

    def __init__(self, vlm: VLM, pruner: Pruner, budget: Budget, positions: str) -> None:
        self.vlm, self.pruner, self.budget, self.positions = vlm, pruner, budget, positions
        self._selection: Selection | None = None
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
        self._full: Prompts | None = None  # rows of the newest prefill as they came, and as they went on
        self._short: Prompts | None = None
        self._offset = 0  # from positions of the rows to those the forward expects

    @property
    def selection(self) -> Selection | None:
        """Survivors of the newest prefill, after the last cut, for `diffprune.overlay`; of repeated rows, the first's."""
        left = None if self.cuts is None else self.cuts.left
        return self._selection if left is None else Selection(left.valid[self._first], grid=left.grid)

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
        if held == 0:  # a prompt without pictures
            self._full = self._short = None
            self.windows.measure_by(None, {})
            if self.cuts is not None:
                self.cuts.expect(None)
        return (), given if self._short is None else self._later(given, held)

    def _refuse(self, given: dict[str, Any], encoded: dict[str, Any], held: int, pictures: bool) -> None:
        mask = given.get("attention_mask")
        refuse_videos(given | {f"{kind} features": output for kind, output in encoded.items() if kind == "video"})
        if any(output is not None for output in encoded.values()):
            raise ValueError("these pictures are already encoded; inside pruned() give their pixel values")
        if given.get("inputs_embeds") is not None:
            raise ValueError("inputs_embeds hide where the visual tokens are; inside pruned() give input_ids and pixel values")
        if mask is not None and (not isinstance(mask, Tensor) or mask.ndim != 2):
            raise ValueError(
                "inside pruned() the attention mask must be [rows, length]; static caches and compiled generation make another one "
                "beforehand: leave cache_implementation unset"
            )
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
        vlm, times = self.vlm, self._times(given, again)
        pixels, prompts, own = self._read(given, times)
        self._offset = 0 if given.get("position_ids") is not None else vlm.position_offset  # what generate passes counts it already
        known = again and self._chosen is not None
        if not again or self._chosen is None:
            tokens = vlm.encode(pixels, self.pruner.needs)
            pruning.rows_of_images(own, tokens)  # refuses rows whose slots are not those of the pictures
            self._chosen = tokens, pruning.select(vlm, own, tokens, self.pruner, self.budget)
        tokens, left = self._chosen
        self._selection, self._first = Selection(left.valid, grid=left.grid), torch.arange(len(left))
        if times > 1:
            owner = pruning.rows_of_images(own, tokens)
            order = torch.cat([(owner == row).nonzero().squeeze(1).repeat(times) for row in range(len(own))])
            tokens, left, self._first = tokens[order], left[order], order.argsort(stable=True)[::times]
        if (labels := given.get("labels")) is not None:
            prompts = replace(prompts, labels=labels)
        packed = pruning.shortened(vlm, prompts, tokens, left, self.positions, self._inside(left))
        self._full, self._short = prompts, packed.prompts
        made = pruning.decoder_inputs(vlm, packed)
        made["position_ids"] = made["position_ids"] + self._offset
        types = {name: made.pop(name) for name in vlm.token_inputs(packed.prompts)}
        types = {name: value for name, value in types.items() if given.get(name) is not None}  # given none, the model has none
        self.windows.measure_by(packed.prompts.index, types)
        if self.cuts is not None:
            self.cuts.expect(packed.prompts, left, again=known)
        kept = {name: value for name, value in given.items() if name not in (*vlm.encoder_inputs, "labels")}
        return kept | made | types | ({} if labels is None else {"labels": packed.prompts.labels})

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

    def _told(self, mask: Tensor | None, where: Tensor | None, new: int, since: int) -> int:
        """Tokens after the prompt that the caller believes to be cached: by its mask or, as generate drops one that hides nothing,
        by its positions; a caller who gives neither believes what is so."""
        assert self._full is not None, "a later step follows a prefill"
        if mask is not None:
            return mask.shape[1] - self._full.input_ids.shape[1] - new
        if where is None:
            return since
        last = _last(self._full) + self._offset
        if where.ndim == 3 and len(where) == 1:  # a later turn of M-RoPE: places in the text, moved by what the newest pictures take
            where, last = where[0] - self.vlm.model.base_model.rope_deltas, last[0]
        elif where.ndim == 3:  # the text's coordinate where it is there
            where, last = where[0], last[-len(where)]
        elif last.ndim == 3:
            last = last[0]
        return int(where.flatten()[-1] - last.flatten()[-1]) - new

    def _later(self, given: dict[str, Any], held: int) -> dict[str, Any]:
        """A step after prefill: the mask and the positions of a sequence that is shorter than the caller knows."""
        assert self._full is not None and self._short is not None, "a later step follows a prefill"
        self._chosen = None
        full, short, new = self._full, self._short, given["input_ids"].shape[1]
        since = held - short.input_ids.shape[1]  # tokens cached after the prompt
        mask, where = given.get("attention_mask"), given.get("position_ids")
        told = self._told(mask, where, new, since)
        removed = full.input_ids.shape[1] - short.input_ids.shape[1]
        if told == since - removed < since:  # another turn of generate, which cuts what it believes to be new by the cache's length
            given, new, told = {**given, "input_ids": given["input_ids"][:, removed:]}, new - removed, since
            where = None if where is None else where[..., removed:]
        if where is not None and where.ndim == 3 and len(where) != 3 and bool((where == where[:1]).all()):
            where = None  # generate derives those of M-RoPE from the pictures, which are those of an earlier turn
        steps = torch.arange(since, since + new, device=short.input_ids.device) + 1
        expected = _last(full) + self._offset + steps
        if not bool(full.attention_mask[:, -1].all()):
            raise ValueError("rows padded on the right cannot be continued inside pruned(): let the tokenizer pad on the left")
        if since < 0 or told != since or len(given["input_ids"]) != len(short) or not _agree(where, expected):
            raise ValueError(
                f"the cache holds {held} tokens, {since} after the pruned prompt, the caller counts on another number: a cache "
                "that was cut (as with an assistant model) or filled elsewhere cannot be used inside pruned(); give the whole "
                "conversation and an empty cache"
            )
        later = (
            torch.ones(len(short), since + new, dtype=torch.long, device=steps.device)
            if mask is None
            else mask[:, -(since + new) :]
        )
        going_on = _last(short) + self._offset + steps
        return given | {"attention_mask": torch.cat([short.attention_mask, later], 1), "position_ids": going_on}


def _is_row_wise(name: str, value: Any, rows: int) -> bool:
    """Whether an argument has one line per row of ids, [B S]."""
    named = name in ("input_ids", "attention_mask") or name.endswith("token_type_ids")
    return named and isinstance(value, Tensor) and value.ndim == 2 and len(value) == rows


def _agree(where: Tensor | None, expected: Tensor) -> bool:
    """Whether the caller's positions, if it gives any, are those that follow the full rows."""
    if where is None:
        return True
    wanted = expected[-where.shape[0] :] if where.ndim == 3 else expected
    return bool((where.expand_as(wanted) == wanted).all())


def _as_rows(where: Tensor, prompts: Prompts, first: int, times: int) -> Tensor:
    """Positions as a caller passes them ([B S], [3 B S] or [4 B S]) -> [B S] or [B S 4] of every `times`-th row from `first` on."""
    if where.ndim == 2:
        return where.expand(len(prompts) * times, -1)[first::times]
    text = (prompts.attention_mask.cumsum(1) - 1).clamp_min(0)
    return torch.stack([text, *where[-3:, first::times]], -1)


def _last(prompts: Prompts) -> Tensor:
    """Position of each row's last token: [B 1] or [R B 1]."""
    where = prompts.position_ids[:, -1:]
    return where if where.ndim == 2 else where.permute(2, 0, 1)


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
    hook = model.register_forward_pre_hook(before, with_kwargs=True)
    base, name = model.base_model, "get_image_features"
    own = vars(base).get(name)
    setattr(base, name, session.deferring(getattr(base, name)))
    try:
        with session.windows.hooked(), nullcontext() if session.cuts is None else session.cuts.hooked():
            yield session
    finally:
        hook.remove()
        delattr(base, name)
        if own is not None:
            setattr(base, name, own)
        _active.discard(model)
