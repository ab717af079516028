"""Mistral 3 (Mistral Small 3.1): a Pixtral encoder at the picture's own resolution, patches merged 2 x 2 (March 2025).

ENCODED is after the norm and the patch merger, before the two-layer projector: one row per token the decoder sees, each made of
2 x 2 patches. [IMG_BREAK] between rows and [IMG_END] after the last are text tokens: always kept, never counted as visual.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import isqrt
from typing import Any

from torch import Tensor
from torch.nn import functional
from transformers import Mistral3Config, Mistral3ForConditionalGeneration
from transformers.models.pixtral.image_processing_pil_pixtral import PixtralImageProcessorPil

from diffprune.core.evidence import Evidence
from diffprune.core.tokens import VisualTokens
from diffprune.core.vlm import Prompts, Shape
from diffprune.models._patches import patch_shape
from diffprune.vlm import tiny
from diffprune.vlm.family import Family

ENDS = {"image_break_token": "[IMG_BREAK]", "image_end_token": "[IMG_END]"}  # of a row and of a picture, unless the processor says


class Mistral3(Family):
    """`Mistral3ForConditionalGeneration`; pictures are padded to the largest of the batch and cropped by the encoder.

    The default size is the encoder's largest, 1540 x 1540 px: N = 55 x 55 = 3,025.
    """

    projector_input = "multi_modal_projector.linear_1"
    encoder_inputs = ("pixel_values", "image_sizes")

    @classmethod
    def tiny(cls, seed: int = 0) -> Mistral3:
        text = tiny.tokenizer(*ENDS.values())
        vision = {
            "model_type": "pixtral", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
            "image_size": 48, "patch_size": 4,
        }  # fmt: skip
        config = Mistral3Config(
            vision_config=vision, text_config={"model_type": "mistral", **tiny.decoder(text), "head_dim": 16},
            image_token_index=tiny.IMAGE, spatial_merge_size=2,
        )  # fmt: skip
        pictures = PixtralImageProcessorPil(size={"longest_edge": 48}, patch_size={"height": 4, "width": 4})
        return cls(tiny.build(Mistral3ForConditionalGeneration, config, seed), tiny.Parts(pictures, text), "tiny mistral3")

    def _shape(self) -> Shape:
        vision = self.model.config.vision_config
        self.stride: int = vision.patch_size * self.model.config.spatial_merge_size
        return patch_shape(self.model.config)

    @property
    def num_visual_tokens(self) -> int:
        side: int = self.model.config.vision_config.image_size // self.stride
        return side**2

    def pixels(self, images: Sequence[Any]) -> dict[str, Tensor]:
        # The family's processor hands its image processor the merged patch, so that sides are multiples of it.
        made = self.processor.image_processor(images=list(images), patch_size=self.stride, return_tensors="pt")
        return self._placed({name: made[name] for name in self.encoder_inputs})

    def encode(self, pixels: dict[str, Tensor], needs: frozenset[Evidence] = frozenset()) -> VisualTokens:
        if self.slots(pixels) == [1]:  # transformers squeezes away the row of a single token
            raise ValueError(
                f"a picture alone that is one token, of {self.stride} px at most: mistral3's own code fails there; enlarge it"
            )
        return super().encode(pixels, needs)

    def part(self, pixels: dict[str, Tensor], start: int, stop: int) -> dict[str, Tensor]:
        sizes = pixels["image_sizes"][start:stop]
        height, width = sizes.amax(0).tolist()
        return {"pixel_values": pixels["pixel_values"][start:stop, :, :height, :width], "image_sizes": sizes}

    def layout(self, pixels: dict[str, Tensor]) -> Tensor:
        """[I 2] int: rows and columns of visual tokens."""
        return pixels["image_sizes"] // self.stride

    def slots(self, pixels: dict[str, Tensor]) -> list[int]:
        found: list[int] = self.layout(pixels).prod(-1).tolist()
        return found

    def read(self, inputs: Mapping[str, Any]) -> tuple[dict[str, Tensor], Prompts]:
        if inputs.get("pixel_values") is not None and inputs.get("image_sizes") is None:
            raise ValueError("mistral3 needs image_sizes [images, 2] beside pixel_values, as its processor makes them")
        return super().read(inputs)

    def placeholder_ids(self, num: int, layout: Tensor | None) -> list[int]:
        rows, columns = (isqrt(num), isqrt(num)) if layout is None else layout.tolist()
        assert rows * columns == num, "one slot per visual token"
        names = [getattr(self.processor, key, default) for key, default in ENDS.items()]
        ends = self.processor.tokenizer.convert_tokens_to_ids(names)
        row = [self.image_token_id] * columns
        return [*(row + ends[:1]) * (rows - 1), *row, ends[1]]

    def _tokens(self, captured: Tensor, output: Any, pixels: dict[str, Tensor], needs: frozenset[Evidence]) -> VisualTokens:
        tokens, shapes = super()._tokens(captured, output, pixels, needs), self.layout(pixels)
        alike = bool((shapes == shapes[0]).all())
        return replace(tokens, grid=(int(shapes[0, 0]), int(shapes[0, 1])) if alike else None)

    def per_token(self, values: Tensor, pixels: dict[str, Tensor]) -> Sequence[Tensor]:
        side = self.model.config.spatial_merge_size
        shapes = [(rows * side, columns * side) for rows, columns in self.layout(pixels).tolist()]
        rasters = values.split([rows * columns for rows, columns in shapes])
        return [
            functional.avg_pool2d(raster.view(*shape, -1).movedim(-1, 0), side).flatten(1).T
            for raster, shape in zip(rasters, shapes, strict=True)
        ]

    def project(self, features: Tensor) -> Tensor:
        projector = self.model.model.multi_modal_projector
        projected: Tensor = projector.linear_2(projector.act(projector.linear_1(features)))
        return projected
