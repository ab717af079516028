"""Metrics of a run for Prometheus: Ray exports on each node what the processes there have counted; `cluster/grafana.json` draws it.

Counting is an addition in memory, of microseconds, and nobody waits for it: Ray's own threads send every few seconds. Training
counts nothing by itself; the driver reads its step log. Where no Ray runs, or its metrics are off, nothing happens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import ray
from ray.util.metrics import Counter, Gauge

from diffprune.core.records import Prediction
from diffprune.io import event_log

OF_RUN = ("run", "stage")


@dataclass(frozen=True)
class _Metric:
    """name: Prometheus has `ray_` before it. tags: its labels."""

    name: str
    description: str
    tags: tuple[str, ...]


class Counted(_Metric):
    """A sum that only grows, from each process that adds to it."""

    @property
    def exported(self) -> str:
        """Its name in Prometheus."""
        return f"ray_{self.name}_total"

    @cached_property
    def _counter(self) -> Counter:
        return Counter(self.name, self.description, self.tags)

    def add(self, number: float, *labels: str) -> None:
        """labels: one for each of `tags`."""
        if number > 0 and ray.is_initialized():
            self._counter.inc(number, dict(zip(self.tags, labels, strict=True)))


class Shown(_Metric):
    """The last value."""

    @property
    def exported(self) -> str:
        """Its name in Prometheus."""
        return f"ray_{self.name}"

    @cached_property
    def _gauge(self) -> Gauge:
        return Gauge(self.name, self.description, self.tags)

    def set(self, value: float, *labels: str) -> None:
        """labels: one for each of `tags`."""
        if ray.is_initialized():
            self._gauge.set(value, dict(zip(self.tags, labels, strict=True)))


CELLS = Counted("diffprune_cells", "Cells that have a result (ok), or a reason why they have none (failed).", (*OF_RUN, "status"))
EXAMPLES = Counted("diffprune_examples", "Images trained on, or questions answered.", OF_RUN)
KEPT_TOKENS = Shown("diffprune_kept_tokens", "Visual tokens kept of an image, mean of the last step or batch.", OF_RUN)
IDLE_SHARE = Shown("diffprune_idle_share", "Part of the time that workers had the model and nothing to do, in [0, 1].", OF_RUN)
WORKERS_LOST = Counted("diffprune_workers_lost", "Processes that died at work.", OF_RUN)
RESTARTS = Counted("diffprune_restarts", "Times that all workers began again from the last state.", OF_RUN)
CACHE_HITS = Counted("diffprune_cache_hits", "Images, or beginnings of prompts, that needed no model.", ("cache",))
CACHE_MISSES = Counted("diffprune_cache_misses", "Images, or beginnings of prompts, that the model was run on.", ("cache",))
METRICS: tuple[Counted | Shown, ...] = (
    CELLS, EXAMPLES, KEPT_TOKENS, IDLE_SHARE, WORKERS_LOST, RESTARTS, CACHE_HITS, CACHE_MISSES,
)  # fmt: skip


def answered(run: str, rows: Sequence[Prediction]) -> None:
    """A batch of questions was answered; those without a picture, or without an answer, kept no tokens."""
    EXAMPLES.add(len(rows), run, "evaluate")
    if kept := [row.visual_kept for row in rows if row.visual_kept]:
        KEPT_TOKENS.set(sum(kept) / len(kept), run, "evaluate")


def worker_lost(run: str, stage: str, reason: str) -> None:
    """A process died at work; the event log says so, too."""
    event_log.tell("worker_lost", stage=stage, reason=reason)
    WORKERS_LOST.add(1, run, stage)


def restarted(run: str, stage: str, workers: int) -> None:
    """All workers have begun again from the last state; the event log says so, too."""
    event_log.tell("restarted", stage=stage, workers=workers)
    RESTARTS.add(1, run, stage)
