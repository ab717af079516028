"""Sliding-window attention over rows from which tokens were removed: distance is counted in the full row, as if they were hidden.

A decoder with sliding windows lets a token attend to so many positions before it, and transformers counts those by index. In a
shortened row the same index lies farther back, so forward pre-hooks on the decoder's layers narrow their masks to the window of
the full row. A cache that holds a window by index holds at least that.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from diffprune.core.vlm import VLM, Prompts
from diffprune.vlm.activation_checkpointing import decoder_layers


def window_of(model: Any) -> int | None:
    """Positions a token of the decoder's sliding layers attends to, itself included; None where there are no such layers."""
    text = model.config.get_text_config()
    window, kinds = getattr(text, "sliding_window", None), getattr(text, "layer_types", None)
    return window if window and (kinds is None or "sliding_attention" in kinds) else None


def _is_sliding(model: Any) -> list[bool]:
    """Of every decoder layer; a configuration without `layer_types` means all."""
    kinds = getattr(model.config.get_text_config(), "layer_types", None)
    return [kinds is None or kinds[i] == "sliding_attention" for i in range(len(decoder_layers(model)))]


def held_by(model: Any) -> list[float]:
    """Tokens whose keys and values the cache of each decoder layer holds at most: with a window those that the next token sees."""
    window = window_of(model)
    return [window - 1 if window and sliding else math.inf for sliding in _is_sliding(model)]


def packed_mask(model: Any, prompts: Prompts) -> Tensor | Mapping[str, Tensor]:
    """[B 1 S S] bool: the mask of packed training rows, within the window of each segment's own positions.

    By kind of layer where the decoder has several, as transformers takes masks that are prepared.
    """
    mask, window = prompts.attention_mask, window_of(model)
    if window is None:
        return mask
    where = prompts.position_ids if prompts.position_ids.ndim == 2 else prompts.position_ids[..., 0]
    narrow = mask & (where[:, None, :, None] - where[:, None, None, :] < window)
    return narrow if all(_is_sliding(model)) else {"full_attention": mask, "sliding_attention": narrow}


class Measure(NamedTuple):
    """By what distance is counted: places [B S] in the full rows, blocks [B S] as `VLM.blocks` has them, the largest place."""

    places: Tensor
    blocks: Tensor | None
    last: int


class Windows:
    """Pre-hooks on the sliding layers of a decoder; `measure_by` says how rows are measured until further notice.

    They hold for the thread that made them.
    """

    def __init__(self, vlm: VLM) -> None:
        self.vlm, self.window = vlm, window_of(vlm.model)
        self.sliding = _is_sliding(vlm.model) if self.window else []
        self.thread = threading.get_ident()
        self.measures: dict[int, Measure] = {}  # by the first decoder layer they hold for

    def measure_by(self, index: Tensor | None, types: Mapping[str, Tensor]) -> None:
        """index: of `Prompts`, None for rows that are whole. types: token types the rows go to the model with.

        Raises:
            ValueError: rows longer than the window, and an attention implementation that counts windows itself.
        """
        if self.window is None:
            return
        self.measures = {} if index is None else {0: Measure(index, self.vlm.blocks(types), last := int(index.max()))}
        implementation = str(self.vlm.model.config.get_text_config()._attn_implementation)
        if index is not None and last >= self.window and "flash" in implementation:
            raise ValueError(
                f"rows of {last + 1} tokens are longer than the decoder's sliding window of {self.window}, which "
                f"{implementation} counts as if removed tokens had never been; load the model with attention='sdpa'"
            )

    def cut_from(self, layer: int, index: Tensor, order: Tensor) -> None:
        """From this layer (from 0) on rows are shorter: index [B S'] of what is left, at the places `order` of the rows before."""
        if not self.measures:
            return
        blocks = self.measures[0].blocks
        if blocks is not None:
            more = max(0, int(order.max()) + 1 - blocks.shape[1])  # text after the rows is in no block
            blocks = functional.pad(blocks, (0, more), value=-1).gather(1, order)
        self.measures[layer] = Measure(index, blocks, int(index.max()))

    @contextmanager
    def hooked(self) -> Iterator[None]:
        """The hooks are in place inside the block."""
        if self.window is None:
            yield
            return
        layers = zip(decoder_layers(self.vlm.model), self.sliding, strict=True)
        hooks = [
            layer.register_forward_pre_hook(self._narrowing(number), with_kwargs=True)
            for number, (layer, sliding) in enumerate(layers)
            if sliding
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _narrowing(self, number: int) -> Any:
        """The pre-hook of layer `number`."""

        def before(_: Any, args: tuple[Any, ...], given: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
            states = args[0] if args else given["hidden_states"]
            mask = given.get("attention_mask")
            narrow = self.narrowed(number, mask, states, given.get("past_key_values"))
            return None if narrow is mask else (args, {**given, "attention_mask": narrow})

        return before

    def narrowed(self, number: int, mask: Tensor | None, states: Tensor, past: Any) -> Tensor | None:
        """The mask of layer `number` within the window; states [B S D] enter it, `past` is the cache before."""
        layers = [layer for layer in self.measures if layer <= number]
        if not layers or not self.sliding[number] or threading.get_ident() != self.thread:
            return mask
        measure, new = self.measures[max(layers)], states.shape[1]
        length, offset = (new, 0) if past is None else past.get_mask_sizes(new, number)
        if measure.last + max(0, offset + length - measure.places.shape[1]) < (self.window or 0):
            return mask
        return _narrowed(mask, self._near(measure, len(states), new, length, offset), new, length)

    def _near(self, measure: Measure, rows: int, new: int, length: int, offset: int) -> Tensor:
        """[B 1 new length] bool: keys within the window of the full row, or of the query's own block."""
        assert self.window is not None
        index, blocks, total = measure.places, measure.blocks, offset + length
        more = torch.arange(1, max(0, total - index.shape[1]) + 1, device=index.device)  # tokens after the rows, one place each
        where = torch.cat([index, index[:, -1:] + more], 1)[:, :total].repeat_interleave(rows // len(index), 0)
        near = where[:, -new:, None] - where[:, None, -length:] < self.window
        if blocks is not None:
            none = blocks.new_full((len(blocks), len(more)), -1)
            own = torch.cat([blocks, none], 1)[:, :total].repeat_interleave(rows // len(blocks), 0)
            near |= (own[:, -new:, None] == own[:, None, -length:]) & (own[:, -new:, None] >= 0)
        return near[:, None]


def _narrowed(mask: Tensor | None, near: Tensor, new: int, length: int) -> Tensor:
    """A layer's mask (bool, added to scores, or none for plain causal rows) at the keys that are `near` only."""
    if mask is None:
        return near & torch.ones(new, length, dtype=torch.bool, device=near.device).tril(length - new)
    return mask & near if mask.dtype == torch.bool else mask.masked_fill(~near, torch.finfo(mask.dtype).min)
