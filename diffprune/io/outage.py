"""Outages of an object store: a store that has answered before is waited for, with every verb, for minutes."""

from __future__ import annotations

import errno
import functools
import math
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from typing import Any, TypeVar

PATIENCE_S = 300.0  # longer than what restarts a gateway or renews a route
FIRST_S, LONGEST_S = 0.5, 10.0  # between two tries
HURRY_S = 10.0  # for a verb, once this process is to end
Verb = TypeVar("Verb", bound=Callable[..., Any])

_answered: set[str] = set()  # buckets that have, in this process: `s3://bucket`, whatever the folder
_away: set[str] = set()  # those of which it has been said that they do not
_silent: set[str] = set()  # those that did not answer in a hurry, and are not asked again in it
_hurry: list[bool] = []  # no event, whose lock a signal may find taken


def hurry(asked: bool = True) -> None:
    """From now on no store is waited for, as whoever drives this process wants it to end; False: as before."""
    _silent.clear()
    _hurry[:] = [True] * asked


def joined(thread: threading.Thread, most: float = math.inf) -> None:
    """Wait for the end of a daemon thread that may wait for a store, `most` seconds: in a hurry no longer than a verb may take, and
    after one that took longer hardly at all."""
    end = time.monotonic() + most
    while thread.is_alive() and not _hurry and time.monotonic() < end:
        thread.join(0.2)
    thread.join(max(0.0, min(1.0 if _silent else HURRY_S, end - time.monotonic())))


class Outage(OSError):
    """The store could not be reached, or failed by itself: what was asked has happened or not, and may be asked again."""


def patient(verb: Verb) -> Verb:
    """A verb of `Blobs` that is asked again through an outage. A store that never answered is not waited for: its address may be
    wrong. As with every verb that was cut short, a `create` that is asked again may find its own bytes there. In a hurry a verb is
    given `HURRY_S`, and after one that took longer its bucket is asked no more.

    Raises:
        Outage: there was none to be had for so long, or never was.
    """

    @functools.wraps(verb)
    def asked(self: Any, *args: Any, **kwargs: Any) -> Any:
        bucket = "/".join(str(self).split("/", 3)[:3])
        end, pause = time.monotonic() + PATIENCE_S, FIRST_S
        while True:
            try:
                call = functools.partial(verb, self, *args, **kwargs)
                found = _hurried(call, bucket) if _hurry else call()
            except Outage as error:
                if bucket not in _answered or _hurry or time.monotonic() > end:
                    raise
                if bucket not in _away:
                    _away.add(bucket)
                    print(f"{error.strerror}: {error.filename}; it is asked again for up to {PATIENCE_S:.0f} s", flush=True)
                _pause(pause)
                pause = min(2 * pause, LONGEST_S)
            except (FileNotFoundError, FileExistsError):
                _heard(bucket)
                raise
            else:
                _heard(bucket)
                return found

    return asked  # type: ignore[return-value]


def _hurried(call: Callable[[], Any], bucket: str) -> Any:
    """What a call gives or raises within `HURRY_S`.

    Raises:
        Outage: it takes longer, and goes on by itself; or another of this bucket did.
    """
    silent = Outage(errno.ETIMEDOUT, "the object store did not answer in time", bucket)
    if bucket in _silent:
        raise silent
    done: Future[Any] = Future()

    def run() -> None:
        try:
            done.set_result(call())
        except BaseException as error:
            done.set_exception(error)

    threading.Thread(target=run, name="hurried", daemon=True).start()
    try:
        return done.result(HURRY_S)
    except FutureTimeout:
        if done.done():  # one of the call's own
            raise
        _silent.add(bucket)
        raise silent from None


def _pause(seconds: float) -> None:
    end = time.monotonic() + seconds
    while not _hurry and time.monotonic() < end:
        time.sleep(min(0.1, seconds))


def _heard(bucket: str) -> None:
    _answered.add(bucket)
    if bucket in _away:
        _away.discard(bucket)
        print(f"{bucket} answers again", flush=True)
