"""Proof that a process, wherever it runs, sees the storage of a run: it reads there what the driver alone has written."""

from __future__ import annotations

import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass

from diffprune.io.attempts import Attempt, Attempts
from diffprune.io.blob_store import Blobs

SEEN_S = 30.0  # after which a network file system shows what was written on another host
LOOK_S = 0.5


class Unseen(RuntimeError):
    """This host does not see the run's storage; trying again here gives the same."""


@dataclass(frozen=True)
class Proof:
    """What has to be found: the note of an attempt at a piece of work, such as holding a run's lock."""

    attempts: Attempts
    attempt: int
    note: bytes

    def seen(self, seconds: float | None = None) -> bool:
        """Look for it, for so long (`SEEN_S`). A newer attempt proves as much; that one shuts the driver out by itself."""
        end = time.monotonic() + (SEEN_S if seconds is None else seconds)
        while self.attempts.newest() <= self.attempt and self.attempts.note(self.attempt) != self.note:
            if time.monotonic() > end:
                return False
            time.sleep(LOOK_S)
        return True

    def check(self, seconds: float | None = None) -> None:
        """See `seen`.

        Raises:
            Unseen: names this host.
        """
        if not self.seen(seconds):
            raise Unseen(unseen([socket.gethostname()], self.attempts.blobs))


def unseen(hosts: Sequence[str], blobs: Blobs) -> str:
    """The sentence on hosts that do not see a storage."""
    return (
        f"{' and '.join(hosts)} cannot see {blobs}, where the driver has written: "
        "the run's folder must be one that all hosts share, or a bucket (--out s3://..., gs://... or az://...)"
    )


def proof(attempts: Attempts, attempt: int) -> Proof | None:
    """Of an attempt that was taken; None for a plain number, which nobody has taken."""
    return Proof(attempts, int(attempt), attempt.note) if isinstance(attempt, Attempt) else None
