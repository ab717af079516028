"""Ends that nobody waits for: SIGTERM with a grace period, workers that hang, leftovers of dead owners."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
import weakref
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
import torch
from blob_stores import MemoryBlobs

from diffprune import verify
from diffprune.cli import commands, job_verbs
from diffprune.core import termination
from diffprune.distributed import cluster, train_worker, watchdog
from diffprune.distributed.train_worker import RayContext
from diffprune.distributed.watchdog import Watchdog, Word
from diffprune.io.run_lock import machine, start_ticks
from diffprune.train import loop
from diffprune.train.checkpoints import Files, claim
from diffprune.train.context import Ended, LocalContext
from diffprune.train.objective import mistake
from diffprune.train.recipe import Recipe
from diffprune.vlm.load import load

# --- SIGTERM ---------------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def handler() -> Any:
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # also where the tests themselves run under nohup, which children would inherit
    termination.handle()
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_the_command_ends_with_143_and_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job_verbs, "_perform", lambda *_: signal.raise_signal(signal.SIGTERM))
    assert commands.call(["run", "demo"]) == (143, "terminated; what was finished is kept, the same command resumes it")

    def in_ray(*_: object) -> None:
        """Ray looks for signals in C, and raises its own."""
        with suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
        raise KeyboardInterrupt

    termination.handle()
    monkeypatch.setattr(job_verbs, "_perform", in_ray)
    assert commands.call(["run", "demo"])[0] == 143
    termination.handle()
    monkeypatch.setattr(job_verbs, "_perform", lambda *_: signal.raise_signal(signal.SIGINT))
    assert commands.call(["run", "demo"])[0] == 130


def test_a_terminal_that_is_closed_ends_it_as_well_with_129(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job_verbs, "_perform", lambda *_: signal.raise_signal(signal.SIGHUP))
    assert commands.call(["run", "demo"]) == (129, "terminated; what was finished is kept, the same command resumes it")
    saved: list[str] = []
    termination.handle()
    with pytest.raises(termination.Terminated), termination.saving(lambda: saved.append("saved")):
        signal.raise_signal(signal.SIGHUP)
        assert saved == ["saved"] and not termination.asked(), "the block ends by itself"
    assert termination.exit_code() == 129


def test_after_a_terminal_has_gone_nothing_that_is_printed_is_an_error() -> None:
    program = textwrap.dedent("""
        import os, sys, time
        from diffprune.core import termination
        termination.handle()
        try:
            print("ready", flush=True)
            time.sleep(30)
        except termination.Terminated:
            print("x" * 100_000, flush=True)
            os.write(int(sys.argv[1]), b"told")
    """)
    near, far = os.openpty()
    read, write = os.pipe()
    with subprocess.Popen([sys.executable, "-c", program, str(write)], stdout=far, stderr=far, pass_fds=(write,)) as process:
        os.close(far)
        os.close(write)
        lines(near, 1)
        os.close(near)  # as a terminal that is closed
        process.send_signal(signal.SIGHUP)
        assert os.read(read, 10) == b"told"
        assert process.wait(20) == 0
    os.close(read)


def lines(terminal: int, count: int) -> bytes:
    """What a terminal shows until it has shown `count` whole lines, which it gets piece by piece."""
    seen = b""
    while seen.count(b"\n") < count:
        seen += os.read(terminal, 100)
    return seen


@pytest.mark.parametrize("told", [True, False])
def test_a_terminal_may_go_before_its_signal_comes_or_without_one(told: bool) -> None:
    program = textwrap.dedent("""
        import os, sys, time
        from diffprune.core import termination
        termination.handle()
        print("ready")
        try:
            while os.read(int(sys.argv[2]), 1) == b"g":
                print("x" * 10_000)
                print("to the other stream", file=sys.stderr)
                os.write(int(sys.argv[1]), b"on")
        except termination.Terminated:
            print("saved")
            os.write(int(sys.argv[1]), b"told")
    """)
    near, far = os.openpty()
    read, write = os.pipe()
    asked, ask = os.pipe()
    command = [sys.executable, "-c", program, str(write), str(asked)]
    with subprocess.Popen(command, stdout=far, stderr=far, pass_fds=(write, asked)) as process:
        os.close(far)
        os.close(write)
        lines(near, 1)
        os.close(near)
        for _ in range(2):  # as long as nobody has told it of the end
            os.write(ask, b"g")
            assert os.read(read, 10) == b"on"
        if told:
            process.send_signal(signal.SIGHUP)
            assert os.read(read, 10) == b"told"
        os.close(ask)
        os.close(asked)
        assert process.wait(20) == 0
    os.close(read)


def test_under_nohup_the_terminal_may_go() -> None:
    program = "import signal; from diffprune.core import termination; termination.handle(); signal.raise_signal(1); print('on')"
    ignoring = ["sh", "-c", 'trap \'\' HUP; exec "$0" "$@"', sys.executable, "-c", program]
    assert subprocess.run(ignoring, capture_output=True, text=True, check=True).stdout == "on\n"


@pytest.mark.parametrize(("number", "code", "how"), [(signal.SIGTERM, 143, "terminated"), (signal.SIGINT, 130, "interrupted")])
def test_a_query_that_a_signal_ends_is_an_interruption(
    number: int, code: int, how: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def verified(*_: object) -> None:
        """DuckDB looks for signals in C, and raises an error of its own."""
        with suppress(KeyboardInterrupt):
            signal.raise_signal(number)
        raise RuntimeError(commands.QUERY_INTERRUPTED)

    monkeypatch.setattr(verify, "verify", verified)
    assert commands.call(["verify", str(tmp_path)]) == (code, f"{how}; what was finished is kept, the same command resumes it")


def test_the_first_signal_saves_and_the_end_of_the_block_ends() -> None:
    saved: list[str] = []
    with pytest.raises(termination.Terminated), termination.saving(lambda: saved.append("asked")):
        signal.raise_signal(signal.SIGTERM)
        saved.append("went on")
    assert saved == ["asked", "went on"]
    with termination.saving(lambda: saved.append("not again")):
        pass
    with pytest.raises(termination.Terminated):
        signal.raise_signal(signal.SIGTERM)
    assert saved == ["asked", "went on"]


def test_a_signal_that_comes_in_a_callback_where_python_ignores_errors_is_not_lost() -> None:
    class Held:
        pass

    held = Held()
    watching = weakref.ref(held, lambda _: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(termination.Terminated):
        del held
        assert watching() is None
        time.sleep(5)


def test_grace_ends_and_a_second_signal_does_not_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(termination, "GRACE_S", 0.3)
    began = time.monotonic()
    with pytest.raises(termination.Terminated), termination.saving(lambda: None):
        signal.raise_signal(signal.SIGTERM)
        time.sleep(30)
    assert 0.2 < time.monotonic() - began < 5
    monkeypatch.setattr(termination, "GRACE_S", 30)
    for said, seconds in (("20", 20.0), ("", 30.0), ("long", 30.0), ("-1", 30.0), ("nan", 30.0)):
        monkeypatch.setenv(termination.GRACE, said)
        assert termination._grace_s() == seconds
    began = time.monotonic()
    with pytest.raises(termination.Terminated), termination.saving(lambda: None):
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
    assert time.monotonic() - began < 5


def test_who_hears_no_signal_ends_all_the_same() -> None:
    """As one does not that waits in C for a cluster that is gone."""
    code = """
