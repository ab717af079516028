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

_answered: set[str] = set()  # addresses of stores that have, in this process
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
        place, end, pause = str(self), time.monotonic() + PATIENCE_S, FIRST_S
        while True:
            try:
                found = verb(self, *args, **kwargs)
            except Outage as error:
                if place not in _answered or _hurry.is_set() or time.monotonic() > end:
                    raise
                if place not in _away:
                    _away.add(place)
                    print(f"{error.strerror}: {error.filename}; it is asked again for up to {PATIENCE_S:.0f} s", flush=True)
                _hurry.wait(pause)
                pause = min(2 * pause, LONGEST_S)
            except (FileNotFoundError, FileExistsError):
                _heard(place)
                raise
            else:
                _heard(place)
                return found

    return asked  # type: ignore[return-value]


def _heard(place: str) -> None:
    _answered.add(place)
    if place in _away:
        _away.discard(place)
        print(f"{place} answers again", flush=True)
