"""LLaVA-NeXT (1.6): an overview and up to four tiles through a CLIP encoder, newline tokens at the ends of rows (January 2024).

ENCODED is before the projector: the tokens of all tiles of a picture in one row, in the order the decoder reads them, under one
budget. Tokens that lie in the padding around a picture never reach the decoder and are not presented. Newlines are separators.
Attention of the encoder is that of each tile's own [CLS], or what a patch receives within its tile, so each tile shares out the
same attention.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import CLIPVisionConfig, LlamaConfig, LlavaNextConfig, LlavaNextForConditionalGeneration
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

from diffprune.core.evidence import Evidence
from diffprune.core.tokens import VisualTokens
from diffprune.models._anyres import Anyres
from diffprune.models._clip import cheap, summary_attention
from diffprune.vlm import tiny


class LlavaNext(Anyres):
    """`LlavaNextForConditionalGeneration`; N of the default 672 x 672 px is 2,880 and 48 newlines."""

    @classmethod
    def tiny(cls, seed: int = 0) -> LlavaNext:
        text = tiny.tokenizer()
        vision = CLIPVisionConfig(
            hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, image_size=32, patch_size=8,
            projection_dim=32,
        )  # fmt: skip
        grids = [[32, 64], [64, 32], [64, 64]]
        config = LlavaNextConfig(
            vision_config=vision, text_config=LlamaConfig(**tiny.decoder(text)), image_token_index=tiny.IMAGE,
            image_grid_pinpoints=grids,
        )  # fmt: skip
        pictures = LlavaNextImageProcessorPil(
            size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}, image_grid_pinpoints=grids
        )
        return cls(tiny.build(LlavaNextForConditionalGeneration, config, seed), tiny.Parts(pictures, text), "tiny llava_next")

    def _tiles(self, pixels: dict[str, Tensor]) -> list[int]:
        config = self.model.config
        return [
            image_size_to_num_patches(size, config.image_grid_pinpoints, config.vision_config.image_size)
            for size in pixels["image_sizes"]
        ]

    def _pack(self, tiles: Sequence[Tensor], sizes: Tensor, newline: Tensor) -> Sequence[Tensor]:
        strategy = self.model.config.vision_feature_select_strategy
        packed: Sequence[Tensor] = self.model.model.pack_image_features(tiles, sizes, strategy, newline)[0]
        return packed

    def encode(self, pixels: dict[str, Tensor], needs: frozenset[Evidence] = frozenset()) -> VisualTokens:
        self.check_evidence(needs)
        asked = self.encoder_layers(e for e in needs if self.summary and cheap(e))
        with ExitStack() as hooks:
            states = {i: hooks.enter_context(self._captured(f"vision_tower.encoder.layers.{i}")) for i in set(asked.values())}
            tokens = super().encode(pixels, needs - asked.keys())
        if not asked:
            return tokens
        orders, tower, evidence = self._orders(pixels), self.model.model.vision_tower, dict(tokens.evidence)
        for key, index in asked.items():
            seen = self._in_order(summary_attention(tower, states[index][-1], index)[:, 1:], pixels, orders)
            evidence[key] = pad_sequence(seen, batch_first=True)
        return replace(tokens, evidence=evidence)

    def per_token(self, values: Tensor, pixels: dict[str, Tensor]) -> Sequence[Tensor]:
        return self._in_order(values.view(-1, self.patches, values.shape[-1]), pixels, self._orders(pixels))

    def _tokens(self, captured: Tensor, output: Any, pixels: dict[str, Tensor], needs: frozenset[Evidence]) -> VisualTokens:
        orders = self._orders(pixels)
        return self._lined(self._in_order(captured, pixels, orders), pixels, needs, orders)
