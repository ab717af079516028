"""Position reweighting: attention divided by how it grows along the sequence (PoRe, arXiv 2508.17807)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import optimize
from torch import Tensor

from diffprune.core.budget import Budget
from diffprune.core.evidence import EvidenceKind
from diffprune.core.fitted import CALIBRATION_IMAGES, Artifact, FittedPruner, FittingRun
from diffprune.core.pruner import Pruner, Reference, ScorePruner
from diffprune.core.site import Plan
from diffprune.core.tokens import VisualTokens
from diffprune.core.vlm import Shape
from diffprune.io import checkpoint as files
from diffprune.io.hub import scorer_folder
from diffprune.io.scorer_card import card
from diffprune.pruners._scorer_config import trained_on

STEEPEST = 20.0  # |sigma| looked at: attention that grows e^20-fold along an image
ATTENTION = {EvidenceKind.ENCODER_ATTENTION, EvidenceKind.DECODER_ATTENTION}


class PoRe(FittedPruner, ScorePruner):
    """`pore(fastv(after=2))`: the ranking of `fastv`, each score divided by mu e^(sigma x); x goes from 0 to 1 along the image.

    mu and sigma are those of the least squares to the scores of calibration images, one pair per method and model; mu is of no
    consequence for a ranking. The release fits one file per method and benchmark, the tested one; here the data of training and
    calibration are used, never those of a test. It also takes letterbox padding out, which is left out here: families do not say
    which patches are padding. The release reweights the first stage of a method that cuts in several; such methods are refused.
    Positions are those of the method inside.

    method:      that ranks tokens by attention.
    weights:     a folder it was saved to, or a repository of the Hub.
    other_model: it may serve another model than the one it was fitted on.

    Raises:
        ValueError: the method inside does not rank by attention, or the folder holds what was fitted to another one.
    """

    label = "PoRe"
    reference = Reference("Attention Debiasing for Token Pruning in Vision Language Models", "2508.17807")
    option_labels = {"other_model": "fitted on another model"}

    def __init__(self, method: Pruner, weights: Path | None = None, *, other_model: bool = False) -> None:
        if not isinstance(method, ScorePruner) or not ATTENTION & {evidence.kind for evidence in method.needs}:
            raise ValueError(f"pore reweights attention along the sequence, but {method.label} does not rank tokens by attention")
        self.ranking, self.inner, self.needs, self.other_model = method, method, method.needs, other_model
        self.sigma: float | None = None
        self.facts: dict[str, Any] = {}
        if weights is not None:
            self._load(scorer_folder(str(weights)))

    def cuts(self, budget: Budget, shape: Shape) -> Plan:
        plan = self.ranking.cuts(budget, shape)
        if len(plan) > 1:
            raise ValueError(f"pore reweights a method's only cut, but {self.ranking.label} cuts {len(plan)} times")
        return plan

    def score(self, tokens: VisualTokens) -> Tensor:
        """Raises ValueError: it has not been fitted."""
        if self.sigma is None:
            raise ValueError(
                f"pore({self.ranking.spec}) is not fitted yet: train it (diffprune train), then write "
                f"pore({self.ranking.spec}, weights='folder')"
            )
        return self.ranking.score(tokens).float() * torch.exp(-self.sigma * along(tokens.valid))

    def fit(self, run: FittingRun) -> Artifact:
        """One exponential through the scores of all calibration images."""
        tokens = run.calibration(self, CALIBRATION_IMAGES)
        scores = self.ranking.score(tokens).float()
        self.sigma = slope(along(tokens.valid)[tokens.valid], scores[tokens.valid])
        return run.save(self, images=len(tokens), sigma=round(self.sigma, 6))

    def save_pretrained(self, folder: Path | str, **facts: Any) -> None:
        """config.json + model.safetensors + README.md in `folder`; `facts` go into both texts, beside those it was loaded with."""
        assert self.sigma is not None, "fit comes before save"
        facts = self.facts | facts
        text = card("Position weights", str(self.spec), Path(folder).name, facts)
        config = {"method": "pore", "spec": str(self.spec.without_places()), "inside": str(self.ranking.spec), "facts": facts}
        tensors = {"sigma": torch.tensor(self.sigma, dtype=torch.float64)}
        self.weights_sha256 = files.write(folder, tensors, config, text)[:20]

    def _load(self, folder: Path) -> None:
        tensors, config = files.read(folder)
        told, wanted = (config.get("method"), config.get("inside")), ("pore", str(self.ranking.spec))
        if told != wanted:
            raise ValueError(f"{folder}: these weights belong to {told[0]}({told[1]}), not to pore({wanted[1]})")
        sigma = tensors.get("sigma")
        if sigma is None or sigma.numel() != 1 or not sigma.is_floating_point():
            raise ValueError(f"{folder / files.FILE}: tensor 'sigma' is missing or no single floating-point number")
        self.sigma = float(sigma)
        self.weights_sha256 = config[files.CHECKSUM][:20]
        self.trained_on, self.recipe, self.trained_seed = trained_on(config, folder / files.CONFIG)
        self.facts = config.get("facts", {})


def along(valid: Tensor) -> Tensor:
    """[B N] float: place of each valid token along its image, 0 at the first and 1 at the last."""
    return (valid.cumsum(1) - 1) / (valid.sum(1, keepdim=True) - 1).clamp_min(1)


def slope(places: Tensor, scores: Tensor) -> float:
    """sigma of mu e^(sigma x) with the least squares to `scores` [M] at `places` [M]; mu follows from sigma.

    Images of one size weigh in as their mean does: the squares around it do not depend on sigma.
    """
    x, y = places.double().cpu().numpy(), scores.double().cpu().numpy()

    def squares(sigma: float) -> float:
        curve = np.exp(sigma * (x - 1 if sigma > 0 else x))  # at most 1
        return float(-((curve @ y) ** 2) / (curve @ curve))

    grid = np.linspace(-STEEPEST, STEEPEST, 81)
    best = int(np.argmin([squares(sigma) for sigma in grid]))
    low, high = grid[max(best - 1, 0)], grid[min(best + 1, len(grid) - 1)]
    return float(optimize.minimize_scalar(squares, bounds=(low, high), method="bounded", options={"xatol": 1e-9}).x)
