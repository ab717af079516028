"""Who follows a training over workers, on the driver: a failure of the storage costs one look and nothing else."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from diffprune.distributed import follower as following
from diffprune.distributed.follower import Follower
from diffprune.train.context import LocalContext
from diffprune.train.recipe import Recipe
from tests.records import step


class PassingFailure:
    """A step log whose storage does not answer for some looks."""

    def __init__(self, inner: Any) -> None:
        self.inner, self.out = inner, threading.Event()

    def newer(self, place: Any) -> Any:
        if self.out.is_set():
            raise OSError(5, "the object store did not answer", "gs://a-bucket/run/steps")
        return self.inner.newer(place)


def test_who_follows_a_training_outlives_a_failure_of_its_storage(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Follower, "every_s", 0.01)
    context = LocalContext("run")
    follower = Follower(Recipe(pruners=("diffprune",), seeds=(0,), steps=3), Path("run"), None, None)
    follower.log, looks = PassingFailure(follower.log), list[bool]()  # type: ignore[assignment]
    follower.watchdog = SimpleNamespace(look=lambda: looks.append(follower.log.out.is_set()) or ())  # type: ignore[attr-defined]
    shown = list[str]()

    def wait(holds: Any) -> None:
        until = time.monotonic() + 60
        while not holds() and time.monotonic() < until:
            shown.append(capsys.readouterr().out)
            time.sleep(0.01)

    with follower:
        for _ in range(2):
            follower.log.out.set()  # type: ignore[attr-defined]
            before = len(looks)
            wait(lambda: sum(looks[before:]) >= 3)  # noqa: B023
            follower.log.out.clear()  # type: ignore[attr-defined]
            wait(lambda: not follower.failing)
        assert sum(looks) >= 6, "workers that hang are looked for all the time"
        context.report("diffprune-0", step(2))
        wait(lambda: "diffprune-0" in "".join(shown))
        assert follower.is_alive()
    said = "".join(shown) + capsys.readouterr().out
    assert said.count("the object store did not answer") == 2, "once for each time that it failed"
    assert said.count("diffprune-0") == 1


def test_how_a_training_ended_is_not_replaced_by_a_failure_of_its_storage(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Follower, "every_s", 3600.0)
    follower = Follower(Recipe(pruners=("diffprune",), seeds=(0,), steps=3), Path("run"), None, None)
    follower.log = PassingFailure(follower.log)  # type: ignore[assignment]
    follower.log.out.set()  # type: ignore[attr-defined]
    with pytest.raises(RuntimeError, match="the loss is not finite"), follower:
        raise RuntimeError("the loss is not finite")


def test_a_storage_that_is_silent_holds_nobody_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Follower, "every_s", 0.01)
    monkeypatch.setattr(following, "LEAVE_S", 0.2)
    follower = Follower(Recipe(pruners=("diffprune",), seeds=(0,), steps=3), Path("run"), None, None)
    asked, answer = threading.Event(), threading.Event()

    def silent(_: Any) -> Any:
        asked.set()
        answer.wait(60)
        raise OSError(5, "the object store did not answer")

    follower.log = SimpleNamespace(newer=silent)  # type: ignore[assignment]
    begun = time.monotonic()
    with follower:
        assert asked.wait(30)
    assert time.monotonic() - begun < 30 and follower.is_alive(), "it has not waited for the answer"
    answer.set()
    follower.join(30)
