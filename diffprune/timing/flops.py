"""FLOPs and KV bytes of a forward pass, by arithmetic from a shape and the visual tokens that enter each decoder layer.

FLOPs are 2 x multiply-adds. Attention is counted *causal*: query i sees i + 1 keys, so n (n + 1) / 2 pairs instead of n^2, which
is what fused kernels compute; tokens that see each other both ways, as pictures do in some decoders, are all pairs. torch's own
counter takes the full square; `causal_half` is the difference, to be added before the two are compared. The output head is counted
on the last position only. Left out, as everywhere: norms, rotary embedding, softmax, biases and the scorer (under 1 %; about 2 %
for PyramidDrop, which computes queries and keys of the layers behind its cuts). Pairs beyond a sliding window are counted: they are
computed and masked, except by kernels that know the window. A method is never asked anything: only its plan of cuts and the counts
that were left.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from diffprune.core.vlm import Shape


def _attention_width(shape: Shape) -> int:
    return shape.heads * shape.head_dim


def layer_weights(shape: Shape) -> int:
    """Multiply-adds per token in one decoder layer: q, k, v, output, and a gated FFN of three matrices."""
    query, keys = _attention_width(shape), shape.kv_heads * shape.head_dim
    return shape.width * (query + 2 * keys) + query * shape.width + 3 * shape.width * shape.ffn


def prefill_flops(shape: Shape, visual: Sequence[float], text: float | Sequence[float], mutual: Sequence[float] = ()) -> float:
    """One image through the decoder and the head of its last position.

    visual: visual tokens entering each layer (`core.site.tokens_per_layer`); text: text tokens, the frame and separators included,
    in all layers or in each; mutual: tokens in each layer that see each other both ways (none where it is empty).
    """
    weights, query, lengths = layer_weights(shape), _attention_width(shape), _lengths(shape, visual, text)
    pairs = sum(n * (n + 1) for n in lengths) + sum(n * (n - 1) for n in mutual)  # twice as many
    return sum(2 * n * weights for n in lengths) + 2 * query * pairs + 2 * shape.width * shape.vocabulary


def _lengths(shape: Shape, visual: Sequence[float], text: float | Sequence[float]) -> list[float]:
    """Of the row that enters each layer."""
    others = text if isinstance(text, Sequence) else [text] * len(visual)
    assert len(visual) == len(others) == shape.layers, "one count per decoder layer"
    return [seen + other for seen, other in zip(visual, others, strict=True)]


def causal_half(shape: Shape, visual: Sequence[float], text: float | Sequence[float], mutual: Sequence[float] = ()) -> float:
    """FLOPs that a counter of full attention sees above `prefill_flops`: 2 q n (n - 1) in each layer, less those of `mutual`."""
    pairs = sum(n * (n - 1) for n in _lengths(shape, visual, text)) - sum(n * (n - 1) for n in mutual)
    return 2 * _attention_width(shape) * pairs


def encoder_flops(shape: Shape) -> float:
    """One image through the vision encoder: patch embedding, then layers of four projections, full attention, a two-matrix FFN."""
    n, width = shape.patches, shape.vision_width
    per_token = 4 * width * width + 2 * width * shape.vision_ffn
    return shape.tiles * (2 * n * shape.patch_inputs * width + shape.vision_layers * (2 * n * per_token + 4 * n * n * width))


def projector_flops(shape: Shape, tokens: float) -> float:
    """LLaVA's two-layer projector on the tokens that reach it: all of them, or the survivors of a cut before it."""
    return 2 * tokens * (shape.vision_width * shape.width + shape.width * shape.width)


def kv_bytes(
    shape: Shape, visual: Sequence[float], text: float | Sequence[float], element_bytes: int, held: Sequence[float] = ()
) -> float:
    """Keys and values of all layers after the prefill of one image. held: tokens of which each layer keeps them at most, as one
    with a sliding window does (all where it is empty)."""
    kept = [min(n, most) for n, most in zip(_lengths(shape, visual, text), held or [math.inf] * shape.layers, strict=True)]
    return sum(2 * shape.kv_heads * shape.head_dim * element_bytes * n for n in kept)


# --- work, for a roofline ----------------------------------------------------------------------------------------------


class Work(NamedTuple):
    """One matrix product, or the element-wise traffic of one layer: arithmetic, and bytes moved to and from memory."""

    flops: float
    bytes: float


def product(rows: float, inward: float, outward: float, element_bytes: int) -> Work:
    """[rows inward] x [inward outward]: weights and both sides are moved once."""
    return Work(2 * rows * inward * outward, element_bytes * (inward * outward + rows * (inward + outward)))


def prefill_work(shape: Shape, visual: Sequence[float], text: float, batch: int, element_bytes: int) -> list[Work]:
    """The parts of one prefill of `batch` equal rows, read causally, in order; their FLOPs sum to `batch` times `prefill_flops`.

    Products are q with k and v, causal attention by a fused kernel (reads q, k, v and writes its output once), output, gate with
    up, down, and the head of the last position. Element-wise traffic is that of unfused operations, each reading and writing its
    operands: two norms, two residual sums, rotary of q and k, and silu times up.
    """
    query, keys, size = _attention_width(shape), shape.kv_heads * shape.head_dim, element_bytes
    found = []
    for n in (v + text for v in visual):
        rows = batch * n
        moved = rows * (2 * 2 * shape.width + 2 * 3 * shape.width + 2 * (query + keys) + 3 * shape.ffn)
        found += [
            product(rows, shape.width, query + 2 * keys, size),
            Work(batch * 2 * query * n * (n + 1), size * rows * 2 * (query + keys)),
            product(rows, query, shape.width, size),
            product(rows, shape.width, 2 * shape.ffn, size),
            product(rows, shape.ffn, shape.width, size),
            Work(0.0, size * moved),
        ]
    return [*found, product(batch, shape.width, shape.vocabulary, size)]
