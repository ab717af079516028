"""Random tokens: the lower bound a method must beat (a control)."""

from __future__ import annotations

import torch
from torch import Tensor

from diffprune.core.evidence import IDENTITY
from diffprune.core.pruner import Kind, ScorePruner
from diffprune.core.tokens import VisualTokens

GOLDEN, FIRST, SECOND = (n - 2**64 for n in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))  # as int64


class Random(ScorePruner):
    """Uniform without replacement, keyed by `seed` and the image: the same in any batch, on any worker and device.

    seed: of the draw; seeds are replicates of one rule.
    """

    label = "Random"
    kind = Kind.CONTROL
    replicate_options = frozenset({"seed"})
    needs = frozenset({IDENTITY})

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def score(self, tokens: VisualTokens) -> Tensor:
        """A counter-based generator, made where the tokens are: the image is a stream, the token its counter."""
        identity = tokens.given(IDENTITY)
        stream = mixed(identity + mixed(torch.full_like(identity, self.seed)))
        place = torch.arange(1, tokens.valid.shape[1] + 1, device=identity.device)
        return (shifted(mixed(stream[:, None] + place * GOLDEN), 40)).float()  # 24 bits, as many as a float32 holds


def mixed(values: Tensor) -> Tensor:
    """The finaliser of SplitMix64 (Steele, Lea and Flood 2014), on int64 that wrap around."""
    values = (values ^ shifted(values, 30)) * FIRST
    values = (values ^ shifted(values, 27)) * SECOND
    return values ^ shifted(values, 31)


def shifted(values: Tensor, bits: int) -> Tensor:
    """Shifted right, zeros filled in: torch fills in the sign."""
    return (values >> bits) & ((1 << (64 - bits)) - 1)
