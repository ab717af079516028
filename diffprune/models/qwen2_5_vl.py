"""Qwen2.5-VL (arXiv 2502.13923): Qwen2-VL with window attention in most encoder layers.

ENCODED: four patches before the merger, see `_qwen`; the encoder works window by window, so groups are put back in raster order
with the family's own window index. Images only; videos are refused.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
from transformers.vision_utils import get_vision_window_index

from diffprune.core.vlm import Shape
from diffprune.models._qwen import Qwen, qwen_shape, tiny_config, tiny_parts
from diffprune.vlm import tiny


class Qwen25VL(Qwen):
    """`Qwen2_5_VLForConditionalGeneration`."""

    @classmethod
    def tiny(cls, seed: int = 0) -> Qwen25VL:
        parts = tiny_parts()
        vision = {
            "depth": 2, "hidden_size": 32, "intermediate_size": 64, "out_hidden_size": tiny.width(),
            "window_size": 16, "fullatt_block_indexes": [1],
        }  # fmt: skip
        config = tiny_config(Qwen2_5_VLConfig, parts.tokenizer, vision)
        return cls(tiny.build(Qwen2_5_VLForConditionalGeneration, config, seed), parts, "tiny qwen2_5_vl")

    def ordered(self, groups: Tensor, grids: Tensor) -> Tensor:
        vision = self.model.config.vision_config
        index, _ = get_vision_window_index(grids, vision.spatial_merge_size, vision.window_size, vision.patch_size)
        return groups[torch.argsort(index).to(groups.device)]

    def _shape(self) -> Shape:
        """The gated FFN of three matrices counts as one of two, half again as wide; windows are counted as full attention."""
        vision = self.model.config.vision_config
        return qwen_shape(self.model.config, vision.hidden_size, vision.intermediate_size * 3 // 2, self.default_grid)
