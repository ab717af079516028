"""Who owns a run when hosts are lost, clocks step, locks are removed by hand and folders move: the newest attempt, nobody else."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from blob_stores import MemoryBlobs

from diffprune.core.cell import Cell, TrainSpec
from diffprune.core.records import Outcome
from diffprune.core.spec import Spec
from diffprune.io import lease, run_lock
from diffprune.io.attempts import Attempt
from diffprune.io.blob_store import Blobs, LocalBlobs
from diffprune.io.run_lock import refuse_if_held
from diffprune.job import pipeline
from diffprune.store import Busy, Fenced, Store, lock
from tests.records import provenance


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A lease of a second and a half: as many heartbeats and looks as in earnest, in less time."""
    for name, seconds in (("BEAT_S", 0.25), ("LEASE_S", 1.5), ("LOOK_S", 0.05)):
        monkeypatch.setattr(lease, name, seconds)
    monkeypatch.setattr(run_lock, "GLANCE_S", 0.5)


@pytest.fixture(params=["local", "memory"])
def blobs(request: pytest.FixtureRequest) -> Blobs:
    return LocalBlobs("store") if request.param == "local" else MemoryBlobs()


def publish(place: Blobs | Path | str, seed: int, attempt: int) -> None:
    """The outcome of one cell."""
    cell = Cell(Spec("embedded"), "float32", TrainSpec(Spec("random"), "key", seed))
    made = provenance(run="demo", attempt=attempt)
    Store(place).publish({"outcomes": [Outcome("ok", "", 1, 0.0)]}, cell=cell, provenance=made)


def published(place: Blobs | Path | str) -> list[int]:
    """The attempts whose outcomes count."""
    return sorted(Store(place).read("outcomes")["attempt"].tolist())


OWNER = """
    import sys, time
    from diffprune.io import lease, run_lock
    lease.BEAT_S = 0.25
    {machine}
    with run_lock.lock("store", "demo") as attempt:
        print(int(attempt), flush=True)
        time.sleep(600)
"""
ELSEWHERE = "run_lock.machine = lambda: 'another-boot-4026531836'"


