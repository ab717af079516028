"""Options of a timing session."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from diffprune.config.fields import MOST, BenchmarkSpec, Count, Seed, Whole, Workers

Span = Literal["encoder", "parts", "prefill", "ttft", "decode"]


class Measurement(BaseModel):
    """How to measure.

    batches: rows per request, one cell each.
    modes: eager, and graph on a CUDA device (`cuda_graph`, which leaves out the spans parts and decode); one cell each.
    rounds, warmup: repetitions kept and discarded in a session, the latter per variant and shape.
    slow_rounds: repetitions of ttft and decode in a session, which cost many times a prefill.
    decode_tokens: of the slope that decoding is measured by.
    spans: beside overhead, projection and prefill, which always are timed; parts are score, select and gather.
    inputs: different batches of images and questions the rounds go through.
    threads: of torch; none leaves them as they are.
    benchmark: where images and questions come from; none given, the job's first.
    split, protocol, limit: of that benchmark; the protocol is the job's unless given.
    sessions: processes, one after the other, in each of which all of it is timed anew; from two on, the interval of a speedup is
        over them, so that it holds what differs from process to process.
    seed: of the order in which variants are timed, in the first session; one more in each that follows.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    batches: tuple[Count, ...] = Field((8,), min_length=1)
    modes: tuple[Literal["eager", "graph"], ...] = Field(("eager",), min_length=1)
    rounds: Count = Field(10, ge=2)
    warmup: Whole = Field(5, ge=0, le=MOST)
    slow_rounds: Count = Field(4, ge=2)
    decode_tokens: Count = 16
    spans: tuple[Span, ...] = ("encoder", "parts", "prefill", "ttft", "decode")
    inputs: Count = 2
    threads: Workers | None = None
    benchmark: BenchmarkSpec | None = None
    split: str = "test"
    protocol: str = "llava"
    limit: Count | None = None
    sessions: Annotated[Count, Field(le=21)] = 5
    seed: Seed = 0
