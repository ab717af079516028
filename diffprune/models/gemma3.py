"""Gemma 3: a SigLIP encoder, average pooling, a normed linear projector, a decoder with sliding windows (arXiv 2503.19786).

ENCODED is one row per visual token, after pooling (4 x 4 patches at the usual sizes) and before the projector's norm; N is the
same for every image. `\\n\\n<start_of_image>` and `<end_of_image>\\n\\n` around the tokens are text. Tokens of a picture see each
other in both directions; the survivors of a cut still do. Pan-and-scan is off; crops that a user's own processor made are
pictures with a budget each.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Gemma3Config, Gemma3ForConditionalGeneration
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

from diffprune.models._raster import Raster, tiny_vision
from diffprune.vlm import tiny


class Gemma3(Raster):
    """`Gemma3ForConditionalGeneration`, checkpoints with an encoder."""

    projector_input = "multi_modal_projector.mm_soft_emb_norm"
    token_types = "token_type_ids"

    @classmethod
    def tiny(cls, seed: int = 0) -> Gemma3:
        start, end = "<start_of_image>", "<end_of_image>"
        text = tiny.tokenizer(start, end)
        text.chat_template = tiny.TEMPLATE.replace("<image>", start)
        settings = tiny.decoder(text, head_dim=16, sliding_window=256)
        layers = ["sliding_attention", "full_attention"] * settings["num_hidden_layers"]
        config = Gemma3Config(
            vision_config=tiny_vision(image_size=64),
            text_config={**settings, "layer_types": layers[: settings["num_hidden_layers"]]},
            image_token_id=tiny.IMAGE,
            boi_token_id=text.convert_tokens_to_ids(start),
            eoi_token_id=text.convert_tokens_to_ids(end),
            mm_tokens_per_image=16,
        )
        pictures = Gemma3ImageProcessorPil(size={"height": 64, "width": 64})
        made = tiny.build(Gemma3ForConditionalGeneration, config, seed)
        return cls(made, tiny.Parts(pictures, text, start), "tiny gemma3")

    @property
    def side(self) -> int:
        return int(self.model.config.mm_tokens_per_image**0.5)

    def pixels(self, images: Sequence[Any]) -> dict[str, Tensor]:
        made = self.processor.image_processor(images=list(images), do_pan_and_scan=False, return_tensors="pt")
        return self._placed({"pixel_values": made["pixel_values"]})

    def project(self, features: Tensor) -> Tensor:
        projector = self.model.model.multi_modal_projector
        return torch.matmul(projector.mm_soft_emb_norm(features), projector.mm_input_projection_weight).type_as(features)

    def chat_prompt(self, question: str, images: int = 1) -> str:
        """The chat template, start and end of each picture written out: the newlines around merge with those of the text."""
        start, token, end = self._words()
        return super().chat_prompt(question, images).replace(start, f"\n\n{start}{token}{end}\n\n")

    @property
    def image_placeholder(self) -> str:
        return self._words()[1]

    def _words(self) -> list[str]:
        """Start of image, visual token, end of image, as text."""
        config = self.model.config
        ids = [config.boi_token_id, self.image_token_id, config.eoi_token_id]
        found: list[str] = self.processor.tokenizer.convert_ids_to_tokens(ids)
        return found
