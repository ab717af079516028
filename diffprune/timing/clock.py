"""Clocks for timing spans: device events where the work is asynchronous, the host's monotonic clock elsewhere.

A mark is cheap and never waits for the device; `wait` is called once, after the last mark of a run. So spans inside a run need no
synchronisation (which would change what is timed), and tests put a clock of their own in place.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch


class Clock:
    """The host's clock (ns resolution): right where calls return when their work is done, as on a CPU.

    finish: waits until the device has done all it was given; called before a host span starts and after it ends.
    """

    label = "host"

    def __init__(self, finish: Callable[[], None] = lambda: None) -> None:
        self.wait = finish

    def mark(self) -> Any:
        """Now, in the units of this clock."""
        return time.perf_counter_ns()

    def between(self, start: Any, end: Any) -> float:
        """Milliseconds from one mark to a later one; `wait` has been called since."""
        return float(end - start) / 1e6


class EventClock(Clock):
    """CUDA events on a device's current stream. An interval includes the gaps in which the device waits for the host.

    A mark that is made while a graph is captured is part of the graph: every replay sets it anew.
    """

    label = "event"

    def __init__(self, device: torch.device) -> None:
        super().__init__(partial(torch.cuda.synchronize, device))
        self.device = device

    def mark(self) -> Any:
        event = torch.cuda.Event(enable_timing=True, external=torch.cuda.is_current_stream_capturing())
        event.record(torch.cuda.current_stream(self.device))
        return event

    def between(self, start: Any, end: Any) -> float:
        return float(start.elapsed_time(end))


class SyncClock(Clock):
    """The host's clock with the device drained at every mark: for spans that start or end on the host (TTFT, decode)."""

    def mark(self) -> Any:
        self.wait()
        return super().mark()


def clocks(device: torch.device) -> tuple[Clock, Clock]:
    """(for device spans, for host spans) of a device; on a CPU both are the plain host clock."""
    if device.type == "cuda":
        return EventClock(device), SyncClock(partial(torch.cuda.synchronize, device))
    if device.type == "mps":
        return SyncClock(torch.mps.synchronize), SyncClock(torch.mps.synchronize)
    return Clock(), Clock()


class Marks:
    """Intervals of one run by name; names may repeat, their times add up."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self._found: list[tuple[str, Any, Any]] = []

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        """Mark the start and the end of the block."""
        start = self.clock.mark()
        yield
        self._found.append((name, start, self.clock.mark()))

    def around(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """`call`, with every run of it marked."""

        def marked(*args: Any, **kwargs: Any) -> Any:
            with self.span(name):
                return call(*args, **kwargs)

        return marked

    def clear(self) -> None:
        """Forget what was marked."""
        self._found.clear()

    def totals(self) -> dict[str, float]:
        """Wait for the device, then milliseconds per name."""
        self.clock.wait()
        found: dict[str, float] = {}
        for name, start, end in self._found:
            found[name] = found.get(name, 0.0) + self.clock.between(start, end)
        return found
