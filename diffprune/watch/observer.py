"""The observer of a run: a thread of its driver that reads what the run writes, and keeps snapshot, page and trackers up to date.

What it costs: every few seconds it looks at one folder, reads what is new of the step log and of the store, and writes two small
files; the page says how much processor time that took in all. While times are measured it looks only twice a minute. Whatever goes
wrong with it is said once and is no reason for the run to end.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any

from diffprune.core.errors import with_class
from diffprune.io import event_log
from diffprune.io.blob_store import open_blobs
from diffprune.io.checkpoint import is_complete
from diffprune.io.outage import joined
from diffprune.io.run_lock import attempts_at
from diffprune.track.trackers import Trackers
from diffprune.watch.news import News
from diffprune.watch.page import page
from diffprune.watch.snapshot import FILE, PAGE, Snapshot, Stage, State

EVERY_S = 3.0
LEAVE_S = 30.0  # for the last look at storage that does not answer
QUIET_S = 30.0  # while a stage of `QUIET` runs
QUIET = ("measure", "tune")  # stages that time the machine
RESTS = 50  # a look is followed by so many times as long without one: it never costs more than 2 % of a core


@dataclass(frozen=True)
class _Expected:
    """What a stage still has to bring: keys of cells, or folders of scorers."""

    stage: Stage
    cells: frozenset[str] = frozenset()
    scorers: tuple[Path, ...] = ()


@dataclass
class Observer:
    """Beside one run, from its first stage to its end. steps: of each scorer that is trained; trackers: beside TensorBoard."""

    folder: Path
    run: str
    title: str
    attempt: int
    steps: Mapping[str, int] = field(default_factory=dict)
    trackers: Sequence[str] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.began, self.spent_s, self.every_s, self._slow_s = time.time(), 0.0, EVERY_S, 0.0
        self._started = time.monotonic()
        self._state: State = "running"
        self._reason, self._broken, self._failing = "", False, False
        self._stages: dict[str, _Expected] = {}
        self._lock, self._ended = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True, name="observer")
        self._blobs = open_blobs(self.folder, private=True)

    # -- what the driver tells -----------------------------------------------------------------------------------------

    def plan(self, cells: Mapping[str, Collection[str]]) -> None:
        """The stages to come, with the keys of the cells that each asks for as far as they are known."""
        with self._lock:
            self._stages = {name: _Expected(Stage(name=name, total=len(keys)), frozenset(keys)) for name, keys in cells.items()}

    def begins(self, stage: str) -> None:
        """A stage begins."""
        self._change(stage, state="running", began=self._now())
        self.every_s = QUIET_S if stage in QUIET else EVERY_S

    def expects(self, stage: str, cells: Collection[str] = (), scorers: Sequence[Path] = ()) -> None:
        """Keys of all cells, or folders of all scorers, that are there when the stage is done."""
        with self._lock:
            if known := self._stages.get(stage):
                told = known.stage.model_copy(update={"total": len(cells) or len(scorers)})
                self._stages[stage] = _Expected(told, frozenset(cells), tuple(scorers))

    def note(self, stage: str, text: str) -> None:
        """Where a stage is, in words of its own."""
        self._change(stage, note=text)

    def ends(self, stage: str, failed: str = "") -> None:
        """A stage has ended; failed: why some of it has no result."""
        self._change(stage, state="failed" if failed else "done", ended=self._now(), note=failed)
        self.every_s = EVERY_S

    def _now(self) -> float:
        """Seconds since 1970, had nobody set the clock since the run began: how long a stage took is no matter of that."""
        return self.began + time.monotonic() - self._started

    def _change(self, stage: str, **fields: Any) -> None:
        with self._lock:
            if known := self._stages.get(stage):
                self._stages[stage] = replace(known, stage=known.stage.model_copy(update=fields))

    # -- the thread ------------------------------------------------------------------------------------------------------

    def __enter__(self) -> Observer:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if isinstance(error, KeyboardInterrupt):
            self._state = "interrupted"
        elif error is not None:
            self._state, self._reason = "failed", " ".join(str(error).split())[:1000] or type(error).__name__
        else:
            self._state = "finished"
        self._ended.set()
        joined(self._thread, LEAVE_S)

    def _follow(self) -> None:
        """Look, write, rest, until the run ends; then once more."""
        news: News | None = None
        trackers: Trackers | None = None
        while not self._broken:
            last = self._ended.is_set()
            before = time.thread_time()
            with self._said_once():
                news = news or News(self.folder, self.steps)
                trackers = trackers or Trackers(self.folder, self.run, self.trackers, self.settings)
                if not self._holds():
                    break
                trackers.log(news.look())
                self._write(news)
                self._failing = False
            took = time.thread_time() - before
            self.spent_s, self._slow_s = self.spent_s + took, RESTS * took
            if last:
                break
            self._ended.wait(max(self.every_s, self._slow_s))
        if trackers:
            trackers.close(self._state != "finished")

    def _holds(self) -> bool:
        """Whether the run is still this process's: not taken over by another, which keeps these files, and still there."""
        return attempts_at(open_blobs(self.folder / "store"), self.run).newest() == self.attempt

    def _said_once(self) -> _Guard:
        return _Guard(self._breaks)

    def _breaks(self, error: Exception) -> None:
        """Storage that fails costs one look; anything else all further ones. Either is said once."""
        self._broken, before = not isinstance(error, OSError), self._failing
        self._failing = True
        if self._broken or not before:
            how = "is no longer written, the run goes on" if self._broken else "is not written, and tried again"
            print(f"{PAGE} {how}: {' '.join(with_class(error).split())[:300]}", flush=True)

    def _write(self, news: News) -> None:
        with self._lock:
            expected = list(self._stages.values())
        news.planned = {one.stage.name: one.cells for one in expected if one.cells}
        failures, num = news.failures()
        timed, _ = news.speedups()
        seen = Snapshot(
            run=self.run, title=self.title, attempt=self.attempt, state=self._state, reason=self._reason, began=self.began,
            written=time.time(), every_s=max(self.every_s, self._slow_s), spent_s=self.spent_s,
            stages=tuple(_counted(one, news.statuses, self._now()) for one in expected), curves=news.curves(), points=news.points(),
            failures=failures, num_failures=num, timed=str(timed or ""), restarts=event_log.restarts(),
        )  # fmt: skip
        self._blobs.replace(FILE, seen.model_dump_json().encode())
        self._blobs.replace(PAGE, page(seen).encode())


@dataclass
class _Guard:
    """A `with` block whose errors are told, not raised."""

    tell: Callable[[Exception], None]

    def __enter__(self) -> None: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> bool:
        if isinstance(error, Exception):
            self.tell(error)
            return True
        return False


def _counted(one: _Expected, statuses: Mapping[str, str], now: float) -> Stage:
    """A stage with what is there of it, and until when."""
    done, failed = one.stage.done, one.stage.failed
    if one.cells:
        told = [statuses.get(cell) for cell in one.cells]
        done, failed = told.count("ok"), told.count("failed")
    elif one.scorers:
        with suppress(OSError):
            done = sum(map(is_complete, one.scorers))
    until = now if one.stage.state == "running" else one.stage.ended
    return one.stage.model_copy(update={"done": done, "failed": failed, "ended": until})
