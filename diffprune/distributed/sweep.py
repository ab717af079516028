"""Cells over workers: each holds the model and takes the next batch when it is free; the driver alone writes.

Everything here may happen more than once: a cell is published whole under its key, and answers of cells that take long are kept
meanwhile (`store.unfinished`), so a worker that dies costs the batch it was at, a driver the answers of the last seconds (`KEEP_S`,
`writer.EVERY_S`), and the next run asks for what is missing.
"""

from __future__ import annotations

import queue
import time
from collections import defaultdict, deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import ActorUnavailableError, RayError, RayTaskError

from diffprune.core import garbage, registry
from diffprune.core.benchmark import Benchmark
from diffprune.core.cell import Cell
from diffprune.core.errors import first_line, with_class
from diffprune.core.records import Outcome, Prediction, Provenance
from diffprune.core.spec import Spec
from diffprune.distributed import metrics, resources
from diffprune.distributed.cluster import connect
from diffprune.distributed.liveness import LOOK_S, QUIET_S, Watch
from diffprune.distributed.worker import Worker
from diffprune.evaluate.evaluator import evaluated, gathered
from diffprune.evaluate.main_figure import answered, main_figure
from diffprune.evaluate.progress import SweepProgress
from diffprune.evaluate.schedule import Batch, ListBatches, Work, most_batches
from diffprune.io.run_lock import attempts_at
from diffprune.io.shared_storage import Proof, Unseen, proof
from diffprune.store import Store, opened
from diffprune.store.unfinished import Kept
from diffprune.store.writer import Writer

TRIES = 3  # deaths of a worker that one batch may cause, and deaths in a row while one place loads
UNREACHED = 0.125  # deaths that a call counts which does not get through: hardly its batch's fault, yet not asked for ever
IDLE_S = 5.0  # between two looks at how idle workers are
KEEP_S = 10.0  # between two looks for answers to keep, which are durable at the second, unless their cell is finished by then


class SweepFailed(RuntimeError):
    """The run went to its end, and some cells have no result."""


@dataclass(frozen=True)
class Summary:
    """What a sweep did. busy_s, idle_s: per worker that loaded the model, seconds it worked, and seconds it had the model and
    no batch until the last answer was in; wall_s includes starting Ray."""

    done: int
    skipped: int
    wall_s: float
    idle_s: tuple[float, ...] = ()
    busy_s: tuple[float, ...] = ()
    deaths: int = 0

    @property
    def idle_shares(self) -> tuple[float, ...]:
        """Idle part of the time each worker had the model."""
        return tuple(idle / max(idle + busy, 1e-9) for idle, busy in zip(self.idle_s, self.busy_s, strict=True))


def sweep(
    cells: Sequence[Cell],
    place: Store | Path | str,
    provenance: Provenance,
    *,
    workers: int,
    model: Spec,
    resume: bool = True,
    address: str | None = None,
    tell: Callable[[str], None] | None = None,
    gpus: float = 0.0,
) -> Summary:
    """Evaluate the cells that the store does not have yet; publish them, many at a time, within seconds.

    Where nothing is missing, neither Ray nor a model is started. address: of a running cluster; None starts a local one, unless
    this process is in a Ray session or a submitted job already. tell: hears how far it is. gpus: of each worker.

    Raises:
        ValueError: a cell that is not one to evaluate, no worker, or a model that cannot be loaded.
        SweepFailed: some cells failed; the others are in the store, and so are the reasons (`outcomes`).
        RuntimeError: no host sees the run's storage, or on all of them workers die, or hang, while they load.
    """
    if workers < 1:
        raise ValueError(f"workers is {workers}: a sweep needs at least 1")
    if wrong := [cell.verb for cell in cells if cell.verb != "evaluate"]:
        raise ValueError(f"a sweep takes cells to evaluate, not to {wrong[0]}: those run alone on a host")
    start, store = time.perf_counter(), opened(place)
    done = store.done() if resume else set()
    asked = {cell.key: cell for cell in cells}
    todo = [cell for key, cell in asked.items() if key not in done]
    skipped = len(asked) - len(todo)
    if not todo:
        print(f"evaluate: all {skipped} cells are in the store already", flush=True)
        return Summary(0, skipped, time.perf_counter() - start)
    with connect(address, workers), SweepProgress(todo, skipped, tell) as progress, Writer(store, provenance) as writer:
        storage = proof(attempts_at(store.blobs, provenance.run), provenance.attempt)
        run = _Run(model, todo, min(workers, most_batches(todo)), progress, writer, gpus, storage)
        run.go()
    summary = Summary(run.done, skipped, time.perf_counter() - start, *run.times(), run.deaths)
    idle = ", ".join(f"{share:.1%}" for share in summary.idle_shares)
    print(f"evaluate: {run.done} cells in {summary.wall_s:.1f} s, workers idle for {idle} of the time", flush=True)
    if run.failed:
        name, reason = next(iter(run.failed.items()))
        raise SweepFailed(
            f"{len(run.failed)} of {len(todo)} cells failed and will be tried again by the next run; first {name}: {reason}"
        )
    return summary