import hashlib, os, signal
from diffprune.core import termination
termination.UNHEARD_S = 0.5
termination.handle()
with termination.saving(lambda: None):
    os.kill(os.getpid(), signal.SIGTERM)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)
"""
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | {termination.GRACE: "0.1"}, timeout=60, check=False)
    assert done.returncode == 143


def test_a_handler_that_others_put_in_place_is_undone() -> None:
    with termination.kept():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    with pytest.raises(termination.Terminated):
        signal.raise_signal(signal.SIGTERM)


def recipe(**changed: Any) -> Recipe:
    return Recipe(
        pruners=("diffprune",), steps=6, images=2, questions=1, workers=1, calibration_images=2, validation_images=2,
        checkpoint_every=100, validate_every=0, grad_cosine_every=0, **changed,
    )  # fmt: skip


def test_training_saves_where_it_is_and_goes_on_from_there() -> None:
    """No state of its own was due; the loss curve is that of a run nobody ended."""
    whole = LocalContext("whole")
    loop.train(recipe(), whole, load)
    context = LocalContext("run")
    report = context.report

    def reported(scorer: str, step: Any) -> None:
        report(scorer, step)
        if step.step == 2:
            context.files.ask_to_end()

    context.report = reported  # type: ignore[method-assign]
    with pytest.raises(Ended):
        loop.train(recipe(), context, load)
    state = context.files.load("diffprune-0", torch.device("cpu"))
    assert state is not None and state["step"] == 4, "it is heard of while the gradients of the next step travel"
    loop.train(recipe(), LocalContext("run"), load)
    curves = [[row.loss for row in loop.read_steps(Path(name))["diffprune-0"]] for name in ("whole", "run")]
    assert len(curves[0]) == 6 and curves[0] == curves[1]


def test_notes_of_workers_go_with_them_and_what_a_run_goes_on_from_stays(tmp_path: Path) -> None:
    files = Files(tmp_path, claim(tmp_path))

    def noted() -> None:
        files.ask_to_end()
        files.stop(0, "why")
        files.blobs.replace(f"workers/{int(files.attempt)}-0", b"{}")

    noted()
    files.save("a", {"step": 1})
    files.save("b", {"step": 1})
    files.discard("b")
    files.tidy()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["attempts", "states"]
    assert [path.name for path in (tmp_path / "states").iterdir()] == ["a"] and files.load("a", torch.device("cpu"))
    noted()
    claim(tmp_path)
    files.tidy()
    assert {"ending", "stopped", "workers"} <= {path.name for path in tmp_path.iterdir()}, "a newer attempt is at work there"


# --- workers that hang -----------------------------------------------------------------------------------------------

WORK = Word(0, "host", "node", 100, 7, 0, 0.0, 1, "matmul in loop.py:1 train", False)
WAIT = replace(WORK, place="all_reduce in train.py:60 sum", waits=True)


class Group:
    """Workers as a watchdog sees them, second by second."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **words: Word) -> None:
        self.killed: list[int] = []
        self.now, self.blobs = 1000.0, MemoryBlobs()
        self.words = {int(name[1:]): replace(word, rank=int(name[1:]), pid=100 + int(name[1:])) for name, word in words.items()}
        monkeypatch.setattr(watchdog.time, "monotonic", lambda: self.now)
        monkeypatch.setattr(watchdog, "kill", lambda word: self.killed.append(word.rank) or True)
        self.dog = Watchdog(self.blobs, 1)

    def pass_by(self, seconds: int, **each: Callable[[Word], Word]) -> list[str]:
        """`each`: what a worker's next word is; without one it says nothing."""
        told = []
        for _ in range(seconds):
            self.now += 1
            for rank, word in self.words.items():
                if speak := each.get(f"w{rank}"):
                    self.words[rank] = replace(speak(word), number=word.number + 1)
                    self.blobs.replace(f"workers/1-{rank}", json.dumps(asdict(self.words[rank])).encode())
            told += self.dog.look()
        return told


