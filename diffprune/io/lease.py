"""Whether the process that took an attempt is still at work, told from anywhere: a heartbeat, and ticks counted without one.

The process rewrites a blob of its own every few seconds. Who wants to take over looks at it again and again: one change says that
the owner lives, none over a whole lease that it may be taken for dead. No clocks are compared. That it was alive all the same, and
merely slow, does no harm: the newer attempt's number shuts it out.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field

from diffprune.io.blob_store import Blobs
from diffprune.io.outage import joined

BEAT_S = 4.0  # between heartbeats
LEASE_S = 24.0  # without a heartbeat, after which the work may be taken over
LOOK_S = 0.5  # between looks at another's heartbeat


@dataclass
class Heartbeat:
    """Rewrites the blob `key` as long as `held` says that the work is ours; a `with` block, which removes the blob at its end."""

    blobs: Blobs
    key: str
    held: Callable[[], bool]
    ended: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> Heartbeat:
        self.beat(0)
        self.thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        joined(self.thread)
        with suppress(OSError):
            self.blobs.delete(self.key)

    def beat(self, number: int) -> None:
        """One heartbeat; one that cannot be written (a full disk, a network that is down for a while) is left out."""
        with suppress(OSError):
            if self.held():  # else a store that was moved away would be made anew
                self.blobs.replace(self.key, str(number).encode())

    def _run(self) -> None:
        number = 0
        while not self.ended.wait(BEAT_S):
            self.beat(number := number + 1)


def beats(blobs: Blobs, key: str, seconds: float, still: Callable[[], bool]) -> bool:
    """Whether the heartbeat `key` is seen to change within some seconds of looking; they end early where `still` says no.

    What counts are looks, not a clock: one who sleeps through the time has looked once.
    """
    seen = _read(blobs, key)
    for _ in range(round(seconds / LOOK_S)):
        time.sleep(LOOK_S)
        if not still():
            return False
        if (now := _read(blobs, key)) != seen and now is not None:
            return True
    return False


def _read(blobs: Blobs, key: str) -> bytes | None:
    """The blob itself: on a network file system its version may be an old one, what is opened is not."""
    try:
        return blobs.read(key)
    except FileNotFoundError:
        return None
