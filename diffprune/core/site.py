"""Where tokens are removed, how many are left there, and which cuts have a given layer average.

A *plan* is a tuple of cuts. From a plan alone follow the tokens that every decoder layer sees, hence layer average, FLOPs and KV
bytes (`timing/flops.py`): cost asks a method nothing.
"""

from __future__ import annotations

import enum
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from diffprune.core.budget import Budget, Each, Keep, Share

LEAST = 1e-9  # share of a cut: every image keeps one token anyway


class Stage(enum.IntEnum):
    """Part of the model at whose end a cut happens, in order along the model."""

    ENCODED = 0  # encoder output, before the projector: where DiffPrune acts
    PROJECTED = 1  # before the decoder, in its width
    DECODER = 2  # inside the decoder


@dataclass(frozen=True, order=True)
class Site:
    """A place to cut; sites are ordered along the model.

    layer: decoder layers that still see every token, at least 1; 0 before the decoder. FastV with K = 2 cuts at
           `Site(Stage.DECODER, 2)`: the third layer is the first with fewer tokens.
    """

    stage: Stage
    layer: int = 0

    def __post_init__(self) -> None:
        if (self.layer >= 1) != (self.stage is Stage.DECODER) or self.layer < 0:
            raise ValueError(f"{self}: a cut inside the decoder comes after layer 1 or later, one before it after no layer")

    def __str__(self) -> str:
        return f"after decoder layer {self.layer}" if self.layer else self.stage.name.lower()


ENCODED, PROJECTED = Site(Stage.ENCODED), Site(Stage.PROJECTED)


@dataclass(frozen=True)
class OverLayers:
    """Makes a count the average over a decoder's layers, at one cut of a plan inside it.

    layers: of the decoder. after: layers behind which the plan cuts; powers: see `layer_average`; power: that of the share of all
    tokens that is left behind this cut.
    """

    layers: int
    after: tuple[int, ...]
    powers: tuple[float, ...]
    power: float

    def count(self, budget: Budget, total: int) -> int:
        """Tokens left of an image with which `total` entered the decoder.

        Raises:
            ValueError: the plan's cuts cannot meet this average with such an image.
        """
        try:
            share = share_per_cut(budget.count(total) / total, self.layers, self.after, self.powers)
        except ValueError as error:
            raise ValueError(f"{budget} with an image of {total} tokens: {error}") from None
        return max(1, round(total * share**self.power))


@dataclass(frozen=True)
class Cut:
    """One removal of tokens. budget: of the tokens that an earlier cut has left.

    number:   of the cut in its plan, from 0, for a method that learnt another rule for each.
    adaptive: the budget is what images keep on average; how many one keeps is known after the cut.
    average:  the budget is a count that all layers see on average; `of` says what it leaves here of images of given sizes.
    """

    site: Site
    budget: Budget
    number: int = 0
    adaptive: bool = False
    average: OverLayers | None = None

    def of(self, totals: Sequence[int]) -> Cut:
        """The cut for images with which so many tokens entered the decoder.

        Raises:
            ValueError: see `OverLayers.count`.
        """
        if self.average is None:
            return self
        found = {total: self.average.count(self.budget, total) if total else 0 for total in {*totals}}
        nums = tuple(found[total] for total in totals)
        return replace(self, average=None, budget=Keep(nums[0]) if len({*nums}) == 1 and nums[0] else Each(nums))


Plan = tuple[Cut, ...]


def for_images(cuts: Iterable[Cut], totals: Sequence[int]) -> Plan:
    """The cuts set against images with which so many tokens entered the decoder.

    Raises:
        ValueError: a count that such an image cannot meet on average.
    """
    return tuple(cut.of(totals) for cut in cuts)


def in_order(cuts: Iterable[Cut]) -> Plan:
    """The cuts in the order in which a token meets them."""
    return tuple(sorted(cuts, key=lambda cut: cut.site))


