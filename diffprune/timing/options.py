"""Options of a timing session."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from diffprune.config.fields import BenchmarkSpec
from diffprune.core.spec import Spec

Span = Literal["encoder", "parts", "prefill", "ttft", "decode"]


class Measurement(BaseModel):
    """How to measure.

    batches: rows per request, one cell each. rounds, warmup: repetitions kept and discarded, the latter per variant and shape.
    modes: "eager", and "graph" on a CUDA device (`graphed`, which leaves out the spans parts and decode); one cell each.
    slow_rounds: repetitions of `ttft` and `decode`, which cost many times a prefill. decode_tokens: of the slope.
    spans: beside overhead, projection and prefill, which always are timed: `parts` are score, select and gather.
    inputs: different batches of images and questions the rounds go through. threads: of torch; none leaves them as they are.
    benchmark, split, limit: where images and questions come from. seed: of the order in which variants are timed.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    batches: tuple[int, ...] = Field((8,), min_length=1)
    modes: tuple[Literal["eager", "graph"], ...] = Field(("eager",), min_length=1)
    rounds: int = Field(30, ge=2)
    warmup: int = Field(10, ge=0)
    slow_rounds: int = Field(10, ge=2)
    decode_tokens: int = Field(16, ge=1)
    spans: tuple[Span, ...] = ("encoder", "parts", "prefill", "ttft", "decode")
    inputs: int = Field(2, ge=1)
    threads: int | None = Field(None, ge=1)
    benchmark: BenchmarkSpec = Spec("world", (("like", "gqa"),))
    split: str = "test"
    limit: int | None = Field(None, ge=1)
    seed: int = 0
