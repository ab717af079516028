"""Arguments of decoder layers for rows that are shorter than those the model made them for: masks and rotary embeddings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from diffprune.pruning.rows import taken
from diffprune.pruning.stages import Stage

Given = dict[str, Any]


class LayerArguments:
    """Cuts what the layers of one forward pass share, each thing once per stage.

    implementation: of attention, as transformers names it. later: [B ...] bool, tokens after the rows that may be attended to, in
    steps after prefill.
    """

    def __init__(self, implementation: str, later: Tensor) -> None:
        self.implementation, self.later = implementation, later
        self._made: dict[tuple[int, ...], tuple[Any, Any]] = {}  # what it is made of, held so that ids stay its own; what is made

    def prefill(self, given: Given, stage: Stage) -> Given:
        """The arguments of a layer in prefill, which the model made for whole rows, for the rows that are left."""
        whole = (given["position_embeddings"], given.get("attention_mask"), given.get("position_ids"))
        key = (id(stage), *map(id, whole))
        if key not in self._made:  # one look-up a layer
            self._made[key] = (stage, whole), self._short(stage, *whole)
        return {**given, **self._made[key][1]}

    def _short(self, stage: Stage, embeddings: Any, mask: Tensor | None, ids: Tensor | None) -> Given:
        short = {
            "position_embeddings": self._once(stage, embeddings, lambda pair: _turned(pair, stage.order)),
            "attention_mask": self._once(stage, mask, lambda mask: self._mask(mask, stage)),
        }
        if ids is not None:  # tells sequences apart, so without gaps
            short["position_ids"] = self._once(stage, ids, lambda _: _counted(stage.real))
        return short

    def step(self, stage: Stage, states: Tensor, length: int) -> Tensor | None:
        """The mask of a step after prefill, of `states` [B new D], over the `length` tokens that a layer has cached."""
        key = length, id(stage)
        if key not in self._made:
            self._made[key] = stage, self._step(stage, states.shape[1], length, states)
        return self._made[key][1]

    def _once(self, stage: Stage, given: Any, make: Callable[[Any], Any]) -> Any:
        key = id(stage), id(given)
        if key not in self._made:
            self._made[key] = (stage, given), make(given)
        return self._made[key][1]

    def _mask(self, mask: Tensor | None, stage: Stage) -> Tensor | None:
        """A mask of whole rows, [B 1 S S] or, for flash attention, [B S], at what is left; None is plain causal."""
        if mask is None and stage.whole:
            return None
        real, order = (stage.real, stage.order) if mask is None else (stage.real.to(mask.device), stage.order.to(mask.device))
        if "flash" in self.implementation:
            return real if mask is None else mask.gather(1, order) * real.to(mask.dtype)
        own = torch.eye(real.shape[1], dtype=torch.bool, device=real.device) & ~real[:, None, :, None]  # padding sees itself
        if mask is None:
            return real[:, None, None, :] & torch.ones_like(own).tril() | own
        queries = taken(mask[:, 0], order)
        short = queries.gather(2, order[:, None].expand(-1, queries.shape[1], -1))[:, None]
        if mask.dtype == torch.bool:
            return short & real[:, None, None, :] | own
        return short.masked_fill(~real[:, None, None, :], torch.finfo(mask.dtype).min)

    def _step(self, stage: Stage, new: int, length: int, states: Tensor) -> Tensor | None:
        columns = torch.cat([stage.real, self.later], 1)[:, -length:]
        plain = new == 1 and bool(columns.all())
        if "flash" in self.implementation:
            return None if plain else columns
        if plain and self.implementation != "eager":
            return None
        seen = columns[:, None, None, :] & torch.ones(new, length, dtype=torch.bool, device=columns.device).tril(length - new)
        if self.implementation != "eager":
            return seen
        return torch.zeros_like(seen, dtype=states.dtype).masked_fill(~seen, torch.finfo(states.dtype).min)


def _turned(pair: tuple[Tensor, ...], order: Tensor) -> tuple[Tensor, ...]:
    """Rotary embeddings ([1 or B S d], or with coordinates before) at the places that are left."""
    index = order[..., None].to(pair[0].device)
    shapes = [(*part.shape[:-3], len(order), *part.shape[-2:]) for part in pair]
    return tuple(part.expand(s).gather(-2, index.expand(*s[:-2], -1, s[-1])) for part, s in zip(pair, shapes, strict=True))


def _counted(real: Tensor) -> Tensor:
    return (real.cumsum(1) - 1).clamp_min(0)
