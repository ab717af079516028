"""A function of tensors as one CUDA graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

WARMUPS = 3  # runs on a side stream before capture: libraries set themselves up, nothing of which may be captured


@cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """Where graphs of a device are made: all on one stream, or they would not share the memory of their pool. Torch's own stream is
    of the device that was current when the first graph was made."""
    return torch.cuda.Stream(device)


class Captured:
    """A function of tensors as one CUDA graph: a call copies its arguments into the graph's own and replays.

    The answer is overwritten by the next call. inputs: examples, whose shapes are fixed from then on; the graph is of their device.
    """

    def __init__(self, call: Callable[..., Any], inputs: Sequence[Tensor], pool: Any) -> None:
        self.inputs = [tensor.clone() for tensor in inputs]
        with torch.cuda.device(self.inputs[0].device):
            self._capture(call, pool)

    def _capture(self, call: Callable[..., Any], pool: Any) -> None:
        side = _stream(self.inputs[0].device)
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARMUPS):
                call(*self.inputs)
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, pool=pool, stream=side):
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
