"""Cuts inside the decoder while a method trains: behind a cut tokens weigh less as keys, and none is removed.

In every layer behind a cut the attention of all rows to a token is multiplied by its weight and normalised again, which is an
additive bias of log weight before the softmax (`vlm/attention.py`). With weights of 0 and 1 that is what removing the tokens
gives: a removed token is no key of any other, and what becomes of it nobody sees. Evidence of later cuts counts tokens by weight.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from diffprune.core.pruner import Pruner
from diffprune.core.site import Cut, Plan
from diffprune.core.tokens import VisualTokens
from diffprune.core.vlm import VLM, Prompts
from diffprune.pruning.decoder_cuts import DecoderCuts
from diffprune.pruning.layer_arguments import Given
from diffprune.vlm.windows import Windows

Soften = Callable[[VisualTokens, Cut, Tensor], Tensor]


class SoftCuts(DecoderCuts):
    """Hooks that weaken tokens where `DecoderCuts` removes them, for rows of full length under the attention "masked_softmax".

    soften: gives the weight [I N] in [0, 1] that each token has behind a cut, from the tokens as the method's selection would see
            them there and their weights so far, the product of those of earlier cuts; gradients pass through both.
    """

    def __init__(self, vlm: VLM, pruner: Pruner, cuts: Plan, soften: Soften) -> None:
        super().__init__(vlm, pruner, cuts, Windows(vlm))
        self.soften = soften
        self._columns: dict[int, Tensor] = {}  # by the first layer behind a cut

    def _cut(self, layer: Any, number: int, states: Tensor, given: Given) -> Tensor:
        rows = self._before_cut(number)
        before = rows.tokens.valid.float() if rows.weight is None else rows.weight
        weight = before * self.soften(self._tokens(layer, number, states, rows, given), self.cuts[number], before)
        self.stages[number] = replace(rows, weight=weight)
        self._columns[number] = columns(rows.prompts, rows.tokens, weight)
        return states

    def _short(self, number: int, given: Given) -> Given:
        made = [layer for layer in self.stages if layer <= number]
        return {**given, "retention": self._columns[max(made)]} if made else given

    def _restores(self, number: int) -> bool:
        return False

    def _restored(self, number: int, states: Tensor) -> Tensor:
        return states


def columns(prompts: Prompts, tokens: VisualTokens, weight: Tensor) -> Tensor:
    """[B S]: weight of every position as a key, from those [I N] of the visual tokens in its slots; 1 at text. A separator, which
    is removed with the last token of its row, weighs what the heaviest of these does."""
    weight = weight.masked_fill(~tokens.valid, 0.0)
    if tokens.row_id is not None:
        rows = weight.new_zeros(len(weight), weight.shape[1] + 1)
        heaviest = rows.scatter_reduce(1, tokens.row_id.clamp_min(0), weight, "amax").gather(1, tokens.row_id.abs())
        weight = weight.where(tokens.valid, heaviest)
    each = weight[tokens.present]
    return torch.ones(prompts.slots.shape, dtype=each.dtype, device=each.device).masked_scatter(prompts.slots, each)
