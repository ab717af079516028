"""The loss on answers: summed negative log likelihood, with tokens removed or through a relaxation of removal."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor
from torch.nn import functional

from diffprune import pruning
from diffprune.core.pruner import Pruner
from diffprune.core.site import Plan
from diffprune.core.tokens import Relaxation, VisualTokens
from diffprune.core.vlm import VLM, Prompts
from diffprune.pruning.soft_cuts import SoftCuts, Soften, columns


def answer_nll(vlm: VLM, packed: pruning.Packed, **options: Any) -> Tensor:
    """Sum over answer tokens of -log p(token), nats. Logits are computed from the first answer token on."""
    labels = packed.prompts.labels
    assert labels is not None, "training rows carry labels"
    length = labels.shape[1]
    shown = length - int((labels >= 0).any(0).nonzero().min()) + 1
    logits = pruning.forward(vlm, packed, logits_to_keep=shown, use_cache=False, **options).logits
    target = labels[:, length - shown + 1 :]
    predicted = target >= 0
    return functional.cross_entropy(logits[:, :-1][predicted].float(), target[predicted], reduction="sum")


def _whole(vlm: VLM, prompts: Prompts, tokens: VisualTokens) -> pruning.Packed:
    """Rows from which nothing is removed."""
    present = tokens.present
    return pruning.Packed(
        prompts, pruning.embeddings(vlm, tokens), tokens.counts, tokens.counts, present.sum(1),
        None if tokens.deepstack is None else tokens.deepstack[present],
    )  # fmt: skip


def relaxed_nll(vlm: VLM, prompts: Prompts, tokens: VisualTokens, relaxed: Relaxation, image: Tensor) -> Tensor:
    """`answer_nll` through a relaxation: nothing is removed. image [M]: the relaxed images that the rows show, row after row.

    Where features are degraded, a token's DeepStack features come through as far as it was let.
    """
    deepstack = tokens.deepstack
    if deepstack is not None and relaxed.features is not tokens.features:  # they tell of the token, too
        deepstack = deepstack * relaxed.let[..., None].to(deepstack)
    shown = replace(tokens, features=relaxed.features, deepstack=deepstack)[image]
    packed = _whole(vlm, prompts, shown)
    if relaxed.retention is None:
        return answer_nll(vlm, packed)
    return answer_nll(vlm, packed, retention=columns(prompts, shown, relaxed.retention[image]))


def softened_nll(vlm: VLM, prompts: Prompts, tokens: VisualTokens, pruner: Pruner, cuts: Plan, soften: Soften) -> Tensor:
    """`answer_nll` with cuts inside the decoder that weaken tokens instead of removing them (`pruning/soft_cuts.py`).

    tokens: of the rows' images, in order.
    """
    soft = SoftCuts(vlm, pruner, cuts, soften)
    soft.expect(prompts, tokens)
    with soft.hooked():
        return answer_nll(vlm, _whole(vlm, prompts, tokens))
