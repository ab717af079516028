"""What is kept between batches: encoder output per image, prompts per batch."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from diffprune.core.pruner import Need
from diffprune.core.tokens import VisualTokens
from diffprune.core.vlm import VLM, Prompts

TOKENISED_MIB = 64  # of prompts that are kept: all of a small run, a few batches of a large one


CHUNK = 8  # images per encoder call, always: the same shape gives the same bits, so an answer cannot depend on what ran before


class Encodings:
    """Encoder output per image, in host memory, least recently used first to go.

    mebibytes: upper bound of what is kept. encoded: images the encoder has run on, for tests and logs.
    """

    def __init__(self, vlm: VLM, mebibytes: float) -> None:
        self.vlm, self.limit_bytes, self.held_bytes, self.encoded = vlm, mebibytes * 2**20, 0, 0
        self.needs: frozenset[Need] = frozenset()
        self._kept: OrderedDict[Hashable, tuple[frozenset[Need], VisualTokens]] = OrderedDict()

    def get(self, names: Sequence[Hashable], images: Sequence[Callable[[], Any]], needs: frozenset[Need]) -> VisualTokens:
        """The images called `names`, one row each, on the model's device; `images` are opened only where needed.

        An image is encoded with everything any method has needed so far, so that methods with different needs share it.
        """
        needs -= {Need.TEXT}  # of the question, not of the image
        self.needs |= needs
        found = {name: self._kept[name][1] for name in names if name in self._kept and needs <= self._kept[name][0]}
        missing = {name: image for name, image in zip(names, images, strict=True) if name not in found}
        if missing:
            tokens = self._encode([image() for image in missing.values()])
            for row, name in enumerate(missing):
                found[name] = tokens[torch.tensor([row])]  # a copy, so that a row forgotten is memory freed
                self._keep(name, found[name])
        for name in names:
            if name in self._kept:
                self._kept.move_to_end(name)
        device = self.vlm.device
        return _only(needs, VisualTokens.cat([_only(needs, found[name]) for name in names]).map(lambda tensor: tensor.to(device)))

    @torch.inference_mode()
    def _encode(self, images: list[Any]) -> VisualTokens:
        self.encoded += len(images)
        filled = images + images[-1:] * (-len(images) % CHUNK)
        parts = [self.vlm.encode(self.vlm.pixels(filled[i : i + CHUNK]), self.needs) for i in range(0, len(filled), CHUNK)]
        return VisualTokens.cat(parts).map(lambda tensor: tensor[: len(images)].cpu())

    def _keep(self, name: Hashable, tokens: VisualTokens) -> None:
        self.held_bytes += _size(tokens)
        if name in self._kept:
            self.held_bytes -= _size(self._kept.pop(name)[1])
        self._kept[name] = self.needs, tokens
        while self.held_bytes > self.limit_bytes and self._kept:
            self.held_bytes -= _size(self._kept.popitem(last=False)[1][1])


def _only(needs: frozenset[Need], tokens: VisualTokens) -> VisualTokens:
    """Without what was not asked for: a pruner sees the same, whoever shared the encoding."""
    attention = tokens.attention if Need.ENCODER_ATTENTION in needs else None
    return replace(tokens, attention=attention, identity=tokens.identity if Need.IDENTITY in needs else None)


def _size(held: VisualTokens | Prompts) -> int:
    return sum(value.nbytes for f in fields(held) if isinstance(value := getattr(held, f.name), Tensor))


class Tokenised:
    """Prompts of batches, in memory, least recently used first to go: the same batch is asked again for every method and budget.

    mebibytes: upper bound of what is kept.
    """

    def __init__(self, mebibytes: float) -> None:
        self.limit_bytes, self.held_bytes = mebibytes * 2**20, 0
        self._kept: OrderedDict[tuple[Any, ...], Prompts] = OrderedDict()

    def get(self, name: tuple[Any, ...], make: Callable[[], Prompts]) -> Prompts:
        """The prompts called `name`, made where they are not kept. The name tells all that they depend on."""
        if name not in self._kept:
            made = make()
            if _size(made) > self.limit_bytes:
                return made
            self._kept[name], self.held_bytes = made, self.held_bytes + _size(made)
        self._kept.move_to_end(name)
        while self.held_bytes > self.limit_bytes:
            self.held_bytes -= _size(self._kept.popitem(last=False)[1])
        return self._kept[name]
