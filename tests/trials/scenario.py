"""What trials share: a job run undisturbed and disturbed, tables compared key by key, and a look for what was left behind."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from diffprune.io.blob_store import TEMPORARY
from diffprune.io.run_lock import holder
from diffprune.store import Store
from diffprune.train.checkpoints import NOTES, read_steps

HOUSE = Path(__file__).parents[2]
SLACK = float(os.environ.get("TRIAL_SLACK", "5"))  # limits are what an idle machine needs, times this
EVALUATE = (
    "evaluate", "--name", "tried", "--pruner", "unpruned", "--pruner", "random", "--pruner", "attention", "--budget", "16",
    "--benchmark", "world('pope')", "--benchmark", "world('gqa')", "--limit", "320", "--set", "evaluate.batch=8",
)  # fmt: skip
TORCH = "torchinductor_"  # torch's cache, one folder for every run of a user
Tables = dict[tuple[str, str], tuple[Any, ...]]
Curve = dict[tuple[str, int], float]


@dataclass
class Run:
    """A process and what it says."""

    process: subprocess.Popen[bytes]
    log: Path

    @property
    def text(self) -> str:
        return self.log.read_text(errors="replace")

    def wait(self, seconds: float) -> int:
        """Its exit code; the trial fails where it takes longer. seconds: on an idle machine."""
        self.until(lambda: self.process.poll() is not None, seconds)
        return self.process.returncode

    def until(self, what: Callable[[], bool], seconds: float) -> float:
        """Wait for something that the process brings about; returns the seconds it took."""
        began = time.monotonic()
        while not what():
            assert self.process.poll() is None, f"ended with {self.process.returncode}:\n{self.text}"
            assert time.monotonic() - began < SLACK * seconds, f"nothing after {SLACK * seconds:.0f} s:\n{self.text}"
            time.sleep(0.05)
        return time.monotonic() - began


@dataclass
class Scene:
    """The processes and temporary files of one trial. place: the folder its commands start in, by which all they start, and that
    outlives them, is found."""

    place: Path
    temporary: Path = field(default_factory=lambda: Path(tempfile.mkdtemp(prefix="dpt-", dir="/tmp")))

    def start(self, name: str, command: Sequence[str], **more: str) -> Run:
        """Start a command whose output goes to `<name>.log`."""
        environment = os.environ | {"PYTHONPATH": str(HOUSE), "OMP_NUM_THREADS": "1", "TMPDIR": str(self.temporary)} | more
        with (log := Path(f"{name}.log").absolute()).open("ab") as stream:
            return Run(subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT, env=environment, cwd=self.place), log)

    def diffprune(self, out: str, *arguments: str, through: Sequence[str] = (), **more: str) -> Run:
        """Start our command, its run below the folder `out`. through: what is written before the command."""
        return self.start(
            out, [*through, sys.executable, "-m", "diffprune", *arguments, "--out", str(Path(out).absolute())], **more
        )

    def processes(self, title: str = "") -> list[psutil.Process]:
        """Living processes of this trial in whose command line a text stands."""
        found = []
        for one in psutil.process_iter():
            with suppress(psutil.Error):
                at = Path(one.cwd())
                ours = one.pid != os.getpid() and (at.is_relative_to(self.place) or at.is_relative_to(self.temporary))
                if ours and one.status() != psutil.STATUS_ZOMBIE and title in " ".join(one.cmdline() or [one.name()]):
                    found.append(one)
        return found

    def assert_clean(self, *runs: Path) -> None:
        """No process, lock, heartbeat or temporary file is left. runs: folders of runs."""
        end = time.monotonic() + SLACK * 15
        while (left := self.processes()) and time.monotonic() < end:
            time.sleep(0.1)
        assert not left, [" ".join(one.cmdline())[:200] for one in left]
        files = [str(one.relative_to(self.temporary)) for one in self.temporary.rglob("*") if not one.name.startswith(TORCH)]
        assert not files, files[:20]
        for run in runs:
            assert holder(run / "store", run.name) is None
            assert not [name for name in NOTES if (run / name).exists()]
            assert not list((run / "store").glob("beats/*/*")) and not list(run.rglob(f".*{TEMPORARY}"))

    def end(self) -> None:
        for one in self.processes():
            with suppress(psutil.Error):
                one.send_signal(signal.SIGCONT)
                one.kill()
        shutil.rmtree(self.temporary, ignore_errors=True)


def answered(run: Run) -> bool:
    """Whether a sweep has told of answers. Its cells are written nearly together, when most is over."""
    return " batches, " in run.text


def answers(run: Path) -> Tables:
    """Answers of a run by (cell, sample); each is there once."""
    frame = Store(run / "store").read("predictions")
    assert not frame.duplicated(["cell", "sample"]).any()
    rows = frame[["cell", "sample", "answer", "credit", "visual_kept", "error"]].itertuples(index=False, name=None)
    return {(cell, sample): tuple(rest) for cell, sample, *rest in rows}


def train(*, workers: int | str = 1, checkpoint_every: int = 1000) -> tuple[str, ...]:
    """Arguments for thirty short steps of one scorer."""
    short = {
        "seeds": [0], "workers": workers, "images": 2, "questions": 1, "calibration_images": 2, "validation_images": 2,
        "checkpoint_every": checkpoint_every, "validate_every": 0,
    }  # fmt: skip
    pairs = (text for key, value in short.items() for text in ("--set", f"train.{key}={value}"))
    return ("train", "--name", "tried", "--scorer", "diffprune", "--steps", "30", *pairs)


def losses(run: Path) -> Curve:
    """Losses of a run by (scorer, step)."""
    return {(scorer, row.step): row.loss for scorer, rows in read_steps(run).items() for row in rows}
