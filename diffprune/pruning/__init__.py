"""The one path from a batch to logits, and forward hooks that run it inside a user's own calls.

`path` holds the functions; they are re-exported here, so that a caller writes `pruning.shrink(...)`.
"""

from diffprune.pruning.path import (
    POSITIONS,
    Packed,
    answer,
    blind,
    cut,
    decoder_inputs,
    embeddings,
    forward,
    full_windows,
    generate,
    merged,
    plan_of,
    rows_of_images,
    select,
    shortened,
    shrink,
    with_question,
)

__all__ = [
    "POSITIONS", "Packed", "answer", "blind", "cut", "decoder_inputs", "embeddings", "forward", "full_windows", "generate",
    "merged", "plan_of", "rows_of_images", "select", "shortened", "shrink", "with_question",
]  # fmt: skip
