"""Training checkpoints: a run resumes from the newest intact state, and every step counts once, whatever was interrupted."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from blob_stores import FailingBlobs, MemoryBlobs

from diffprune.core.records import Step
from diffprune.io.attempts import Fenced
from diffprune.io.blob_store import Blobs, LocalBlobs
from diffprune.train import step_log
from diffprune.train.checkpoints import ELSEWHERE, Files, claim, read_steps
from diffprune.train.context import LocalContext
from diffprune.train.step_log import STEPS


@pytest.fixture(params=["local", "memory"])
def storage(request: pytest.FixtureRequest) -> Blobs:
    return LocalBlobs("run") if request.param == "local" else MemoryBlobs()


def attempt(storage: Blobs) -> Files:
    """A new attempt at the run."""
    return Files(Path("run"), claim(storage), storage)


def state(step: int) -> dict[str, Any]:
    return {"step": step, "weight": torch.full((3,), float(step))}


def newest(files: Files, name: str = "scorer") -> float | None:
    """The step of the state that a run would resume from; its weights are those of that step."""
    found = files.load(name, torch.device("cpu"))
    if found is None:
        return None
    assert found["weight"].tolist() == [found["step"]] * 3
    return found["step"]


# States --------------------------------------------------------------------------------------------------------------


def test_the_newest_state_and_the_one_before_are_kept(storage: Blobs) -> None:
    files = attempt(storage)
    assert newest(files) is None
    for step in (2, 4, 6):
        files.save("scorer", state(step))
    files.save("other", state(1))
    assert newest(files) == 6 and newest(files, "other") == 1 and len(storage.list("states/scorer")) == 2
    files.discard("scorer")
    assert newest(files) is None and newest(files, "other") == 1


def test_a_damaged_state_gives_way_to_the_one_before(storage: Blobs) -> None:
    files = attempt(storage)
    for step in (4, 6):
        files.save("scorer", state(step))
    four, six = storage.list("states/scorer")
    data = storage.read(six)
    storage.replace(six, data[:-9] + bytes([data[-9] ^ 1]) + data[-8:])
    assert newest(files) == 4
    files.save("scorer", state(5))
    assert newest(files) == 5 and len(storage.list("states/scorer")) == 2, "the damaged one is gone"
    storage.replace(four, b"")
    for key in storage.list("states/scorer"):
        storage.replace(key, b"")
    assert newest(files) is None


@pytest.mark.parametrize("late", [False, True])
def test_stopped_while_saving_a_state_is_left(storage: Blobs, late: bool) -> None:
    files = attempt(storage)
    for step in (2, 4):
        files.save("scorer", state(step))
    for point in range(2):  # the write, and the removal of the state that is two older
        with pytest.raises(KeyboardInterrupt):
            Files(Path("run"), 1, FailingBlobs(storage, KeyboardInterrupt(), point, late)).save("scorer", state(6))
        assert newest(files) == (6 if late or point else 4)
    files.save("scorer", state(8))
    assert newest(files) == 8 and len(storage.list("states/scorer")) == 2


def test_the_reason_why_all_stop_is_that_of_the_worker_that_has_one(storage: Blobs) -> None:
    files = attempt(storage)
    assert files.stopped() == ""
    files.stop(0, f"the training data cannot be read {ELSEWHERE}")
    assert files.stopped().endswith(ELSEWHERE), "the other has not noted its own yet"
    files.stop(1, "7 of 9 rows are broken")
    assert files.stopped() == "7 of 9 rows are broken"


def test_one_writes_to_the_step_log_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another host's end of a file on NFS is what it was; who holds the lock has read the newest."""
    held = (
        "import fcntl, sys, time; log = open(sys.argv[1], 'ab'); fcntl.lockf(log, fcntl.LOCK_EX); print('held', flush=True); "
        "time.sleep(float(sys.argv[2])); log.write(b'other\\n')"
    )
    path = tmp_path / STEPS
    for seconds, patience, wanted in (("0.5", 5.0, b"other\nmine\n"), ("2", 0.1, b"mine\nother\n")):
        path.unlink(missing_ok=True)
        monkeypatch.setattr(step_log, "LOCK_S", patience)
        other = subprocess.Popen([sys.executable, "-c", held, str(path), seconds], stdout=subprocess.PIPE)
        assert other.stdout is not None and other.stdout.readline() == b"held\n"
        step_log.opened(tmp_path).append(b"mine\n")
        assert other.wait(10) == 0 and path.read_bytes() == wanted


def test_what_cannot_be_trained_is_noted_for_one_attempt(storage: Blobs) -> None:
    files = attempt(storage)
    files.fail("mine-0", "its objective fails")
    files.fail("mine-1", "loss was NaN")
    assert files.failures() == {"mine-0": "its objective fails", "mine-1": "loss was NaN"} and files.stopped() == ""
    newer = attempt(storage)
    assert newer.failures() == {}
    newer.tidy()
    assert files.failures() == {}


def test_an_older_attempt_may_not_write_any_more(storage: Blobs) -> None:
    old = attempt(storage)
    old.save("scorer", state(9))
    new = attempt(storage)
    new.save("scorer", state(3))
    for write in (lambda: old.save("scorer", state(10)), lambda: old.discard("scorer"), old.check):
        with pytest.raises(Fenced, match=r"attempt 1 of training .*attempt 2 has taken over"):
            write()
    assert newest(new) == 3, "the newest attempt counts, not the highest step"


def test_a_write_that_was_under_way_when_it_was_fenced_off_hurts_nothing(storage: Blobs) -> None:
    """The fence is looked at before a write; what is written a moment later stays behind the newer attempt."""
    new = Files(Path("run"), 2, storage)
    new.save("scorer", state(3))
    new.save("scorer", state(4))
    Files(Path("run"), 1, storage).save("scorer", state(10))
    assert newest(new) == 4


# The step log --------------------------------------------------------------------------------------------------------


def step(number: int, loss: float = 1.0) -> Step:
    return Step(
        step=number, loss=loss, penalty=0.0, temperature=1.0, drawn_budget="Keep(8)", kept=8.0, grad_norm=1.0,
        clipped=False, score_sd=1.0, overlap=0.5, grad_cosine=math.nan,
        step_ms=3.0, workers=1, validation_soft=math.nan, validation_hard=math.nan,
    )  # fmt: skip


def losses(scorer: str = "scorer") -> list[tuple[int, float]]:
    return [(row.step, row.loss) for row in read_steps(Path("run")).get(scorer, [])]


def test_steps_done_again_count_once_as_last_done() -> None:
    context = LocalContext("run")
    assert read_steps(Path("run")) == {}
    context.begin("scorer", 0)
    for number in (0, 1, 2):
        context.report("scorer", step(number))
    context.report("other", step(0, 9.0))
    context.begin("scorer", 1)
    assert losses() == [(0, 1.0)]
    context.report("scorer", step(1, 2.0))
    context.report("scorer", step(1, 2.0))
    assert losses() == [(0, 1.0), (1, 2.0)] and losses("other") == [(0, 9.0)]
    assert math.isnan(read_steps(Path("run"))["scorer"][0].grad_cosine) and "NaN" not in Path("run", STEPS).read_text()


def test_a_torn_line_is_left_out_and_ends_before_the_next() -> None:
    context = LocalContext("run")
    context.report("scorer", step(0))
    with Path("run", STEPS).open("a") as log:
        log.write('{"scorer": "scorer", "st')
    assert losses() == [(0, 1.0)]
    context.report("scorer", step(1))
    assert losses() == [(0, 1.0), (1, 1.0)]
