"""DiffPrune: variance-preserving noise according to a budgeted soft top-K (arXiv 2605.28051).

In training every token stays and is mixed with Gaussian noise according to its retention weight; at inference the
tokens with low scores are removed. How we differ from the paper: features are standardised per channel before they are
noised (Eq. 5 presumes unit variance), scores per image before they are divided by the temperature (see `scale`), and one scorer
serves all budgets because the budget is drawn per step.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffprune.core.budget import Budget, Eased, Share, standardise, top
from diffprune.core.fitted import Annealing, Loss, Progress, TrainingRun
from diffprune.core.noise import Noise
from diffprune.core.pruner import Reference
from diffprune.core.site import Cut
from diffprune.core.tokens import Relaxation, Selection, VisualTokens
from diffprune.pruners._determinantal import checked, determinantal, length_left
from diffprune.pruners._greedy import cosines, farther
from diffprune.pruners._learned import Learned
from diffprune.pruners._soft_topk import centred, laplace_cdf, signal_and_noise

SCALES = ("unit", "free")
THROTTLES = ("noise", "gate", "additive", "removal")
SHARES = ("exact", "penalty")
LOUDEST = 10.0  # standard deviations of additive noise at most
PENALTY = 100.0  # weight of the squared difference of shares, as of the ratio loss of keep/drop


class DiffPrune(Learned):
    """`diffprune(weights='folder')`; `question_aware=True` lets the scorer read the question.

    scale: "unit" divides scores by their standard deviation in each image before the temperature does its part, so that the
           temperature alone says how sharp the soft top-K is, and thresholds (`Above`) see what training saw; "free" is the
           paper's s / tau, where growing scores sharpen the soft top-K by themselves and can freeze what it lets through early.

    The others are parts to take out or replace, and change training alone (`jobs/ablation_throttler.py`):

    throttle: "noise" is Eq. 4; "gate" scales, x~ = alpha z (the paper's Table 5); "additive" adds noise of the same ratio to the
              signal, x~ = z + sqrt((1 - alpha) / alpha) noise, ten standard deviations at most; "removal" is "noise" whose tokens
              also weigh alpha as keys of the decoder's attention, as removed ones weigh nothing.
    total:    "exact" is the soft top-K; "penalty" takes alpha = F(s / tau) as it comes, free of scale, and adds
              100 (mean alpha - K / N)^2 to the loss.
    trained_share: trained at this share alone; 0 at the budgets that are drawn.
    temperature_end: last temperature; 0 is the recipe's.

    dpp: weight w with which scores go into a determinantal point process that chooses, as in `dpp(diffprune, weight=w)`, trained
         as it is used; 0: the best by score. Greedy inference takes the largest
         a_i = s_i + log(r_i) / (2 w) again and again (`_determinantal`). With r_i of a token that is not taken as the others have
         left it, a is at least as large of all that are taken as of any that is not, so the soft top-K of a in place of s becomes,
         as its temperature falls, that choice. r depends on features and on the order in which tokens are taken, not otherwise on
         scores: the gradient through s alone is exact wherever a small step leaves that order. The combination is ours. Budgets are
         counts then.

    Two change what is kept alone, so that a trained scorer can be asked with and without them; they need a budget that is a count:

    diversity: share of the budget for tokens unlike those kept: again and again the one whose largest cosine to any kept token is
               smallest, as LearnPruner adds them (arXiv 2604.23950). At least one token goes by score.
    sinks:     tokens of largest norm that are always kept, at most half of those that do not go by diversity. A model that has
               never seen tokens removed leans on some that say little as sinks of its attention (arXiv 2503.03321); which these are
               no paper on pruning states. That it is those of large norm, as in vision encoders (arXiv 2309.16588), is our choice.
    """

    label = "DiffPrune"
    reference = Reference("Beyond Surrogate Gradients: Fully Differentiable Token Pruning for Vision-Language Models", "2605.28051")
    option_labels = Learned.option_labels | {
        "trained_share": "trained at a share of", "temperature_end": "last temperature", "sinks": "sinks kept:",
        "dpp": "trained for DPP of weight",
    }  # fmt: skip

    def __init__(
        self,
        weights: Path | None = None,
        *,
        scale: str = "unit",
        throttle: str = "noise",
        total: str = "exact",
        trained_share: float = 0.0,
        temperature_end: float = 0.0,
        dpp: float = 0.0,
        diversity: float = 0.0,
        sinks: int = 0,
        question_aware: bool | str = False,
        attention: bool | None = None,
        denoiser: bool | str = True,
        depth: int | None = None,
        width: int = 0,
        other_model: bool = False,
    ) -> None:
        for name, told, known in (("scale", scale, SCALES), ("throttle", throttle, THROTTLES), ("total", total, SHARES)):
            if told not in known:
                raise ValueError(f"diffprune: {name} is one of {', '.join(known)}, not {told!r}")
        if not 0 <= trained_share <= 1 or not 0 <= temperature_end < math.inf:
            raise ValueError(
                f"diffprune: trained_share is {trained_share} and temperature_end {temperature_end}; give a share up to 1 and a "
                "temperature, or 0, which leaves them to the recipe"
            )
        if isinstance(diversity, bool) or not isinstance(diversity, (int, float)) or not 0 <= diversity < 1:
            raise ValueError(f"diffprune(diversity={diversity!r}): the share for unlike tokens lies from 0 to below 1")
        if type(sinks) is not int or sinks < 0:
            raise ValueError(f"diffprune(sinks={sinks!r}): the number of tokens that are always kept is whole and not below 0")
        self.dpp = checked(dpp, "diffprune(dpp")
        if dpp and (diversity or sinks or scale != "unit" or total != "exact"):
            raise ValueError(
                f"diffprune(dpp={dpp}) chooses by itself, of scores of unit deviation: leave diversity, sinks, scale and total out"
            )
        self.diversity, self.sinks = diversity, sinks
        self.scale, self.throttle, self.total = scale, throttle, total
        self.trained_share, self.temperature_end = trained_share, temperature_end
        if throttle == "removal":
            self.attention_implementation = "masked_softmax"  # type: ignore[misc]
        super().__init__(
            weights, question_aware=question_aware, attention=attention, denoiser=denoiser, depth=depth, width=width,
            other_model=other_model,
        )  # fmt: skip

    @property
    def by_score_alone(self) -> bool:
        return not self.diversity and not self.sinks and not self.dpp

    def select(self, tokens: VisualTokens, cut: Cut) -> Selection:
        """The best by score; with the tokens that are always kept, and those unlike them; or by the determinantal point process.

        Raises:
            ValueError: a score is NaN; or a threshold where parts of a count are asked for.
        """
        if self.by_score_alone:
            return super().select(tokens, cut)
        if self.dpp:
            return determinantal(tokens, self.ordered(tokens), self.dpp, cut.budget)
        scores, valid, counts = self.ordered(tokens).float(), tokens.valid, cut.budget.counts(tokens.counts)
        unlike = self._unlike(counts)
        held = top(tokens.features.float().norm(dim=-1), valid, ((counts - unlike) // 2).clamp_max(self.sinks))
        keep = top(scores.masked_fill(held, math.inf), valid, counts - unlike)
        if not self.diversity:
            return Selection(keep)
        largest = torch.tensor(cut.budget.count(valid.shape[1]))  # of an image that has all N, so that no device is asked
        steps = int(self._unlike(largest))
        return Selection(farther(cosines(tokens.features, valid).neg_(), keep, valid, counts, steps))

    def _unlike(self, counts: Tensor) -> Tensor:
        """Of so many tokens of each image, those that go by diversity."""
        return (self.diversity * counts.double() + 0.5).long().minimum((counts - 1).clamp_min(0))

    def temperature(self, progress: Progress, annealing: Annealing) -> float:
        return super().temperature(progress, replace(annealing, end=self.temperature_end or annealing.end))

    def objective(self, run: TrainingRun, batch: Any, budget: Budget, progress: Progress, noise: Noise) -> Loss:
        """Of the share it is trained at, where one is given, eased as the drawn budget is."""
        if self.trained_share:
            only = Share(self.trained_share)
            budget = replace(budget, budget=only) if isinstance(budget, Eased) else only
        return super().objective(run, batch, budget, progress, noise)

    def relax(self, tokens: VisualTokens, budget: Budget, temperature: float, noise: Noise) -> Relaxation:
        """Eq. 2-5: alpha = soft top-K of s / tau, x~ = sqrt(alpha) z + sqrt(1 - alpha) noise, x- = denoiser(x~)."""
        z, counts = self.standardised(tokens.features), self.counts(tokens, budget)
        u = self._logits_of_alpha(tokens, counts, temperature)
        alpha = laplace_cdf(u).float()
        mixed = self.denoised(self._throttled(z, u, alpha, noise.normal(tokens.valid, z.shape[-1])), tokens.valid)
        penalty: Tensor | float = 0.0
        if self.total == "penalty":
            num = tokens.counts.clamp_min(1)
            penalty = PENALTY * ((alpha.where(tokens.valid, 0.0).sum(1) - counts) / num).square().mean()
        retention = alpha.where(tokens.valid, 0.0) if self.throttle == "removal" else None
        return Relaxation(self.restored(mixed, tokens.features), let=alpha.detach(), retention=retention, penalty=penalty)

    def _logits_of_alpha(self, tokens: VisualTokens, counts: Tensor, temperature: float) -> Tensor:
        """u [B N] with alpha = F(u)."""
        scores = self.logits(tokens)
        if self.total == "penalty":
            return (scores.double() / temperature).masked_fill(~tokens.valid, -math.inf)
        if self.scale == "unit":
            scores = standardise(scores, tokens.valid)
        if self.dpp:
            scores = scores + length_left(tokens, self.dpp * scores.detach(), counts.long()).log() / (2 * self.dpp)
        return centred(scores, tokens.valid, counts, temperature)

    def _throttled(self, z: Tensor, u: Tensor, alpha: Tensor, noise: Tensor) -> Tensor:
        """What is left of standardised tokens [B N D]."""
        if self.throttle == "gate":
            return alpha[..., None] * z
        signal, share = (part.float()[..., None] for part in signal_and_noise(u))
        if self.throttle == "additive":
            return z + (share / signal.clamp_min(1e-6)).clamp_max(LOUDEST) * noise
        return signal * z + share * noise
