"""Base of families that cut an image into tiles at any resolution: tokens in the family's own order, newlines as separators.

A picture is one small overview and a grid of tiles. The family sets the tiles' tokens side by side, drops those of the padding
around the picture and ends every row with a learned newline. Which token stands where is read from the family's own packing code,
run on running numbers instead of features. A picture has one budget over all its tiles; newlines are never scored, are counted
apart, and go when the last token of their row goes.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from diffprune.core.evidence import Evidence
from diffprune.core.tokens import VisualTokens
from diffprune.core.vlm import Prompts, Shape
from diffprune.models._clip import CLIP
from diffprune.models._patches import patch_shape
from diffprune.vlm.family import Family


class Anyres(Family):
    """A tower, a projector, `pack_image_features` and `image_newline`.

    pixel_values [I tiles 3 H W], where pictures of few tiles end in empty ones; image_sizes [I 2] height and width, px.
    """

    encoder_inputs: ClassVar[tuple[str, ...]] = ("pixel_values", "image_sizes")

    @abstractmethod
    def _tiles(self, pixels: dict[str, Tensor]) -> list[int]:
        """Tiles of each image, the overview included."""

    @abstractmethod
    def _pack(self, tiles: Sequence[Tensor], sizes: Tensor, newline: Tensor) -> Sequence[Tensor]:
        """The family's own packing: [tiles n C] of each image -> [n_i C]; sizes [I 2] height, width in px; newline [C]."""

    def _shape(self) -> Shape:
        shape = patch_shape(self.model.config, self._tiles({"image_sizes": self._default_size})[0])
        self.patches = shape.patches
        self.summary = self.model.config.vision_config.model_type in CLIP
        return replace(shape, patches=self.patches + self.summary)

    @property
    def _default_size(self) -> Tensor:
        """[1 2] height and width, px: the largest resolution the model was made for."""
        return torch.tensor([max(self.model.config.image_grid_pinpoints, key=lambda size: size[0] * size[1])])

    @property
    def num_visual_tokens(self) -> int:
        return int((self._orders({"image_sizes": self._default_size})[0] >= 0).sum())

    def separator(self) -> Tensor:
        newline: Tensor = self.model.model.image_newline
        return newline

    def part(self, pixels: dict[str, Tensor], start: int, stop: int) -> dict[str, Tensor]:
        tiles = max(self._tiles(pixels)[start:stop])
        return {**super().part(pixels, start, stop), "pixel_values": pixels["pixel_values"][start:stop, :tiles]}

    def slots(self, pixels: dict[str, Tensor]) -> list[int]:
        return [len(order) for order in self._orders(pixels)]

    def read(self, inputs: Mapping[str, Any]) -> tuple[dict[str, Tensor], Prompts]:
        tiles, sizes = inputs.get("pixel_values"), inputs.get("image_sizes")
        if tiles is not None and (sizes is None or tiles.ndim != 5):
            raise ValueError(
                f"{self.model.config.model_type} needs pixel_values [images, tiles, 3, height, width] with image_sizes "
                f"[images, 2], as its processor makes them"
            )
        return super().read(inputs)

    # -- tokens of all tiles in one row --------------------------------------------------------------------------------

    def _orders(self, pixels: dict[str, Tensor]) -> list[Tensor]:
        """Of each image [n_i]: the number of the token that stands there among its tiles' tokens; below zero for a newline.

        A family that resizes while it packs gives mixtures of numbers; their sign still tells tokens from newlines.
        """
        sizes = pixels["image_sizes"]
        newline = torch.tensor([-1.0], dtype=torch.float64, device=sizes.device)
        numbers = [
            torch.arange(tiles * self.patches, dtype=torch.float64, device=sizes.device).view(tiles, -1, 1)
            for tiles in self._tiles(pixels)
        ]
        return [packed[:, 0] for packed in self._pack(numbers, sizes, newline)]

    def _in_order(self, values: Tensor, pixels: dict[str, Tensor], orders: Sequence[Tensor]) -> list[Tensor]:
        """[tiles n ...] of all images, one after the other -> [n_i ...] of each image, zeros at newlines. orders: `_orders`."""
        found = []
        for own, order in zip(values.split(self._tiles(pixels)), orders, strict=True):
            rows = own.flatten(0, 1)[order.clamp_min(0).long()]
            rows[order < 0] = 0
            found.append(rows)
        return found

    def _lined(
        self, parts: Sequence[Tensor], pixels: dict[str, Tensor], needs: frozenset[Evidence], orders: Sequence[Tensor]
    ) -> VisualTokens:
        """[n_i D] of each image, newlines included -> `VisualTokens` with their rows. orders: `_orders`."""
        tokens = self._rows(parts, pixels, needs)
        bases = [self.patches if tiles > 1 else 0 for tiles in self._tiles(pixels)]
        row_id = pad_sequence([row_ids(o, b) for o, b in zip(orders, bases, strict=True)], batch_first=True)
        return replace(tokens, valid=tokens.valid & (row_id >= 0), row_id=row_id)


def row_ids(order: Tensor, base: int) -> Tensor:
    """[n] int: the row each token stands in, 0 for the first `base` (the overview); minus the row at the newline that ends it.

    Lines of a picture so narrow that its tiles have no token left, only newlines, belong to the overview, which then is row 1.
    """
    ends = order < 0
    empty = ends[base:].all().long()
    row_id = 1 + (ends.long().cumsum(0) - ends.long()) * (1 - empty)
    row_id[:base] = empty
    return torch.where(ends, -row_id, row_id)
