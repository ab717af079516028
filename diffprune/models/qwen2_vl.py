"""Qwen2-VL (arXiv 2409.12191): images of any size, 2 x 2 patches merged into a visual token, M-RoPE.

ENCODED: four patches before the merger, see `_qwen`. Images only; videos are refused.
"""

from __future__ import annotations

from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

from diffprune.core.vlm import Shape
from diffprune.models._qwen import Qwen, qwen_shape, tiny_config, tiny_parts
from diffprune.vlm import tiny


class Qwen2VL(Qwen):
    """`Qwen2VLForConditionalGeneration`."""

    @classmethod
    def tiny(cls, seed: int = 0) -> Qwen2VL:
        parts = tiny_parts()
        vision = {"depth": 2, "embed_dim": 32, "hidden_size": tiny.width(), "mlp_ratio": 2}
        config = tiny_config(Qwen2VLConfig, parts.tokenizer, vision)
        return cls(tiny.build(Qwen2VLForConditionalGeneration, config, seed), parts, "tiny qwen2_vl")

    def _shape(self) -> Shape:
        vision = self.model.config.vision_config
        return qwen_shape(self.model.config, vision.embed_dim, int(vision.embed_dim * vision.mlp_ratio), self.default_grid)