def working(word: Word) -> Word:
    return replace(word, processor_s=word.processor_s + 0.5)


def idle(word: Word) -> Word:
    return replace(word, processor_s=word.processor_s + 0.001)


def test_workers_that_work_or_wait_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    group = Group(monkeypatch, w0=WORK, w1=WAIT)
    assert group.pass_by(600, w0=working, w1=idle) == [] == group.killed


def test_a_frozen_worker_is_named_within_a_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    group = Group(monkeypatch, w0=WAIT, w1=WORK)
    group.pass_by(5, w0=idle, w1=working)
    (told,) = group.pass_by(55, w0=idle)
    assert group.killed == [1] and "worker 1 (process 101 on host) hangs: no sign of life for 41 s" in told and "loop.py:1" in told


def test_a_worker_asleep_is_named_and_not_those_that_wait_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    asleep = replace(WORK, place="sleep in stream.py:9 batches")
    group = Group(monkeypatch, w0=WAIT, w1=asleep, w2=WAIT)
    (told,) = group.pass_by(60, w0=idle, w1=idle, w2=idle)
    assert group.killed == [1] and "worker 1" in told and "at sleep in stream.py:9" in told


def test_of_workers_that_wait_for_each_other_the_odd_one_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that skipped a report waits in another place than the rest."""
    elsewhere = replace(WAIT, place="report in train.py:78 save")
    group = Group(monkeypatch, w0=WAIT, w1=WAIT, w2=elsewhere)
    group.pass_by(60, w0=idle, w1=idle, w2=idle)
    assert group.killed == [2]
    together = Group(monkeypatch, w0=WAIT, w1=WAIT)
    assert together.pass_by(600, w0=idle, w1=idle) == [], "all wait for something that is no worker of theirs"


def test_time_in_which_storage_was_away_counts_against_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    group = Group(monkeypatch, w0=WORK, w1=WAIT)
    group.pass_by(60, w0=working, w1=idle)
    group.now += 120
    assert group.dog.look() == [], "nobody could speak"
    assert group.pass_by(60, w0=working, w1=idle) == []
    group.now += 120
    (told,) = group.pass_by(60, w0=working)
    assert group.killed == [1] and "no sign of life for 4" in told
    slow = Group(monkeypatch, w0=WORK, w1=WORK)
    slow.pass_by(5, w0=working, w1=working)
    for _ in range(12):  # storage that takes twelve seconds for a look
        slow.now += 11
        slow.pass_by(1, w0=working)
    assert set(slow.killed) == {1}


def test_loading_a_model_may_take_long_and_one_that_moves_on_is_new(monkeypatch: pytest.MonkeyPatch) -> None:
    group = Group(monkeypatch, w0=replace(WORK, steps=0))
    assert group.pass_by(600, w0=idle) == []
    group = Group(monkeypatch, w0=WORK)
    for number in range(20):
        assert group.pass_by(30, w0=lambda word, n=number: replace(idle(word), steps=1 + n)) == []  # type: ignore[misc]


def test_the_next_process_of_a_rank_is_another(monkeypatch: pytest.MonkeyPatch) -> None:
    group = Group(monkeypatch, w0=WORK)
    group.pass_by(3, w0=working)
    assert len(group.pass_by(50)) == 1
    group.words[0] = replace(WORK, pid=999)
    assert group.pass_by(30, w0=working) == [] and group.dog.seen[0].word.pid == 999
    for damage in (b"", b"[]", b'{"rank": 0}'):
        group.blobs.replace("workers/1-0", damage)
        group.pass_by(1)


def test_how_ray_prints_is_as_before_when_ours_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else what workers of somebody's own Ray print, later in this process, would be cut as a raylet's paragraphs are."""
    printing = ray._private.worker.print_to_stdstream
    for name in ("init", "shutdown"):
        monkeypatch.setattr(ray, name, lambda *_, **__: None)
    monkeypatch.setattr(cluster, "_options", lambda *_: {})
    with cluster._started("auto", 1):
        assert ray._private.worker.print_to_stdstream is cluster._tell is not printing
    assert ray._private.worker.print_to_stdstream is printing


