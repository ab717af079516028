"""Processes that hang are found, and those that only take long are not; a host that does not see the run's storage is named."""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import ray

from diffprune.core.cell import Cell
from diffprune.core.records import Prediction
from diffprune.core.spec import Spec
from diffprune.distributed import cluster, liveness, sweep, trials
from diffprune.distributed.exclusive import exclusive
from diffprune.io.blob_store import LocalBlobs
from diffprune.io.run_lock import attempts_at, lock
from diffprune.io.shared_storage import Proof, Unseen, proof
from diffprune.store import Store
from tests.records import evaluate_cell, prediction, provenance

pytestmark = pytest.mark.slow

ASKED = [evaluate_cell(f"random(seed={seed})", benchmark="world('pope')") for seed in range(3)]


@pytest.fixture(scope="module")
def session() -> Iterator[None]:
    here = sys.modules[__name__]
    ray.cloudpickle.register_pickle_by_value(here)  # workers cannot import a test
    with cluster.connect(workers=2):
        yield
    ray.cloudpickle.unregister_pickle_by_value(here)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seconds in {"LOOK_S": 0.3, "QUIET_S": 0.5, "HANG_S": 1.5}.items():
        monkeypatch.setattr(liveness, name, seconds)
        monkeypatch.setattr(sweep, name, seconds, raising=False)


class Model:
    """No model: answers at once."""

    def prepare(self, model: Spec, methods: Sequence[Spec], storage: Proof | None) -> int:
        return os.getpid()

    def batches(self, cell: Cell) -> tuple[list[list[int]], float]:
        return [[0], [1], [2]], 0.0

    def answer(self, cell: Cell, index: Sequence[int]) -> tuple[dict[int, Prediction], float]:
        return {i: prediction(i) for i in index}, 0.0


def first(mark: Path) -> bool:
    """Whether this process is the first to come here."""
    try:
        mark.touch(exist_ok=False)
    except FileExistsError:
        return False
    mark.write_text(str(os.getpid()))
    return True


