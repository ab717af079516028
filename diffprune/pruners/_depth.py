"""Depths at which methods cut inside the decoder, in decoders of any depth."""

from __future__ import annotations

from collections.abc import Sequence

PAPERS = 32  # decoder layers of the 7B models that papers state their depths for


def scaled(after: Sequence[int], layers: int) -> tuple[int, ...]:
    """Numbers of layers, stated for 32, as the same fractions of a decoder of `layers`: from 1 to `layers` - 1, each once."""
    return tuple(sorted({min(max(1, round(one * layers / PAPERS)), layers - 1) for one in after}))