def test_a_group_taken_down_is_no_fault_of_the_method() -> None:
    """Ray does so under the workers that are left, as soon as one has died."""
    member = object.__new__(RayContext)
    member.world = 2
    with pytest.raises(ConnectionError, match="the other workers are gone") as caught:
        member.begin_sum(torch.zeros(1))
    assert mistake(caught.value, others=True, code="its code") == ""


def test_where_a_thread_is_and_whether_it_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    gate, free = threading.Event(), threading.Event()

    def _others_done() -> None:
        gate.set()
        free.wait()

    def thread(body: Callable[[], object]) -> Any:
        gate.clear()
        one = threading.Thread(target=body, daemon=True)
        one.start()
        assert gate.wait(30)
        time.sleep(0.05)
        assert one.ident
        return sys._current_frames()[one.ident]

    assert watchdog.where(thread(_others_done))[1]
    assert not watchdog.where(thread(lambda: (gate.set(), free.wait())))[1]
    monkeypatch.setattr(Files, "check", lambda _: (gate.set(), free.wait()))
    place, waits = watchdog.where(thread(lambda: LocalContext("run").files.discard("x")))
    member = object.__new__(RayContext)
    member.rank, member.world = 0, 2
    lock = threading.Lock()  # as a sum of torch.distributed does, it waits within one call that has no frame
    lock.acquire()
    begun = SimpleNamespace(wait=lock.acquire)
    monkeypatch.setattr(train_worker.group, "all_reduce", lambda values, async_op: gate.set() or begun)
    found = watchdog.where(thread(lambda: member.sum(torch.zeros(1))))
    assert found[1] and "train_worker.py" in found[0]
    lock.release()
    free.set()
    assert "checkpoints.py" in place and "discard" in place and not waits


