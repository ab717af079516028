"""Rows between two cuts inside the decoder: what is left of them, and which visual token stands at which of their places."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from diffprune.core.tokens import VisualTokens
from diffprune.core.vlm import Prompts
from diffprune.pruning.rows import at_places, places_left, rows_of_images


class Length(NamedTuple):
    """What is known beforehand of rows behind a cut, so that the device need not be asked. tokens: of every row, padding included;
    whole: none of them is padding."""

    tokens: int
    whole: bool


@dataclass(frozen=True)
class Stage:
    """Rows between two cuts.

    order [B S']: places in the rows that entered the decoder. entered: those rows. real [B S'] bool: not padding. tokens: those
    left. token [B S']: which of all I * N tokens stands at a place; I * N at text and padding. owner [I]: the row of each image.
    whole: no row is padded. weight [I N]: how far each token is there; None where that is all or nothing.

    Everything is on the device the rows came on. Layers spread over several GPUs may have their states elsewhere.
    """

    order: Tensor
    entered: Prompts
    real: Tensor
    tokens: VisualTokens
    token: Tensor
    owner: Tensor
    whole: bool
    weight: Tensor | None = None
    shorter: bool = False  # than those that entered

    @staticmethod
    def entering(prompts: Prompts, tokens: VisualTokens, length: Length | None = None) -> Stage:
        """Rows as they enter the decoder, with the tokens of their images in their slots.

        length: given for rows of one image each, of which it is known to be true: then nothing is asked of the device.

        Raises:
            ValueError: the rows have another number of slots than the images have tokens.
        """
        present, slots = tokens.present.flatten(), prompts.slots
        owner = rows_of_images(prompts, tokens) if length is None else torch.arange(len(slots), device=slots.device)
        token = torch.full(slots.shape, len(present), device=slots.device)
        token.masked_scatter_(slots, (~present).int().argsort(stable=True))  # slots: in the order of images and their tokens
        places = torch.arange(slots.shape[1], device=slots.device).expand(slots.shape)
        whole = bool(prompts.attention_mask.all()) if length is None else length.whole
        return Stage(places, prompts, prompts.attention_mask.bool(), tokens, token, owner, whole)

    @cached_property
    def prompts(self) -> Prompts:
        """What is left of the rows, their mask says what is padding; made where somebody asks, as most cuts need nothing of it."""
        return at_places(self.entered, self.order, self.real, whole=self.whole) if self.shorter else self.entered

    def cut(self, left: VisualTokens, length: Length | None = None) -> tuple[Stage, Tensor]:
        """The rows without the places of tokens that are not in `left`, and the places [B S''] in these rows of what they have.

        length: see `Length`.
        """
        stays = left.present.flatten()
        live = self.real & torch.cat([stays, stays.new_ones(1)])[self.token]
        order, real = places_left(live, None if length is None else length.tokens)
        whole = bool(real.all()) if length is None else length.whole
        token = self.token.gather(1, order)
        token = token if whole else token.masked_fill_(~real, left.valid.numel())
        return Stage(self.order.gather(1, order), self.entered, real, left, token, self.owner, whole, shorter=True), order

    def placed(self, values: Tensor) -> Tensor:
        """[B S' D] at the places of the rows -> [I N D] at the tokens that stand there, zeros elsewhere."""
        num, width = self.tokens.valid.numel(), values.shape[2]
        flat = values.new_zeros(num + 1, width).index_copy_(0, self.token.flatten().to(values.device), values.flatten(0, 1))
        return flat[:num].view(*self.tokens.valid.shape, width).to(self.token.device)

    def standing(self, features: Tensor, states: Tensor) -> Tensor:
        """`states` [B S' D] with `features` [I N D] in the places of visual tokens."""
        own = torch.cat([features.flatten(0, 1), features.new_zeros(1, features.shape[2])])[self.token]
        return torch.where(self.prompts.slots[..., None].to(states.device), own.to(states), states)
