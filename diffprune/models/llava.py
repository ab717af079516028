"""LLaVA 1.5: a CLIP encoder, a two-layer projector, a Llama-type decoder (arXiv 2310.03744). The embedded model is one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling

from diffprune.core.pruner import Need
from diffprune.core.tokens import VisualTokens
from diffprune.core.vlm import VLM, Prompts, Shape
from diffprune.models._decoder import identities, tokenise, weights_hash


class Llava(VLM):
    """`LlavaForConditionalGeneration` with one image per prompt; every visual token of one image is scored together."""

    def __init__(self, model: Any, processor: Any, name: str) -> None:
        self.model = model.eval().requires_grad_(False)
        self.processor, self.name = processor, name
        self.device = next(model.parameters()).device
        self.weights_hash = weights_hash(model)
        text, vision = model.config.text_config, model.config.vision_config
        self.patches = vision.image_size // vision.patch_size
        self.shape = Shape(
            layers=text.num_hidden_layers,
            width=text.hidden_size,
            heads=text.num_attention_heads,
            kv_heads=text.num_key_value_heads,
            head_dim=getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads,
            ffn=text.intermediate_size,
            vocabulary=text.vocab_size,
            vision_layers=vision.num_hidden_layers,
            vision_width=vision.hidden_size,
            vision_ffn=vision.intermediate_size,
            patches=self.patches**2 + 1,
            patch_inputs=3 * vision.patch_size**2,
        )

    @property
    def num_visual_tokens(self) -> int:
        return self.patches**2

    def frame(self, question: str) -> str:
        content = [{"type": "image"}, {"type": "text", "text": question}]
        return self.processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)

    def pixels(self, images: Sequence[Any]) -> dict[str, Tensor]:
        values = self.processor.image_processor(images=list(images), return_tensors="pt")["pixel_values"]
        return {"pixel_values": values.to(self.device, self.model.dtype)}

    def encode(self, pixels: dict[str, Tensor], needs: frozenset[Need] = frozenset()) -> VisualTokens:
        tower, layer = self.model.model.vision_tower, self.model.config.vision_feature_layer
        states = tower(pixels["pixel_values"], output_hidden_states=True).hidden_states
        features = states[layer] if isinstance(layer, int) else torch.cat([states[i] for i in layer], -1)
        attention = None
        if Need.ENCODER_ATTENTION in needs:
            last = (layer if isinstance(layer, int) else layer[-1]) % len(states)
            attention = self._summary_attention(states[last - 1], last - 1)
        if self.model.config.vision_feature_select_strategy == "default":
            features = features[:, 1:]
        return VisualTokens(
            features=features,
            alive=torch.ones(features.shape[:2], dtype=torch.bool, device=features.device),
            grid=(self.patches, self.patches),
            attention=attention,
            identity=identities(pixels["pixel_values"]) if Need.IDENTITY in needs else None,
        )

    def _summary_attention(self, states: Tensor, index: int) -> Tensor:
        """[B N]: softmax row of the [CLS] query in encoder layer `index`, mean over heads, from that layer's own q and k."""
        tower = self.model.model.vision_tower
        layer = getattr(tower, "vision_model", tower).encoder.layers[index]
        normed, mixer = layer.layer_norm1(states), layer.self_attn
        split = (len(states), -1, mixer.num_heads, mixer.head_dim)
        query = mixer.q_proj(normed[:, :1]).view(split).transpose(1, 2)
        key = mixer.k_proj(normed).view(split).transpose(1, 2)
        return (query @ key.transpose(2, 3) * mixer.head_dim**-0.5).softmax(-1)[:, :, 0, 1:].mean(1)

    def project(self, features: Tensor) -> Tensor:
        return self.model.model.multi_modal_projector(features)

    def prompts(self, questions: Sequence[str], num_tokens: Sequence[int]) -> Prompts:
        tokenizer = self.processor.tokenizer
        texts = [self.frame(q) for q in questions]
        rows = tokenise(tokenizer, texts, self.processor.image_token, self.model.config.image_token_id, num_tokens)
        return rows.to(self.device)

    def embed(self, input_ids: Tensor) -> Tensor:
        return self.model.get_input_embeddings()(input_ids)

    def image_inputs(self, features: Sequence[Tensor]) -> dict[str, Any]:
        return {"mm_encoder_outputs": {"image": BaseModelOutputWithPooling(pooler_output=list(features))}}
