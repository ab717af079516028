"""Caches between batches: encoder output per image, prompts per batch, prefixes in the decoder."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import fields
from typing import Any, NamedTuple

import torch
from cachetools import LRUCache, RRCache
from torch import Tensor

from diffprune.core.evidence import Evidence
from diffprune.core.tokens import VisualTokens
from diffprune.core.vlm import VLM, Prompts
from diffprune.pruning.shared_prefix import Prefix

TOKENISED_MIB = 64  # of prompts that are kept: all of a small run, a few batches of a large one
TOGETHER = {"cpu": 2}  # images per call of encoder or decoder, by device: a CPU gains little by more, and a filled call costs more
USUALLY = 8  # on other devices, which do many in the time of one


def filled(items: list[Any], device: torch.device) -> list[list[Any]]:
    """Parts of one length, the last filled with its last item: the same shape gives the same bits, whatever ran before."""
    size = TOGETHER.get(device.type, USUALLY)
    whole = items + items[-1:] * (-len(items) % size)
    return [whole[start : start + size] for start in range(0, len(whole), size)]


class _Encoded(NamedTuple):
    """One image: its tokens, and the evidence they were encoded with."""

    tokens: VisualTokens
    needs: frozenset[Evidence]


class Encodings:
    """Encoder output per image, in host memory.

    mebibytes: upper bound of what is kept. encoded, asked: images the encoder has run on, and that were asked for.
    """

    def __init__(self, vlm: VLM, mebibytes: float) -> None:
        self.vlm, self.encoded, self.asked = vlm, 0, 0
        self.needs: frozenset[Evidence] = frozenset()
        self._kept: LRUCache[Hashable, _Encoded] = LRUCache(mebibytes * 2**20, lambda held: _size(held.tokens))

    @property
    def held_bytes(self) -> float:
        """Bytes of the tensors that are kept."""
        return self._kept.currsize

    def expect(self, needs: frozenset[Evidence]) -> None:
        """Encode every image with this evidence from now on, as far as it is of the image and the family has it."""
        self.needs |= {evidence for evidence in needs if evidence.of_image and not self.vlm.lacks(evidence)}

    def get(self, names: Sequence[Hashable], images: Sequence[Callable[[], Any]], needs: frozenset[Evidence]) -> VisualTokens:
        """The images called `names`, one row each, on the model's device; `images` are opened only where needed.

        An image is encoded with everything any method has needed so far, so that methods with different needs share it.
        """
        needs = frozenset(evidence for evidence in needs if evidence.of_image)
        self.needs |= needs
        held = {name: kept for name in names if (kept := self._kept.get(name)) is not None}
        found = {name: kept.tokens for name, kept in held.items() if needs <= kept.needs}
        missing = {name: image for name, image in zip(names, images, strict=True) if name not in found}
        self.asked += len(names)
        if missing:
            tokens = self._encode([image() for image in missing.values()])
            for row, name in enumerate(missing):
                found[name] = tokens[torch.tensor([row])]  # a copy, so that a row forgotten is memory freed
                self._keep(name, found[name])
        device = self.vlm.device
        whole = VisualTokens.cat([found[name].showing(needs) for name in names])
        return whole.map(lambda tensor: tensor.to(device))

    @torch.inference_mode()
    def _encode(self, images: list[Any]) -> VisualTokens:
        self.encoded += len(images)
        parts = [self.vlm.encode(self.vlm.pixels(part), self.needs) for part in filled(images, self.vlm.device)]
        return VisualTokens.cat(parts).map(lambda tensor: tensor[: len(images)].cpu())

    def _keep(self, name: Hashable, tokens: VisualTokens) -> None:
        if _size(tokens) <= self._kept.maxsize:
            self._kept[name] = _Encoded(tokens, self.needs)


class Tokenised:
    """Prompts of batches, in memory: the same batch is asked again for every method and budget.

    mebibytes: upper bound of what is kept.
    """

    def __init__(self, mebibytes: float) -> None:
        self._kept: LRUCache[tuple[Any, ...], Prompts] = LRUCache(mebibytes * 2**20, _size)

    @property
    def held_bytes(self) -> float:
        """Bytes of the tensors that are kept."""
        return self._kept.currsize

    def get(self, name: tuple[Any, ...], make: Callable[[], Prompts]) -> Prompts:
        """The prompts called `name`, made where they are not kept. The name tells all that they depend on."""
        found = self._kept.get(name)
        if found is None:
            found = make()
            if _size(found) <= self._kept.maxsize:
                self._kept[name] = found
        return found


class Prefixes:
    """Keys and values of what questions about an image share, on the model's device, so that other questions go on from them.

    What gives way is drawn at random: benchmarks about the same images go through all methods one after the other, and of a round
    that just does not fit the least recently used one is always the next.

    mebibytes: upper bound of what is kept. prefilled, asked: prefixes the decoder has run on, and that were asked for.
    """

    def __init__(self, device: torch.device, mebibytes: float) -> None:
        self.device, self.prefilled, self.asked = device, 0, 0
        self._kept: RRCache[Hashable, Prefix] = RRCache(mebibytes * 2**20, getsizeof=lambda held: held.nbytes)

    def get(self, names: Sequence[Hashable], make: Callable[[list[int]], list[Prefix]]) -> list[Prefix]:
        """The prefixes called `names`; `make` takes the numbers of those that are not kept. The name tells all they depend on."""
        found = {i: kept for i, name in enumerate(names) if (kept := self._kept.get(name)) is not None}
        missing = [i for i in range(len(names)) if i not in found]
        self.prefilled, self.asked = self.prefilled + len(missing), self.asked + len(names)
        for part in filled(missing, self.device):
            for i, prefix in zip(part, make(part), strict=True):
                found[i] = prefix
                if prefix.nbytes <= self._kept.maxsize:
                    self._kept[names[i]] = prefix
        return [found[i] for i in range(len(names))]


def _size(held: VisualTokens | Prompts) -> int:
    values = [getattr(held, f.name) for f in fields(held)]
    if isinstance(held, VisualTokens):
        values += [part for value in held.evidence.values() for part in (value if isinstance(value, tuple) else (value,))]
    return sum(value.nbytes for value in values if isinstance(value, Tensor))