@pytest.mark.parametrize("instead", [b"", b"theirs"])
def test_a_worker_that_was_given_up_says_nothing_more(monkeypatch: pytest.MonkeyPatch, instead: bytes) -> None:
    """One that wakes when the run is over leaves no note behind, nor one in the place of who has its rank now."""
    monkeypatch.setattr(watchdog, "BEAT_S", 0.01)
    blobs = MemoryBlobs()
    speaker = watchdog.Speaker(blobs, 3, 1)
    key = f"{watchdog.WORKERS}/3-1"
    until(lambda: key in blobs.list() and json.loads(blobs.read(key))["number"] > 2)
    before = json.loads(blobs.read(key))
    assert (before["rank"], before["pid"], before["ticks"]) == (1, os.getpid(), start_ticks(os.getpid())) and speaker.is_alive()
    told = instead and json.dumps(before | {"pid": before["pid"] + 1}).encode()

    def give_up() -> bool:  # again where it was just about to speak
        if told:
            blobs.replace(key, told)
        elif key in blobs.list():
            blobs.delete(key)
        speaker.join(0.1)
        return not speaker.is_alive()

    until(give_up)
    assert (blobs.read(key) if key in blobs.list() else b"") == told


def test_only_the_very_process_is_killed() -> None:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    ticks = start_ticks(child.pid)
    assert ticks and not watchdog.kill_process(child.pid, ticks + 1) and child.poll() is None
    assert watchdog.kill_process(child.pid, ticks) and child.wait() == -signal.SIGKILL
    assert not watchdog.kill_process(child.pid, ticks)


def until(what: Callable[[], object]) -> None:
    end = time.monotonic() + 10
    while not what():
        assert time.monotonic() < end
        time.sleep(0.005)


# --- leftovers -------------------------------------------------------------------------------------------------------


def test_folders_of_dead_drivers_are_swept_and_no_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "_short_folder", lambda: str(tmp_path))
    left = {
        "dead": f"{machine()} {2**22 + 1} 5", "reused": f"{machine()} {os.getpid()} 5",
        "alive": f"{machine()} {os.getpid()} {start_ticks(os.getpid())}", "elsewhere": "another-boot-1 7 5", "half": "",
    }  # fmt: skip
    for name, owner in left.items():
        (tmp_path / f"dp-ray-{name}" / "r").mkdir(parents=True)
        (tmp_path / f"dp-ray-{name}" / cluster.OWNER).write_text(owner)
    (tmp_path / "dp-ray-unnamed").mkdir()
    (tmp_path / "dp-ray-link").symlink_to("dp-ray-dead")
    with cluster._one_host() as folder:
        kept = {path.name for path in tmp_path.iterdir()}
        assert Path(folder).parent.name in kept
        cluster.sweep_leftovers(tmp_path)
        assert Path(folder).is_dir(), "one's own is not dead"
    assert {"dp-ray-dead", "dp-ray-reused"}.isdisjoint(kept)
    assert {"dp-ray-alive", "dp-ray-elsewhere", "dp-ray-half", "dp-ray-unnamed", "dp-ray-link"} <= kept


