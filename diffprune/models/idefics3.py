"""Idefics3: a SigLIP encoder of any resolution, tiles, a linear projector, a Llama 3 decoder (arXiv 2408.12637).

Pictures, what ENCODED means and what stays text: `_tiles`.
"""

from __future__ import annotations

from transformers import Idefics3Config, Idefics3ForConditionalGeneration
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

from diffprune.models._tiles import Tiles, tiny_parts, tiny_settings
from diffprune.vlm import tiny


class Idefics3(Tiles):
    """`Idefics3ForConditionalGeneration`."""

    @classmethod
    def tiny(cls, seed: int = 0) -> Idefics3:
        parts = tiny_parts(Idefics3ImageProcessorPil)
        config = Idefics3Config(**tiny_settings(parts))
        return cls(tiny.build(Idefics3ForConditionalGeneration, config, seed), parts, "tiny idefics3")
