"""Cells over workers: each holds the model and takes the next cell when it is free; the driver alone writes.

Everything here may happen more than once: a cell is published whole under its key, so a worker or driver that dies costs the
cells it was at, and the next run asks for what is missing.
"""

from __future__ import annotations

import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from diffprune.core.budget import Above, Keep, parse
from diffprune.core.record import Cell, Outcome, Provenance
from diffprune.distributed.start import connect
from diffprune.distributed.worker import Worker
from diffprune.store import Store

TRIES = 3  # deaths of a worker that one cell may cause
LINE_S = 5.0  # at most one line of progress in this time where the output is no terminal
NOMINAL_TOKENS = 576  # of an unpruned image, to compare counts with shares when cells are put in order


class SweepFailed(RuntimeError):
    """The run went to its end, and some cells have no result."""


@dataclass(frozen=True)
class Summary:
    """What a sweep did. idle_s: per worker, seconds it held the model and had no cell; wall_s includes starting Ray."""

    done: int
    skipped: int
    wall_s: float
    idle_s: tuple[float, ...] = ()
    deaths: int = 0


def weight(cell: Cell) -> float:
    """How long a cell takes beside the others, roughly: an order for the queue, and the estimate of the time left."""
    budget = parse(cell.budget)
    share = (
        0.5 if isinstance(budget, Above) else min(1.0, budget.num / NOMINAL_TOKENS) if isinstance(budget, Keep) else budget.share
    )
    return (0.2 + share) * (cell.limit or 1000)


def sweep(
    cells: Sequence[Cell],
    store_root: Path | str,
    provenance: Provenance,
    *,
    workers: int,
    model: str,
    resume: bool = True,
    address: str | None = None,
) -> Summary:
    """Evaluate the cells that the store does not have yet; publish each as soon as it is found.

    Where nothing is missing, neither Ray nor a model is started. address: of a running cluster; None starts a local one, unless
    this process is in a Ray session or a submitted job already.

    Raises:
        ValueError: a cell that is not one to evaluate, no worker, or a model that cannot be loaded.
        SweepFailed: some cells failed; the others are in the store, and so are the reasons (`outcomes`).
    """
    if workers < 1:
        raise ValueError(f"workers is {workers}: a sweep needs at least 1")
    if wrong := [cell.verb for cell in cells if cell.verb != "evaluate"]:
        raise ValueError(f"a sweep takes cells to evaluate, not to {wrong[0]}: those run alone on a host")
    start, store = time.perf_counter(), Store(store_root)
    done = store.done() if resume else set()
    asked = {cell.key: cell for cell in cells}
    todo = sorted((cell for key, cell in asked.items() if key not in done), key=lambda c: (-weight(c), c.benchmark, c.key))
    skipped = len(asked) - len(todo)
    if not todo:
        print(f"evaluate: all {skipped} cells are in the store already", flush=True)
        return Summary(0, skipped, time.perf_counter() - start)
    with connect(address, workers), _progress(todo, skipped) as advance:
        run = _Run(store, provenance, model, deque(todo), advance)
        run.go(min(workers, len(todo)))
    summary = Summary(run.done, skipped, time.perf_counter() - start, run.idle_s(), run.deaths)
    print(f"evaluate: {run.done} cells in {summary.wall_s:.1f} s, workers idle for {sum(summary.idle_s):.1f} s", flush=True)
    if run.failed:
        name, reason = next(iter(run.failed.items()))
        raise SweepFailed(
            f"{len(run.failed)} of {len(todo)} cells failed and will be tried again by the next run; first {name}: {reason}"
        )
    return summary


@dataclass(eq=False)
class _Slot:
    """A worker's place. cell: what it is at, None while it loads; since: when it had the model; busy_s: time in cells."""

    actor: Any
    cell: Cell | None = None
    since: float = 0.0
    busy_s: float = 0.0
    until: float = 0.0


