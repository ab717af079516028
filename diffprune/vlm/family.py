"""Base of the families: features captured at the projector's input, rows from text or from a processor's output.

A family says which module takes one visual token's features to the decoder's width (`projector_input`), which ids stand in a prompt
for an image (`placeholder_ids`), and, where it differs, how tokens are grouped, ordered and positioned. Nothing of its code is
copied: a forward pre-hook captures the projector's input while the family's own `get_image_features` runs.
"""

from __future__ import annotations

import re
import threading
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers.modeling_outputs import BaseModelOutputWithPooling

from diffprune.core.evidence import IDENTITY, Evidence, EvidenceKind
from diffprune.core.spec import Spec
from diffprune.core.tokens import VisualTokens
from diffprune.core.vlm import VLM, Prompts, Shape
from diffprune.io.qa_rows import MARKER, unmarked
from diffprune.vlm.attention_rows import SHOWING
from diffprune.vlm.encoder_attention import Kept, kept_by_encoder, outputs_of, read
from diffprune.vlm.image_token_runs import behind
from diffprune.vlm.tokenize import identities, mentions, picture_tokens, plain, special_tokens, tokenise, weights_hash
from diffprune.vlm.windows import window_of


class Deferred(BaseModelOutputWithPooling):
    """An encoder output that is made later. `generate` looks inside only to prefill in chunks."""

    def __getitem__(self, name: Any) -> Any:
        raise ValueError("prefill_chunk_size splits pictures before they are pruned; leave it unset: pruned rows are short")


@dataclass(frozen=True)
class EncoderReader:
    """What was kept while a family's encoder ran. asked: layers of what is wanted; calls, outputs: by layer, call by call."""

    family: Family
    asked: Mapping[Evidence, int]
    calls: Mapping[int, Sequence[Kept]]
    outputs: Mapping[int, Sequence[Tensor]]

    def evidence(self, pixels: dict[str, Tensor]) -> dict[Evidence, Tensor]:
        """[B N ...] of everything asked for."""
        return {evidence: self._one(evidence, layer, pixels) for evidence, layer in self.asked.items()}

    def _one(self, evidence: Evidence, layer: int, pixels: dict[str, Tensor]) -> Tensor:
        family, calls = self.family, self.calls.get(layer, ())
        if evidence.kind is EvidenceKind.ENCODER_FEATURES:
            found = [output if output.ndim == 3 else output[None] for output in self.outputs[layer]]
        else:
            found = [read(evidence, call, family.summary) for call in calls]
        if not found:
            raise ValueError(f"{family.family}: its vision encoder does not show {evidence} (it uses no attention function)")
        patches = torch.cat([rows[:, family.skipped :].flatten(0, 1) for rows in found])
        tokens = pad_sequence(list(family.per_token(patches, pixels)), batch_first=True)
        if evidence.kind is EvidenceKind.ENCODER_KEYS:
            return tokens.unflatten(-1, (calls[0].key.shape[1], -1))
        return tokens[..., 0] if evidence.kind is EvidenceKind.ENCODER_ATTENTION else tokens


