"""Qwen3-VL: Qwen2-VL with DeepStack (arXiv 2406.04334): features of inner encoder layers join early decoder layers.

ENCODED: four patches of the last encoder layer before the merger, see `_qwen`. The DeepStack features of a
token are [L * D_text], already in the decoder's width: cut by the same mask, never scored. Images only; videos are refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration
from transformers.models.qwen3_vl.modeling_qwen3_vl import BaseModelOutputWithDeepstackFeatures

from diffprune.core.evidence import Evidence
from diffprune.core.tokens import VisualTokens
from diffprune.core.vlm import Shape
from diffprune.models._qwen import Qwen, by_layer, qwen_shape, tiny_config, tiny_parts
from diffprune.vlm import tiny


class Qwen3VL(Qwen):
    """`Qwen3VLForConditionalGeneration`."""

    joins_deepstack = True

    @classmethod
    def tiny(cls, seed: int = 0) -> Qwen3VL:
        parts = tiny_parts()
        vision = {
            "depth": 3, "hidden_size": 32, "intermediate_size": 64, "out_hidden_size": tiny.width(),
            "num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1],
        }  # fmt: skip
        config = tiny_config(Qwen3VLConfig, parts.tokenizer, vision, {"mrope_interleaved": True})
        return cls(tiny.build(Qwen3VLForConditionalGeneration, config, seed), parts, "tiny qwen3_vl")

    def _shape(self) -> Shape:
        vision = self.model.config.vision_config
        return qwen_shape(self.model.config, vision.hidden_size, vision.intermediate_size, self.default_grid)

    def _tokens(self, captured: Tensor, output: Any, pixels: dict[str, Tensor], needs: frozenset[Evidence]) -> VisualTokens:
        tokens = super()._tokens(captured, output, pixels, needs)
        deep = [torch.cat(layers, -1) for layers in zip(*output.deepstack_features, strict=True)]
        return replace(tokens, deepstack=pad_sequence(deep, batch_first=True))

    def image_inputs(self, features: Sequence[Tensor], deepstack: Sequence[Tensor] | None = None) -> dict[str, Any]:
        assert deepstack is not None, "a visual token of Qwen3-VL comes with its DeepStack features"
        output = BaseModelOutputWithDeepstackFeatures(
            pooler_output=list(features), deepstack_features=by_layer(deepstack, features[0].shape[-1])
        )
        return {"mm_encoder_outputs": {"image": output}}
