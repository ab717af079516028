"""Every test runs in its own empty folder, on one thread, without telemetry."""

from __future__ import annotations

import gc
import os
import secrets
import signal
import tempfile

# Before torch or Ray is imported anywhere: both read their environment once.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))  # tests leave the user's own token alone
os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")  # else every report waits for a poll of two seconds

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from diffprune.core.registry import FOLDER
from tests.browser import Browser
from tests.trials.table import pytest_runtest_makereport, pytest_terminal_summary  # noqa: F401

START_RAY = "identity installed liveness object_stores own_files resources submit sweep train_ray tune tune_training".split()

torch.set_num_threads(1)
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # started in the background; some tests press Ctrl-C
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Each file is one process's, for its fixtures; those that start Ray are one's together: two Rays at once are in each other's
    way on two cores, and while one waits for its processes to start, other tests compute."""
    from xdist.scheduler.loadfile import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = super()._split_scope(nodeid)
            return "ray" if Path(file).stem.removeprefix("test_") in START_RAY else file

    return Scheduling(config, log)


def pytest_collection_finish() -> None:
    """What is imported now stays, and need not be looked through at every collection of garbage."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Whatever a test writes lands in a folder of its own, temporary files of this process included."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.delenv(FOLDER, raising=False)  # an earlier test that spoke to Ray told its workers where its plug-ins lie
    return tmp_path


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """One headless Chromium for all tests that look at pages."""
    made = Browser(tmp_path_factory.mktemp("chromium"))
    yield made
    made.close()
