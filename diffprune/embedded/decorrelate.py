"""The last stage of the embedded VLM's training: visual tokens stop looking like the words that name them, and what is learnt
last is asked more often.

The naming loss reads the decoder through the head it shares with the word embeddings, so it aligns projected tokens with words
as a side effect, and keeping the tokens closest in cosine to the question's words would be a near-oracle, which no real LLaVA
is known to offer. Here the model goes on answering, with all tokens, while that likeness is first made small and then made
uninformative. Nothing is removed or hidden.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlavaForConditionalGeneration

from . import questions, vlm, world
from .pretrain import Language, features, losses, names, optimisers, scenes, step


@dataclass(frozen=True)
class Apart:
    """Three passes of this many steps: `shrink` weighs the squared cosines, `blur` what cosines tell about content; so does
    `settle`, which asks for more multiple choice (`SETTLED`), above all in Chinese words."""

    shrink_steps: int = 750
    shrink: float = 1.0
    blur_steps: int = 400
    blur: float = 0.5
    settle_steps: int = 1400
    rate: float = 0.5  # of the language recipe's learning rates
    warmup: int = 40
    hold: float = 0.4  # share of a pass at the full rate; then linear to 3 %


SETTLED = {**questions.MIXTURE, "choice": 0.2, "choice_cn": 0.4}
WORDS = torch.tensor([vlm.WORD_ID[word] for word in questions.WORDS])


def likeness(model: LlavaForConditionalGeneration, image: Tensor, words: Tensor = WORDS) -> Tensor:
    """Cosine of projected tokens [B, 144, D] with word embeddings, [B, 144, len(words)]."""
    return F.normalize(image, dim=-1) @ F.normalize(model.get_input_embeddings().weight[words], dim=-1).T


def size(cosine: Tensor, batch: list[world.Scene]) -> Tensor:
    """How large the cosines are: their squares, summed over words, mean over tokens."""
    return cosine.square().sum(-1).mean()


def told(cosine: Tensor, batch: list[world.Scene]) -> Tensor:
    """What cosines tell: squared correlation, over a picture's tokens, of a word's cosine with where it names something, and of a
    token's (soft) largest cosine with whether it is anything that is asked about."""
    named = (names(batch)[..., WORDS] > 0).float()
    per_word = _correlation(named, cosine)[named.amax(1) > 0].square().mean()
    thing, largest = (named.sum(-1) > 0).float(), (20 * cosine).logsumexp(-1)
    return per_word + _correlation(thing, largest).square().mean()


def _correlation(x: Tensor, y: Tensor) -> Tensor:
    """Along dimension 1, the tokens."""
    x, y = x - x.mean(1, keepdim=True), y - y.mean(1, keepdim=True)
    return (x * y).sum(1) / (x.norm(dim=1) * y.norm(dim=1)).clamp_min(1e-6)


def train_apart(
    model: LlavaForConditionalGeneration, seed: int, recipe: Apart, language: Language, say: Callable[[str], None] = print
) -> None:
    """All passes, in place, on the frozen tower; `language` gives rates, questions per picture and the cost of looking."""
    _train(model, seed, recipe, language, size, recipe.shrink, recipe.shrink_steps, questions.MIXTURE, say)
    _train(model, seed, recipe, language, told, recipe.blur, recipe.blur_steps, questions.MIXTURE, say)
    _train(model, seed, recipe, language, told, recipe.blur, recipe.settle_steps, SETTLED, say)
    model.eval()


def _train(
    model: LlavaForConditionalGeneration,
    seed: int,
    recipe: Apart,
    language: Language,
    cost: Callable[[Tensor, list[world.Scene]], Tensor],
    weight: float,
    steps: int,
    mixture: Mapping[str, float],
    say: Callable[[str], None],
) -> None:
    torch.manual_seed(seed + 7)
    seeds, r = scenes(seed + 7777), np.random.default_rng([seed + 7, 2])
    model.model.vision_tower.requires_grad_(False).eval()
    learning = nn.ModuleList([model.model.language_model, model.model.multi_modal_projector])
    parameters = list(learning.parameters())
    opts, start = optimisers(learning, language.muon, language.adam), time.process_time()
    for i in range(steps):
        done = i / steps
        batch = [world.scene(next(seeds), world.FULL) for _ in range(language.pictures)]
        packed = vlm.pack(
            [[asked[1:] for asked in questions.draw(s, r, language.questions, mixture)] for s in batch],
            [[asked[1:] for asked in questions.text_only(r, language.text_only)] for _ in batch],
        )
        loss, _, look = losses(model, batch, packed, language.naming_layer, True)
        apart = cost(likeness(model, model.model.multi_modal_projector(features(model, batch))), batch)
        cool = 1 if done < recipe.hold else max(0.03, 1 - (done - recipe.hold) / (1 - recipe.hold))
        scale = recipe.rate * min(1, (i + 1) / recipe.warmup) * cool
        step(opts, parameters, loss + weight * apart + language.looking * look, scale)
        if i % 100 == 0:
            shown = f"loss {loss.item():.3f} apart {apart.item():.3f} looking {look.item():.3f}"
            say(f"apart {i}/{steps} cpu {time.process_time() - start:.0f} s {shown}")
