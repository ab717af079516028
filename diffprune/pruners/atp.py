"""ATP-LLaVA: thresholds that small modules predict for every image, question and layer decide what stays (arXiv 2412.00447).

A token stays if it matters (attention in the decoder) or is needed to cover the image (a place on a coarse grid). In training both
comparisons are soft and weaken the token as a key in all later layers; how many stay on average is a term of the loss.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffprune.core.budget import Budget, Share, top
from diffprune.core.evidence import decoder_attention
from diffprune.core.fitted import Annealing, Loss, Progress, TrainingRun
from diffprune.core.noise import Noise
from diffprune.core.pruner import Reference
from diffprune.core.site import Cut, Plan, Site, Stage, layer_average, staged
from diffprune.core.tokens import Selection, VisualTokens
from diffprune.core.vlm import Shape
from diffprune.pruners._depth import PAPERS, scaled
from diffprune.pruners._networks import Networks

AFTER = (4, 14, 24)  # of 32 decoder layers
SHARPNESS = 10.0  # of the soft comparison
SPACING = 3.0  # lambda of the spatial score, 1 - lambda R
STRIDES = (2, 3, 4, 5, 6)  # grids of rates R = 1/4, 1/9, 1/16, 1/25 and 1/36
DEPTH_WEIGHT = 0.05  # of the share kept after each cut, times its layer
SELF, CROSS = decoder_attention(queries="image", raw=True), decoder_attention(queries="text")


class ATP(Networks):
    """Keeps what exceeds one of two thresholds that are predicted after the layers 4, 14 and 24 of 32.

    We know the paper by a re-implementation that cites its equations. From it: S_self, what a token receives as a key of its
    image's tokens before the softmax; S_cross, the question's mean attention to it; S_r, their mean; thresholds from both by two
    linear layers and a sigmoid; sharpness 10; the loss. Ours, as it leaves them open: thresholds see the mean of S_self and the sum
    of S_cross, whose mean falls with the number of tokens; S_self and S_cross are each brought into (0, 1) by the logistic of their
    standard scores over the tokens that are there; the spatial score is a ladder of grids, so that its threshold picks a density;
    modules also see the logarithm of the share to keep, so that one scorer serves all budgets; the layer in the loss is that of a
    decoder of 32. How we differ: the model stays frozen, where the paper trains it and reports 2 to 3 points less without; no
    two-dimensional positions are added to the rotary ones. Evidence gives no gradient, masks do.

    slack:         an image keeps at least the plan's count at every cut divided by this, and at most that many times it, whatever
                   earlier cuts left; 1 makes counts exact, by how far tokens exceed their thresholds. A full budget keeps
                   everything.
    target_weight: of the difference between the tokens kept, layer and question average, and those of the budget.
    """

    label = "ATP-LLaVA"
    reference = Reference("ATP-LLaVA: Adaptive Token Pruning for Large Vision Language Models", "2412.00447")
    option_labels = Networks.option_labels | {"target_weight": "target weight"}
    needs = frozenset({SELF, CROSS})
    attention_implementation = "masked_softmax"
    recomputable = False
    searched = {"target_weight": (0.02, 0.05, 0.2, 0.5)}
    apart = (
        "Every question is a row of its own, as its thresholds depend on it: fewer questions per image and step.",
        "A drawn budget is the share behind its last cut; the loss holds the average over layers near that of such a plan.",
        "Its temperature is constant, a tenth.",
        "The paper also trains the language model; here it is frozen.",
        "How many tokens an image keeps is its own: the budget is met on average, and within a factor.",
    )

    def __init__(
        self, weights: Path | None = None, *, slack: float = 2.0, target_weight: float = 0.2, other_model: bool = False
    ) -> None:
        if not 1 <= slack < math.inf:
            raise ValueError(f"atp(slack={slack}): how many times its budget an image may keep is a number of at least 1")
        if not 0 <= target_weight < math.inf:
            raise ValueError(f"atp(target_weight={target_weight}): give 0, which leaves the target out, or more")
        self.slack, self.target_weight = slack, target_weight
        self.sharpness = SHARPNESS
        options = {"question_aware": False, "attention": False, "denoiser": False, "depth": None, "width": 0}
        super().__init__(weights, options, other_model=other_model)

    def temperature(self, progress: Progress, annealing: Annealing) -> float:
        return 1 / self.sharpness

    def _sizes(self, features: int, text: int | None) -> dict[str, int | None]:
        return {"features": features, "text": None, "width": 3, "depth": len(AFTER)}

    def _make(self) -> nn.ModuleDict:
        self.networks = nn.ModuleDict({"scorer": Thresholds()})
        return self.networks

    # -- removal -----------------------------------------------------------------------------------------------------

    def cuts(self, budget: Budget, shape: Shape) -> Plan:
        plan = staged(budget, shape.layers, scaled(AFTER, shape.layers), fixed=self.slack > 1)
        return tuple(replace(cut, number=number, adaptive=self.slack > 1) for number, cut in enumerate(plan))

    def select(self, tokens: VisualTokens, cut: Cut) -> Selection:
        """Raises ValueError: a threshold, which says nothing of how many to keep; or the method has not been trained."""
        total = tokens.counts
        asked = cut.budget.counts(total)
        over = self.over(tokens, cut, tokens.valid.float())
        stay = ((over > 0) & tokens.valid).sum(1)
        least, most = (asked / self.slack).ceil().long(), (asked * self.slack).long().minimum(total)
        count = torch.where(asked >= total, total, stay.maximum(least).minimum(most))
        return Selection(top(over, tokens.valid, count))

    def over(self, tokens: VisualTokens, cut: Cut, here: Tensor) -> Tensor:
        """[B N]: by how much each token exceeds the one of its two thresholds that it exceeds by more.

        here: [B N] in [0, 1], how far each is still there.
        """
        here = here.where(tokens.valid, 0.0)
        total, budget = tokens.counts.clamp_min(1), cut.budget
        share = torch.full_like(here[:, 0], budget.share) if isinstance(budget, Share) else budget.counts(total) / total
        own, cross = (tokens.given(key).float() for key in (SELF, CROSS))
        matters = (logistic(own, here) + logistic(cross, here)) / 2
        told = torch.stack([mean(own, here), mean(cross, here) * here.sum(1), share.log()], 1)
        theta = self.trained("scorer")(told, cut.number)
        covers = coverage(tokens).expand_as(matters)
        return torch.maximum(matters - theta[:, :1], covers - theta[:, 1:])

    def soft(self, tokens: VisualTokens, cut: Cut, here: Tensor) -> Tensor:
        """[B N] in (0, 1): the soft comparison, max_i sigmoid(10 (S_i - theta_i)); 0 at padding."""
        return (self.sharpness * self.over(tokens, cut, here)).sigmoid().where(tokens.valid, 0.0)

    # -- training ----------------------------------------------------------------------------------------------------

    def objective(self, run: TrainingRun, batch: Any, budget: Budget, progress: Progress, noise: Noise) -> Loss:
        """The answers' loss with weakened tokens, 0.05 sum_l l (share kept after l), and the distance from the target average.

        That distance is of the mean over the questions that are in memory together: how many tokens one keeps is free.
        """
        tokens, image = run.tokens(batch)
        layers, after = run.vlm.shape.layers, scaled(AFTER, run.vlm.shape.layers)
        most = int(tokens.counts.max())
        share = (budget.count(most) / most) ** (1 / len(after))
        kept: list[Tensor] = []

        def soften(seen: VisualTokens, cut: Cut, before: Tensor) -> Tensor:
            mask = self.soft(seen, cut, before)
            kept.append((before * mask).sum(1))
            return mask

        plan = tuple(Cut(Site(Stage.DECODER, layer), Share(share), number) for number, layer in enumerate(after))
        nll = run.softened_nll(batch, tokens, image, plan, soften)
        total = tokens.counts[image].float()
        spans = [end - start for start, end in zip((0, *after), (*after, layers), strict=True)]
        average = torch.stack([span * num for span, num in zip(spans, (total, *kept), strict=True)]).sum(0) / layers
        deep = torch.stack([layer * PAPERS / layers * num / total for layer, num in zip(after, kept, strict=True)]).sum(0)
        target = total * layer_average(share, layers, after)
        penalty = DEPTH_WEIGHT * deep.mean() + self.target_weight * (average - target).mean().abs()
        rows = len(total)
        terms = {"nll": nll, "penalty": run.per_row(penalty, rows), "kept": run.per_row(average.mean(), rows)}
        return Loss(run.per_answer(nll) + terms["penalty"], terms)


class Thresholds(nn.Module):
    """What is told of an image and its question [B 3] -> thresholds of importance and coverage [B 2] in (0, 1), for each cut."""

    blocks = ()

    def __init__(self) -> None:
        super().__init__()
        self.inlets = nn.ModuleList(nn.Linear(3, 3) for _ in AFTER)
        self.heads = nn.ModuleList(nn.Linear(3, 2) for _ in AFTER)

    @property
    def inlet(self) -> nn.Module:
        """The first of its linear layers, by which estimates of memory know its width."""
        return self.inlets[0]

    def forward(self, told: Tensor, number: int) -> Any:
        return self.heads[number](self.inlets[number](told)).sigmoid()

    def flops(self, num: int) -> float:
        """Whatever the number of tokens."""
        return 2.0 * sum(p.numel() for p in self.parameters() if p.ndim == 2)


def mean(values: Tensor, here: Tensor) -> Tensor:
    """[B]: mean of `values` [B N] over the tokens by how far they are `here` [B N]."""
    return (values * here).sum(1) / here.sum(1).clamp_min(1e-6)


def logistic(values: Tensor, here: Tensor) -> Tensor:
    """[B N] in (0, 1): the logistic of the standard scores of `values`, by mean and variance over the tokens that are `here`."""
    away = values - mean(values, here)[:, None]
    variance = mean(away.square(), here)[:, None]
    return (away / variance.where(variance > 1e-20, 1.0).sqrt()).sigmoid()


def coverage(tokens: VisualTokens) -> Tensor:
    """[1 N]: the spatial score 1 - 3 R of the coarsest grid of rate R that a token's place is on, 0 off all of them.

    Where tokens are no raster, every R-th place of the sequence is on the grid of rate 1 / R.
    """
    num, device = tokens.valid.shape[1], tokens.valid.device
    place = torch.arange(num, device=device)
    score = torch.zeros(num, device=device)
    for stride in STRIDES:
        if tokens.grid is None:
            on = place % stride**2 == stride**2 // 2
        else:
            row, column = place // tokens.grid[1], place % tokens.grid[1]
            on = (row % stride == stride // 2) & (column % stride == stride // 2)
        score = torch.where(on, 1 - SPACING / stride**2, score)
    return score[None]
