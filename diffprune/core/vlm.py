"""The contract of a vision-language model: encode, project, lay out prompts; its own forward and generate do the rest."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from diffprune.core import source
from diffprune.core.evidence import Evidence, EvidenceKind
from diffprune.core.spec import Spec
from diffprune.core.tokens import VisualTokens


@dataclass(frozen=True)
class Prompts:
    """B rows of text with one slot per visual token, as the full, unpruned model would read them.

    input_ids      [B S] int; slots hold the model's image token.
    attention_mask [B S] 0/1, padding on the left; or [B 1 S S] bool for packed training rows (True: may attend).
    position_ids   [B S] int; or [B S R] where positions have several coordinates (M-RoPE: text, time, row, column).
    slots          [B S] bool: positions of visual tokens, in the order of the row's images.
    question       [B S] bool: text a question-aware scorer may read (never an answer).
    labels         [B S] int | None: -100 where there is nothing to predict.
    index          [B S] int | None: place of each token in the full row, by which sliding windows measure distance; None: tokens
                   count as they stand.
    token_types    [B S] int | None: token types as a caller gave them; None: those the family finds itself (`VLM.token_inputs`).
    """

    input_ids: Tensor
    attention_mask: Tensor
    position_ids: Tensor
    slots: Tensor
    question: Tensor
    labels: Tensor | None = None
    index: Tensor | None = None
    token_types: Tensor | None = None

    def __len__(self) -> int:
        return self.input_ids.shape[0]

    def __getitem__(self, index: Tensor) -> Prompts:
        """The rows at `index` [M] int."""
        return replace(self, **{f.name: v[index] for f in fields(self) if (v := getattr(self, f.name)) is not None})

    def to(self, device: torch.device | str) -> Prompts:
        """The same rows on another device."""
        return replace(self, **{f.name: v.to(device) for f in fields(self) if (v := getattr(self, f.name)) is not None})


@dataclass(frozen=True)
class Shape:
    """Numbers from which cost follows (`timing/flops.py`). Widths in elements, counts per layer where said.

    Decoder: layers, width, heads, kv_heads, head_dim, ffn (gated, three matrices), vocabulary.
    Encoder: vision_layers, vision_width, vision_ffn (two matrices), patches, patch_inputs (channels x patch area);
    tiles of one image, each of so many patches that attend to each other. visual_tokens: N of one image of the default size.
    """

    layers: int
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocabulary: int
    vision_layers: int
    vision_width: int
    vision_ffn: int
    patches: int
    patch_inputs: int
    tiles: int = 1
    visual_tokens: int = 0


class VLM(ABC):
    """A loaded, frozen model of one family, in eval mode. One file per family under `models/`.

    model:     the transformers model; `processor`: its processor.
    family:    its `model_type`. asked: what the user asked for; `weights_hash`: sha256 of the weights that run.
    shape:     for cost.
    position_offset: what the family's own `forward` expects positions to start at (its `generate` counts from 0).
    encoder_inputs: keyword arguments that carry pictures, by the names the family's processor gives them, pixel values first.
    packs:     many questions about an image can share one training row (the decoder takes a [B 1 S S] mask as it is).
    joins_deepstack: features of inner encoder layers join the first decoder layers.
    """

    position_offset: int = 0
    encoder_inputs: ClassVar[tuple[str, ...]] = ("pixel_values",)
    packs: bool = True
    joins_deepstack: ClassVar[bool] = False

    model: Any
    processor: Any
    family: str
    asked: Spec
    weights_hash: str
    shape: Shape
    device: torch.device

    @property
    def name(self) -> str:
        """The canonical spelling of what was asked for; never a path."""
        return str(self.asked)

    @property
    def spec(self) -> Spec:
        """What was asked for, with the hash of the weights that run and the digest of the family's code."""
        return replace(self.asked, weights_sha256=self.weights_hash, source=source.digest(type(self)))

    @property
    def dtype(self) -> str:
        """Of the weights, as torch names it: `float32`, `bfloat16`."""
        return str(self.model.dtype).removeprefix("torch.")

    @property
    @abstractmethod
    def num_visual_tokens(self) -> int:
        """N of one image of the default size."""

    def lacks(self, evidence: Evidence) -> str:
        """Why the family cannot give this evidence, as a clause; empty where it can."""
        known = (EvidenceKind.QUESTION, EvidenceKind.IDENTITY)
        return "" if evidence.kind in known else "no family reads that from its model yet"

    def check_evidence(self, needs: Iterable[Evidence]) -> None:
        """Refuse a method that asks for what the family cannot give.

        Raises:
            ValueError: names the evidence and the family, and says why.
        """
        for evidence in needs:
            if reason := self.lacks(evidence):
                raise ValueError(f"{self.family} cannot give {evidence}: {reason}")

    @abstractmethod
    def lacks_shared_prefix(self) -> str:
        """Why questions about one image cannot go on from one prefill of it, as a clause; empty where they can."""

    @abstractmethod
    def chat_prompt(self, question: str, images: int = 1) -> str:
        """The full prompt text around a question by the model's chat template, one placeholder per image included."""

    @abstractmethod
    def pixels(self, images: Sequence[Any]) -> dict[str, Tensor]:
        """Encoder inputs of PIL images (RGB) on the model's device."""

    @abstractmethod
    def part(self, pixels: dict[str, Tensor], start: int, stop: int) -> dict[str, Tensor]:
        """Encoder inputs of the images start..stop."""

    @abstractmethod
    def layout(self, pixels: dict[str, Tensor]) -> Tensor | None:
        """[I K] int: what the family must know of each image to place its slots; None where all images are alike."""

    @abstractmethod
    def slots(self, pixels: dict[str, Tensor]) -> list[int]:
        """Slots each image takes in a prompt, separators included; without running the encoder."""

    @abstractmethod
    def encode(self, pixels: dict[str, Tensor], needs: frozenset[Evidence] = frozenset()) -> VisualTokens:
        """Run the vision encoder: features [B N D] *before* the projector, plus what `needs` asks of the encoder.

        Raises:
            ValueError: the family cannot give what `needs` asks for.
        """

    @abstractmethod
    def project(self, features: Tensor) -> Tensor:
        """[M D] -> [M D_text]: encoder features into the decoder's width; per token, so survivors alone suffice."""

    @abstractmethod
    def separator(self) -> Tensor:
        """[D_text]: the embedding that stands at negative entries of `VisualTokens.row_id`."""

    @abstractmethod
    def prompts(
        self,
        questions: Sequence[str],
        num_tokens: Sequence[int],
        layout: Tensor | None = None,
        images: Sequence[int] | None = None,
    ) -> Prompts:
        """Prompts around `questions`, tokenised and left-padded.

        num_tokens: slots of each image, separators included; layout: `VisualTokens.layout` of the images (None: the default
        size). images: of each question, one after the other; None is one each.
        """

    @abstractmethod
    def read(self, inputs: Mapping[str, Any]) -> tuple[dict[str, Tensor], Prompts]:
        """Encoder inputs and full-length rows from what the family's own processor made.

        Raises:
            ValueError: inputs without token ids or pictures.
        """

    @abstractmethod
    def deferred(self) -> Any:
        """An encoder output with nothing in it, for callers that encode later."""

    @abstractmethod
    def token_inputs(self, prompts: Prompts) -> dict[str, Tensor]:
        """Further keyword arguments [B S] the model's own forward wants beside the ids (token types)."""

    def blocks(self, types: Mapping[str, Tensor]) -> Tensor | None:
        """[B S] int: tokens of one number see each other whatever a sliding window says, -1 does not; None where none do.

        types: `token_inputs` of the rows.
        """
        return None

    @abstractmethod
    def embed(self, input_ids: Tensor) -> Tensor:
        """[B T] -> [B T D_text]: the decoder's input embeddings, for question-aware scorers."""

    @abstractmethod
    def image_inputs(self, features: Sequence[Tensor], deepstack: Sequence[Tensor] | None = None) -> dict[str, Any]:
        """Keyword arguments that hand projected features, one [n_i D_text] per image, to the model's own forward.

        deepstack: `VisualTokens.deepstack` of the same tokens, one [n_i C] per image.
        """
