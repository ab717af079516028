"""Where tokens are removed, how many are left there, and which cuts have a given layer average.

A *plan* is a tuple of cuts. From a plan alone follow the tokens that every decoder layer sees, hence layer average, FLOPs and KV
bytes (`timing/flops.py`): cost asks a method nothing.
"""

from __future__ import annotations

import enum
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from diffprune.core.budget import Budget, Keep, Share

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
class Cut:
    """One removal of tokens. budget: of the tokens that an earlier cut has left.

    number:   of the cut in its plan, from 0, for a method that learnt another rule for each.
    adaptive: the budget is what images keep on average; how many one keeps is known after the cut.
    """

    site: Site
    budget: Budget
    number: int = 0
    adaptive: bool = False


Plan = tuple[Cut, ...]


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
    for cut in in_order(cuts):
        if cut.adaptive:
            raise ValueError(f"a cut {cut.site} keeps a different number of tokens per image, which is known after it has happened")
        if cut.site.layer >= layers:
            raise ValueError(f"a cut {cut.site} saves nothing in a decoder of {layers} layers")
        seen += [total] * (cut.site.layer - len(seen))
        total = cut.budget.count(total)
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


def staged(budget: Budget, layers: int, after: Sequence[int], total: int, powers: Sequence[float] = ()) -> Plan:
    """Cuts after the decoder layers `after` whose layer average is `budget`; each leaves the same share of what it finds.

    layers: of the decoder. total: visual tokens of an image, which a count is set against. powers: see `layer_average`.

    Raises:
        ValueError: a threshold, or a budget that those cuts cannot meet.
    """
    sites = [Site(Stage.DECODER, layer) for layer in after]
    if isinstance(budget, Share):
        share = share_per_cut(budget.share, layers, after, powers)
        return tuple(
            Cut(site, Share(max(share**power, LEAST))) for site, power in zip(sites, powers or [1.0] * len(sites), strict=True)
        )
    share = share_per_cut(budget.count(total) / total, layers, after, powers)
    left = itertools.accumulate(powers or [1.0] * len(sites))
    return tuple(Cut(site, Keep(max(1, round(total * share**power)))) for site, power in zip(sites, left, strict=True))
