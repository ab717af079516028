"""Random tokens: the lower bound a method must beat (a control)."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from diffprune.core.evidence import IDENTITY
from diffprune.core.pruner import Kind, ScorePruner
from diffprune.core.tokens import VisualTokens


class Random(ScorePruner):
    """Uniform without replacement, keyed by `seed` and the image: the same in any batch, on any worker."""

    label = "Random"
    kind = Kind.CONTROL
    replicate_options = frozenset({"seed"})
    needs = frozenset({IDENTITY})

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def score(self, tokens: VisualTokens) -> Tensor:
        rows = []
        for identity in tokens.given(IDENTITY).tolist():
            key = hashlib.sha256(f"{self.seed} {identity}".encode()).digest()
            rows.append(
                torch.rand(tokens.valid.shape[1], generator=torch.Generator().manual_seed(int.from_bytes(key[:8], "big") >> 1))
            )
        return torch.stack(rows).to(tokens.features.device)