@contextmanager
def owner(machine: str = ELSEWHERE, *before: str) -> Iterator[subprocess.Popen[str]]:
    """A process that holds the run's lock, on another machine as far as its own words tell; `before` starts it."""
    path = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    command = [*before, sys.executable, "-c", textwrap.dedent(OWNER).replace("{machine}", machine)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": path})
    try:
        assert process.stdout and process.stdout.readline() == "1\n"
        yield process
    finally:
        with process:
            process.kill()


def test_a_live_process_elsewhere_is_told_by_its_heartbeat() -> None:
    with owner() as process:
        for _ in range(2):
            began = time.monotonic()
            told = f"held by process {process.pid} on .*the same command takes over by itself"
            with pytest.raises(Busy, match=told), lock("store", "demo"):
                pass
            assert time.monotonic() - began < lease.LEASE_S
        with pytest.raises(Busy):
            refuse_if_held("store", "demo")


def test_a_lost_host_is_taken_over_after_its_lease() -> None:
    with owner() as process:
        process.kill()
        process.wait()
        began = time.monotonic()
        refuse_if_held("store", "demo")
        with lock("store", "demo") as attempt:
            assert attempt == 2 and lease.LEASE_S <= time.monotonic() - began < 4 * lease.LEASE_S
            publish("store", 1, attempt)
        assert not list(LocalBlobs("store").list("beats")), "no heartbeat of either is left"
    assert published("store") == [2]


def test_in_earnest_a_host_is_taken_over_within_a_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert run_lock.GLANCE_S + lease.LEASE_S < 45 and lease.LEASE_S >= 5 * lease.BEAT_S and lease.BEAT_S < run_lock.GLANCE_S


def test_a_process_frozen_beyond_its_lease_is_shut_out_when_it_wakes(blobs: Blobs) -> None:
    """Its lease is over, another works; what it still wants to write is refused, and it does not release the other's lock."""
    with pytest.raises(Fenced, match="attempt 2 has taken over"), lock(blobs, "demo") as old:
        publish(blobs, 1, old)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(lease, "beats", lambda *_: False)
            patch.setattr(run_lock.Owner, "is_here", False)
            with lock(blobs, "demo") as new:
                publish(blobs, 2, new)
                with pytest.raises(Fenced):
                    publish(blobs, 3, old)
                time.sleep(3 * lease.BEAT_S)
                assert [key for key in blobs.list("beats") if f"/{int(old)}-" in key] == [], "its heartbeat has stopped"
        publish(blobs, 4, old)
    assert published(blobs) == [1, 2]


@pytest.mark.parametrize("taken", [False, True])
def test_a_lock_removed_by_hand_shuts_its_owner_out(blobs: Blobs, taken: bool) -> None:
    with pytest.raises(Fenced, match="is gone or another's"), lock(blobs, "demo") as old:
        publish(blobs, 1, old)
        for key in [*blobs.list("locks"), *blobs.list("beats")]:
            blobs.delete(key)
        if taken:
            with lock(blobs, "demo") as new:
                assert new == old == 1, "the same number, and yet another attempt"
                with pytest.raises(Fenced):
                    publish(blobs, 2, old)
                publish(blobs, 3, new)
        publish(blobs, 2, old)
    assert published(blobs) == [1] * (1 + taken)


def test_two_looks_make_no_time() -> None:
    """Who was frozen while it waited has not waited: looks are counted, not seconds."""
    looks: list[float] = []
    clock = iter(range(0, 10**9, 10**6))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(time, "monotonic", lambda: next(clock))
        patch.setattr(time, "time", lambda: next(clock))
        patch.setattr(time, "sleep", looks.append)
        assert not lease.beats(MemoryBlobs(), "beats/demo/1-a", lease.LEASE_S, lambda: True)
    assert len(looks) == 30


@pytest.mark.parametrize(
    ("change", "free"),
    [({}, False), ({"pid": 2**22 + 1}, True), ({"ticks": 1}, True), ({"host": "renamed"}, False), ({"machine": ""}, None)],
)
def test_a_process_of_this_machine_is_known_to_live_or_not(blobs: Blobs, change: dict[str, object], free: bool | None) -> None:
    """By its id and the tick it began at; a host's name says nothing, and where nothing is known the heartbeat decides."""
    with lock(blobs, "demo"):
        note = json.loads(blobs.read("locks/demo/1"))
    blobs.replace("locks/demo/1", json.dumps({**note, **change}).encode())
    began = time.monotonic()
    if free is False:
        with pytest.raises(Busy), lock(blobs, "demo"):
            pass
    else:
        with lock(blobs, "demo") as attempt:
            assert attempt == 2
    assert (time.monotonic() - began > lease.LEASE_S) == (free is None)


def test_a_clock_that_steps_grants_no_second_lock(monkeypatch: pytest.MonkeyPatch) -> None:
    with lock("store", "demo"):
        for step in (-(10**6), 10**6):
            monkeypatch.setattr(time, "time", lambda step=step: 10**9 + step)
            with pytest.raises(Busy), lock("store", "demo"):
                pass


def test_start_ticks_are_those_of_the_system() -> None:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    mine, its = run_lock.start_ticks(os.getpid()), run_lock.start_ticks(child.pid)
    assert mine and its and its >= mine
    uptime = float(Path("/proc/uptime").read_text().split()[0])
    assert 0 <= uptime - its / os.sysconf("SC_CLK_TCK") < 60
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert run_lock.start_ticks(child.pid) is None, "a zombie has ended"
    child.wait()
    assert run_lock.start_ticks(child.pid) is None


def test_who_cannot_look_takes_nobody_for_dead(monkeypatch: pytest.MonkeyPatch) -> None:
    owner = run_lock.Owner("", run_lock.machine(), os.getpid(), run_lock.start_ticks(os.getpid()) or 0, "")
    assert not owner.gone

    def refused(*_: Any, **__: Any) -> str:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(Path, "read_text", refused)
    with pytest.raises(OSError, match="Too many open files"):
        _ = owner.gone


def test_another_container_is_another_machine() -> None:
    """Its process ids mean nothing here, though it runs on the same system: a live one is not taken for dead."""
    into = ("unshare", "--pid", "--fork", "--kill-child")
    if os.geteuid() or shutil.which("unshare") is None or subprocess.run([*into, "true"], capture_output=True).returncode:
        pytest.skip("needs root, and namespaces of process ids")
    with owner("", *into) as process:
        note = json.loads(LocalBlobs("store").read("locks/demo/1"))
        assert note["pid"] < 100 and note["machine"] != run_lock.machine()
        with pytest.raises(Busy), lock("store", "demo"):
            pass
        process.kill()
        process.wait()
        with lock("store", "demo") as attempt:
            assert attempt == 2


def test_a_store_that_vanished_is_an_error_and_not_made_anew() -> None:
    with pytest.raises(Fenced, match="was the folder moved"), lock("run/store", "demo") as attempt:
        publish("run/store", 1, attempt)
        Path("run").rename("elsewhere")
        with pytest.raises(Fenced):
            publish("run/store", 2, attempt)
        time.sleep(3 * lease.BEAT_S)
        pipeline._explained(Path("run/store"))
        assert not Path("run").exists()
    assert not Path("run").exists() and published("elsewhere/store") == [1]


def test_no_stage_begins_without_its_store(capsys: pytest.CaptureFixture[str]) -> None:
    """A report of a folder that has gone would be a page about nothing."""
    plan = pipeline.Plan(pipeline.Job(name="demo"), Path("run"), None)
    with pytest.raises(Fenced), lock(plan.store_root, "demo") as attempt, pipeline.contextlib.ExitStack() as stack:
        going = pipeline.PipelineRun(plan, replace(provenance(run="demo"), attempt=attempt), None, stack)
        Path("run").rename("elsewhere")
        going.go(["report"])
    assert capsys.readouterr().out == "" and not Path("run").exists()


def test_a_released_lock_is_free_at_once_from_anywhere(blobs: Blobs) -> None:
    for number in (1, 2, 3):
        began = time.monotonic()
        with lock(blobs, "demo") as attempt:
            assert attempt == number and isinstance(attempt, Attempt)
        assert time.monotonic() - began < lease.LEASE_S and blobs.read(f"locks/demo/{number}") == b""


def test_ctrl_c_releases(blobs: Blobs) -> None:
    with pytest.raises(KeyboardInterrupt), lock(blobs, "demo"):
        signal.raise_signal(signal.SIGINT)
    refuse_if_held(blobs, "demo")
    assert list(blobs.list("beats")) == []