CARELESS = """
import os, subprocess, sys
from diffprune.distributed import reaper
started = []
class Kept(subprocess.Popen):
    def __init__(self, *given, **options):
        super().__init__(*given, **options)
        started.append(self)
subprocess.Popen = Kept
with reaper.reaped(sys.argv[1]):
    started[0].stdin.close()
    print(flush=True)
    sys.stdin.read()
    os._exit(1)
"""


def test_a_driver_whose_pipe_is_closed_is_not_taken_for_dead(tmp_path: Path) -> None:
    """Nor is a program killed that has joined a Ray of another's, and has but its own log there."""
    (place := tmp_path / "place").mkdir()
    with (place / "python-core-driver-01_7.log").open("w") as log, (place / "raylet.out").open("w") as out:
        joined, raylet = (subprocess.Popen(["sleep", "60"], stdout=file) for file in (log, out))
    pipe: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", CARELESS, str(place)], **pipe) as driver:
        assert driver.stdout and driver.stdout.readline() == b"\n"
        time.sleep(1.0)
        assert place.is_dir() and raylet.poll() is None and driver.poll() is None
    assert driver.wait() == 1 and raylet.wait(10) == -signal.SIGKILL
    began = time.monotonic()
    while place.exists() and time.monotonic() - began < 10:
        time.sleep(0.02)
    assert not place.exists() and joined.poll() is None
    joined.kill()
    joined.wait()


KILLED = """
import os, signal, subprocess, sys
from diffprune.distributed.cluster import private_folder
with private_folder() as folder:
    log, quiet = open(f"{folder}/log", "w"), subprocess.DEVNULL
    writing = subprocess.Popen(["sleep", "60"], stdout=log, stderr=log, start_new_session=True).pid
    reading = subprocess.Popen(["tail", "-f", log.name], stdout=quiet, stderr=quiet).pid
    print(folder, writing, reading, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_killed_driver_started_ends_with_it_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who writes into its folder, and neither who reads there nor another driver's."""
    monkeypatch.setattr(cluster, "_short_folder", lambda: str(tmp_path))
    with cluster.private_folder() as mine, Path(mine, "log").open("w") as log:
        innocent = subprocess.Popen(["sleep", "60"], stdout=log)
        killed = subprocess.run([sys.executable, "-c", KILLED], capture_output=True, text=True, check=False)
        began, (theirs, writing, reading) = time.monotonic(), killed.stdout.split()
        while (start_ticks(int(writing)) or Path(theirs).parent.exists()) and time.monotonic() - began < 10:
            time.sleep(0.02)
        assert killed.returncode == -signal.SIGKILL and not start_ticks(int(writing)) and not Path(theirs).parent.exists()
        assert start_ticks(int(reading)) and innocent.poll() is None and Path(mine).is_dir()
    os.kill(int(reading), signal.SIGKILL)
    assert innocent.wait(10) == -signal.SIGKILL and not Path(mine).parent.exists(), "at the end of one's own"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_who_is_to_be_told_hears_of_a_signal_before_anything_else(number: int) -> None:
    code = (
        "import os, signal\n"
        "from diffprune.core import termination\n"
        "heard = []\n"
        "termination.handle(lambda: heard.append(1))\n"
        "try:\n"
        f"    os.kill(os.getpid(), {number})\n"
        "except KeyboardInterrupt:\n"
        "    print(heard)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[1]\n"
