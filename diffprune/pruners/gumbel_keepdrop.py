"""Per-token keep/drop Gumbel-Softmax with masked attention and a ratio loss (DynamicViT, Dynamic-LLaVA).

The like-for-like variant: DiffPrune's scorer body with two logits per token, the frozen VLM, lambda = 100. Features are
not degraded; a dropped token stops being a key in every decoder layer. There is no noise to undo, hence no denoiser.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from diffprune.core.budget import Budget
from diffprune.core.fitted import Annealing, Progress
from diffprune.core.noise import Noise
from diffprune.core.pruner import Reference
from diffprune.core.tokens import Relaxation, VisualTokens
from diffprune.pruners._keep_drop import geometric, keep_or_drop
from diffprune.pruners._learned import Learned
from diffprune.pruners._logistic_topk import logistic_offset


class GumbelKeepDrop(Learned):
    """Keeps or drops every token on its own.

    ratio_weight: of the published ratio loss, which pulls the share of kept tokens towards the budget. A scorer that does not see
                  the budget can only meet the mean of those that are drawn.
    offset:       logits are shifted per image so that the expected number of kept tokens is the budget, as DiffPrune's are: the
                  like-for-like form. The ratio loss stays, and is small.
    """

    label = "Gumbel keep/drop"
    reference = Reference("DynamicViT: Efficient Vision Transformers with Dynamic Token Sparsification", "2106.02034")
    option_labels = Learned.option_labels | {"offset": "budget offset", "ratio_weight": "ratio weight"}
    outputs = 2
    attention_implementation = "masked_softmax"
    searched = {"ratio_weight": (3.0, 10.0, 30.0, 100.0)}
    apart = (
        "There is no denoiser, as nothing is noised; a ratio loss stands for the budget.",
        "Its temperature falls geometrically from 1 over all steps.",
    )

    def __init__(
        self,
        weights: Path | None = None,
        *,
        ratio_weight: float = 100.0,
        offset: bool = False,
        question_aware: bool | str = False,
        attention: bool | None = None,
        depth: int | None = None,
        width: int = 0,
        other_model: bool = False,
    ) -> None:
        if ratio_weight < 0:
            raise ValueError(f"gumbel_keepdrop: ratio_weight is {ratio_weight}; give 0, which leaves the ratio loss out, or more")
        self.ratio_weight, self.offset = ratio_weight, offset
        super().__init__(
            weights, question_aware=question_aware, attention=attention, denoiser=False, depth=depth, width=width,
            other_model=other_model,
        )  # fmt: skip

    def temperature(self, progress: Progress, annealing: Annealing) -> float:
        return geometric(progress, annealing)

    def score(self, tokens: VisualTokens) -> Tensor:
        keep, drop = self.logits(tokens).unbind(-1)
        return keep - drop

    def relax(self, tokens: VisualTokens, budget: Budget, temperature: float, noise: Noise) -> Relaxation:
        logits = self.logits(tokens)
        if self.offset:
            keep = logits[..., 0] - logits[..., 1]
            keep = keep - logistic_offset(keep, tokens.valid, self.counts(tokens, budget))
            logits = torch.stack([keep, torch.zeros_like(keep)], -1)
        return keep_or_drop(tokens, logits, self.counts(tokens, budget), self.ratio_weight, temperature, noise)
