"""Trials of the process that leads a sweep: it is killed or asked to end, or strangers hold the ports; and of a submitted job."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import psutil
import pytest
from scenario import EVALUATE, HOUSE, SLACK, Run, Scene, Tables, answered, answers

pytestmark = pytest.mark.trial
RUN = Path("runs/tried")
JOB = """
from diffprune.job import Evaluation, Job
job = Job(
    name="tried", baselines=("unpruned", "random", "attention"), budgets=("Keep(16)",),
    evaluate=Evaluation(benchmarks=("world('pope')", "world('gqa')"), limit=320, batch=8),
)
"""


def sweeping(scene: Scene) -> Run:
    """A sweep that has written something."""
    run = scene.diffprune("runs", *EVALUATE, "--workers", "2")
    run.until(lambda: answered(run), 120)
    return run


def ends_as(undisturbed: Tables, scene: Scene) -> None:
    """The same command goes on to the end, and leaves the undisturbed tables and nothing else."""
    run = scene.diffprune("runs", *EVALUATE, "--workers", "2")
    assert run.wait(120) == 0, run.text
    assert answers(RUN) == undisturbed
    scene.assert_clean(RUN)


@pytest.mark.trial(3)
def test_nothing_outlives_a_killed_driver_by_ten_seconds(scene: Scene, undisturbed: Tables) -> None:
    run = sweeping(scene)
    run.process.kill()
    run.process.wait()
    began = time.monotonic()
    while (left := scene.processes()) and time.monotonic() - began < 10:
        time.sleep(0.1)
    assert not left, [" ".join(one.cmdline())[:200] for one in left]
    print(f"the last process ended after {time.monotonic() - began:.1f} s")
    assert not list(scene.temporary.glob("dp-ray-*"))
    ends_as(undisturbed, scene)


@pytest.mark.trial(11)
def test_a_sweep_that_is_asked_to_end_does_so(scene: Scene, undisturbed: Tables) -> None:
    run = sweeping(scene)
    run.process.send_signal(signal.SIGTERM)
    assert run.wait(10) == 143, run.text
    assert "diffprune: terminated; what was finished is kept" in run.text and "Traceback" not in run.text
    ends_as(undisturbed, scene)


@pytest.mark.trial(13)
def test_strangers_on_rays_ports_are_left_alone(scene: Scene, undisturbed: Tables) -> None:
    with ExitStack() as stack:
        held = []
        for port in (6379, 8265, 10001, 52365, 0):  # of a head, its dashboard, its client server, an agent
            try:
                held.append(stack.enter_context(socket.create_server(("", port))))
            except OSError:
                continue  # somebody really is there
        address = f"127.0.0.1:{held[-1].getsockname()[1]}"
        run = scene.diffprune("runs", *EVALUATE, "--workers", "2", RAY_ADDRESS=address)
        assert run.wait(120) == 0, run.text
        held[-1].setblocking(False)
        with pytest.raises(BlockingIOError):  # whoever looks for something of its own may knock at the others
            held[-1].accept()
    assert answers(RUN) == undisturbed
    scene.assert_clean(RUN)


@pytest.mark.trial(8)
def test_a_job_whose_supervisor_is_killed_fails_and_is_resumed(scene: Scene, undisturbed: Tables) -> None:
    Path("tried.py").write_text(JOB)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    head = scene.temporary / "head"
    own = {"DIFFPRUNE_HEAD": str(head), "PORT": str(port), "PYTHON": sys.executable, "CPUS": "3", "PYTHONPATH": str(HOUSE)}

    def local(verb: str) -> None:
        subprocess.run([HOUSE / "cluster" / "local.sh", verb], env=os.environ | own, check=True, timeout=60 * SLACK)

    local("start")
    try:
        at = ("--address", f"http://127.0.0.1:{port}")
        sent = scene.start(
            "sent", [sys.executable, "-m", "diffprune", "submit", "tried.py", *at, "--out", str(RUN.parent.absolute())]
        )
        sent.until(lambda: " batches, " in sent.text, 180)
        (supervisor,) = scene.processes("JobSupervisor")
        supervisor.kill()
        assert sent.wait(20) != 0, sent.text
        assert "tried-1 failed" in sent.text and "Traceback" not in sent.text
        psutil.wait_procs(scene.processes("-m diffprune run"), 10 * SLACK)
        assert not scene.processes("-m diffprune run"), "the entry point went with its supervisor"
        again = scene.start("again", [sys.executable, "-m", "diffprune", "resume", "tried-1", *at])
        assert again.wait(180) == 0, again.text
        assert "tried-2" in again.text
    finally:
        local("stop")
    assert answers(RUN) == undisturbed
    shutil.rmtree(head)  # a head's logs stay for whoever asks why it ended
    scene.assert_clean(RUN)
