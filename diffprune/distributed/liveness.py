"""Whether processes that owe an answer still work: Ray tells of those that died, not of those that hang.

Their driver asks Ray where they run and looks at them there, by one small task a node. One that has used no processor, read and
written nothing and kept its memory for a while is killed; its death is what others go on from. Nothing runs in the processes
themselves, so one that is frozen, or holds the interpreter's lock for ever, is found like any other.
"""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import psutil
import ray
from ray._private.state import state as ray_state
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from diffprune.distributed.watchdog import BUSY, kill_process
from diffprune.io.run_lock import start_ticks

LOOK_S = 15.0  # between two looks
QUIET_S = 30.0  # an answer is not missed before
HANG_S = 180.0  # without any work
START_S = 300.0  # for a process to begin, where nobody else is at work
MOVED_BYTES = 1 << 20  # read, written, or of memory taken or given back: more is work, as that of one that loads from a slow disk


@dataclass(frozen=True)
class Process:
    """Where an actor runs."""

    node: str
    pid: int


@dataclass(frozen=True)
class Work:
    """What a process and its children have done so far. ticks: its start; processor_s: on all cores; moved: bytes read and written;
    memory: bytes it has now."""

    ticks: int
    processor_s: float
    moved: int
    memory: int

    def more(self, before: Work, seconds: float) -> bool:
        """Whether it has worked since `before`, so many seconds ago."""
        busy = self.processor_s - before.processor_s > BUSY * seconds
        return busy or self.moved - before.moved > MOVED_BYTES or abs(self.memory - before.memory) > MOVED_BYTES


def work(pids: Sequence[int]) -> dict[int, Work]:
    """What these processes of this host have done; without those that have ended."""
    found = {}
    for pid in pids:
        with suppress(psutil.Error):
            one = psutil.Process(pid)
            family = [one, *one.children(recursive=True)]
            times, moved = [p.cpu_times() for p in family], sum(map(_moved, family))
            processor_s = sum(t.user + t.system for t in times)
            found[pid] = Work(start_ticks(pid) or 0, processor_s, moved, sum(p.memory_info().rss for p in family))
    return found


def _moved(process: psutil.Process) -> int:
    """Bytes read and written, of caches and disks; 0 on a system that does not count them."""
    with suppress(psutil.AccessDenied, AttributeError):
        counted = process.io_counters()
        return int(counted.read_bytes + counted.write_bytes + counted.read_chars + counted.write_chars)
    return 0


@dataclass
class _Seen:
    """An actor that owes an answer. since: when it was seen at work, or first missed; at: when `last` was found."""

    since: float
    process: Process | None = None
    last: Work | None = None
    at: float = 0.0


@dataclass
class Watch:
    """The actors of one driver that owe it an answer. asked: what nodes were asked, which they have until the next look to say."""

    seen: dict[Any, _Seen] = field(default_factory=dict)
    asked: list[tuple[str, Any]] = field(default_factory=list)

    def look(self, working: Sequence[Any], loading: Sequence[Any] = (), patient: bool = False) -> list[tuple[Any, str]]:
        """Those of these actors that hang, with the reason; they are killed. Call it every `LOOK_S` with all whose answer is due.

        loading: may wait while another of them works, as one does that downloads for all. patient: processes that have not begun
        are waited for without limit, as they may wait for nodes.
        """
        now = time.monotonic()
        self.seen = {actor: self.seen.get(actor) or _Seen(now) for actor in (*working, *loading)}
        self._hear(now)
        served = set(loading) if any(self._works(self.seen[one], now) for one in loading) else set()
        hanging = [
            (actor, reason)
            for actor, seen in self.seen.items()
            if (reason := self._reason(actor, seen, now, patient)) and actor not in served
        ]
        for actor, _ in hanging:
            kill(actor, self.seen.pop(actor))
        self._ask()
        return hanging

    def _hear(self, now: float) -> None:
        """What the nodes have said since the last look; one that says nothing is Ray's to notice."""
        told: dict[Process, Work] = {}
        for node, ref in self.asked:
            with suppress(ray.exceptions.RayError, ray.exceptions.GetTimeoutError):
                told |= {Process(node, pid): found for pid, found in ray.get(ref, timeout=0).items()}
        for seen in self.seen.values():
            if seen.process and (found := told.get(seen.process)):
                if seen.last is None or found.more(seen.last, now - seen.at):
                    seen.since = now
                seen.last, seen.at = found, now

    def _works(self, seen: _Seen, now: float) -> bool:
        return seen.process is not None and now - seen.since <= HANG_S

    def _reason(self, actor: Any, seen: _Seen, now: float, patient: bool) -> str:
        """Why one thinks that it hangs; "" where it does not."""
        if seen.process is None:
            there = ray_state.actor_table(actor._actor_id.hex(), None, None)
            if there.get("State") == "ALIVE":
                seen.process, seen.since = Process(there["Address"]["NodeID"], there["Pid"]), now
            elif not patient and now - seen.since > START_S:
                return f"its process did not begin in {now - seen.since:.0f} s"
        elif seen.last and not self._works(seen, now):
            return f"process {seen.process.pid} hangs: it did nothing for {now - seen.since:.0f} s"
        return ""

    def _ask(self) -> None:
        nodes: dict[str, list[int]] = defaultdict(list)
        for seen in self.seen.values():
            if seen.process:
                nodes[seen.process.node].append(seen.process.pid)
        self.asked = [(node, _on(node, work).remote(pids)) for node, pids in nodes.items()]


def _on(node: str, function: Any) -> Any:
    """A task for one node."""
    here = NodeAffinitySchedulingStrategy(node, soft=False)
    return ray.remote(num_cpus=0, max_retries=0, scheduling_strategy=here)(function)


def kill(actor: Any, seen: _Seen) -> None:
    """For Ray, and for its host, where a frozen process does not hear Ray."""
    if seen.process and seen.last:
        _on(seen.process.node, kill_process).remote(seen.process.pid, seen.last.ticks)
    ray.kill(actor)


@contextmanager
def watched(working: Callable[[], Sequence[Any]]) -> Iterator[None]:
    """Whoever waits for answers of these actors within the block hears of the death of one that hangs. working: those of which an
    answer is due; asked by another thread."""
    ended = threading.Event()

    def look() -> None:
        watch = Watch()
        while not ended.wait(LOOK_S):
            for _, reason in watch.look(working()):
                print(f"{reason}; it is killed", flush=True)

    thread = threading.Thread(target=look, daemon=True, name="liveness")
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(LOOK_S)
