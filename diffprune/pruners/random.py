"""Random tokens: the lower bound a method must beat (METHODS 6.1)."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from diffprune.core.pruner import Need, ScorePruner
from diffprune.core.tokens import VisualTokens


class Random(ScorePruner):
    """Uniform without replacement, keyed by `seed` and the image: the same in any batch, on any worker."""

    label = "Random"
    kind = "control"
    replicate_options = frozenset({"seed"})

    needs = frozenset({Need.IDENTITY})

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def score(self, tokens: VisualTokens) -> Tensor:
        assert tokens.identity is not None, "the path provides what `needs` asks for"
        rows = []
        for identity in tokens.identity.tolist():
            key = hashlib.sha256(f"{self.seed} {identity}".encode()).digest()
            rows.append(
                torch.rand(tokens.valid.shape[1], generator=torch.Generator().manual_seed(int.from_bytes(key[:8], "big") >> 1))
            )
        return torch.stack(rows).to(tokens.features.device)
