"""LLaVA 1.5: a CLIP encoder, a two-layer projector, a Llama-type decoder (arXiv 2310.03744). The embedded model is one.

Encoders without a [CLS] token (SigLIP) and strategy "full", which shows the decoder every token of the encoder, are served too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from diffprune.core.evidence import IDENTITY, Evidence
from diffprune.core.spec import Spec
from diffprune.core.tokens import VisualTokens
from diffprune.core.vlm import Shape
from diffprune.io.image import pad_to_square
from diffprune.models._clip import CLIP, cheap, summary_attention
from diffprune.models._patches import patch_shape
from diffprune.vlm import tiny
from diffprune.vlm.encoder_attention import has_summary
from diffprune.vlm.family import Family
from diffprune.vlm.tokenize import identities

IMAGE_MODES = "pad", "crop"
FRAMES = "template", "vicuna_v1"
VICUNA_V1 = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, and polite "
    "answers to the user's questions. USER: {images}{question} ASSISTANT:"
)


class Llava(Family):
    """`LlavaForConditionalGeneration`; all visual tokens of an image are scored together, before the projector.

    The tower runs alone, so that only survivors are ever projected.

    image_mode: "pad" to a square with the processor's mean colour, as LLaVA was trained and evaluated, or "crop" the centre;
                by default as the checkpoint's processor says (most say crop).
    frame:      "template", the chat template of the checkpoint, or "vicuna_v1", the prompt of LLaVA's own code, which opens with
                a system sentence.

    Raises:
        ValueError: another word for either.
    """

    def __init__(self, model: Any, processor: Any, asked: Spec | str, image_mode: str = "", frame: str = "template") -> None:
        if image_mode not in ("", *IMAGE_MODES):
            raise ValueError(f"image_mode is {image_mode!r}; llava knows {' and '.join(IMAGE_MODES)}")
        if frame not in FRAMES:
            raise ValueError(f"frame is {frame!r}; llava knows {' and '.join(FRAMES)}")
        super().__init__(model, processor, asked)
        self.image_mode, self.framing = image_mode, frame

    @classmethod
    def tiny(cls, seed: int = 0) -> Llava:
        text = tiny.tokenizer()
        vision = CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=3,
            num_attention_heads=4,
            image_size=32,
            patch_size=8,
            projection_dim=32,
        )
        config = LlavaConfig(vision_config=vision, text_config=LlamaConfig(**tiny.decoder(text)), image_token_id=tiny.IMAGE)
        size = {"height": 32, "width": 32}
        pictures = LlavaImageProcessorPil(size={"shortest_edge": 32}, crop_size=size, do_pad=True)
        return cls(tiny.build(LlavaForConditionalGeneration, config, seed), tiny.Parts(pictures, text), "tiny llava")

    def _shape(self) -> Shape:
        config = self.model.config
        if config.vision_config.model_type == "pixtral":
            raise ValueError("llava with a Pixtral encoder is not supported: it sees pictures of any size as one row of patches")
        self.side = config.vision_config.image_size // config.vision_config.patch_size
        self.summary = has_summary(self.model.model.vision_tower)
        return replace(patch_shape(config), patches=self.side**2 + self.summary)

    @property
    def num_visual_tokens(self) -> int:
        return self.shape.patches - self.skipped

    def pixels(self, images: Sequence[Any]) -> dict[str, Tensor]:
        pictures = self.processor.image_processor
        if not self.image_mode:
            return super().pixels(images)
        if self.image_mode == "pad":
            red, green, blue = (int(255 * mean) for mean in pictures.image_mean)
            images = [pad_to_square(image, (red, green, blue)) for image in images]
        more = {"do_pad": False} if hasattr(pictures, "do_pad") else {}  # CLIP's processor, which many checkpoints name, has none
        made = pictures(images=list(images), return_tensors="pt", **more)
        return self._placed({"pixel_values": made["pixel_values"]})

    def chat_prompt(self, question: str, images: int = 1) -> str:
        if self.framing == "vicuna_v1":
            return VICUNA_V1.format(images=f"{self.image_placeholder}\n" * images, question=question)
        return super().chat_prompt(question, images)

    def encode(self, pixels: dict[str, Tensor], needs: frozenset[Evidence] = frozenset()) -> VisualTokens:
        self.check_evidence(needs)
        config, tower = self.model.config, self.model.model.vision_tower
        layer, clip = config.vision_feature_layer, config.vision_config.model_type in CLIP
        rows = self.encoder_layers(e for e in needs if clip and cheap(e))
        with self.reading(needs - rows.keys()) as reader:
            states: Any = tower(pixels["pixel_values"], output_hidden_states=True).hidden_states
        features = states[layer] if isinstance(layer, int) else torch.cat([states[i] for i in layer], -1)
        evidence = reader.evidence(pixels)
        evidence |= {key: summary_attention(tower, states[index], index)[:, self.skipped :] for key, index in rows.items()}
        if IDENTITY in needs:
            evidence[IDENTITY] = identities(pixels["pixel_values"])
        features = features[:, self.skipped :]
        return VisualTokens(
            features=features,
            valid=torch.ones(features.shape[:2], dtype=torch.bool, device=features.device),
            grid=(self.side, self.side) if features.shape[1] == self.side**2 else None,
            evidence=evidence,
        )

    @property
    def skipped(self) -> int:
        """With strategy "full" the decoder sees the summary token too."""
        return int(self.model.config.vision_feature_select_strategy == "default")
