"""SIGTERM, and SIGHUP of a terminal that was closed, as Ctrl-C that ends with exit code 143 or 129, and with time to save what is
under way."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

from diffprune.core import terminal

GRACE_S = 8.0  # to save; who sends SIGTERM waits ten seconds or more before it sends SIGKILL
GRACE = "DIFFPRUNE_GRACE_S"  # names the variable that says it otherwise, where who sends them waits longer
UNHEARD_S = 5.0  # for Python to hear the second signal
AGAIN_S = 0.05  # until the callback in which a signal was ignored has ended

_others: list[Callable[[Any], Any]] = []  # what was told of ignored errors before
_saving: list[Callable[[int], None]] = []
_asked: list[int] = []  # the signal by which the process was asked to end
_told: list[Callable[[], None]] = []  # as soon as a signal has come
_heard = threading.Event()  # that one has come


class Terminated(KeyboardInterrupt):
    """The process was asked to end."""


def handle(tell: Callable[[], None] | None = None) -> None:
    """Let SIGTERM, and SIGHUP unless it is ignored as under nohup, raise `Terminated` in the main thread from now on.

    tell: called as soon as one of them or Ctrl-C has come, before anything is raised or saved; it returns at once.
    """
    _asked.clear()
    _told[:] = [tell] if tell else []
    signal.signal(signal.SIGTERM, _on_signal)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _on_interrupt)
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        signal.signal(signal.SIGHUP, _on_signal)
    terminal.outlive()
    if sys.unraisablehook is not _on_unraisable:
        _others[:] = [sys.unraisablehook]
        sys.unraisablehook = _on_unraisable


def _on_unraisable(found: Any) -> None:
    """Python ignores what is raised in a finalizer or a weak reference's callback, where a signal may come too: sent once more."""
    if isinstance(found.exc_value, Terminated):
        again = threading.Timer(AGAIN_S, os.kill, (os.getpid(), _asked[-1]))
        again.daemon = True
        again.start()
    elif _others:
        _others[0](found)


def asked() -> bool:
    """Whether `Terminated` was raised since `handle`. Who waits for Ray, in C, gets a KeyboardInterrupt in its place."""
    return bool(_asked)


def exit_code() -> int:
    """Of a process that was asked to end, by the signal that asked."""
    return 128 + (_asked[0] if _asked else signal.SIGTERM)


@contextlib.contextmanager
def kept() -> Iterator[None]:
    """What handles SIGTERM before the block does so after it: Ray puts its own in place, which ends with a stack dump."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if callable(before) and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def saving(save: Callable[[], None]) -> Iterator[None]:
    """In this block the first signal calls `save`, which asks that the block be ended; `Terminated` is raised at its end, or after
    `GRACE_S`, or as long as the environment says (`GRACE`), or by a second signal."""
    timers: list[threading.Timer] = []
    by: list[int] = []

    def first(number: int) -> None:
        by.append(number)
        timers.append(threading.Timer(_grace_s(), _insist, (number,)))
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
        raise _terminated(by[0])


def _insist(number: int) -> None:
    """Send a signal once more. Python hears none while it waits in C, as for a Ray whose processes had it too when a terminal was
    closed: then this process ends as one that is killed, of which nothing stays either."""
    _heard.clear()
    os.kill(os.getpid(), number)
    if not _heard.wait(UNHEARD_S):
        os._exit(128 + number)


def _grace_s() -> float:
    """Seconds, `GRACE_S` where the environment says nothing that is a number of them."""
    with contextlib.suppress(ValueError):
        given = float(os.environ.get(GRACE, ""))
        return given if 0 <= given <= threading.TIMEOUT_MAX else GRACE_S
    return GRACE_S


def _on_interrupt(number: int, frame: FrameType | None) -> None:
    for tell in _told:
        tell()
    signal.default_int_handler(number, frame)


def _on_signal(number: int, frame: FrameType | None) -> None:
    _heard.set()
    for tell in _told:
        tell()
    if number != signal.SIGTERM:
        terminal.gone()
    if not _saving:
        raise _terminated(number)
    _saving.pop()(number)


def _terminated(number: int) -> Terminated:
    _asked.append(number)
    return Terminated()
