"""What a pruner may ask for beside the features; only what is asked is computed, and a pruner sees nothing else."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor


class EvidenceKind(enum.StrEnum):
    """What is looked at."""

    QUESTION = "the embedded question"
    IDENTITY = "the identity of an image"
    ENCODER_ATTENTION = "attention in the vision encoder"
    ENCODER_KEYS = "keys of the vision encoder"
    ENCODER_FEATURES = "features inside the vision encoder"
    DECODER_ATTENTION = "attention in the decoder"
    DECODER_KEYS = "keys of the decoder"
    DECODER_FEATURES = "hidden states of the decoder"


OF_THE_ENCODER = frozenset({EvidenceKind.ENCODER_ATTENTION, EvidenceKind.ENCODER_KEYS, EvidenceKind.ENCODER_FEATURES})
_FROM = {
    "last": "from the last token", "text": "from the question", "each": "from each token of the question",
    "image": "from the image itself",
}  # fmt: skip
OF_THE_DECODER = frozenset(kind for kind in EvidenceKind if kind.name.startswith("DECODER_"))


@dataclass(frozen=True)
class Evidence:
    """One thing a pruner asks for: a key of `VisualTokens.evidence`.

    layer:   of the encoder or decoder, counted from 0. Of the encoder also from -1 backwards, and None is the layer whose output
             the projector reads. Of the decoder, a negative number counts back from the cut (-1: the layer just before it), and
             None is the first layer behind the cut, computed ahead on the tokens that are still there.
    queries: rows of decoder attention that are looked at: "last" (the last token of the prompt), "text" (mean over the question,
             which is all text after the image), "each" (every token of the question) or, raw alone, "image" (mean over the tokens
             of the token's own image). Of keys and hidden states, "text" means those of the question instead of those of the image.
    joint:   encoder attention of one head as wide as all of them together, instead of the mean over heads.
    raw:     decoder attention before soft cap, mask and softmax: scaled products of queries and keys.
    """

    kind: EvidenceKind
    layer: int | None = None
    queries: str = ""
    joint: bool = False
    raw: bool = False

    @property
    def from_encoder(self) -> bool:
        """Whether the encoder has to be read for it beyond its plain output, one value per visual token."""
        return self.kind in OF_THE_ENCODER

    @property
    def from_decoder(self) -> bool:
        """Whether it is known at a cut inside the decoder alone."""
        return self.kind in OF_THE_DECODER

    @property
    def of_question(self) -> bool:
        """Whether it depends on what is asked. States of visual tokens count as if it did: in some decoders they see the text."""
        return self.kind is EvidenceKind.QUESTION or self.from_decoder

    @property
    def per_token(self) -> bool:
        """Whether there is one value per visual token, which is padded and indexed with the tokens."""
        return self.from_encoder or self.kind is EvidenceKind.DECODER_ATTENTION or (self.from_decoder and self.queries != "text")

    @property
    def of_image(self) -> bool:
        """Whether it is the same whatever is asked about the image, so that it can be kept with its encoding."""
        return not self.of_question

    def __str__(self) -> str:
        rows = self.kind is EvidenceKind.DECODER_ATTENTION
        whose = _FROM.get(self.queries, "") if rows else "of the question" * bool(self.queries)
        told = (str(self.kind), self._layer, whose, "joint heads" * self.joint, "before the softmax" * self.raw)
        return ", ".join(part for part in told if part)

    @property
    def _layer(self) -> str:
        """Which layer, in words; "" where that goes without saying."""
        if self.layer is None:
            return "the layer after the cut" if self.from_decoder else ""
        if self.layer >= 0:
            return f"layer {self.layer}"
        if self.from_decoder:
            return "the layer before the cut" if self.layer == -1 else f"{-self.layer} layers before the cut"
        return "the last layer" if self.layer == -1 else f"layer {-self.layer} from the end"


class Question(NamedTuple):
    """The embedded question of each image: embedding [B T D_text], valid [B T] bool, False for padding."""

    embedding: Tensor
    valid: Tensor


QUESTION = Evidence(EvidenceKind.QUESTION)  # -> Question
IDENTITY = Evidence(EvidenceKind.IDENTITY)  # -> [B] int64, a hash of the pixels, whatever batch an image comes in


def encoder_attention(layer: int | None = None, joint: bool = False) -> Evidence:
    """Attention [B N] each token receives from the encoder's summary token or, where it has none, from all tokens; mean over heads.

    A visual token of several patches has their mean. joint: softmax(q k / sqrt(D)) of all heads' queries and keys side by side.
    """
    return Evidence(EvidenceKind.ENCODER_ATTENTION, layer, joint=joint)


def encoder_keys(layer: int | None = None) -> Evidence:
    """Keys [B N H d] of an encoder layer, as its attention takes them, after any rotation; mean over a token's patches."""
    return Evidence(EvidenceKind.ENCODER_KEYS, layer)


def encoder_features(layer: int) -> Evidence:
    """Output [B N D] of an encoder layer, mean over a token's patches."""
    return Evidence(EvidenceKind.ENCODER_FEATURES, layer)


def decoder_attention(layer: int | None = -1, queries: str = "last", raw: bool = False) -> Evidence:
    """Attention [B N] each visual token receives from the `queries` in a decoder layer, after the softmax, mean over heads.

    "each": [B N T], T as in the embedded question. raw: q k / sqrt(d), whatever the mask; "image": mean over these queries, by how
    far they are still there, wherever they stand.

    Raises:
        ValueError: the image's own queries after the softmax, which nothing computes.
    """
    if queries == "image" and not raw:
        raise ValueError("attention of an image's own tokens is read before the softmax: write decoder_attention(..., raw=True)")
    return Evidence(EvidenceKind.DECODER_ATTENTION, layer, queries, raw=raw)


def decoder_keys(layer: int | None = -1, queries: str = "") -> Evidence:
    """Keys [B N D] of a decoder layer with their rotary embedding, heads side by side; "text": a `Question` of keys [B T D]."""
    return Evidence(EvidenceKind.DECODER_KEYS, layer, queries)


def decoder_features(layer: int | None = None, queries: str = "") -> Evidence:
    """Hidden states [B N D] that enter a decoder layer, 0 being the input embeddings; "text": a `Question` of them [B T D]."""
    return Evidence(EvidenceKind.DECODER_FEATURES, layer, queries)
