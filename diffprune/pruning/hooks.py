"""Prune inside a model's own calls: `with pruned(model, pruner, budget): model.generate(**inputs)`.

While the block runs there are a forward pre-hook and a patched `get_image_features`. The hook encodes the images at prefill, cuts
the rows and hands both to the model's own forward; at every later step it only shortens the attention mask, whose other columns
were never cached. `generate` encodes images before any forward sees them, so the patch records its arguments and leaves the
encoding to the hook. Both are removed on exit and nothing else is touched, so sampling, beams, streaming and several answers per
prompt are the library's own.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor

from diffprune import pruning
from diffprune.core.budget import Budget
from diffprune.core.pruner import Pruner
from diffprune.core.tokens import Selection
from diffprune.core.vlm import VLM, Prompts
from diffprune.vlm.load import wrap

_active: WeakSet[torch.nn.Module] = WeakSet()


class Pruned:
    """State of a `pruned` block. selection: survivors of the newest prefill, for `diffprune.overlay`."""

    def __init__(self, vlm: VLM, pruner: Pruner, budget: Budget, positions: str) -> None:
        self.vlm, self.pruner, self.budget, self.positions = vlm, pruner, budget, positions
        self.selection: Selection | None = None
        self.parameters = inspect.signature(vlm.model.forward).parameters
        self._asked: tuple[Any, dict[str, Any]] = (None, {})  # a deferred encoder output, and the pictures it stands for
        self._full: Prompts | None = None  # rows of the newest prefill as they came, and as they went on
        self._short: Prompts | None = None
        self._offset = 0  # from positions of the rows to those the forward expects

    def deferring(self, encode: Callable[..., Any]) -> Callable[..., Any]:
        """A `get_image_features` that records its arguments and encodes nothing yet."""
        signature = inspect.signature(encode)

        @functools.wraps(encode)
        def record(*args: Any, **options: Any) -> Any:
            self._asked = self.vlm.deferred(), dict(signature.bind(*args, **options).arguments)
            return self._asked[0]

        return record

    def before(self, module: Any, args: tuple[Any, ...], given: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The forward pre-hook: arguments of the model's own forward, changed.

        Raises:
            ValueError: a call that cannot be pruned; the sentence says which and what to do.
        """
        given = {**dict(zip(self.parameters, args, strict=False)), **given}
        past = given.get("past_key_values")
        held = int(past.get_seq_length()) if past is not None else 0
        encoded = given.pop("mm_encoder_outputs", None) or {}
        if encoded.get("image") is not None and encoded["image"] is self._asked[0]:
            given |= {name: value for name, value in self._asked[1].items() if name in self.vlm.encoder_inputs}
        elif any(output is not None for output in encoded.values()):
            raise ValueError("these pictures or videos are already encoded; inside pruned() give the pixel values of pictures")
        pictures = any(given.get(name) is not None for name in self.vlm.encoder_inputs)
        self._refuse(given, held, pictures)
        if pictures:
            return (), self._prefill(given)
        if held == 0:
            self._full = self._short = None  # a prompt without pictures
        return (), given if self._short is None else self._later(given, held)

    def _refuse(self, given: dict[str, Any], held: int, pictures: bool) -> None:
        mask = given.get("attention_mask")
        if given.get("inputs_embeds") is not None:
            raise ValueError("inputs_embeds hide where the visual tokens are; inside pruned() give input_ids and pixel values")
        if mask is not None and (not isinstance(mask, Tensor) or mask.ndim != 2):
            raise ValueError(
                "inside pruned() the attention mask must be [rows, length]; static caches and compiled generation make another one "
                "beforehand: leave cache_implementation unset"
            )
        if pictures and held:
            raise ValueError(f"a picture in a later turn: the cache already holds {held} tokens; start with an empty cache")

    def _prefill(self, given: dict[str, Any]) -> dict[str, Any]:
        vlm, times = self.vlm, self._times(given)
        rows = {name: value[::times] for name in ("input_ids", "attention_mask") if (value := given.get(name)) is not None}
        pixels, prompts = vlm.read(given | rows)
        if (where := given.get("position_ids")) is not None:
            prompts = replace(prompts, position_ids=_as_rows(where, prompts, times))
        self._offset = 0 if where is not None else vlm.position_offset  # what generate passes already counts as the forward does
        if (labels := given.get("labels")) is not None:
            prompts = replace(prompts, labels=labels)
        tokens = vlm.encode(pixels, self.pruner.needs)
        self.budget.check(int(tokens.counts.min()))
        # refuses rows whose slots are not those of the pictures, as in chunked prefill
        owner = pruning.rows_of_images(prompts, tokens)
        packed = pruning.shrink(vlm, prompts, tokens, self.pruner, self.budget, self.positions)
        self.selection = packed.selection
        packed = _repeated(packed, owner, times)
        self._full, self._short = _each(prompts, times), packed.prompts
        made = pruning.decoder_inputs(vlm, packed)
        made["position_ids"] = made["position_ids"] + self._offset
        kept = {name: value for name, value in given.items() if name not in (*vlm.encoder_inputs, "labels")}
        return kept | made | ({} if labels is None else {"labels": packed.prompts.labels})

    def _times(self, given: dict[str, Any]) -> int:
        """How often each prompt stands in the rows: generate repeats it for beams and several answers, its pictures not.

        Raises:
            ValueError: rows that do not fit the pictures.
        """
        ids = given.get("input_ids")
        if ids is None or len(ids) < 2 or not torch.equal(ids[0], ids[1]):
            return 1
        pixels = {name: given[name] for name in self.vlm.encoder_inputs if given.get(name) is not None}
        slots = int((ids == self.vlm.model.config.image_token_id).sum())
        tokens = sum(self.vlm.slots(pixels))
        if slots % tokens or len(ids) % (slots // tokens):
            raise ValueError(f"the prompts have {slots} places for visual tokens, the pictures have {tokens} of them")
        return slots // tokens

    def _later(self, given: dict[str, Any], held: int) -> dict[str, Any]:
        """A step after prefill: the mask and the positions of a sequence that is shorter than the caller knows."""
        assert self._full is not None and self._short is not None, "a later step follows a prefill"
        full, short, new = self._full, self._short, given["input_ids"].shape[1]
        since = held - short.input_ids.shape[1]  # tokens cached after the prompt
        mask, where = given.get("attention_mask"), given.get("position_ids")
        told = since if mask is None else mask.shape[1] - full.input_ids.shape[1] - new
        steps = torch.arange(since, since + new, device=short.input_ids.device) + 1
        expected = _last(full) + self._offset + steps
        if since < 0 or told != since or len(given["input_ids"]) != len(short) or not _agree(where, expected):
            raise ValueError(
                f"the cache holds {held} tokens, {since} after the pruned prompt, the caller counts on another number: a cache "
                "that somebody else cut cannot be used inside pruned()"
            )
        later = (
            torch.ones(len(short), since + new, dtype=torch.long, device=steps.device)
            if mask is None
            else mask[:, -(since + new) :]
        )
        going_on = _last(short) + self._offset + steps
        return given | {"attention_mask": torch.cat([short.attention_mask, later], 1), "position_ids": going_on}


def _agree(where: Tensor | None, expected: Tensor) -> bool:
    """Whether the caller's positions, if it gives any, are those that follow the full rows."""
    if where is None:
        return True
    wanted = expected[-where.shape[0] :] if where.ndim == 3 else expected
    return bool((where.expand_as(wanted) == wanted).all())


def _as_rows(where: Tensor, prompts: Prompts, times: int) -> Tensor:
    """Positions as a caller passes them ([B S], [3 B S] or [4 B S]) -> [B S] or [B S 4] of the rows before they were repeated."""
    if where.ndim == 2:
        return where.expand(len(prompts) * times, -1)[::times]
    text = (prompts.attention_mask.cumsum(1) - 1).clamp_min(0)
    return torch.stack([text, *where[-3:, ::times]], -1)


def _last(prompts: Prompts) -> Tensor:
    """Position of each row's last token: [B 1] or [R B 1]."""
    where = prompts.position_ids[:, -1:]
    return where if where.ndim == 2 else where.permute(2, 0, 1)


def _each(prompts: Prompts, times: int) -> Prompts:
    """Every row `times` times, one after the other."""
    found = {f.name: getattr(prompts, f.name) for f in fields(prompts)}
    return replace(prompts, **{name: value.repeat_interleave(times, 0) for name, value in found.items() if value is not None})


def _repeated(packed: pruning.Packed, owner: Tensor, times: int) -> pruning.Packed:
    """Every row `times` times, with its pictures. owner: [I] the row of each picture."""
    if times == 1:
        return packed
    sizes = packed.sizes
    order = torch.cat([(owner == row).nonzero().squeeze(1).repeat(times) for row in range(len(packed.prompts))])
    lines = torch.arange(len(packed.features), device=owner.device).split(sizes.tolist())
    index = torch.cat([lines[i] for i in order.tolist()])
    return pruning.Packed(
        _each(packed.prompts, times), packed.features[index], packed.kept[order], packed.total[order], sizes[order],
        None if packed.deepstack is None else packed.deepstack[index],
    )  # fmt: skip


@contextmanager
def pruned(model: Any, pruner: Pruner, budget: Budget, *, positions: str = "original") -> Iterator[Pruned]:
    """Inside the block `model`'s own forward and generate run with pruned visual tokens; on exit it is as it was.

        with diffprune.pruned(model, pruner, Keep(64)):
            model.generate(**processor(images=images, text=prompts, return_tensors="pt", padding=True))

    model: a loaded transformers VLM of a supported family. positions: "original" or "compact" (`pruning.cut`). A direct call of the
    model returns logits of the shortened rows, whose padding stands on the left.

    Raises:
        ValueError: no supported VLM, one that is already pruned, or that lacks what the method needs; later, a call that cannot be
            pruned.
    """
    vlm = wrap(model)
    vlm.check_evidence(pruner.needs)
    if positions not in pruning.POSITIONS:
        raise ValueError(f"positions is {positions!r}; it is one of {', '.join(pruning.POSITIONS)}")
    if model in _active:
        raise ValueError("this model is already inside a pruned() block; leave it before starting another")
    session = Pruned(vlm, pruner, budget, positions)
    _active.add(model)
    hook = model.register_forward_pre_hook(session.before, with_kwargs=True)
    base, name = model.base_model, "get_image_features"
    own = vars(base).get(name)
    setattr(base, name, session.deferring(getattr(base, name)))
    try:
        yield session
    finally:
        hook.remove()
        delattr(base, name)
        if own is not None:
            setattr(base, name, own)
        _active.discard(model)
