"""What a threshold keeps, known without running the model: scores of a calibration set, cached once.

Scores do not depend on the threshold, so one run of the scorer answers for all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from diffprune import pruning
from diffprune.core.budget import Above, Budget, standardise
from diffprune.core.evidence import IDENTITY
from diffprune.core.pruner import Pruner
from diffprune.core.records import CalibrationPicture, TokenScore
from diffprune.core.vlm import VLM
from diffprune.timing.eager import Inputs, marked

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class Scored:
    """A calibration set: counts and texts of S samples and, where the method has scores, the scores.

    visual, text: [S] tokens. starts: first sample of each batch. scores: per sample, standardised float32 in ascending order (what
    `Above` compares); None where a method has none, or draws them, so that a threshold means nothing.
    """

    visual: Array
    text: Array
    starts: Array
    scores: tuple[Array, ...] | None = None

    def kept(self, budget: Budget) -> Array:
        """[S] tokens each sample keeps, by the same comparison as inference."""
        if not isinstance(budget, Above):
            return np.array([budget.count(int(v)) for v in self.visual])
        assert self.scores is not None, "a threshold needs scores"
        limit = np.float32(budget.threshold)
        over = np.array([len(s) - np.searchsorted(s, limit, side="right") for s in self.scores])
        most = self.visual if budget.most is None else np.minimum(self.visual, budget.most)
        return np.minimum(np.maximum(over, budget.least), most)

    def longest(self, kept: Array) -> Array:
        """[batches] length of the longest row of each batch."""
        return np.asarray(np.maximum.reduceat(kept + self.text, self.starts))

    @property
    def records(self) -> dict[str, list[Any]]:
        """Rows of the tables `calibration` and `scores`, from which what a budget keeps can be counted again."""
        batch = np.searchsorted(self.starts, np.arange(len(self.visual)), side="right") - 1
        pictures = [
            CalibrationPicture(i, int(b), int(v), int(t))
            for i, (b, v, t) in enumerate(zip(batch, self.visual, self.text, strict=True))
        ]
        scores = [TokenScore(i, rank, float(s)) for i, row in enumerate(self.scores or ()) for rank, s in enumerate(row)]
        return {"calibration": pictures, "scores": scores}


def captured(vlm: VLM, inputs: Inputs, pruner: Pruner) -> tuple[Array, ...] | None:
    """Standardised scores of each image, ascending; None where the method does not pick by scores in one cut, or draws them."""
    if IDENTITY in pruner.needs:
        return None
    caught: list[tuple[torch.Tensor, torch.Tensor]] = []
    budget = Above(0.0)

    def pick(scores: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
        caught.append((scores, valid))
        return budget.pick(scores, valid)

    try:
        pruning.select(vlm, inputs.prompts, inputs.for_(pruner), pruner, marked(budget, pick=pick))
    except ValueError:  # a method that needs a count says so
        return None
    if len(caught) != 1:
        return None
    rows = standardise(*caught[0]).cpu().numpy()
    return tuple(np.sort(row[valid]) for row, valid in zip(rows, caught[0][1].cpu().numpy(), strict=True))


def scored(vlm: VLM, batches: Sequence[Inputs], pruner: Pruner) -> Scored:
    """Run the scorer once over a calibration set."""
    found = [captured(vlm, inputs, pruner) for inputs in batches]
    sizes = [len(inputs.questions) for inputs in batches]
    text = [(i.prompts.attention_mask.sum(1) - i.prompts.slots.sum(1)).cpu().numpy() for i in batches]
    return Scored(
        visual=np.concatenate([i.tokens.counts.cpu().numpy() for i in batches]),
        text=np.concatenate(text),
        starts=np.cumsum([0, *sizes[:-1]]),
        scores=None if any(f is None for f in found) else tuple(s for f in found if f is not None for s in f),
    )
