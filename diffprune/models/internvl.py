"""InternVL 3 in transformers' own format: InternViT, 2 x 2 patches to a token, an MLP, a Qwen-type decoder (arXiv 2504.10479).

A picture is cut into up to twelve tiles of the encoder's size and, if more than one, a thumbnail of it all; its tokens are those of
all its tiles, one budget over them. ENCODED is one row per visual token: four neighbouring patches, after the pixel shuffle and
before the projector. `<img>` and `</img>` around the tokens are text. Frames of a video, as a user's processor makes them, are
pictures with a budget each.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import InternVLConfig, InternVLForConditionalGeneration, Qwen2Config
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

from diffprune.core.evidence import Evidence
from diffprune.core.tokens import VisualTokens
from diffprune.core.vlm import Prompts, Shape
from diffprune.vlm import tiny
from diffprune.vlm.family import Family, decoder_shape
from diffprune.vlm.image_token_runs import runs

START, END = "<img>", "</img>"


class InternVL(Family):
    """`InternVLForConditionalGeneration`. Pixels: pixel_values [tiles 3 H W] of all pictures, and num_tiles [I] of each, ours."""

    stacked = True
    summary = True  # of each tile its own, so each tile shares out the same attention

    @classmethod
    def tiny(cls, seed: int = 0) -> InternVL:
        text = tiny.tokenizer(START, END)
        vision = {
            "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
            "image_size": [16, 16], "patch_size": [4, 4],
        }  # fmt: skip
        config = InternVLConfig(
            vision_config=vision, text_config=Qwen2Config(**tiny.decoder(text)), image_token_id=tiny.IMAGE, image_seq_length=4
        )
        pictures = GotOcr2ImageProcessorPil(size={"height": 16, "width": 16}, max_patches=4)
        return cls(tiny.build(InternVLForConditionalGeneration, config, seed), tiny.Parts(pictures, text), "tiny internvl")

    def _shape(self) -> Shape:
        vision = self.model.config.vision_config
        area = vision.patch_size[0] * vision.patch_size[1]
        self.patches = vision.image_size[0] * vision.image_size[1] // area
        return Shape(
            **decoder_shape(self.model.config.text_config),
            vision_layers=vision.num_hidden_layers,
            vision_width=vision.hidden_size,
            vision_ffn=vision.intermediate_size,
            patches=self.patches + 1,  # [CLS]
            patch_inputs=3 * area,
        )

    @property
    def num_visual_tokens(self) -> int:
        """Of a picture of one tile."""
        return int(self.patches * self.model.config.downsample_ratio**2)

    def pixels(self, images: Sequence[Any]) -> dict[str, Tensor]:
        made = self.processor.image_processor(images=list(images), crop_to_patches=True, return_tensors="pt")
        return self._placed({"pixel_values": made["pixel_values"], "num_tiles": torch.as_tensor(made["num_patches"])})

    def part(self, pixels: dict[str, Tensor], start: int, stop: int) -> dict[str, Tensor]:
        ends = [0, *pixels["num_tiles"].cumsum(0).tolist()]
        tiles = pixels["pixel_values"][ends[start] : ends[stop]]
        return {"pixel_values": tiles, "num_tiles": pixels["num_tiles"][start:stop]}

    def slots(self, pixels: dict[str, Tensor]) -> list[int]:
        tiles = pixels["num_tiles"].tolist() if "num_tiles" in pixels else [1] * len(pixels["pixel_values"])
        return [n * self.num_visual_tokens for n in tiles]

    def _tokens(self, captured: Tensor, output: Any, pixels: dict[str, Tensor], needs: frozenset[Evidence]) -> VisualTokens:
        sizes = (pixels["num_tiles"] * captured.shape[1]).tolist()
        return self._rows(captured.flatten(0, 1).split(sizes), pixels, needs)  # no grid: not every picture is one tile

    def per_token(self, values: Tensor, pixels: dict[str, Tensor]) -> Sequence[Tensor]:
        """By the family's own pixel shuffle."""
        side, width, scale = math.isqrt(self.patches), values.shape[-1], self.model.config.downsample_ratio
        squares = self.model.model.pixel_shuffle(values.view(-1, side, side, width), scale_factor=scale)
        return squares.reshape(-1, squares.shape[-1] // width, width).mean(1).split(self.slots(pixels))

    def chat_prompt(self, question: str, images: int = 1) -> str:
        """The chat template, start and end of each picture written out."""
        return super().chat_prompt(question, images).replace(self.image_placeholder, START + self.image_placeholder + END)

    def read(self, inputs: Mapping[str, Any]) -> tuple[dict[str, Tensor], Prompts]:
        pixels, prompts = super().read(inputs)
        sizes = [stop - start for row in runs(prompts.input_ids, self.image_token_id) for start, stop in row]
        per, tiles = self.num_visual_tokens, len(pixels["pixel_values"])
        if any(size % per for size in sizes) or sum(sizes) != tiles * per:
            raise ValueError(
                f"the rows have {sum(sizes)} places for visual tokens and pixel_values {tiles} tiles of {per} each; "
                f"both come from one call of the model's processor"
            )
        num_tiles = torch.tensor([size // per for size in sizes], device=self.device)
        return {**pixels, "num_tiles": num_tiles}, prompts
