"""The snapshot of a run, `live.json` in its folder: stages, losses, accuracies so far, failures."""

from __future__ import annotations

import time
from datetime import datetime
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from diffprune.io.blob_store import open_blobs, remote
from diffprune.io.run_lock import holder

FILE, PAGE = "live.json", "live.html"
SLACK_S = 30.0  # beyond the time between two snapshots, before no news is bad news
State = Literal["running", "finished", "failed", "interrupted"]
Moment = Annotated[float, Field(ge=0, le=2e11)]  # seconds since 1970; later ones have no date


class Value(BaseModel):
    """A frozen value that refuses what it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Stage(Value):
    """A stage of the job. total: of its cells, trials or scorers, 0 where it has none; began, ended: seconds since 1970, by a clock
    that nobody sets; ended: of one that runs, when it was looked at last."""

    name: str
    state: Literal["waiting", "running", "done", "failed"] = "waiting"
    began: Moment | None = None
    ended: Moment | None = None
    total: int = 0
    done: int = 0
    failed: int = 0
    note: str = ""

    def lasted(self, now: float) -> str:
        """How long it has taken so far, in words."""
        if self.began is None:
            return "–"
        minutes, seconds = divmod(max(0, round((self.ended or now) - self.began)), 60)
        return f"{minutes} min {seconds:02d} s" if minutes else f"{seconds} s"


class Curve(Value):
    """One scorer in training. step: steps done of `steps`; points: (step, loss), means of neighbouring steps."""

    scorer: str
    step: int
    steps: int
    loss: float | None = None
    validation: float | None = None
    points: tuple[tuple[float, float], ...] = ()


class Point(Value):
    """A method at a budget. kept: visual tokens, mean; accuracy: mean credit of benchmarks and seeds; speedup: net, of prefill."""

    method: str
    budget: str
    kept: float
    accuracy: float
    cells: int
    bound: bool = False
    speedup: float | None = None


class Failure(Value):
    """A cell that has no result."""

    what: str
    reason: str


class Snapshot(Value):
    """A run as its driver saw it last.

    began, written: seconds since 1970; every_s: the next snapshot comes within these seconds; spent_s: processor time that all
    snapshots have cost so far; num_failures: of which `failures` are the first; timed: with which batch and mode
    the speedups of `points` are, in words; restarts: how often the run was interrupted, in words.
    """

    run: str
    title: str
    attempt: int
    state: State = "running"
    reason: str = ""
    began: Moment
    written: Moment
    every_s: float
    spent_s: float = 0.0
    stages: tuple[Stage, ...] = ()
    curves: tuple[Curve, ...] = ()
    points: tuple[Point, ...] = ()
    failures: tuple[Failure, ...] = Field(default=(), max_length=100)
    num_failures: int = 0
    timed: str = ""
    restarts: str = ""


def read(folder: Path) -> Snapshot:
    """The snapshot of a run.

    Raises:
        ValueError: no such run, one that has left no snapshot, or a damaged one.
    """
    if not remote(folder) and not folder.is_dir():
        raise ValueError(f"there is no run {str(folder)!r}: name a folder below runs/, or give --out")
    try:
        return Snapshot.model_validate_json(open_blobs(folder).read(FILE))
    except FileNotFoundError:
        raise ValueError(f"{folder} holds no {FILE}: no run has begun there yet, or one of an older version has") from None
    except ValidationError as error:
        raise ValueError(
            f"{folder / FILE} is damaged ({error.errors()[0]['msg']}): the run writes it anew while it works"
        ) from None


def standing(folder: Path, seen: Snapshot, now: float | None = None) -> str:
    """How a run stands, in a sentence: the process that drives it is looked for, so that a killed one does not seem to run."""
    if seen.state != "running":
        return f"{seen.state}{f': {seen.reason}' if seen.reason else ''}"
    late = (time.time() if now is None else now) - seen.written
    if holder(folder / "store", seen.run) is None:
        shown = f"{datetime.fromtimestamp(seen.written):%Y-%m-%d %H:%M:%S}"  # later work is kept, and not in the snapshot
        return (
            f"killed: the process that drove it is gone; the same command goes on where it stopped (shown is how it was at {shown})"
        )
    if late > seen.every_s + SLACK_S:
        return f"no news for {late:.0f} s: its process may hang, or the machine it is on"
    return "running"
