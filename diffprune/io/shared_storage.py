"""Proof that a process, wherever it runs, sees the storage of a run: it reads there what the driver alone has written."""

from __future__ import annotations

import socket
import time
from dataclasses import dataclass

from diffprune.io.attempts import Attempt
from diffprune.io.blob_store import Blobs
from diffprune.io.run_lock import attempts_at

SEEN_S = 30.0  # after which a network file system shows what was written on another host
LOOK_S = 0.5


class Unseen(RuntimeError):
    """This host does not see the run's storage; trying again here gives the same."""


@dataclass(frozen=True)
class Proof:
    """What has to be found: the note of an attempt that holds the run's lock."""

    blobs: Blobs
    run: str
    attempt: int
    note: bytes

    def check(self, seconds: float = SEEN_S) -> None:
        """Look for it, for so long. A newer attempt's lock proves as much; that one shuts the driver out by itself.

        Raises:
            Unseen: names this host.
        """
        attempts, end = attempts_at(self.blobs, self.run), time.monotonic() + seconds
        while attempts.newest() <= self.attempt and attempts.note(self.attempt) != self.note:
            if time.monotonic() > end:
                raise Unseen(
                    f"{socket.gethostname()} cannot see {self.blobs}, where the driver has written: "
                    "the run's folder must be one that all hosts share, or a bucket (--out s3://...)"
                )
            time.sleep(LOOK_S)


def proof(blobs: Blobs, run: str, attempt: int) -> Proof | None:
    """Of the attempt that holds the lock; None for a plain number, with which nobody holds any."""
    return Proof(blobs, run, int(attempt), attempt.note) if isinstance(attempt, Attempt) else None
