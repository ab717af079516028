"""DART: one cut inside the decoder that keeps what a few pivots are least like (arXiv 2502.11494)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from diffprune.core.budget import Budget
from diffprune.core.evidence import Question, decoder_features, decoder_keys
from diffprune.core.pruner import Pruner, Reference
from diffprune.core.site import Cut, Plan, staged
from diffprune.core.tokens import Selection, VisualTokens
from diffprune.core.vlm import Shape
from diffprune.pruners._depth import scaled

KEYS, WORD_KEYS = decoder_keys(), decoder_keys(queries="text")  # of the layer before the cut
WORDS = decoder_features(queries="text")  # hidden states of the question at the cut


class Dart(Pruner):
    """Keeps pivots, and for each pivot in turn the tokens whose hidden states are least similar to it, so that few tell the same.

    Pivots are the tokens of the image and of the question with the largest keys (L1 norm, rotary embedding included) in the layer
    before the cut. image, text: how many of each. after: decoder layers that see every token; 0 is 2 of 32, as in `fastv`.

    From ports, as the paper leaves pivots open: 4 of the image, then 4 of the question. How we differ: cosines of the hidden states
    as they enter the next layer, without the model's last norm; what the pivots' equal shares leave over goes to the first pivots,
    so that the budget is met exactly.
    """

    label = "DART"
    reference = Reference("Stop Looking for Important Tokens in Multimodal Language Models: Duplication Matters More", "2502.11494")
    option_labels = {"after": "after layer", "image": "image pivots", "text": "text pivots"}
    needs = frozenset({KEYS, WORD_KEYS, WORDS})

    def __init__(self, after: int = 0, image: int = 4, text: int = 4) -> None:
        if after < 0 or image < 1 or text < 0:
            raise ValueError(
                f"after={after}, image={image}, text={text}: DART has at least one pivot in the image, and no negative number"
            )
        self.after, self.image, self.text = after, image, text

    def cuts(self, budget: Budget, shape: Shape) -> Plan:
        after = (self.after,) if self.after else scaled((2,), shape.layers)
        return staged(budget, shape.layers, after)

    def select(self, tokens: VisualTokens, cut: Cut) -> Selection:
        counts = cut.budget.counts(tokens.counts)
        words, word_keys = tokens.evidence[WORDS], tokens.evidence[WORD_KEYS]
        assert isinstance(words, Question) and isinstance(word_keys, Question), "hidden states and keys of the question"
        size = tokens.given(KEYS).float().abs().sum(-1).masked_fill(~tokens.valid, -torch.inf)
        word_size = word_keys.embedding.float().abs().sum(-1).masked_fill(~words.valid, -torch.inf)
        states = functional.normalize(tokens.features.float().masked_fill(~tokens.valid[..., None], 0), dim=-1)
        word_states = functional.normalize(words.embedding.float(), dim=-1)
        keep = torch.zeros_like(tokens.valid)
        for i, count in enumerate(counts.tolist()):
            shown, said = _largest(size[i], min(self.image, count)), _largest(word_size[i], self.text)
            pivots = torch.cat([states[i, shown], word_states[i, said]])
            keep[i] = _unlike(pivots @ states[i].T, tokens.valid[i], shown, count)
        return Selection(keep)


def _largest(size: Tensor, num: int) -> Tensor:
    """Places of the `num` largest that are real, from the largest down; ties to the earlier."""
    order = size.argsort(descending=True, stable=True)[:num]
    return order[size[order].isfinite()]


def _unlike(likeness: Tensor, valid: Tensor, first: Tensor, count: int) -> Tensor:
    """Mask [N] of `count` tokens: those at `first`, then for each pivot in turn its share of the least alike that are left.

    likeness: [P N], of each token to each pivot.
    """
    keep = torch.zeros_like(valid)
    keep[first] = True
    share, over = divmod(count - len(first), len(likeness))
    for pivot, row in enumerate(likeness):
        taken = row.masked_fill(keep | ~valid, torch.inf).argsort(stable=True)[: share + (pivot < over)]
        keep[taken] = True
    return keep
