"""Event log of a run: what happened to each attempt, one JSON object a line, in `events/<run>/<attempt>.jsonl` beside the records.

| event | also says |
|---|---|
| `started` | `host`, `pid` |
| `took_over` | `from_attempt`: the one before, whose process ended without a word |
| `stage_began`, `stage_ended` | `stage`; at its end `seconds`, and `reason` where something failed |
| `worker_lost` | `stage`, `reason` |
| `restarted` | `stage`: its workers began again from the last state, so many `workers` |
| `ended` | `exit_code`, `reason` where it is not 0 |

Every line has `run`, `attempt`, `event`, `time` (UTC, for people and log collectors; no decision hangs on it) and `after_s`,
seconds since the attempt began, which no correction of the clock changes.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from typing import Any, Literal

from diffprune.core.errors import MOST, with_class
from diffprune.core.exits import exit_code
from diffprune.io.attempts import Attempts
from diffprune.io.blob_store import Blobs
from diffprune.io.json_object import parsed
from diffprune.io.outage import hurry
from diffprune.io.run_lock import attempts_at

PREFIX = "events"
MOST_LINES = 2000  # of an attempt: each is a write of all; losses beyond are counted in its last line alone
Kind = Literal["started", "took_over", "stage_began", "stage_ended", "worker_lost", "restarted", "ended"]
Event = dict[str, Any]


class EventLog:
    """Of one attempt. A line is durable when `tell` returns; a medium that fails costs the log, never the run."""

    def __init__(self, blobs: Blobs, run: str, attempt: int) -> None:
        self.blobs, self.run, self.attempt = blobs, run, int(attempt)
        self.attempts: Attempts = attempts_at(blobs, run)
        self.earlier, self.events, self.counts = list(read(blobs, run)), list[Event](), Counter[str]()
        self._began, self._lock, self._broken = time.monotonic(), threading.Lock(), False

    def tell(self, event: Kind, **about: Any) -> None:
        """Add a line. about: JSON values; None and "" are left out, and texts are cut at the length of an error's."""
        said = {key: value[:MOST] if isinstance(value, str) else value for key, value in about.items() if value not in (None, "")}
        head = {"time": datetime.now(UTC).isoformat(timespec="milliseconds"), "run": self.run, "attempt": self.attempt}
        with self._lock:
            self.counts[event] += 1
            if event in ("worker_lost", "restarted") and len(self.events) >= MOST_LINES:
                return
            self.events.append({**head, "event": event, "after_s": round(time.monotonic() - self._began, 3), **said})
            self._write()

    def _write(self) -> None:
        """All lines, also those that could not be written before, unless the store was moved away, which is not made anew; who was
        taken over writes on, to its own file."""
        try:
            if self.attempts.newest() >= self.attempt:
                text = "".join(f"{json.dumps(one, allow_nan=False)}\n" for one in self.events)
                self.blobs.replace(f"{PREFIX}/{self.run}/{self.attempt:08d}.jsonl", text.encode())
                self._broken = False
        except OSError as error:
            if not self._broken:
                print(f"the event log is not written, and tried again at the next event: {with_class(error)}", flush=True)
            self._broken = True


_open: list[EventLog] = []


@contextmanager
def kept(blobs: Blobs, run: str, attempt: int) -> Iterator[None]:
    """The log that `tell` adds to in this block; says how the attempt begins, and how it ends.

    Raises:
        Fenced: at the end of the block, which went well, the run's lock was not this attempt's any more.
    """
    hurry(False)
    log = EventLog(blobs, run, attempt)
    log.tell("started", host=socket.gethostname(), pid=os.getpid())
    before = [one for one in log.earlier if one["attempt"] < log.attempt]
    if before and not any(one["event"] == "ended" for one in before if one["attempt"] == before[-1]["attempt"]):
        log.tell("took_over", from_attempt=before[-1]["attempt"])
    _open.append(log)
    code, reason = 0, ""
    try:
        yield
        log.attempts.check(attempt)
    except BaseException as error:
        code, reason = exit_code(error), with_class(error)
        if isinstance(error, KeyboardInterrupt):
            hurry()
        raise
    finally:
        _open.remove(log)
        counts = {f"{kind}_events": log.counts[kind] for kind in ("worker_lost", "restarted") if log.counts[kind]}
        log.tell("ended", exit_code=code, reason=reason, **counts)


def tell(event: Kind, **about: Any) -> None:
    """Add a line to the log that is open, if one is: see `EventLog.tell`."""
    if _open:
        _open[-1].tell(event, **about)


def read(blobs: Blobs, run: str) -> Iterator[Event]:
    """Every event of a run, attempt after attempt; lines that are no event are passed over."""
    for key in blobs.list(f"{PREFIX}/{run}"):
        with suppress(FileNotFoundError):
            for line in blobs.read(key).splitlines():
                with suppress(ValueError):
                    found = parsed(line)
                    if type(found.get("attempt")) is int and isinstance(found.get("event"), str):
                        yield found


def copy(store: Blobs, to: Blobs) -> None:
    """The event logs of all runs of a store into another."""
    for key in store.list(PREFIX):
        to.replace(key, store.read(key))


def restarts(events: Sequence[Event] | None = None) -> str:
    """How often a run was interrupted, in words; of the log that is open unless events are given. Empty where there is no log."""
    if events is None:
        events = [*_open[-1].earlier, *_open[-1].events] if _open else []
    if not events:
        return ""
    kinds = Counter(str(one["event"]) for one in events)
    lost, again = _told(events, "worker_lost"), _told(events, "restarted")
    cut = kinds["took_over"] + sum(one["event"] == "ended" and bool(one.get("exit_code")) for one in events)
    died = f", {_times(kinds['took_over'])} without a word" if kinds["took_over"] else ""
    return f"interrupted {_times(cut)}{died}; training restarted {_times(again)}; workers lost: {lost}"


def _told(events: Sequence[Event], event: Kind) -> int:
    """How often an event was told: lines of each attempt, or what its last line says."""
    found = Counter(one["attempt"] for one in events if one["event"] == event)
    for one in events:
        if type(said := one.get(f"{event}_events")) is int:
            found[one["attempt"]] = said
    return sum(found.values())


def _times(number: int) -> str:
    return {0: "never", 1: "once", 2: "twice"}.get(number, f"{number} times")
