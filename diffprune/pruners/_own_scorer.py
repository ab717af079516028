"""Base of learned methods that bring the small scorer of their own paper instead of the shared one, and no denoiser."""

from __future__ import annotations

from abc import abstractmethod
from pathlib import Path

from torch import nn

from diffprune.core.fitted import Annealing, Progress
from diffprune.pruners._learned import Learned
from diffprune.pruners._networks import Networks


class OwnScorer(Learned):
    """One hidden layer, as a rule half as wide as the tokens; nothing reads the question, nothing is noised.

    width: of the hidden layer; 0 is half of the tokens'.
    """

    option_labels = Networks.option_labels

    def __init__(self, weights: Path | None = None, *, width: int = 0, other_model: bool = False) -> None:
        super().__init__(weights, attention=False, denoiser=False, width=width, other_model=other_model)

    @abstractmethod
    def network(self, features: int, width: int) -> nn.Module:
        """The scorer. Beside `forward` it has `inlet` (a linear layer), `blocks` and `flops`, which estimates of memory ask for."""

    def temperature(self, progress: Progress, annealing: Annealing) -> float:
        """These papers have none: scores sharpen the relaxation by growing."""
        return 1.0

    def _sizes(self, features: int, text: int | None) -> dict[str, int | None]:
        return {"features": features, "text": None, "width": self.options["width"] or max(1, features // 2), "depth": 1}

    def _make(self) -> nn.ModuleDict:
        features, width = self.dims["features"], self.dims["width"]
        assert features and width, "a scorer has widths"
        self.networks = nn.ModuleDict({"scorer": self.network(features, width)})
        return self.networks
