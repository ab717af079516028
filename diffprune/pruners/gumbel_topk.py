"""Gumbel-Softmax with a hard top-K and a straight-through gradient: DiffPrune's own control (arXiv 2605.28051, section 3.1).

Same scorer, denoiser, data, schedule and budgets as DiffPrune; only the relaxation changes.
"""

from __future__ import annotations

from pathlib import Path

from diffprune.core.budget import Budget, top
from diffprune.core.noise import Noise
from diffprune.core.pruner import Reference
from diffprune.core.tokens import Relaxation, VisualTokens
from diffprune.pruners._learned import Learned
from diffprune.pruners._soft_topk import soft_top_k

BACKWARDS = ("relaxed", "identity")
FILLERS = ("mean", "noise")


class GumbelTopK(Learned):
    """m = top-K of s + Gumbel noise; a dropped token becomes its filler but keeps its slot, so it still gets gradient.

    backward: "relaxed" uses the Jacobian of the soft top-K of the same perturbed scores, "identity" passes dL/dm to s.
    filler:   "noise" (what DiffPrune gives at alpha = 0), or "mean" (zero in standardised space), with which the
              scorer hardly trains on the embedded model.
    """

    label = "Gumbel top-K"
    reference = Reference("Categorical Reparameterization with Gumbel-Softmax; control of DiffPrune, section 3.1", "1611.01144")

    def __init__(
        self,
        weights: Path | None = None,
        *,
        backward: str = "relaxed",
        filler: str = "noise",
        question_aware: bool | str = False,
        attention: bool | None = None,
        denoiser: bool | str = True,
        depth: int | None = None,
        width: int = 0,
        other_model: bool = False,
    ) -> None:
        if backward not in BACKWARDS or filler not in FILLERS:
            raise ValueError(f"gumbel_topk: backward is one of {', '.join(BACKWARDS)}, filler one of {', '.join(FILLERS)}")
        self.backward, self.filler = backward, filler
        super().__init__(
            weights, question_aware=question_aware, attention=attention, denoiser=denoiser, depth=depth, width=width,
            other_model=other_model,
        )  # fmt: skip

    def relax(self, tokens: VisualTokens, budget: Budget, temperature: float, noise: Noise) -> Relaxation:
        z, scores, counts = self.standardised(tokens.features), self.logits(tokens), self.counts(tokens, budget)
        perturbed = scores - (-noise.uniform(tokens.valid).squeeze(-1).log()).log()
        hard = top(perturbed, tokens.valid, counts.long()).to(scores.dtype)
        surrogate = soft_top_k(perturbed, tokens.valid, counts, temperature) if self.backward == "relaxed" else scores
        mask = (hard + surrogate - surrogate.detach())[..., None]
        mixed = mask * z
        if self.filler == "noise":
            mixed = mixed + (1 - mask) * noise.normal(tokens.valid, z.shape[-1])
        return Relaxation(self.restored(self.denoised(mixed, tokens.valid), tokens.features), let=hard)