@dataclass
class _Run:
    """The queue of one sweep and the workers that empty it."""

    store: Store
    provenance: Provenance
    model: str
    queue: deque[Cell]
    advance: Callable[[Cell], None]
    slots: list[_Slot] = field(default_factory=list)
    running: dict[Any, _Slot] = field(default_factory=dict)
    tries: Counter[str] = field(default_factory=Counter)
    failed: dict[str, str] = field(default_factory=dict)
    done: int = 0
    deaths: int = 0

    def go(self, workers: int) -> None:
        resources = ray.cluster_resources()
        workers = min(workers, max(1, int(resources.get("CPU", 1))))  # one that finds no CPU would be waited for without end
        gpus = min(1.0, resources.get("GPU", 0) / workers)
        self.kind = ray.remote(num_cpus=1, num_gpus=gpus)(Worker)
        try:
            for _ in range(workers):
                self.slots.append(_Slot(self.kind.remote()))
                self._prepare(self.slots[-1])
            while self.queue or any(slot.cell for slot in self.running.values()):
                for ref in ray.wait(list(self.running))[0]:
                    self._collect(ref, self.running.pop(ref))
        finally:
            for slot in self.slots:
                ray.kill(slot.actor)

    def idle_s(self) -> tuple[float, ...]:
        return tuple(max(0.0, slot.until - slot.since - slot.busy_s) for slot in self.slots if slot.since)

    def _prepare(self, slot: _Slot) -> None:
        slot.cell = None
        self.running[slot.actor.prepare.remote(self.model)] = slot

    def _next(self, slot: _Slot) -> None:
        slot.cell, slot.until = (self.queue.popleft() if self.queue else None), time.perf_counter()
        if slot.cell:
            self.running[slot.actor.run.remote(slot.cell)] = slot
            self.tries[slot.cell.key] += 1

    def _collect(self, ref: Any, slot: _Slot) -> None:
        cell = slot.cell
        try:
            found = ray.get(ref)
        except RayTaskError as error:  # the same cell gives the same error, so it is not tried again
            if cell is None:
                raise error.cause from None
            self._next(slot)
            self._fail(cell, f"{type(error.cause).__name__}: {_line(error.cause)}")
        except RayError as error:
            self._replace(slot, cell, _line(error))
        else:
            if cell is None:
                slot.since = slot.since or time.perf_counter()
                self._next(slot)
                return
            slot.busy_s += found[1]
            self._next(slot)  # before writing: the worker need not wait for the disk
            outcome = Outcome("ok", "", len(found[0]), found[1])
            self.store.publish({"predictions": found[0], "outcomes": [outcome]}, cell=cell, provenance=self.provenance)
            self.done += 1
            self.advance(cell)

    def _replace(self, slot: _Slot, cell: Cell | None, reason: str) -> None:
        """A worker died: its cell goes back to the front of the queue, a new process takes its place."""
        self.deaths += 1
        key = cell.key if cell else "prepare"
        if cell is None:
            self.tries[key] += 1
            if self.tries[key] >= TRIES:
                raise RuntimeError(f"workers die while they load {self.model}: {reason}")
        elif self.tries[key] >= TRIES:
            self._fail(cell, f"the worker died {TRIES} times, last: {reason}")
        else:
            self.queue.appendleft(cell)
        ray.kill(slot.actor)
        slot.actor = self.kind.remote()
        resting = [other for other in self.slots if other is not slot and other not in self.running.values()]
        for other in resting[: len(self.queue)]:
            self._next(other)
        if self.queue:
            self._prepare(slot)
        else:
            slot.cell = None

    def _fail(self, cell: Cell, reason: str) -> None:
        self.failed[f"{cell.pruner} {cell.budget} {cell.benchmark}"] = reason
        self.store.publish({"outcomes": [Outcome("failed", reason, 0, 0.0)]}, cell=cell, provenance=self.provenance)
        self.advance(cell)


def _line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{lines[0]:.300}" if lines else ""


@contextmanager
def _progress(todo: Sequence[Cell], skipped: int) -> Iterator[Callable[[Cell], None]]:
    """A bar on a terminal, lines elsewhere; the time left follows the weights of what is left."""
    if sys.stdout.isatty():
        columns = TextColumn("evaluate"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn()
        with Progress(*columns) as bar:
            task = bar.add_task("evaluate", total=skipped + len(todo), completed=skipped)
            yield lambda cell: bar.advance(task)
        return
    start, total, shown = time.perf_counter(), sum(map(weight, todo)), 0.0
    found, past = 0, 0.0

    def advance(cell: Cell) -> None:
        nonlocal found, past, shown
        found, past, now = found + 1, past + weight(cell), time.perf_counter()
        if now - shown >= LINE_S or found == len(todo):
            left = (now - start) * (total - past) / past
            print(
                f"evaluate: {skipped + found}/{skipped + len(todo)} cells, {now - start:.0f} s, about {left:.0f} s left", flush=True
            )
            shown = now

    yield advance


def exclusive(fn: Callable[..., Any], *args: Any, address: str | None = None, **kwargs: Any) -> Any:
    """`fn(*args, **kwargs)` in a process of Ray's that has every CPU and GPU of one host to itself: for measuring time.

    Raises whatever `fn` raises. It waits until the host is free, so no sweep may be running in the same session.
    """
    with connect(address):
        hosts = [node["Resources"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")]
        host = max(hosts, key=lambda resources: (resources.get("GPU", 0), resources["CPU"]))
        alone = ray.remote(num_cpus=host["CPU"], num_gpus=host.get("GPU", 0), max_retries=0)(fn)
        try:
            return ray.get(alone.remote(*args, **kwargs))
        except RayTaskError as error:
            raise error.cause from error
