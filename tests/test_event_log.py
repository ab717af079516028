"""The event log of a run: what is written when, by whom, what the next attempt makes of it, and what report and terminal say."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from diffprune.cli import commands
from diffprune.core import termination
from diffprune.core.records import Outcome
from diffprune.distributed import metrics
from diffprune.distributed.follower import Follower
from diffprune.distributed.sweep import SweepFailed
from diffprune.io import event_log
from diffprune.io.attempts import Fenced
from diffprune.io.blob_store import LocalBlobs
from diffprune.io.run_lock import lock
from diffprune.job import pipeline
from diffprune.report import report
from diffprune.store import Store
from diffprune.train.context import LocalContext
from diffprune.train.recipe import Recipe
from diffprune.watch.screen import screen
from diffprune.watch.snapshot import read
from tests.records import evaluate_cell, prediction, provenance, step

JOB = """
from diffprune.job import *
job = Job(name='mine', measure=Measurement(), budgets=('7',), baselines=('unpruned', 'random'),
          evaluate=Evaluation(benchmarks=("world('pope')",)))
"""


def events(run: str = "mine", store: str = "runs/mine/store") -> list[dict[str, Any]]:
    return list(event_log.read(LocalBlobs(store), run))


def kinds(attempt: int, **where: str) -> list[str]:
    return [one["event"] for one in events(**where) if one["attempt"] == attempt]


@pytest.fixture
def stages(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What `evaluate` raises; every stage does nothing otherwise."""
    raised: dict[str, Any] = {}

    def evaluate(self: pipeline.PipelineRun) -> None:
        if error := raised.get("error"):
            raise error

    for name in ("measure", "report"):
        monkeypatch.setattr(pipeline.PipelineRun, name, lambda self: None)
    monkeypatch.setattr(pipeline.PipelineRun, "evaluate", evaluate)
    Path("mine.py").write_text(JOB)
    return raised


def test_an_attempt_is_told_from_its_start_to_its_exit_code(stages: dict[str, Any]) -> None:
    assert commands.call(["run", "mine.py"]) == (0, "")
    (path,) = Path("runs/mine/store/events/mine").iterdir()
    found = [json.loads(line) for line in path.read_text().splitlines()]
    assert found == events() and path.name == "00000001.jsonl"
    both = ["stage_began", "stage_ended"]
    assert [one["event"] for one in found] == ["started", *both, *both, *both, "ended"]
    assert [one["stage"] for one in found if one["event"] == "stage_ended"] == ["evaluate", "measure", "report"]
    assert all((one["run"], one["attempt"]) == ("mine", 1) and one["time"].endswith("+00:00") for one in found)
    assert [one["after_s"] for one in found] == sorted(one["after_s"] for one in found)
    assert found[0]["pid"] == os.getpid() and found[-1]["exit_code"] == 0 and "reason" not in found[-1]


