"""Trials 11 and 12 in earnest: a training run is asked to end, a worker is frozen; losses are those of a run left alone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from diffprune.train.checkpoints import read_steps

pytestmark = pytest.mark.trial
COMMAND = (
    "train --scorer diffprune --steps 30 --set train.seeds=[0] --set train.workers=2 --set train.images=2 "
    "--set train.questions=1 --set train.calibration_images=2 --set train.validation_images=2 "
    "--set train.checkpoint_every=1000 --set train.validate_every=0"
)
HOUSE = Path(__file__).parents[2]


@contextmanager
def training(name: str) -> Iterator[subprocess.Popen[str]]:
    """The command, its output in the file `<name>.log`; killed at the end if it still runs."""
    environment = os.environ | {"PYTHONPATH": str(HOUSE), "OMP_NUM_THREADS": "1"}
    with Path(f"{name}.log").open("a") as log:
        command = [sys.executable, "-m", "diffprune", *COMMAND.split(), "--name", name]
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, text=True, env=environment)
    try:
        yield process
    finally:
        with process:
            process.kill()


def await_(what: Callable[[], bool], process: subprocess.Popen[str], name: str, seconds: float = 400) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert process.poll() is None and time.monotonic() < end, Path(f"{name}.log").read_text()
        time.sleep(0.05)


def losses(name: str) -> list[float]:
    found = read_steps(Path("runs") / name)
    return [row.loss for row in next(iter(found.values()), [])]


def left() -> set[str]:
    """Temporary folders of ours."""
    return {path.name for path in Path("/tmp").glob("dp-ray-*")}


def finished(name: str) -> None:
    with training(name) as process:
        assert process.wait(600) == 0, Path(f"{name}.log").read_text()
    assert len(losses(name)) == 30


def test_a_run_that_is_asked_to_end_saves_and_goes_on() -> None:
    finished("whole")
    before = left()
    with training("run") as process:
        await_(lambda: len(losses("run")) >= 3, process, "run")
        began = time.monotonic()
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 143, Path("run.log").read_text()
        print(f"ended after {time.monotonic() - began:.1f} s")
    text, done = Path("run.log").read_text(), len(losses("run"))
    assert "diffprune: terminated; what was finished is kept" in text and "Traceback" not in text and "stack" not in text
    (state,) = (path.name for path in Path("runs/run/states").glob("*/*.pt"))
    assert 3 <= int(state.split("-")[1]) >= done - 1, "saved where it was, though no state was due"
    assert left() <= before
    finished("run")
    assert losses("run") == pytest.approx(losses("whole"), rel=1e-5)


def test_a_frozen_worker_is_named_and_the_group_starts_again() -> None:
    finished("whole")
    with training("run") as process:
        await_(lambda: len(losses("run")) >= 3, process, "run")
        family = psutil.Process(process.pid).children(recursive=True)
        workers = [one for one in family if "RayTrainWorker" in " ".join(one.cmdline())]
        began = time.monotonic()
        workers[-1].suspend()
        await_(lambda: "hangs: no sign of life" in Path("run.log").read_text(), process, "run", seconds=120)
        print(f"named after {time.monotonic() - began:.1f} s")
        assert f"process {workers[-1].pid} on" in Path("run.log").read_text()
        assert process.wait(600) == 0, Path("run.log").read_text()
    assert losses("run") == pytest.approx(losses("whole"), rel=1e-5)
