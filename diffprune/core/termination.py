"""SIGTERM as Ctrl-C that ends with exit code 143, and with time to save what is under way."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

GRACE_S = 8.0  # to save; who sends SIGTERM waits ten seconds or more before it sends SIGKILL
EXIT_CODE = 128 + signal.SIGTERM

_saving: list[Callable[[], None]] = []
_asked = threading.Event()


class Terminated(KeyboardInterrupt):
    """The process was asked to end."""


def handle() -> None:
    """Let SIGTERM raise `Terminated` in the main thread from now on."""
    _asked.clear()
    signal.signal(signal.SIGTERM, _on_signal)


def asked() -> bool:
    """Whether `Terminated` was raised since `handle`. Who waits for Ray, in C, gets a KeyboardInterrupt in its place."""
    return _asked.is_set()


@contextmanager
def kept() -> Iterator[None]:
    """What handles SIGTERM before the block does so after it: Ray puts its own in place, which ends with a stack dump."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if callable(before) and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)


@contextmanager
def saving(save: Callable[[], None]) -> Iterator[None]:
    """In this block the first SIGTERM calls `save`, which asks that the block be ended; `Terminated` is raised at its end, or after
    `GRACE_S`, or by a second signal."""
    timers: list[threading.Timer] = []

    def first() -> None:
        timers.append(threading.Timer(GRACE_S, os.kill, (os.getpid(), signal.SIGTERM)))
        timers[0].daemon = True
        timers[0].start()
        save()

    _saving.append(first)
    try:
        yield
    finally:
        if first in _saving:
            _saving.remove(first)
        for timer in timers:
            timer.cancel()
    if timers:
        raise _terminated()


def _on_signal(number: int, frame: FrameType | None) -> None:
    if not _saving:
        raise _terminated()
    _saving.pop()()


def _terminated() -> Terminated:
    _asked.set()
    return Terminated()