@pytest.mark.parametrize(
    ("error", "code", "reason"),
    [
        (SweepFailed("2 of 4 cells failed"), 1, "SweepFailed: evaluate: 2 of 4 cells failed"),
        (RuntimeError("lost"), 1, "RuntimeError: lost"),
        (KeyboardInterrupt(), 130, "KeyboardInterrupt"),
        (termination.Terminated(), 143, "Terminated"),
    ],
)
def test_the_exit_code_in_the_log_is_the_commands(
    stages: dict[str, Any], error: BaseException, code: int, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    stages["error"] = error
    monkeypatch.setattr(termination, "asked", lambda: isinstance(error, termination.Terminated))
    assert commands.call(["run", "mine.py"])[0] == code
    last = events()[-1]
    assert (last["event"], last["exit_code"], last["reason"]) == ("ended", code, reason)
    stopped = next(one for one in events() if one["event"] == "stage_ended")
    assert stopped["stage"] == "evaluate" and type(error).__name__ in stopped["reason"]


KILLED = """
import sys, time
from diffprune.io import event_log
from diffprune.io.blob_store import open_blobs
from diffprune.io.run_lock import lock
with lock("runs/mine/store", "mine") as attempt, event_log.kept(open_blobs("runs/mine/store"), "mine", attempt):
    print("here", flush=True)
    time.sleep(600)
"""


def test_the_attempt_after_a_killed_one_says_so(stages: dict[str, Any]) -> None:
    own = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    with subprocess.Popen([sys.executable, "-c", KILLED], env=own, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout and process.stdout.readline() == "here\n"
        process.send_signal(signal.SIGKILL)
    assert kinds(1) == ["started"]
    for _ in range(2):
        assert commands.call(["run", "mine.py"]) == (0, "")
    taken = [one for one in events() if one["event"] == "took_over"]
    assert [(one["attempt"], one["from_attempt"]) for one in taken] == [(2, 1)], "the second ended by itself"
    assert event_log.restarts(events()) == "interrupted once, once without a word; training restarted never; workers lost: 0"


def test_who_was_taken_over_says_that_it_failed_and_a_vanished_store_is_not_made_anew(own_folder: Path) -> None:
    blobs = LocalBlobs("store")
    with pytest.raises(Fenced), lock("store", "mine") as attempt, event_log.kept(blobs, "mine", attempt):
        blobs.create("locks/mine/2", b"another's")
    last = events(store="store")[-1]
    assert (last["attempt"], last["event"], last["exit_code"]) == (1, "ended", 1) and "attempt 2 has taken over" in last["reason"]
    with pytest.raises(Fenced), lock("other", "mine") as attempt, event_log.kept(LocalBlobs("other"), "mine", attempt):
        Path("other").rename("elsewhere")
        event_log.tell("worker_lost", stage="evaluate", reason="gone")
    assert not Path("other").exists() and kinds(1, store="elsewhere") == ["started"]


def test_a_full_disk_costs_the_log_and_not_the_run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "disk full")

    blobs = LocalBlobs("store")
    with lock("store", "mine") as attempt, event_log.kept(blobs, "mine", attempt):
        monkeypatch.setattr(LocalBlobs, "replace", full)
        event_log.tell("stage_began", stage="train")
        event_log.tell("stage_ended", stage="train")
        monkeypatch.undo()
    assert capsys.readouterr().out.count("the event log is not written, and tried again at the next event") == 1
    events = [one["event"] for one in event_log.read(blobs, "mine")]
    assert events == ["started", "stage_began", "stage_ended", "ended"], "the last one brings what was missed"


def test_lines_are_bounded_and_losses_beyond_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(event_log, "MOST_LINES", 5)
    with lock("store", "mine") as attempt, event_log.kept(LocalBlobs("store"), "mine", attempt):
        threads = [threading.Thread(target=metrics.worker_lost, args=("mine", "evaluate", "x" * 9000)) for _ in range(20)]
        for one in threads:
            one.start()
        for one in threads:
            one.join()
    found = events(store="store")
    assert len(found) == 6 and len(found[2]["reason"]) == 300 and found[-1]["worker_lost_events"] == 20
    assert event_log.restarts(found).endswith("workers lost: 20")


def test_no_event_is_lost_on_a_line_that_is_none() -> None:
    blobs = LocalBlobs("store")
    blobs.replace("events/mine/00000001.jsonl", b'{"attempt": 1, "event": "started"}\n[1]\n{"attempt": "1"}\nhalf {\n')
    assert [one["event"] for one in events(store="store")] == ["started"]


def test_a_group_that_begins_again_is_told_once_each(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Follower, "every_s", 0.01)
    recipe = Recipe(pruners=("diffprune",), seeds=(0,), steps=3)
    context = LocalContext("run")
    follower, blobs = Follower(recipe, Path("run"), None, None), LocalBlobs("run/store")
    with lock("run/store", "mine") as attempt, event_log.kept(blobs, "mine", attempt), follower:
        for number, workers in enumerate((2, 2, 1)):
            context.files.append({"group": workers})
            context.report("diffprune-0", step(number))
            time.sleep(0.05)
    told = [(one["stage"], one["workers"]) for one in events(store="run/store") if one["event"] == "restarted"]
    assert told == [("train", 2), ("train", 1)], "the first group is no restart"


def test_report_and_terminal_say_how_often_it_was_interrupted(stages: dict[str, Any], tmp_path: Path) -> None:
    stages["error"] = OSError("no space left")
    assert commands.call(["run", "mine.py"])[0] != 0
    stages.clear()
    for _ in range(2):  # what ends well, and is asked for again, was not interrupted
        assert commands.call(["run", "mine.py"]) == (0, "")
    store, says = Store("runs/mine/store"), "interrupted once; training restarted never; workers lost: 0"
    shown = io.StringIO()
    Console(file=shown, width=200).print(screen(Path("runs/mine"), read(Path("runs/mine"))))
    assert says in shown.getvalue() and says in Path("runs/mine/live.html").read_text()
    rows = {"predictions": [prediction(0)], "outcomes": [Outcome("ok", "", 1, 0.0)]}
    with lock(store.blobs, "mine") as attempt:
        store.publish(rows, cell=evaluate_cell(), provenance=provenance(run="mine", attempt=attempt))
    assert f"mine: {says}" in report("runs/mine/store", tmp_path / "page")["html"].read_text()
    store.compact(tmp_path / "compact")
    assert f"mine: {says}" in report(tmp_path / "compact", tmp_path / "again")["html"].read_text()