def tokens_per_layer(cuts: Sequence[Cut], total: int, layers: int) -> tuple[int, ...]:
    """Visual tokens *entering* each decoder layer, from a plan alone. total: of the image before any cut.

    Raises:
        ValueError: a cut by threshold, or an adaptive one, whose count differs from image to image; pass the count that was left
            instead. Or one behind the last layer.
    """
    seen: list[int] = []
    entering = total
    for cut in in_order(cuts):
        if cut.adaptive:
            raise ValueError(f"a cut {cut.site} keeps a different number of tokens per image, which is known after it has happened")
        if cut.site.layer >= layers:
            raise ValueError(f"a cut {cut.site} saves nothing in a decoder of {layers} layers")
        seen += [total] * (cut.site.layer - len(seen))
        total = cut.of([entering]).budget.count(total)
        entering = entering if cut.site.layer else total
    return (*seen, *[total] * (layers - len(seen)))


def layer_average(share: float, layers: int, after: Sequence[int], powers: Sequence[float] = ()) -> float:
    """Mean share of tokens over all decoder layers when cuts after the layers `after` each leave `share` of what they find.

    With l_0 = 0 < l_1 < ... < l_n and l_(n+1) = L: sum_i (l_(i+1) - l_i) share^i / L.

    powers: of `share`, one for each cut, where cuts leave different shares; () is 1 for all.
    """
    edges = [0, *after, layers]
    left = [0.0, *itertools.accumulate(powers or [1.0] * len(after))]
    return sum((end - start) * share**p for p, (start, end) in zip(left, itertools.pairwise(edges), strict=True)) / layers


def share_per_cut(average: float, layers: int, after: Sequence[int], powers: Sequence[float] = ()) -> float:
    """The share of what it finds that each cut leaves, to the power of its own, so that `layer_average` is `average`.

    Raises:
        ValueError: layers out of order or outside the decoder, or an average that even empty layers do not come down to.
    """
    return _share_per_cut(average, layers, tuple(after), tuple(powers))


@lru_cache(maxsize=4096)
def _share_per_cut(average: float, layers: int, after: tuple[int, ...], powers: tuple[float, ...]) -> float:
    if list(after) != sorted(set(after)) or not after or after[0] < 1 or after[-1] >= layers:
        raise ValueError(f"cuts after the layers {list(after)} of {layers}: give each layer once, in order, from 1 to {layers - 1}")
    least = after[0] / layers
    if not least < average <= 1:
        raise ValueError(
            f"{average:.1%} of the tokens on average over {layers} layers cannot be met by a cut after layer {after[0]}, as the "
            f"layers before it alone make {least:.1%}; ask for more"
        )
    low, high = 0.0, 1.0
    while low < (middle := (low + high) / 2) < high:  # until neighbouring floating-point numbers; the average rises with the share
        low, high = (middle, high) if layer_average(middle, layers, after, powers) < average else (low, middle)
    return high


def staged(budget: Budget, layers: int, after: Sequence[int], powers: Sequence[float] = (), fixed: bool = False) -> Plan:
    """Cuts after the decoder layers `after` whose layer average is `budget`; each leaves the same share of what it finds.

    A count is the average of every image, whatever its size: an image that has no more keeps all it has.

    layers: of the decoder. powers: see `layer_average`. fixed: a share is of the tokens with which an image enters the decoder, as
    a count is, so that what a cut asks for does not depend on how many an earlier one left.

    Raises:
        ValueError: a threshold, or a share that those cuts cannot meet.
    """
    sites, powers = [Site(Stage.DECODER, layer) for layer in after], tuple(powers) or (1.0,) * len(after)
    if isinstance(budget, Share) and not fixed:
        share = share_per_cut(budget.share, layers, after, powers)
        return tuple(Cut(site, Share(max(share**power, LEAST))) for site, power in zip(sites, powers, strict=True))
    budget.count(1)  # refuses a threshold
    share_per_cut(budget.share if isinstance(budget, Share) else 1.0, layers, after, powers)  # and what cannot be met
    left = itertools.accumulate(powers)
    averages = [OverLayers(layers, tuple(after), powers, power) for power in left]
    return tuple(Cut(site, budget, average=average) for site, average in zip(sites, averages, strict=True))
