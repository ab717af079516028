"""A function of tensors as one CUDA graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

WARMUPS = 3  # runs on a side stream before capture: libraries set themselves up, nothing of which may be captured


class Captured:
    """A function of tensors as one CUDA graph: a call copies its arguments into the graph's own and replays.

    The answer is overwritten by the next call. inputs: examples, whose shapes are fixed from then on.
    """

    def __init__(self, call: Callable[..., Any], inputs: Sequence[Tensor], pool: Any) -> None:
        self.inputs = [tensor.clone() for tensor in inputs]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARMUPS):
                call(*self.inputs)
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, pool=pool):
            self.answer = call(*self.inputs)

    def __call__(self, *values: Tensor) -> Any:
        for own, value in zip(self.inputs, values, strict=True):
            own.copy_(value)
        self.graph.replay()
        return self.answer

    @staticmethod
    def pool() -> Any:
        """Memory that graphs share: they never run at the same time."""
        return torch.cuda.graph_pool_handle()
