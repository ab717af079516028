"""Watchdog of a group of workers: each says every few seconds where it is; the driver finds the one that hangs, and kills it.

Its death is what the group restarts from. A worker hangs that says nothing any more (frozen), or whose training thread has done
nothing for a while without waiting for the others (asleep); where all wait, the one that waits elsewhere than the others.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import threading
import time
from collections import Counter
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from diffprune.io.blob_store import Blobs
from diffprune.io.json_object import parsed
from diffprune.io.run_lock import start_ticks
from diffprune.train.checkpoints import WORKERS

BEAT_S = 3.0  # between two words of a worker
HANG_S = 40.0  # without a word, or without work
BUSY = 0.02  # of the time on a processor: more is work; saying where one is takes less
BLIND_S = 10.0  # between two looks at most; beyond, storage was away, so that workers may have spoken to no avail
KILL_S = 20.0  # for a task of Ray's that kills a process, wherever that is
PACKAGE = str(Path(__file__).parents[1])
WAITING = ("torch/distributed/", "/ray/")  # files whose functions wait for other workers or for the driver
# Functions that do: sums over workers, a look at what others have finished, layers of a decoder that is spread over the workers.
WAITS = ("wait_for_all", "_others_done", "_engine_run_backward")


@dataclass(frozen=True)
class Word:
    """What a worker says of itself.

    ticks: its start (`start_ticks`); processor_s: time on processors so far; steps: trained since it began; place: where its
    training thread is; waits: whether that is for others.
    """

    rank: int
    host: str
    node: str
    pid: int
    ticks: int
    number: int
    processor_s: float
    steps: int
    place: str
    waits: bool


class Speaker(threading.Thread):
    """The worker's side: says where the thread that made it is."""

    def __init__(self, blobs: Blobs, attempt: int, rank: int) -> None:
        super().__init__(daemon=True, name="watchdog")
        self.blobs, self.key, self.steps = blobs, f"{WORKERS}/{int(attempt)}-{rank}", 0
        self.watched = threading.get_ident()
        node = ray.get_runtime_context().get_node_id() if ray.is_initialized() else ""  # Ray Train's local mode has none
        self.about = (rank, socket.gethostname(), node, os.getpid(), start_ticks(os.getpid()) or 0)
        self.start()

    def run(self) -> None:
        number, heard = 0, False
        while frame := sys._current_frames().get(self.watched):
            place, waits = where(frame)
            word = Word(*self.about, number := number + 1, time.process_time(), self.steps, place, waits)
            if heard and self._given_up():
                return
            with suppress(OSError):
                self.blobs.replace(self.key, json.dumps(asdict(word)).encode())
                heard = True
            time.sleep(BEAT_S)

    def _given_up(self) -> bool:
        """Whether our last word is gone, or another process has this rank: while we were frozen, they have done without us."""
        try:
            word = Word(**parsed(self.blobs.read(self.key)))
        except FileNotFoundError:
            return True
        except (OSError, ValueError, TypeError):
            return False
        return (word.rank, word.host, word.node, word.pid, word.ticks) != self.about


def where(frame: FrameType | None) -> tuple[str, bool]:
    """(innermost line of ours and innermost function of a stack, whether it waits for others)."""
    ours, waits, innermost = "", False, frame.f_code.co_name if frame else ""
    while frame is not None:
        file, name = frame.f_code.co_filename, frame.f_code.co_name
        if not ours and file.startswith(PACKAGE):
            ours = f"{Path(file).name}:{frame.f_lineno} {name}"
            waits |= name in WAITS
        waits |= not ours and (name in WAITS or any(part in file for part in WAITING))
        frame = frame.f_back
    return " in ".join(dict.fromkeys((innermost, ours))), waits


@dataclass
class _Seen:
    """The last word of a worker; since: when it was new; idle_since: when it last worked or began to wait elsewhere."""

    word: Word
    since: float
    idle_since: float


@dataclass
class Watchdog:
    """The driver's side, for one attempt."""

    blobs: Blobs
    attempt: int
    seen: dict[int, _Seen] = field(default_factory=dict)
    looked: float = field(default_factory=time.monotonic)

    def look(self) -> list[str]:
        """Kill whoever hangs; a sentence on each."""
        words, now, told = self._words(), time.monotonic(), []
        self.after_a_break(now)
        for word in words:
            self._hear(word, now)
        for seen, why in self.hanging(now):
            del self.seen[seen.word.rank]  # said once of a process; the next has a rank and a process id of its own
            if kill(seen.word):
                who = f"worker {seen.word.rank} (process {seen.word.pid} on {seen.word.host})"
                told.append(f"train: {who} hangs: {why}; it is killed, and all start again from the last state")
        return told

    def after_a_break(self, now: float) -> None:
        """Leave time in which nothing could be heard out of account."""
        if (missed := now - self.looked - BLIND_S) > 0:
            for one in self.seen.values():
                one.since, one.idle_since = one.since + missed, one.idle_since + missed
        self.looked = now

    def _words(self) -> list[Word]:
        found = []
        for key in self.blobs.list(WORKERS):
            if key.startswith(f"{WORKERS}/{int(self.attempt)}-"):
                with suppress(OSError, ValueError, TypeError):
                    found.append(Word(**parsed(self.blobs.read(key))))
        return found

    def _hear(self, word: Word, now: float) -> None:
        before = self.seen.get(word.rank)
        if before is None or before.word.pid != word.pid:
            self.seen[word.rank] = _Seen(word, now, now)
        elif before.word.number != word.number:
            worked = word.processor_s - before.word.processor_s > BUSY * (now - before.since) or word.steps != before.word.steps
            moved = worked or word.place != before.word.place
            self.seen[word.rank] = _Seen(word, now, now if moved else before.idle_since)

    def hanging(self, now: float) -> list[tuple[_Seen, str]]:
        """Who hangs, and why one thinks so. Before the first step of all, when models are loaded, only silence counts."""
        workers = list(self.seen.values())
        if silent := [one for one in workers if now - one.since > HANG_S]:
            return [(one, f"no sign of life for {now - one.since:.0f} s, last at {one.word.place}") for one in silent]
        if not all(one.word.steps for one in workers):
            return []
        idle = [one for one in workers if now - one.idle_since > HANG_S]
        asleep = [one for one in idle if not one.word.waits]
        if not asleep and len(idle) == len(workers) > 1:  # each waits for the others
            places = Counter(one.word.place for one in idle)
            rarest, count = places.most_common()[-1]
            asleep = [one for one in idle if one.word.place == rarest][-1:] if len(places) > 1 and count < len(idle) else []
        return [(one, f"idle for {now - one.idle_since:.0f} s at {one.word.place}") for one in asleep]


def kill(word: Word) -> bool:
    """Kill a worker's process, by a task on its host; False where it has ended, or its host does not answer (Ray sees to that)."""
    here = NodeAffinitySchedulingStrategy(word.node, soft=False)
    task = ray.remote(num_cpus=0, max_retries=0, scheduling_strategy=here)(kill_process)
    try:
        return bool(ray.get(task.remote(word.pid, word.ticks), timeout=KILL_S))
    except ray.exceptions.RayError:
        return False


def kill_process(pid: int, ticks: int) -> bool:
    """Kill a process of this host that began at a tick; whether there was one."""
    if start_ticks(pid) != ticks:
        return False
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    return True