def compute(seconds: float) -> None:
    """Work that takes long."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        pass


def ended(pid: int) -> bool:
    """Within a while."""
    end = time.monotonic() + 10
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        if time.monotonic() > end:
            return False
        time.sleep(0.1)
    return True


@pytest.mark.trial(12)
def test_what_hangs_is_replaced_and_what_takes_long_is_not(
    session: None, quick: None, own_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Hanging(Model):
        """One process sleeps for ever while it loads, one freezes at a batch; others take longer than either is given."""

        def prepare(self, model: Spec, methods: Sequence[Spec], storage: Proof | None) -> int:
            if first(own_folder / "asleep"):
                time.sleep(1000)
            if first(own_folder / "slow"):
                compute(2.5)
            return os.getpid()

        def answer(self, cell: Cell, index: Sequence[int]) -> tuple[dict[int, Prediction], float]:
            if first(own_folder / "long"):
                compute(2.5)
            elif first(own_folder / "frozen"):
                os.kill(os.getpid(), signal.SIGSTOP)
            return super().answer(cell, index)

    monkeypatch.setattr(sweep, "Worker", Hanging)
    found = sweep.sweep(ASKED, own_folder / "store", provenance(), workers=2, model=Spec("embedded"))
    assert (found.done, found.deaths) == (3, 2), "the two that hang, and not the two that take long"
    assert len(Store(own_folder / "store").read("predictions")) == 9
    for mark in ("asleep", "frozen"):
        assert ended(int((own_folder / mark).read_text())), f"the process that was {mark} is left"


def test_a_process_that_does_not_begin_is_missed_where_nobody_is_at_work(session: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(liveness, "START_S", 0.1)
    never = ray.remote(num_cpus=1000)(Model).remote()
    watch = liveness.Watch()
    assert watch.look([never]) == []
    time.sleep(0.2)
    assert watch.look([never], patient=True) == [], "it may wait for a node"
    ((actor, reason),) = watch.look([never])
    assert actor == never and reason == "its process did not begin in 0 s"


@pytest.mark.trial(12)
def test_a_trial_of_a_search_that_hangs_is_a_failed_trial(session: None, quick: None, own_folder: Path) -> None:
    """The others come to their end, also one that takes longer than a trial may do nothing."""

    def trial(config: dict[str, int], marks: Path) -> None:
        from ray import tune

        if config["index"] == 1:
            (marks / "frozen").write_text(str(os.getpid()))
            os.kill(os.getpid(), signal.SIGSTOP)
        compute(2.5 if config["index"] == 0 else 0.1)
        tune.report({"value": config["index"]})

    class Heard:
        def __init__(self) -> None:
            self.told: list[int] = []

        def reported(self, index: int, result: dict[str, int]) -> None:
            assert result["value"] == index

        def ended(self, index: int) -> None:
            self.told.append(index)

    heard = Heard()
    failed = trials.failures(trial, 4, {"marks": own_folder}, heard, {"cpu": 1}, computing=True, max_concurrent_trials=2)
    assert list(failed) == [1] and sorted(heard.told) == [0, 2, 3] and failed[1]
    assert ended(int((own_folder / "frozen").read_text()))


def test_what_is_timed_may_hang_as_well(session: None, quick: None) -> None:
    def frozen() -> Iterator[int]:
        yield os.getpid()
        time.sleep(0.5)  # until that is on its way
        os.kill(os.getpid(), signal.SIGSTOP)
        yield 0

    found = exclusive(frozen)
    pid = next(found)
    with pytest.raises(ray.exceptions.RayError):
        next(found)
    assert ended(pid)


def test_a_host_that_does_not_see_the_storage_is_named(
    session: None, own_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is left out, as long as others see it; where nobody does, the run ends."""
    store, host = own_folder / "store", socket.gethostname()

    class Elsewhere(Model):
        """A process that sees another folder in the place of the run's: the first, or all."""

        def prepare(self, model: Spec, methods: Sequence[Spec], storage: Proof | None) -> int:
            assert storage is not None
            if model.name == "nobody" or first(own_folder / "blind"):
                storage = replace(storage, attempts=replace(storage.attempts, blobs=LocalBlobs(own_folder / "other")))
            storage.check(0.0)
            while model.name == "one" and not (own_folder / "left_out").exists():
                time.sleep(0.05)
            return os.getpid()

    left_out = sweep._Run._left_out

    def told(run: sweep._Run, slot: sweep._Slot, reason: str) -> None:
        left_out(run, slot, reason)
        (own_folder / "left_out").touch()

    monkeypatch.setattr(sweep, "Worker", Elsewhere)
    monkeypatch.setattr(sweep._Run, "_left_out", told)
    with lock(store, "made-up") as attempt:
        holder = provenance(attempt=attempt)
        found = sweep.sweep(ASKED, store, holder, workers=2, model=Spec("one"))
        assert found.done == 3
        assert f"a worker is left out: {host} cannot see {own_folder / 'other'}" in capsys.readouterr().out
        again = [evaluate_cell("random(seed=9)", benchmark="world('pope')")]
        with pytest.raises(RuntimeError, match=f"^{host} cannot see"):
            sweep.sweep(again, store, holder, workers=2, model=Spec("nobody"))


def test_the_note_of_the_lock_is_the_proof(tmp_path: Path) -> None:
    with lock(tmp_path / "store", "made-up") as attempt:
        found = proof(attempts_at(LocalBlobs(tmp_path / "store"), "made-up"), attempt)
        assert found
        found.check(0.0)
        with lock(tmp_path / "other", "made-up"), pytest.raises(Unseen):
            replace(found, attempts=attempts_at(LocalBlobs(tmp_path / "other"), "made-up")).check(0.0)
    assert proof(attempts_at(LocalBlobs(tmp_path), "made-up"), 1) is None, "without a lock there is nothing to see"
