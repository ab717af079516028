"""LLaVA-OneVision: an overview and up to 36 tiles through a SigLIP encoder, newline tokens (arXiv 2408.03326). Pictures only.

The family resizes the projected features of a picture whose tiles hold more than 9 x 27 x 27 tokens, so a token the decoder sees is
no token the encoder made. ENCODED therefore means *after* the projector and this resizing, in the order the decoder reads; cuts
before the projector and after it look at the same features, and a scorer is as wide as the decoder. Newlines are separators.

`pixels` cuts every picture into tiles, as the processor does with a flat list of pictures. Given a list per prompt, the processor
shows several pictures of one prompt whole; `read` follows it through `batch_num_images`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration, Qwen2Config, SiglipVisionConfig
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil
from transformers.models.llava_onevision.modeling_llava_onevision import image_size_to_num_patches

from diffprune.core.evidence import Evidence
from diffprune.core.tokens import VisualTokens
from diffprune.models._anyres import Anyres
from diffprune.vlm import tiny


class LlavaOnevision(Anyres):
    """`LlavaOnevisionForConditionalGeneration`; N of the default 2304 x 2304 px is 7,290 and 81 newlines."""

    projects = True
    encoder_inputs = ("pixel_values", "image_sizes", "batch_num_images")

    @classmethod
    def tiny(cls, seed: int = 0) -> LlavaOnevision:
        text = tiny.tokenizer("<video>")
        vision = SiglipVisionConfig(
            hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, image_size=32, patch_size=8,
            vision_use_head=False,
        )  # fmt: skip
        grids = [[32, 32], [32, 64], [64, 32], [64, 64]]
        config = LlavaOnevisionConfig(
            vision_config=vision, text_config=Qwen2Config(**tiny.decoder(text)), image_token_index=tiny.IMAGE,
            video_token_index=4, image_grid_pinpoints=grids, vision_aspect_ratio="anyres_max_2",
        )  # fmt: skip
        pictures = LlavaOnevisionImageProcessorPil(size={"height": 32, "width": 32}, image_grid_pinpoints=grids)
        made = tiny.build(LlavaOnevisionForConditionalGeneration, config, seed)
        return cls(made, tiny.Parts(pictures, text), "tiny llava_onevision")

    def _tiles(self, pixels: dict[str, Tensor]) -> list[int]:
        config, groups = self.model.config, pixels.get("batch_num_images")
        sizes = pixels["image_sizes"]
        tiled = [True] * len(sizes) if groups is None else [n == 1 for n in groups.tolist() for _ in range(n)][: len(sizes)]
        return [
            image_size_to_num_patches(size, config.image_grid_pinpoints, config.vision_config.image_size) if cut else 1
            for size, cut in zip(sizes, tiled, strict=True)
        ]

    def _pack(self, tiles: Sequence[Tensor], sizes: Tensor, newline: Tensor) -> Sequence[Tensor]:
        limit = self.model.config.vision_aspect_ratio
        packed: Sequence[Tensor] = self.model.model.pack_image_features(tiles, sizes, newline, limit)[0]
        return packed

    def part(self, pixels: dict[str, Tensor], start: int, stop: int) -> dict[str, Tensor]:
        found = super().part(pixels, start, stop)
        if "batch_num_images" in pixels:
            found["batch_num_images"] = part_of_groups(pixels["batch_num_images"], start, stop)
        return found

    def per_token(self, values: Tensor, pixels: dict[str, Tensor]) -> Sequence[Tensor]:
        """Packed and resized as the features are; a newline has none."""
        tiles = values.view(-1, self.patches, values.shape[-1]).split(self._tiles(pixels))
        return self._pack(tiles, pixels["image_sizes"], values.new_zeros(values.shape[-1]))

    def _tokens(self, captured: Tensor, output: Any, pixels: dict[str, Tensor], needs: frozenset[Evidence]) -> VisualTokens:
        return replace(self._lined(output.pooler_output, pixels, needs, self._orders(pixels)), projected=self.projects)


def part_of_groups(groups: Tensor, start: int, stop: int) -> Tensor:
    """Pictures per prompt [P] of the pictures start..stop, as the family reads it: 1 means tiles, more means none.

    The last picture of a group may stand alone, announced as two, as the family stops reading where the pictures end.

    Raises:
        ValueError: a single picture of a group before pictures of another: the family has no way to say that it has no tiles.
    """
    owner = torch.arange(len(groups), device=groups.device).repeat_interleave(groups)[start:stop]
    index, counts = owner.unique_consecutive(return_counts=True)
    alone = (counts == 1) & (groups[index] > 1)
    if alone[:-1].any():
        raise ValueError(f"pictures {start} to {stop} begin with the last of a prompt's pictures: take whole prompts")
    return torch.where(alone, 2, counts)
