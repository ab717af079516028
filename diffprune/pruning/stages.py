"""Rows between two cuts inside the decoder: what is left of them, and which visual token stands at which of their places."""

from __future__ import annotations

from dataclasses import dataclass
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

    order [B S']: places in the rows that entered the decoder. prompts: what is left of them; its mask says what is padding.
    tokens: those left. token [B S']: which of all I * N tokens stands at a place; I * N at text and padding. owner [I]: the row of
    each image. whole: no row is padded. weight [I N]: how far each token is there; None where that is all or nothing.
    """

    order: Tensor
    prompts: Prompts
    tokens: VisualTokens
    token: Tensor
    owner: Tensor
    whole: bool
    weight: Tensor | None = None

    @staticmethod
    def entering(prompts: Prompts, tokens: VisualTokens, length: Length | None = None) -> Stage:
        """Rows as they enter the decoder, with the tokens of their images in their slots.

        length: given for rows of one image each, of which it is known to be true: then nothing is asked of the device.

        Raises:
            ValueError: the rows have another number of slots than the images have tokens.
        """
        present, slots = tokens.present.flatten(), prompts.slots
        owner = rows_of_images(prompts, tokens) if length is None else torch.arange(len(slots), device=slots.device)
        nth = (slots.flatten().cumsum(0) - 1).clamp_min(0)  # slots come in the order of the images and their tokens
        token = (~present).int().argsort(stable=True).gather(0, nth).view(slots.shape).masked_fill(~slots, len(present))
        places = torch.arange(slots.shape[1], device=slots.device).expand(slots.shape)
        whole = bool(prompts.attention_mask.all()) if length is None else length.whole
        return Stage(places, prompts, tokens, token, owner, whole)

    @property
    def real(self) -> Tensor:
        """[B S'] bool: not padding."""
        return self.prompts.attention_mask.bool()

    def cut(self, left: VisualTokens, length: Length | None = None) -> tuple[Stage, Tensor]:
        """The rows without the places of tokens that are not in `left`, and the places [B S''] in these rows of what they have.

        length: see `Length`.
        """
        gone = (self.tokens.present & ~left.present).flatten()
        live = self.real & ~torch.cat([gone, gone.new_zeros(1)])[self.token]
        order, real = places_left(live, None if length is None else length.tokens)
        short = at_places(self.prompts, order, real)
        token = self.token.gather(1, order).masked_fill(~real, left.valid.numel())
        whole = bool(real.all()) if length is None else length.whole
        return Stage(self.order.gather(1, order), short, left, token, self.owner, whole), order

    def placed(self, values: Tensor) -> Tensor:
        """[B S' D] at the places of the rows -> [I N D] at the tokens that stand there, zeros elsewhere."""
        num, width = self.tokens.valid.numel(), values.shape[2]
        flat = values.new_zeros(num + 1, width).index_copy(0, self.token.flatten(), values.flatten(0, 1))
        return flat[:num].view(*self.tokens.valid.shape, width)

    def standing(self, features: Tensor, states: Tensor) -> Tensor:
        """`states` [B S' D] with `features` [I N D] in the places of visual tokens."""
        own = torch.cat([features.flatten(0, 1), features.new_zeros(1, features.shape[2])])[self.token]
        return torch.where(self.prompts.slots[..., None], own.to(states.dtype), states)
