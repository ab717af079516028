"""The controller of a training in the driver: in the thread that calls, where an event loop runs, and where it is interrupted."""

from __future__ import annotations

import asyncio
import threading
import time

import pytest

from diffprune.distributed import controller


def test_it_works_in_the_thread_that_calls_and_beside_a_loop_in_its_own() -> None:
    ran: list[threading.Thread] = []

    async def run() -> None:
        await asyncio.sleep(0)
        ran.append(threading.current_thread())

    async def notebook() -> None:
        controller._to_the_end(run)

    controller._to_the_end(run)
    asyncio.run(notebook())
    assert ran[0] is threading.current_thread() and ran[1] is not ran[0]


def test_what_it_raises_is_raised_beside_a_loop_too() -> None:
    async def run() -> None:
        await asyncio.sleep(0)
        raise ValueError("no workers")

    async def notebook() -> None:
        controller._to_the_end(run)

    for call in (lambda: controller._to_the_end(run), lambda: asyncio.run(notebook())):
        with pytest.raises(ValueError, match="no workers"):
            call()


def test_an_interrupted_notebook_leaves_no_controller_at_work(monkeypatch: pytest.MonkeyPatch) -> None:
    turns: list[int] = []

    async def run() -> None:
        while True:
            turns.append(len(turns))
            await asyncio.sleep(0.01)

    class Interrupted(controller.Future):
        def result(self, timeout: float | None = None) -> None:
            time.sleep(0.1)
            raise KeyboardInterrupt

    async def notebook() -> None:
        controller._to_the_end(run)

    monkeypatch.setattr(controller, "Future", Interrupted)
    with pytest.raises(KeyboardInterrupt):
        asyncio.run(notebook())
    time.sleep(0.1)
    seen = len(turns)
    time.sleep(0.1)
    assert 1 < seen == len(turns)


def test_a_group_whose_cluster_is_mute_is_left_after_some_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    class Mute:
        def abort(self) -> None:
            time.sleep(5)

    monkeypatch.setattr(controller, "ABORT_S", 0.1)
    begun = time.monotonic()
    controller._abort(Mute())
    assert time.monotonic() - begun < 2
