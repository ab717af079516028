"""Dynamic-LLaVA's image part: keep or drop after the second decoder layer, by a predictor on hidden states (arXiv 2412.00876)."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from diffprune.core.budget import Budget
from diffprune.core.evidence import decoder_features
from diffprune.core.fitted import Annealing, Loss, Progress, TrainingRun
from diffprune.core.noise import Noise
from diffprune.core.pruner import Reference
from diffprune.core.site import Cut, Plan, Site, Stage, staged
from diffprune.core.tokens import Relaxation, VisualTokens
from diffprune.core.vlm import Shape
from diffprune.pruners._depth import scaled
from diffprune.pruners._keep_drop import geometric, keep_or_drop
from diffprune.pruners._own_scorer import OwnScorer
from diffprune.pruners._scorer import Block


class DynamicLLaVA(OwnScorer):
    """Keeps the tokens whose logit of keep exceeds that of drop by most, among the hidden states after its first layers.

    From the authors' code. How we differ: the model stays frozen, which the release trains at a fortieth of the predictor's rate;
    the gate on generated text is left out; budgets are drawn per step, of which the predictor learns no more than the mean, where
    the release trains at 20 % alone. A drawn budget is the share that the cut leaves; when tokens are removed a budget is the
    average over layers, as for every method that cuts inside the decoder. Blocks are those of the shared scorer (SiLU for GELU, a
    bias in the attention's projections), on states that are standardised channel by channel first.

    after:        decoder layers that see every token; 0 is the paper's 2 of 32, the same fraction of another depth, at least one.
    ratio_weight: of the published ratio loss, which pulls the share of kept tokens towards the budget.
    width:        of the predictor; 0 is an eighth of the model's, as the release's 512 for 7B, or half of a narrow model's.
    """

    label = "Dynamic-LLaVA (image part)"
    reference = Reference(
        "Dynamic-LLaVA: Efficient Multimodal Large Language Models via Dynamic Vision-language Context Sparsification", "2412.00876"
    )
    option_labels = OwnScorer.option_labels | {"after": "after layer", "ratio_weight": "ratio weight"}
    needs = frozenset({decoder_features()})
    attention_implementation = "masked_softmax"
    recomputable = False
    searched = {"ratio_weight": (3.0, 10.0, 30.0, 100.0)}
    apart = (
        "Every question is a row of its own, as states inside the decoder may depend on it: fewer questions per image and step.",
        "A drawn budget is the share behind its cut, not the average over layers.",
        "Its temperature falls geometrically from 1 over all steps.",
        "The paper also trains the language model; here it is frozen.",
    )

    def __init__(
        self, weights: Path | None = None, *, after: int = 0, ratio_weight: float = 100.0, width: int = 0, other_model: bool = False
    ) -> None:
        if after < 0:
            raise ValueError(f"dynamic_llava(after={after}): it cuts after so many decoder layers, or the paper's share with 0")
        if not 0 <= ratio_weight < math.inf:
            raise ValueError(f"dynamic_llava(ratio_weight={ratio_weight}): give 0, which leaves the ratio loss out, or more")
        self.after, self.ratio_weight = after, ratio_weight
        super().__init__(weights, width=width, other_model=other_model)

    def network(self, features: int, width: int) -> nn.Module:
        return Predictor(features, width)

    def outline(self, features: int, text: int | None = None) -> nn.ModuleDict:
        return super().outline(text or features)  # tokens have the decoder's width where it looks

    def _sizes(self, features: int, text: int | None) -> dict[str, int | None]:
        narrow = max(16, features // 2 // 16 * 16)
        return super()._sizes(features, text) | {"width": self.options["width"] or max(min(512, narrow), features // 8)}

    def layers(self, shape: Shape) -> tuple[int, ...]:
        """Decoder layers before its cut."""
        return (self.after,) if self.after else scaled((2,), shape.layers)

    def cuts(self, budget: Budget, shape: Shape) -> Plan:
        return staged(budget, shape.layers, self.layers(shape))

    def temperature(self, progress: Progress, annealing: Annealing) -> float:
        return geometric(progress, annealing)

    def score(self, tokens: VisualTokens) -> Tensor:
        keep, drop = self.logits(tokens).unbind(-1)
        return keep - drop

    def relax(self, tokens: VisualTokens, budget: Budget, temperature: float, noise: Noise) -> Relaxation:
        return keep_or_drop(tokens, self.logits(tokens), self.counts(tokens, budget), self.ratio_weight, temperature, noise)

    def objective(self, run: TrainingRun, batch: Any, budget: Budget, progress: Progress, noise: Noise) -> Loss:
        """The answers' loss with dropped tokens hidden behind the cut, and the ratio loss."""
        tokens, image = run.tokens(batch)
        made: list[tuple[VisualTokens, Relaxation]] = []

        def soften(seen: VisualTokens, cut: Cut, before: Tensor) -> Tensor:
            relaxed = self.relax(seen, budget, self.temperature(progress, run.annealing), noise)
            made.append((seen, relaxed))
            assert relaxed.retention is not None
            return relaxed.retention

        (layer,) = self.layers(run.vlm.shape)
        nll = run.softened_nll(batch, tokens, image, (Cut(Site(Stage.DECODER, layer), budget),), soften)
        ((seen, relaxed),) = made
        return self.summed(run, nll, seen, budget, relaxed)


class Predictor(nn.Module):
    """Standardised hidden states [B N D] -> logits of keep and drop [B N 2].

    A linear layer, two transformer blocks, half of the channels replaced by their mean over the image, three linear layers.
    """

    def __init__(self, features: int, width: int) -> None:
        super().__init__()
        self.norm, self.inlet = nn.LayerNorm(features), nn.Linear(features, width)
        self.blocks = nn.ModuleList(Block(width, math.gcd(8, width), attention=True) for _ in range(2))
        self.out = nn.ModuleList([nn.Linear(width, width // 2), nn.Linear(width // 2, max(1, width // 4))])
        self.head = nn.Linear(max(1, width // 4), 2)

    def forward(self, z: Tensor, valid: Tensor) -> Any:
        x = functional.gelu(self.inlet(self.norm(z)))
        for block in self.blocks:
            x = block(x, valid)
        half = x.shape[-1] // 2
        live = valid[..., None]
        middle = x[..., half:].where(live, 0.0).sum(1, keepdim=True) / live.sum(1, keepdim=True).clamp_min(1)
        x = torch.cat([x[..., :half], middle.expand(-1, x.shape[1], -1)], -1)
        for layer in self.out:
            x = functional.gelu(layer(x))
        return self.head(x)

    def flops(self, num: int) -> float:
        """Of `num` tokens of one image, forward."""
        matrices = sum(p.numel() for p in self.parameters() if p.ndim == 2)
        return 2.0 * num * matrices + 2 * 4.0 * num**2 * self.inlet.out_features