class Family(VLM):
    """A conditional-generation model: vision encoder, projector, decoder, and `mm_encoder_outputs` in its forward.

    projector_input:       dotted path below `model.model` of the module whose input is one row per visual token.
    projects:       what it encodes are features behind the projector already, in the decoder's width.
    encoder_inputs: are keyword arguments of `get_image_features` too.
    token_types:    name of the input that is 1 at visual tokens and 0 at text; "" where there is none.
    stacked:        its forward wants the rows of all images as one tensor, not a list of them.
    summary:        the encoder's first token sums up what it sees ([CLS]).
    """

    projector_input: ClassVar[str] = "multi_modal_projector"
    projects: ClassVar[bool] = False
    token_types: ClassVar[str] = ""
    stacked: ClassVar[bool] = False
    summary: bool = False

    def __init__(self, model: Any, processor: Any, asked: Spec | str) -> None:
        self.model, self.processor = model, processor
        self.asked = Spec(asked) if isinstance(asked, str) else asked
        self.device = next(model.parameters()).device
        self.image_token_id: int = model.config.image_token_id
        self.family: str = model.config.model_type
        self.shape = self._shape()
        self.shape = replace(self.shape, visual_tokens=self.num_visual_tokens)

    @classmethod
    @abstractmethod
    def tiny(cls, seed: int = 0) -> VLM:
        """A random instance of two or three narrow layers with a processor that works offline, for tests and dry runs."""

    @abstractmethod
    def _shape(self) -> Shape:
        """Numbers for cost, from the configuration."""

    @cached_property
    def weights_hash(self) -> str:  # type: ignore[override]
        """sha256 of the weights that run; taken when first asked for, as it reads every byte."""
        return weights_hash(self.model)

    # -- images --------------------------------------------------------------------------------------------------------

    def pixels(self, images: Sequence[Any]) -> dict[str, Tensor]:
        made = self.processor.image_processor(images=list(images), return_tensors="pt")
        return self._placed({name: made[name] for name in self.encoder_inputs if name in made})

    def _placed(self, pixels: dict[str, Tensor]) -> dict[str, Tensor]:
        """On the model's device, in its type where they are no indices."""
        kind = self.model.dtype
        return {n: v.to(self.device, kind if v.is_floating_point() else v.dtype) for n, v in pixels.items()}

    def part(self, pixels: dict[str, Tensor], start: int, stop: int) -> dict[str, Tensor]:
        return {name: value[start:stop] for name, value in pixels.items()}

    def layout(self, pixels: dict[str, Tensor]) -> Tensor | None:
        """[I K] int: what `placeholder_ids` and `positions` must know of each image; None where all images are alike."""
        return None

    def slots(self, pixels: dict[str, Tensor]) -> list[int]:
        return [self.num_visual_tokens] * len(pixels[self.encoder_inputs[0]])

    def lacks(self, evidence: Evidence) -> str:
        if evidence.from_decoder:
            return self._lacks_of_decoder(evidence)
        if not evidence.from_encoder:
            return super().lacks(evidence)
        layers = self.shape.vision_layers
        known = evidence.layer is None or -layers <= evidence.layer < layers
        return "" if known else f"its encoder has the layers 0 to {layers - 1}"

    def _lacks_of_decoder(self, evidence: Evidence) -> str:
        """See `lacks`."""
        layers, implementation = self.shape.layers, self.model.config.get_text_config()._attn_implementation
        if evidence.layer is not None and evidence.layer >= layers:
            return f"its decoder has the layers 0 to {layers - 1}"
        if evidence.kind is not EvidenceKind.DECODER_FEATURES and implementation not in SHOWING:
            return f"it is read beside {' or '.join(SHOWING)}, not {implementation}; load the model with attention='sdpa'"
        return ""

    def lacks_shared_prefix(self) -> str:
        if not self.packs:
            return "its decoder reads pictures in both directions"
        if (window := window_of(self.model)) is not None:
            return f"its decoder has sliding windows of {window}"
        if self.model.generation_config.stop_strings:
            return "its generation configuration has stop strings, which transformers does not hand on to another decoding loop"
        attention = self.model.config.get_text_config()._attn_implementation
        return "" if attention == "sdpa" else f"{attention} attention takes no mask in which questions do not see each other"

    def encode(self, pixels: dict[str, Tensor], needs: frozenset[Evidence] = frozenset()) -> VisualTokens:
        self.check_evidence(needs)
        with self._captured() as captured, self.reading(needs) as reader:
            given = {name: pixels[name] for name in self.encoder_inputs if name in pixels}
            base = self.model.model  # by its class: `hooks.pruned` patches the instance
            output = type(base).get_image_features(base, **given, return_dict=True)
        tokens = self._tokens(captured[-1], output, pixels, needs)
        return replace(tokens, evidence={**tokens.evidence, **reader.evidence(pixels)})

    # -- inside the encoder --------------------------------------------------------------------------------------------

    def encoder_layers(self, needs: Iterable[Evidence]) -> dict[Evidence, int]:
        """The encoder layer (from 0) of everything asked of the encoder; by default the one whose output the projector reads."""
        layers, chosen = self.shape.vision_layers, getattr(self.model.config, "vision_feature_layer", -1)
        default = (chosen if isinstance(chosen, int) else chosen[-1]) % (layers + 1) - 1
        asked = [evidence for evidence in needs if evidence.from_encoder]
        return {evidence: default if evidence.layer is None else evidence.layer % layers for evidence in asked}

    @contextmanager
    def reading(self, needs: Iterable[Evidence]) -> Iterator[EncoderReader]:
        """While the block runs, the encoder is read for what `needs` asks of it."""
        asked = self.encoder_layers(needs)
        inner = {n for evidence, n in asked.items() if evidence.kind is EvidenceKind.ENCODER_FEATURES}
        calls = {n for evidence, n in asked.items() if evidence.kind is not EvidenceKind.ENCODER_FEATURES}
        tower = self.model.get_encoder(modality="image")
        with kept_by_encoder(self.model, calls) as kept, outputs_of(tower, self.shape.vision_layers, inner) as outputs:
            yield EncoderReader(self, asked, kept.calls, outputs)

    @property
    def skipped(self) -> int:
        """Tokens at the head of the encoder's that the decoder does not see."""
        return int(self.summary)

    def per_token(self, values: Tensor, pixels: dict[str, Tensor]) -> Sequence[Tensor]:
        """[P C], one row per patch in the order in which the encoder has them -> [n_i C], one per visual token of each image.

        A token of several patches has their mean.
        """
        sizes = self.slots(pixels)
        if len(values) != sum(sizes):
            raise ValueError(f"{self.family} does not say which of {len(values)} patches are in its {sum(sizes)} visual tokens")
        return values.split(sizes)

    @contextmanager
    def _captured(self, path: str = "") -> Iterator[list[Tensor]]:
        """Inputs of the projector, or of the module at `path`, captured by a forward pre-hook while the block runs; those of this
        thread, as another may call the model meanwhile."""
        captured: list[Tensor] = []
        module, thread = self.model.model.get_submodule(path or self.projector_input), threading.get_ident()
        hook = module.register_forward_pre_hook(
            lambda _, args: captured.append(args[0]) if threading.get_ident() == thread else None
        )
        try:
            yield captured
        finally:
            hook.remove()

    def _tokens(self, captured: Tensor, output: Any, pixels: dict[str, Tensor], needs: frozenset[Evidence]) -> VisualTokens:
        """Captured features as one padded row per image; `output` says how many each has."""
        flat = captured.reshape(-1, captured.shape[-1])
        sizes = [len(found) for found in output.pooler_output]
        assert len(flat) == sum(sizes), "the projector takes one row per visual token"
        return self._rows(flat.split(sizes), pixels, needs)

    def _rows(self, parts: Sequence[Tensor], pixels: dict[str, Tensor], needs: frozenset[Evidence]) -> VisualTokens:
        """[n_i D] of each image -> padded `VisualTokens`."""
        sizes = torch.tensor([len(p) for p in parts], device=self.device)
        features = pad_sequence(list(parts), batch_first=True)
        return VisualTokens(
            features=features,
            valid=torch.arange(features.shape[1], device=self.device) < sizes[:, None],
            evidence={IDENTITY: self._identity(pixels, len(parts))} if IDENTITY in needs else {},
            layout=self.layout(pixels),
        )

    def _identity(self, pixels: dict[str, Tensor], images: int) -> Tensor:
        """[I] int64: a hash of each image's own pixels, whatever batch it comes in."""
        return torch.cat([identities(next(iter(self.part(pixels, i, i + 1).values())).flatten()[None]) for i in range(images)])

    def project(self, features: Tensor) -> Tensor:
        return self.model.model.get_submodule(self.projector_input)(features)

    def separator(self) -> Tensor:
        raise ValueError(f"{self.model.config.model_type} puts no separators between visual tokens")

    def image_inputs(self, features: Sequence[Tensor], deepstack: Sequence[Tensor] | None = None) -> dict[str, Any]:
        rows = torch.cat(list(features))[None] if self.stacked else list(features)
        return {"mm_encoder_outputs": {"image": BaseModelOutputWithPooling(pooler_output=rows)}}

    def deferred(self) -> Any:
        """An encoder output with nothing in it yet: `hooks.pruned` encodes when the rows are known."""
        return Deferred()

    # -- text ----------------------------------------------------------------------------------------------------------

    def chat_prompt(self, question: str, images: int = 1) -> str:
        content = [*({"type": "image"} for _ in range(images)), {"type": "text", "text": question}]
        return self.processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)

    @property
    def image_placeholder(self) -> str:
        """What stands for an image in the text of a prompt."""
        return self.processor.image_token

    def placeholder_ids(self, num: int, layout: Tensor | None) -> list[int]:
        """Token ids that stand for an image of `num` slots, separators included."""
        return [self.image_token_id] * num

    def prompts(
        self,
        questions: Sequence[str],
        num_tokens: Sequence[int],
        layout: Tensor | None = None,
        images: Sequence[int] | None = None,
    ) -> Prompts:
        shown = list(images or [1] * len(questions))
        texts = [self.chat_prompt(self._plain(q, n), n) for q, n in zip(questions, shown, strict=True)]
        ids_of_images = [self.placeholder_ids(n, None if layout is None else layout[i]) for i, n in enumerate(num_tokens)]
        ids, mask, question = tokenise(self.processor.tokenizer, texts, self.image_placeholder, ids_of_images, shown)
        return self._prompts(ids.to(self.device), mask.to(self.device), question.to(self.device), layout)

    def _plain(self, question: str, images: int) -> str:
        """A question without the marks for its images that it may open with; further mentions of special tokens are text."""
        for marker in (MARKER, self.image_placeholder):
            question = unmarked(question, marker, images)
        return plain(question, self._mentions)

    @cached_property
    def _mentions(self) -> re.Pattern[str]:
        tokenizer = self.processor.tokenizer
        return mentions((self.image_placeholder, *picture_tokens(self.model.config, tokenizer), *special_tokens(tokenizer)))

    def _prompts(self, ids: Tensor, mask: Tensor, question: Tensor, layout: Tensor | None) -> Prompts:
        slots = (ids == self.image_token_id) & mask.bool()
        return Prompts(ids, mask, self.positions(ids, mask, layout), slots, question)

    def positions(self, ids: Tensor, mask: Tensor, layout: Tensor | None) -> Tensor:
        """[B S] int, or [B S R]: position ids as the family's own generate makes them."""
        return (mask.cumsum(1) - 1).clamp_min(0)

    def read(self, inputs: Mapping[str, Any]) -> tuple[dict[str, Tensor], Prompts]:
        refuse_videos(inputs)
        ids = inputs.get("input_ids")
        pixels = {name: inputs[name] for name in self.encoder_inputs if inputs.get(name) is not None}
        if ids is None or self.encoder_inputs[0] not in pixels:
            raise ValueError(f"a pruned call needs input_ids and {self.encoder_inputs[0]}, as the model's processor makes them")
        mask = inputs.get("attention_mask")
        mask = torch.ones_like(ids) if mask is None else mask
        pixels, types = self._placed(pixels), inputs.get(self.token_types) if self.token_types else None
        question = behind(ids == self.image_token_id) & mask.bool()
        if (labels := inputs.get("labels")) is not None:
            question &= ((labels >= 0) & question).cumsum(1) == 0  # what is to be predicted is an answer, and no question
        prompts = self._prompts(ids, mask.long(), question, self.layout(pixels))
        return pixels, prompts if types is None else replace(prompts, token_types=types)

    def token_inputs(self, prompts: Prompts) -> dict[str, Tensor]:
        if not self.token_types:
            return {}
        return {self.token_types: prompts.slots.long() if prompts.token_types is None else prompts.token_types}

    def embed(self, input_ids: Tensor) -> Tensor:
        return self.model.get_input_embeddings()(input_ids)


def refuse_videos(inputs: Mapping[str, Any]) -> None:
    """Raises ValueError: one of the inputs is about a video."""
    if found := [name for name, value in inputs.items() if "video" in name and value is not None]:
        raise ValueError(
            f"a pruned call takes images, not videos ({found[0]}); give the frames as images or call the model unpruned"
        )


def decoder_shape(text: Any) -> dict[str, int]:
    """The decoder's part of a `Shape` from its configuration."""
    return {
        "layers": text.num_hidden_layers,
        "width": text.hidden_size,
        "heads": text.num_attention_heads,
        "kv_heads": text.num_key_value_heads,
        "head_dim": getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads,
        "ffn": text.intermediate_size,
        "vocabulary": text.vocab_size,
    }
