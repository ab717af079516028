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


OF_THE_ENCODER = frozenset({EvidenceKind.ENCODER_ATTENTION, EvidenceKind.ENCODER_KEYS, EvidenceKind.ENCODER_FEATURES})
OF_THE_QUESTION = frozenset({EvidenceKind.QUESTION, EvidenceKind.DECODER_ATTENTION})


@dataclass(frozen=True)
class Evidence:
    """One thing a pruner asks for: a key of `VisualTokens.evidence`.

    layer:   of the encoder or decoder, counted from 0, of the encoder from -1 backwards too; None is the encoder layer whose
             output the projector reads.
    queries: rows of decoder attention that are looked at: "last" (the last position) or "text" (all text after the image).
    joint:   encoder attention of one head as wide as all of them together, instead of the mean over heads.
    """

    kind: EvidenceKind
    layer: int | None = None
    queries: str = ""
    joint: bool = False

    @property
    def from_encoder(self) -> bool:
        """Whether the encoder has to be read for it beyond its plain output, one value per visual token."""
        return self.kind in OF_THE_ENCODER

    @property
    def per_token(self) -> bool:
        """Whether there is one value per visual token, which is padded and indexed with the tokens."""
        return self.from_encoder or self.kind is EvidenceKind.DECODER_ATTENTION

    @property
    def of_image(self) -> bool:
        """Whether it is the same whatever is asked about the image, so that it can be kept with its encoding."""
        return self.kind not in OF_THE_QUESTION

    def __str__(self) -> str:
        layer = "" if self.layer is None else f", layer {self.layer}"
        return f"{self.kind}{layer}{f', {self.queries} queries' if self.queries else ''}{', joint heads' if self.joint else ''}"


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


def decoder_attention(layer: int, queries: str = "last") -> Evidence:
    """Attention [B N] each visual token receives from the `queries` in a decoder layer, mean over heads and queries."""
    return Evidence(EvidenceKind.DECODER_ATTENTION, layer, queries)
