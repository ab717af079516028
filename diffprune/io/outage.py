"""Outages of an object store: a store that has answered before is waited for, with every verb, for minutes."""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

PATIENCE_S = 300.0  # longer than what restarts a gateway or renews a route
FIRST_S, LONGEST_S = 0.5, 10.0  # between two tries
Verb = TypeVar("Verb", bound=Callable[..., Any])

_answered: set[str] = set()  # buckets that have, in this process: `s3://bucket`, whatever the folder
_away: set[str] = set()  # those of which it has been said that they do not
_hurry = threading.Event()


def hurry(asked: bool = True) -> None:
    """From now on no store is waited for, as whoever drives this process wants it to end; False: as before."""
    _hurry.set() if asked else _hurry.clear()


class Outage(OSError):
    """The store could not be reached, or failed by itself: what was asked has happened or not, and may be asked again."""


def patient(verb: Verb) -> Verb:
    """A verb of `Blobs` that is asked again through an outage. A store that never answered is not waited for: its address may be
    wrong. As with every verb that was cut short, a `create` that is asked again may find its own bytes there.

    Raises:
        Outage: there was none to be had for so long, or never was.
    """

    @functools.wraps(verb)
    def asked(self: Any, *args: Any, **kwargs: Any) -> Any:
        bucket = "/".join(str(self).split("/", 3)[:3])
        end, pause = time.monotonic() + PATIENCE_S, FIRST_S
        while True:
            try:
                found = verb(self, *args, **kwargs)
            except Outage as error:
                if bucket not in _answered or _hurry.is_set() or time.monotonic() > end:
                    raise
                if bucket not in _away:
                    _away.add(bucket)
                    print(f"{error.strerror}: {error.filename}; it is asked again for up to {PATIENCE_S:.0f} s", flush=True)
                _hurry.wait(pause)
                pause = min(2 * pause, LONGEST_S)
            except (FileNotFoundError, FileExistsError):
                _heard(bucket)
                raise
            else:
                _heard(bucket)
                return found

    return asked  # type: ignore[return-value]


def _heard(bucket: str) -> None:
    _answered.add(bucket)
    if bucket in _away:
        _away.discard(bucket)
        print(f"{bucket} answers again", flush=True)
