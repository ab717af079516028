"""The loss on answers: summed negative log likelihood, with tokens removed or through a relaxation of removal."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from diffprune import pruning
from diffprune.core.budget import Budget
from diffprune.core.fitted import Loss, Progress, TrainablePruner, TrainingRun
from diffprune.core.noise import Noise
from diffprune.core.tokens import Relaxation, VisualTokens
from diffprune.core.vlm import VLM, Prompts
from diffprune.data import TrainBatch


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


def _per_position(prompts: Prompts, retention: Tensor) -> Tensor:
    """Retention of the visual tokens [M] in slot order -> weight of every position [B S], 1 where there is text."""
    ones = torch.ones(prompts.slots.shape, dtype=retention.dtype, device=retention.device)
    return ones.masked_scatter(prompts.slots, retention)


def relaxed_nll(vlm: VLM, prompts: Prompts, tokens: VisualTokens, relaxed: Relaxation, image: Tensor) -> Tensor:
    """`answer_nll` through a relaxation: nothing is removed. Row b is about relaxed image `image[b]`."""
    shown = replace(tokens, features=relaxed.features)[image]
    present = shown.present
    packed = pruning.Packed(
        prompts, pruning.embeddings(vlm, shown), shown.counts, shown.counts, present.sum(1),
        None if shown.deepstack is None else shown.deepstack[present],
    )  # fmt: skip
    if relaxed.retention is None:
        return answer_nll(vlm, packed)
    weight = relaxed.retention[image].masked_fill(~shown.valid, 1.0)  # separators are never degraded
    return answer_nll(vlm, packed, retention=_per_position(prompts, weight[present]))


class Objective(nn.Module):
    """A method's training objective as a module, so that its networks can be wrapped for several workers."""

    def __init__(self, pruner: TrainablePruner, networks: nn.ModuleDict) -> None:
        super().__init__()
        self.pruner, self.networks = pruner, networks

    def forward(self, run: TrainingRun, batch: TrainBatch, budget: Budget, progress: Progress, noise: Noise) -> Loss:
        return self.pruner.objective(run, batch, budget, progress, noise)
