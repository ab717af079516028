"""The one path from a batch to logits, and forward hooks that run it inside a user's own calls.

`path` holds the functions; they are re-exported here, so that a caller writes `pruning.shrink(...)`.
"""

from diffprune.pruning.path import (
    Packed,
    answer,
    blind,
    decoder_inputs,
    embeddings,
    forward,
    generate,
    inside_decoder,
    plan_of,
    running,
    select,
    shortened,
    shrink,
    with_question,
)
from diffprune.pruning.rows import POSITIONS, cut, rows_of_images
from diffprune.pruning.selection import merged

__all__ = [
    "POSITIONS", "Packed", "answer", "blind", "cut", "decoder_inputs", "embeddings", "forward", "generate", "inside_decoder",
    "merged", "plan_of", "rows_of_images", "running", "select", "shortened", "shrink", "with_question",
]  # fmt: skip
