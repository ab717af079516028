"""OC-VTP: slots that explain an image, of each of which the token it claims most strongly is kept (arXiv 2511.20439).

Trained without answers and without the language model: slot attention with as many slots as tokens are to be kept, and a decoder
that rebuilds the encoder's tokens from the slots. What small slots cover weighs more in the error, or small things would have none.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffprune.core.budget import Budget, top
from diffprune.core.evidence import encoder_attention
from diffprune.core.fitted import Annealing, Loss, Progress, TrainingRun
from diffprune.core.noise import Noise
from diffprune.core.pruner import Reference
from diffprune.core.site import Cut
from diffprune.core.tokens import Selection, VisualTokens
from diffprune.pruners._networks import Networks
from diffprune.pruners._scorer_config import DIMS
from diffprune.pruners._slot_attention import Rebuild, SlotAttention

ATTENTION = encoder_attention()
DEPTH = 4  # layers of the decoder
MOST = 10.0  # weight of a token, the mean weight of an image's slots being 1
FEW = 24 / 576  # share of tokens that the decoder is shown, every other time; in between any number


class OCVTP(Networks):
    """Keeps the token that each slot claims most strongly; where slots agree, places are filled by attention in the encoder.

    From the authors' code, at a quarter of its widths for features a quarter as wide: slots half as wide as the tokens, three
    iterations, a decoder of four layers. How we differ: the scorer reads what the projector reads, not an early layer of CLIP;
    free places go by the attention that tells `attention` apart, not by its mean over queries; budgets are drawn as for every
    method instead of from {16, 32, 64, 128}, and eased with them; the decoder knows places by sines instead of a learned
    table, so that it serves any number of tokens; tokens are standardised; there is no dropout in slot attention (0.01 there); and
    see `by_area`. Which numbers slots start from at inference the release leaves to chance, ours are those of `seed`. The reported
    training is of 30 epochs.

    seed:  of the draws that slots start from when tokens are selected; the same for every image.
    width: of the slots; 0 is half of the tokens'.
    """

    label = "OC-VTP"
    reference = Reference("Object-Centric Vision Token Pruning for Efficient Vision Language Models", "2511.20439")
    needs = frozenset({ATTENTION})
    apart = (
        "Its loss is the area-weighted error of rebuilding the encoder's tokens from slots; answers and the decoder play no part.",
        "Steps, images, seeds and drawn budgets are the recipe's; there is no temperature.",
    )

    def __init__(self, weights: Path | None = None, *, seed: int = 0, width: int = 0, other_model: bool = False) -> None:
        if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
            raise ValueError(f"ocvtp(seed={seed!r}): the seed of the slots is a whole number that is not negative")
        self.seed = seed
        options = {"question_aware": False, "attention": False, "denoiser": False, "depth": None, "width": width}
        super().__init__(weights, options, other_model=other_model)

    def temperature(self, progress: Progress, annealing: Annealing) -> float:
        """There is none."""
        return 1.0

    def _sizes(self, features: int, text: int | None) -> dict[str, int | None]:
        return {"features": features, "text": None, "width": self.options["width"] or max(1, features // 2), "depth": DEPTH}

    def _make(self) -> nn.ModuleDict:
        features, _, width, depth = (self.dims[name] for name in DIMS)
        assert features and width and depth, "slots have widths"
        self.networks = nn.ModuleDict({"scorer": SlotAttention(features, width), "decoder": Rebuild(features, width, depth)})
        return self.networks

    def select(self, tokens: VisualTokens, cut: Cut) -> Selection:
        """Raises ValueError: a threshold, of which no number of slots follows; or the method has not been trained."""
        scorer, counts = self.trained("scorer"), cut.budget.counts(tokens.counts)
        most, (batch, num) = cut.budget.count(tokens.valid.shape[1]), tokens.valid.shape
        width = self.dims["width"]
        assert width, "slots have a width"
        draws = drawn_slots(self.seed, most, width, tokens.valid.device).expand(batch, -1, -1)
        live = torch.arange(most, device=counts.device) < counts[:, None]
        claim = scorer(self.seen(tokens), tokens.valid, draws, live)[1]
        best = claim.masked_fill(~tokens.valid[:, None], -1.0).argmax(2)
        claimed = counts.new_zeros(batch, num).scatter_add_(1, best, live.long()) > 0
        attention = tokens.given(ATTENTION).float()
        return Selection(top(attention.masked_fill(claimed, torch.inf), tokens.valid, counts))

    def objective(self, run: TrainingRun, batch: Any, budget: Budget, progress: Progress, noise: Noise) -> Loss:
        """The area-weighted mean squared error of standardised tokens, mean over images."""
        tokens, _ = run.tokens(batch)
        counts, rows = self.counts(tokens, budget), len(tokens)
        error = self.rebuilding(tokens, counts.long(), noise).mean()
        return Loss(run.per_row(error, rows), {"kept": run.per_row(counts.mean(), rows)})

    def rebuilding(self, tokens: VisualTokens, counts: Tensor, noise: Noise) -> Tensor:
        """[B]: error of each image with `counts` [B] slots, mean over its tokens by the weight of those who claim them."""
        assert self.networks is not None and self.dims["width"], "build comes before the objective"
        z, valid = self.seen(tokens), tokens.valid
        live = torch.arange(int(counts.max()), device=counts.device) < counts[:, None]
        slots, claim = self.networks["scorer"](z, valid, noise.normal(live, self.dims["width"]), live)
        rebuilt = self.networks["decoder"](slots, live, z, valid, shown(valid, noise))
        weight = by_area(claim.detach(), valid, live)
        error = (rebuilt - z).square().mean(2).where(valid, 0.0)
        return (weight * error).sum(1) / weight.sum(1).clamp_min(1e-8)


def by_area(claim: Tensor, valid: Tensor, live: Tensor) -> Tensor:
    """[B N]: weights of tokens. A slot that claims a_k of an image's T tokens most strongly weighs (a_k / T)^-1/2, divided by the
    mean over slots, at most `MOST`; a token weighs what its slots weigh, by their claims [B K N]. A slot that wins no token counts
    as winning one; in the release it counts as winning 10^-8 of them, so that one such slot outweighs all that win some.
    """
    owner = claim.argmax(1)
    area = claim.new_zeros(claim.shape[:2]).scatter_add_(1, owner, valid.to(claim.dtype)).clamp_min(1)
    weight = (area / valid.sum(1, keepdim=True).clamp_min(1)).rsqrt().where(live, 0.0)
    weight = (weight * live.sum(1, keepdim=True) / weight.sum(1, keepdim=True).clamp_min(1e-8)).clamp_max(MOST)
    return (weight[:, None] @ claim)[:, 0].where(valid, 0.0)


def shown(valid: Tensor, noise: Noise) -> Tensor:
    """[B N] bool: tokens that the decoder is shown, with equal chance `FEW` of an image's or a uniform number of them."""
    first = valid & (valid.cumsum(1) == 1)
    coin, share = noise.uniform(first, 2).masked_fill(~first[..., None], 0.0).sum(1).unbind(1)
    order = noise.uniform(valid)[..., 0].where(valid, -1.0)
    return top(order, valid, (valid.sum(1) * torch.where(coin < 0.5, share, FEW)).long())


@lru_cache(maxsize=8)
def drawn_slots(seed: int, num: int, width: int, device: torch.device) -> Tensor:
    """[num width]: standard normal numbers; those of a slot do not depend on how many there are."""
    one = torch.ones(num, 1, dtype=torch.bool)
    return Noise("slots", seed, rows=range(num)).normal(one, width)[:, 0].to(device)
