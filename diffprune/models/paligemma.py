"""PaliGemma 1 and 2: a SigLIP encoder, a linear projector, a Gemma decoder whose prompt sees itself both ways (arXiv 2407.07726).

ENCODED is one row per patch, before the projector; N is the same for every image. A row is images, `<bos>`, text, newline: the
prefix, whose tokens see each other. What follows the newline is the answer and is read causally. Nothing is counted apart.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers import PaliGemmaConfig, PaliGemmaForConditionalGeneration
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from diffprune.core.vlm import Prompts
from diffprune.models._raster import Raster, tiny_vision
from diffprune.vlm import tiny


class PaliGemma(Raster):
    """`PaliGemmaForConditionalGeneration`; its forward counts positions from 1, its generate adds that 1 itself."""

    position_offset = 1
    token_types = "token_type_ids"

    @classmethod
    def tiny(cls, seed: int = 0) -> PaliGemma:
        text = tiny.tokenizer()
        config = PaliGemmaConfig(
            vision_config=tiny_vision(),
            text_config={"model_type": "gemma", "head_dim": 16, **tiny.decoder(text)},
            image_token_id=tiny.IMAGE,
            projection_dim=tiny.width(),
            hidden_size=tiny.width(),
        )
        pictures = SiglipImageProcessorPil(size={"height": 32, "width": 32})
        return cls(tiny.build(PaliGemmaForConditionalGeneration, config, seed), tiny.Parts(pictures, text), "tiny paligemma")

    @property
    def side(self) -> int:
        vision = self.model.config.vision_config
        return int(vision.image_size // vision.patch_size)

    def chat_prompt(self, question: str, images: int = 1) -> str:
        """Images, `<bos>`, the question, a newline: these checkpoints have no chat template."""
        return f"{self.image_placeholder * images}{self.processor.tokenizer.bos_token}{question}\n"

    def read(self, inputs: Mapping[str, Any]) -> tuple[dict[str, Tensor], Prompts]:
        """As the base class; what a caller's token types call an answer is one without labels, too."""
        ids, types = inputs.get("input_ids"), inputs.get(self.token_types)
        if ids is None or types is None or inputs.get("labels") is not None:
            return super().read(inputs)
        labels = ids.masked_fill(types == 0, -100)
        pixels, prompts = super().read({**inputs, "labels": labels})
        return pixels, replace(prompts, labels=labels)

    def token_inputs(self, prompts: Prompts) -> dict[str, Tensor]:
        """0 for the prefix, 1 for the answer: as a caller says, by labels, or what follows the last newline."""
        if prompts.token_types is not None:
            return super().token_inputs(prompts)
        if prompts.labels is not None:
            return {"token_type_ids": (prompts.labels != -100).long()}
        ids = prompts.input_ids
        breaks = torch.isin(ids, torch.tensor(self._newlines, device=ids.device)) & prompts.attention_mask.bool()
        after = breaks.flip(1).cumsum(1).flip(1) == 0
        return {"token_type_ids": (after & breaks.any(1, keepdim=True)).long()}

    def blocks(self, types: Mapping[str, Tensor]) -> Tensor | None:
        """The prefix sees itself, beyond the windows of PaliGemma 2."""
        return torch.where(types[self.token_types] == 0, 0, -1) if self.token_types in types else None

    @cached_property
    def _newlines(self) -> list[int]:
        """Tokens of one or several newlines; none where a model came without its processor, whose rows are prompts only."""
        if not self.processor:
            return []
        found = [self.processor.tokenizer("\n" * n, add_special_tokens=False)["input_ids"] for n in range(1, 32)]
        return [ids[0] for ids in found if len(ids) == 1]
