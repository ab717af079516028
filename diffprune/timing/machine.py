"""Threads, memory and other load of the machine while it is timed, and flags for measurements that they affect."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

FEW = 30  # repetitions below which a series is flagged
OUTLIER = 5.0  # times the median of its series
DRIFT = 0.02  # share by which a session may become slower or faster
BUSY_CORES = 0.25  # of others, on average over the session
FOREIGN_BYTES = 1.5 * 2**30  # of device memory that is not ours; a CUDA context alone takes part of it
BLOCK = 31 * 2**20  # bytes; glibc never raises its thresholds beyond 32 MiB by itself


@contextmanager
def steady(threads: int | None) -> Iterator[int]:
    """Run with this many threads of torch, then as before, and with memory as in a process that has worked for a while.

    Yields the number of threads.
    """
    keep_memory()
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        yield threads or before
    finally:
        torch.set_num_threads(before)


def keep_memory() -> None:
    """Let host memory that is freed stay with this process.

    glibc hands freed memory back to the system above thresholds that it raises to the size of the largest block freed so far
    (mallopt(3), M_MMAP_THRESHOLD). In a young process every long prefill therefore pays for its memory again, page by page, and
    no short one does: a speedup that pruning has not earned, and that is gone after the first large batch. Other allocators
    are not affected.
    """
    torch.ones(BLOCK, dtype=torch.uint8)


def processor_seconds() -> tuple[float, float, float]:
    """(wall, processor seconds of the whole machine, of this process); the machine's is nan where the system does not tell."""
    own = sum(os.times()[:4])
    try:
        ticks = [int(word) for word in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    except (OSError, ValueError):
        return time.monotonic(), float("nan"), own
    return time.monotonic(), (sum(ticks) - ticks[3] - ticks[4]) / os.sysconf("SC_CLK_TCK"), own


def others(start: tuple[float, float, float], end: tuple[float, float, float]) -> float:
    """Cores that anybody else kept busy between two readings; nan where unknown."""
    return (end[1] - start[1] - (end[2] - start[2])) / max(end[0] - start[0], 1e-9)


def machine_flags(device: torch.device, busy_cores: float, threads: int) -> list[str]:
    """Flags of the session: device, threads, and whether others used the machine."""
    shared = busy_cores > BUSY_CORES
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        shared |= total - free - torch.cuda.memory_reserved(device) > FOREIGN_BYTES
    return [f"threads_{threads}"] + ["cpu_only"] * (device.type == "cpu") + ["shared_device"] * shared


def drifted(series: Sequence[Sequence[float]]) -> bool:
    """Whether the machine became slower or faster by over 2 %: last third against first, each series by its own median."""
    rows = np.array([np.asarray(s) / np.median(s) for s in series if len(s) >= 6 and np.median(s) > 0])
    if not rows.size:
        return False
    third = rows.shape[1] // 3
    return bool(abs(np.median(rows[:, -third:]) / np.median(rows[:, :third]) - 1) > DRIFT)


def value_flags(values: Sequence[float]) -> list[str]:
    """Flags of one series of repetitions. Nothing is ever removed from it."""
    far = bool(len(values)) and bool(max(values) > OUTLIER * max(float(np.median(values)), 1e-9))
    return ["outlier"] * far
