"""Base of families that see every image as one square raster, through a SigLIP encoder, which has no [CLS] token."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor
from torch.nn import functional

from diffprune.core.evidence import Evidence
from diffprune.core.tokens import VisualTokens
from diffprune.core.vlm import Shape
from diffprune.models._patches import patch_shape
from diffprune.vlm.family import Family


class Raster(Family):
    """A family whose pictures all have `side` x `side` tokens."""

    stacked = True
    packs = False  # the decoder reads pictures in both directions: it takes no mask of packed questions

    @property
    @abstractmethod
    def side(self) -> int:
        """Tokens along one side of a picture."""

    def _shape(self) -> Shape:
        return patch_shape(self.model.config)

    @property
    def num_visual_tokens(self) -> int:
        return self.side**2

    def _tokens(self, captured: Tensor, output: Any, pixels: dict[str, Tensor], needs: frozenset[Evidence]) -> VisualTokens:
        return replace(super()._tokens(captured, output, pixels, needs), grid=(self.side, self.side))

    def per_token(self, values: Tensor, pixels: dict[str, Tensor]) -> Sequence[Tensor]:
        """Patches are pooled into tokens, square by square."""
        images = len(pixels["pixel_values"])
        rows = math.isqrt(len(values) // images)
        rasters = values.view(images, rows, rows, -1).movedim(-1, 1)
        return list(functional.avg_pool2d(rasters, rows // self.side).flatten(2).transpose(1, 2))


def tiny_vision(**changes: Any) -> dict[str, Any]:
    """Settings of a SigLIP encoder of two layers over 4 x 4 patches."""
    return {
        "model_type": "siglip_vision_model", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "image_size": 32, "patch_size": 8, "vision_use_head": False,
    } | changes  # fmt: skip
