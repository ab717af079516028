"""SmolVLM and SmolVLM2: Idefics3 made small, with a SmolLM2 decoder (arXiv 2504.05299).

Pictures, what ENCODED means and what stays text: `_tiles`.
"""

from __future__ import annotations

from transformers import SmolVLMConfig, SmolVLMForConditionalGeneration
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

from diffprune.models._tiles import Tiles, tiny_parts, tiny_settings
from diffprune.vlm import tiny


class SmolVLM(Tiles):
    """`SmolVLMForConditionalGeneration`."""

    @classmethod
    def tiny(cls, seed: int = 0) -> SmolVLM:
        parts = tiny_parts(SmolVLMImageProcessorPil)
        config = SmolVLMConfig(**tiny_settings(parts))
        return cls(tiny.build(SmolVLMForConditionalGeneration, config, seed), parts, "tiny smolvlm")
