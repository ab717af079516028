"""Base of the Qwen-VL families: images of any size as rows of patches, 2 x 2 patches per visual token, M-RoPE positions.

A visual token is a group of 2 x 2 patches, so that N is what the decoder would see. ENCODED is that group before the merger:
[4 D_v], the patches in the merger's own order. The merger is the projector: survivors' patches go through it alone. The markers
around an image (`<|vision_start|>`, `<|vision_end|>`) are text, are never scored and are not in N.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from diffprune.core.evidence import Evidence
from diffprune.core.tokens import VisualTokens
from diffprune.core.vlm import Prompts, Shape
from diffprune.vlm import tiny
from diffprune.vlm.family import Family, decoder_shape
from diffprune.vlm.image_token_runs import runs
from diffprune.vlm.tokenize import identities

SIDE = 24  # groups on each side of an image of the default size: 576 visual tokens, as many as LLaVA 1.5 has


class Qwen(Family):
    """Patches [P C*T*p*p] of all images one after the other, and their grids `image_grid_thw` [I 3] in patches."""

    projector_input = "visual.merger"
    encoder_inputs = ("pixel_values", "image_grid_thw")
    token_types = "mm_token_type_ids"

    # -- images --------------------------------------------------------------------------------------------------------

    @property
    def group(self) -> int:
        """Patches on each side of a visual token."""
        side: int = self.model.config.vision_config.spatial_merge_size
        return side

    @property
    def default_grid(self) -> tuple[int, int]:
        """Groups (rows, columns) of an image of the default size: 24 x 24, fewer where the processor allows no such image."""
        if not self.processor:
            return SIDE, SIDE
        pictures = self.processor.image_processor
        edge = self.model.config.vision_config.patch_size * self.group
        side = min(SIDE, math.isqrt(pictures.size["longest_edge"]) // edge)
        return side, side

    @property
    def num_visual_tokens(self) -> int:
        return math.prod(self.default_grid)

    def part(self, pixels: dict[str, Tensor], start: int, stop: int) -> dict[str, Tensor]:
        grids = pixels["image_grid_thw"]
        first, last = (int(grids[:end].prod(-1).sum()) for end in (start, stop))
        return {"pixel_values": pixels["pixel_values"][first:last], "image_grid_thw": grids[start:stop]}

    def layout(self, pixels: dict[str, Tensor]) -> Tensor:
        return pixels["image_grid_thw"]

    def slots(self, pixels: dict[str, Tensor]) -> list[int]:
        found: list[int] = (pixels["image_grid_thw"].prod(-1) // self.group**2).tolist()
        return found

    def _tokens(self, captured: Tensor, output: Any, pixels: dict[str, Tensor], needs: frozenset[Evidence]) -> VisualTokens:
        grids = pixels["image_grid_thw"]
        groups = self.ordered(captured.reshape(-1, captured.shape[-1] * self.group**2), grids)
        parts = groups.split([len(found) for found in output.pooler_output])
        tokens = self._rows(parts, pixels, needs)
        time, rows, columns = grids[0].tolist()
        alike = time == 1 and bool((grids == grids[0]).all())
        return replace(tokens, grid=(rows // self.group, columns // self.group) if alike else None)

    def per_token(self, values: Tensor, pixels: dict[str, Tensor]) -> Sequence[Tensor]:
        groups = self.ordered(values.view(-1, self.group**2, values.shape[-1]), pixels["image_grid_thw"])
        return groups.mean(1).split(self.slots(pixels))

    def ordered(self, groups: Tensor, grids: Tensor) -> Tensor:
        """[N ...] in the merger's order -> in the decoder's (raster) order."""
        return groups

    def _identity(self, pixels: dict[str, Tensor], images: int) -> Tensor:
        """The grid belongs to the image: the same patches in another grid are another picture."""
        parts = [self.part(pixels, i, i + 1) for i in range(images)]
        rows = [torch.cat([p["image_grid_thw"].flatten().float(), p["pixel_values"].flatten().float()]) for p in parts]
        return torch.cat([identities(row[None]) for row in rows])

    def project(self, features: Tensor) -> Tensor:
        return super().project(features.reshape(-1, features.shape[-1] // self.group**2))

    # -- text ----------------------------------------------------------------------------------------------------------

    def positions(self, ids: Tensor, mask: Tensor, layout: Tensor | None) -> Tensor:
        """[B S 4]: text (without gaps, it only tells sequences apart), time, row and column, by the family's `get_rope_index`."""
        slots = (ids == self.image_token_id) & mask.bool()
        found = [stop - start for row in runs(slots, True) for start, stop in row]
        if layout is None:
            rows, columns = self.default_grid
            layout = torch.tensor([[1, rows * self.group, columns * self.group]], device=ids.device).expand(len(found), 3)
        sizes = (layout.prod(-1) // self.group**2).tolist()
        if found != sizes:
            raise ValueError(
                f"runs of image tokens have the lengths {found}, the images need {sizes}; images are told apart by the text "
                f"between them (vision start and end), and positions need the layout of images that are not of the default size"
            )
        where, _ = self.model.model.get_rope_index(ids, slots.int(), image_grid_thw=layout, attention_mask=mask)
        return torch.stack([super().positions(ids, mask, layout), *where], -1)

    def read(self, inputs: Mapping[str, Any]) -> tuple[dict[str, Tensor], Prompts]:
        if inputs.get("pixel_values") is not None and inputs.get("image_grid_thw") is None:
            raise ValueError("a pruned call needs image_grid_thw beside pixel_values, as the model's processor makes them")
        return super().read(inputs)


def qwen_shape(config: Any, width: int, ffn: int, grid: tuple[int, int]) -> Shape:
    """Numbers for cost; one image of the default size. width, ffn: of the encoder, as if its FFN had two matrices."""
    vision = config.vision_config
    return Shape(
        **decoder_shape(config.text_config),
        vision_layers=vision.depth,
        vision_width=width,
        vision_ffn=ffn,
        patches=math.prod(grid) * vision.spatial_merge_size**2,
        patch_inputs=vision.in_channels * vision.temporal_patch_size * vision.patch_size**2,
    )


def tiny_parts() -> tiny.Parts:
    """Byte-level tokenizer with the vision markers around each image, and pictures of at most 64 tokens."""
    text = tiny.tokenizer("<|vision_start|>", "<|vision_end|>", "<|video_pad|>")
    text.chat_template = tiny.TEMPLATE.replace("<image>", "<|vision_start|><image><|vision_end|>")
    pictures = Qwen2VLImageProcessorPil(patch_size=4, size={"shortest_edge": 64, "longest_edge": 64 * 64})
    return tiny.Parts(pictures, text)


def tiny_config(make: Any, text: PreTrainedTokenizerFast, vision: dict[str, Any], rope: dict[str, Any] | None = None) -> Any:
    """Configuration of a tiny instance: the vision settings every version shares, and M-RoPE in the decoder."""
    start, end, video = (text.convert_tokens_to_ids(f"<|{word}|>") for word in ("vision_start", "vision_end", "video_pad"))
    parameters = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3], **(rope or {})}
    shared = {"patch_size": 4, "num_heads": 4, "spatial_merge_size": 2, "temporal_patch_size": 2}
    return make(
        text_config=tiny.decoder(text, rope_parameters=parameters),
        vision_config=shared | vision,
        image_token_id=tiny.IMAGE,
        video_token_id=video,
        vision_start_token_id=start,
        vision_end_token_id=end,
    )


def by_layer(deepstack: Sequence[Tensor], width: int) -> list[list[Tensor]]:
    """[n_i L*D] of each image -> for each of L layers, [n_i D] of each image."""
    split = [part.split(width, -1) for part in deepstack]
    return [list(layer) for layer in zip(*split, strict=True)]