@dataclass(eq=False)
class _Slot:
    """A worker's place. asked: what it is at and what comes next, (future, piece), None while it loads; heard: when it was asked
    or answered last; since: when it had the model; busy_s: time it worked; deaths: of its processes in a row while they loaded."""

    number: int
    actor: Any = None
    asked: deque[tuple[Future[Any], ListBatches | Batch | None]] = field(default_factory=deque)
    heard: float = 0.0
    since: float = 0.0
    busy_s: float = 0.0
    deaths: int = 0

    @property
    def loading(self) -> bool:
        """Whether its process has no model yet."""
        return bool(self.asked) and self.asked[0][1] is None

    @property
    def given_up(self) -> bool:
        """Whether it gets no other process: Ray would put that where the last ones died, as other hosts are taken."""
        return self.deaths >= TRIES


@dataclass
class _Run:
    """The workers of one sweep, and what they bring."""

    model: Spec
    todo: Sequence[Cell]
    workers: int | float
    progress: SweepProgress
    writer: Writer
    gpus: float = 0.0
    storage: Proof | None = None
    slots: list[_Slot] = field(default_factory=list)
    running: dict[Future[Any], _Slot] = field(default_factory=dict)
    ended: queue.SimpleQueue[Future[Any]] = field(default_factory=queue.SimpleQueue)  # as Ray tells of each that it is there
    resting: dict[_Slot, None] = field(default_factory=dict)  # slots that found nothing to do, those with a model first
    tries: defaultdict[object, float] = field(default_factory=lambda: defaultdict(float))  # deaths of workers at a piece
    seconds: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    told: dict[str, float] = field(default_factory=dict)  # of these seconds, those of answers that are kept
    benchmarks: dict[Spec, Benchmark] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    done: int = 0
    deaths: int = 0
    last: float = 0.0
    shared: float = 0.0
    looked: float = 0.0
    kept: float = 0.0

    @property
    def run(self) -> str:
        return self.writer.provenance.run

    def go(self) -> None:
        """Until every cell is published or given up."""
        workers = int(self.workers)  # all are asked for; those without a node yet join when it comes
        resources.awaited(workers, 1, self.gpus)
        self.over(workers, ray.remote(num_cpus=1, num_gpus=self.gpus)(Worker).remote, ray.kill, Watch())

    def over(self, workers: int, start: Callable[[], Any], stop: Callable[[Any], None], watch: Watch) -> None:
        """The same with workers that are started, stopped and watched by these: `jobs/studies/sweep_scale.py` has none of Ray's."""
        self.start, self.watch = start, watch
        self.work = Work(self.todo, workers)
        self.methods = list(dict.fromkeys(evaluated(cell).pruner for cell in self.todo))
        self.slots = [_Slot(number) for number in range(workers)]
        self._resume()
        try:
            with garbage.looked_for_seldom():
                self._until_done()
        finally:
            for slot in self.slots:
                if slot.actor:
                    stop(slot.actor)
            self._keep(last=True)

    def _until_done(self) -> None:
        for slot in self.slots:
            self._give(slot)
        while self.work.unfinished:
            answer = self._next()
            while answer and (at := self.running.get(answer)):  # none: it was asked of a worker that died
                self._collect(at)
                self._give(at)
                self._give(at)  # one ahead, if there is plenty
            while self.resting and self.work.waiting:
                self._give(next((slot for slot in self.resting if slot.actor), next(iter(self.resting))))
        self._share()

    def _resume(self) -> None:
        """Go on from the answers that an earlier run has kept."""
        for key, kept in self.writer.unfinished.load(self.todo, self.writer.store.done()).items():
            self.work.resumed(key, kept.rows)
            self.progress.resumed(key, len(kept.rows))
            self.seconds[key] = self.told[key] = kept.seconds

    def _keep(self, last: bool = False) -> None:
        """Answers of cells that take long; in the end all of them."""
        found = []
        for cell, rows in self.work.unkept(last):
            seconds = self.seconds[cell.key] - self.told.get(cell.key, 0.0)
            self.told[cell.key] = self.seconds[cell.key]
            found.append((cell, Kept(rows, seconds)))
        if found:
            self.writer.keep(found)

    def _next(self) -> Future[Any] | None:
        """What has ended next. None: nothing for a while; who is quiet was looked at meanwhile, and what hung was replaced."""
        now = time.perf_counter()
        if now - self.looked > LOOK_S:
            self.looked = now
            self._look(now)
        if now - self.kept > KEEP_S:
            self.kept = now
            self._keep()
        try:
            return self.ended.get(timeout=LOOK_S)
        except queue.Empty:
            return None

    def _look(self, now: float) -> None:
        """Processes that hang are as good as dead."""
        quiet = {slot.actor: slot for slot in self.slots if slot.asked and now - slot.heard > QUIET_S}
        loading = [actor for actor, slot in quiet.items() if slot.loading]
        working = [actor for actor, slot in quiet.items() if not slot.loading]
        patient = any(slot.actor and not slot.loading for slot in self.slots)
        for actor, reason in self.watch.look(working, loading, patient):
            slot = quiet[actor]
            answer, piece = slot.asked.popleft()
            del self.running[answer]
            self._lost(slot, piece, reason, dead=True)
            self._give(slot)

    def times(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """(idle, busy) seconds of each worker that had the model."""
        ready = [slot for slot in self.slots if slot.since]
        return tuple(max(0.0, self.last - slot.since - slot.busy_s) for slot in ready), tuple(slot.busy_s for slot in ready)

    def _give(self, slot: _Slot) -> None:
        """Something to do, if there is any; a process first where there is none."""
        self.resting.pop(slot, None)
        if slot.actor is None:
            if slot.given_up:
                return
            if self.work.waiting:
                slot.actor = self.start()
                self._ask(slot, None, slot.actor.prepare.remote(self.model, self.methods, self.storage))
            else:
                self.resting[slot] = None
            return
        if slot.asked and (len(slot.asked) > 1 or not isinstance(slot.asked[0][1], Batch) or not self.work.plenty):
            return
        piece = self.work.next(slot.number)
        if isinstance(piece, Batch):
            self._ask(slot, piece, slot.actor.answer.remote(piece.cell, piece.index))
        elif piece:
            self._ask(slot, piece, slot.actor.batches.remote(piece.cell))
        elif not slot.asked:
            self.resting[slot] = None

    def _ask(self, slot: _Slot, piece: ListBatches | Batch | None, ref: Any) -> None:
        answer = ref.future()
        slot.heard = time.perf_counter()
        slot.asked.append((answer, piece))
        self.running[answer] = slot
        answer.add_done_callback(self.ended.put)

    def _collect(self, slot: _Slot) -> None:
        """The oldest piece of a worker: they end in the order they were asked, so it has ended if any has."""
        answer, piece = slot.asked.popleft()
        del self.running[answer]
        try:
            found = answer.result()
        except RayTaskError as error:  # the same work gives the same error, so it is not tried again
            if piece is None and isinstance(error.cause, Unseen):
                return self._left_out(slot, str(error.cause))
            if piece is None:
                raise error.cause from None
            self._fail(piece, with_class(error.cause))
        except RayError as error:
            self._lost(slot, piece, first_line(error), dead=not isinstance(error, ActorUnavailableError))
        else:
            self.last = slot.heard = time.perf_counter()
            if piece is None:
                slot.since = slot.since or self.last
                slot.deaths = 0  # over a long run some host is always lost
                return
            slot.busy_s += found[1]
            self._found(slot, piece, *found)

    def _found(self, slot: _Slot, piece: ListBatches | Batch, found: Any, seconds: float) -> None:
        """A worker's answer is kept, and the cell written where it was the last one."""
        if isinstance(piece, ListBatches):
            self.progress.listed(piece.cell, sum(map(len, found)))
            for cell, rows in self.work.listed(piece, found):
                self._complete(cell, rows)
            return
        self.seconds[piece.cell.key] += seconds
        complete = self.work.answered(piece, found)
        self._give(slot)  # before writing: the worker need not wait for it
        self.progress.batch(piece.cell, len(found))
        self._told(list(found.values()))
        if complete is not None:
            self._complete(piece.cell, complete)

    def _told(self, rows: Sequence[Prediction]) -> None:
        """Metrics of a batch; of all workers now and then."""
        metrics.answered(self.run, rows)
        if self.last - self.shared >= IDLE_S:
            self._share()

    def _share(self) -> None:
        self.shared, (idle, busy) = self.last, self.times()
        metrics.IDLE_SHARE.set(sum(idle) / max(sum(idle) + sum(busy), 1e-9), self.run, "evaluate")

    def _complete(self, cell: Cell, found: Mapping[int, Prediction]) -> None:
        try:
            rows = gathered(cell, found)
        except RuntimeError as error:
            return self._failed(cell, f"RuntimeError: {first_line(error)}")
        broken = sum(bool(row.error) for row in rows)
        reason = f"{broken} of {len(rows)} answers failed" if broken else ""
        self.told.pop(cell.key, None)
        outcome = Outcome("ok", reason, len(rows), self.seconds.pop(cell.key))
        asked = evaluated(cell).questions
        if asked.benchmark not in self.benchmarks:
            self.benchmarks[asked.benchmark] = registry.make("benchmarks", asked.benchmark)
        figures = [main_figure(asked, answered(rows), self.benchmarks[asked.benchmark])]
        self.writer.publish(cell, {"predictions": rows, "figures": figures, "outcomes": [outcome]})
        self.done += 1
        self.progress.cell(cell)
        metrics.CELLS.add(1, self.run, "evaluate", "ok")

    def _lost(self, slot: _Slot, piece: ListBatches | Batch | None, reason: str, dead: bool) -> None:
        """A worker died: what it was at, and what it had not begun, is for others, and its place gets a new process.

        dead: False where only the call did not get through.
        """
        self.deaths += 1
        metrics.worker_lost(self.run, "evaluate", reason)
        for answer, later in reversed(slot.asked):
            del self.running[answer]
            assert later is not None, "nothing is asked before loading"
            self.work.returned(slot.number, later)
        slot.asked.clear()
        ray.kill(slot.actor)
        slot.actor = None
        if piece is None:
            return self._unloaded(slot, reason)
        self.tries[piece.name] += 1.0 if dead else UNREACHED
        self.work.returned(slot.number, piece)
        if self.tries[piece.name] >= TRIES:
            self._fail(piece, f"the worker {f'died {TRIES} times' if dead else 'was out of reach again and again'}, last: {reason}")

    def _unloaded(self, slot: _Slot, reason: str) -> None:
        """A process died while it loaded. A host on which all do costs its place, not the run, as long as others work."""
        slot.deaths += 1
        if all(one.given_up for one in self.slots):
            raise RuntimeError(f"workers die while they load {self.model}: {reason}")
        if slot.given_up:
            print(f"evaluate: a worker is left out, its process died {TRIES} times while it loaded: {reason}", flush=True)

    def _left_out(self, slot: _Slot, reason: str) -> None:
        """A host that does not see the run's storage costs its places, not the run, as long as others do."""
        metrics.worker_lost(self.run, "evaluate", reason)
        ray.kill(slot.actor)
        slot.actor, slot.deaths = None, TRIES
        if all(one.given_up for one in self.slots):
            raise RuntimeError(reason)
        print(f"evaluate: a worker is left out: {reason}", flush=True)

    def _fail(self, piece: ListBatches | Batch, reason: str) -> None:
        for cell in self.work.given_up(piece):
            self._failed(cell, reason)

    def _failed(self, cell: Cell, reason: str) -> None:
        self.failed[f"{cell.pruner} {evaluated(cell).budget} {evaluated(cell).questions.benchmark}"] = reason
        self.writer.publish(cell, {"outcomes": [Outcome("failed", reason, 0, 0.0)]})
        self.progress.cell(cell)
        metrics.CELLS.add(1, self.run, "evaluate", "failed")
