"""Shapes, for cost, of encoders of square patches; a family whose encoder has a [CLS] token adds it to the patches."""

from __future__ import annotations

from typing import Any

from diffprune.core.vlm import Shape
from diffprune.vlm.family import decoder_shape


def patch_shape(config: Any, tiles: int = 1) -> Shape:
    """From a configuration; `patches` are those of one tile of the encoder's own size, `tiles` those of one picture."""
    vision = config.vision_config
    return Shape(
        **decoder_shape(config.text_config),
        vision_layers=vision.num_hidden_layers,
        vision_width=vision.hidden_size,
        vision_ffn=vision.intermediate_size,
        patches=(vision.image_size // vision.patch_size) ** 2,
        patch_inputs=3 * vision.patch_size**2,
        tiles=tiles,
    )
