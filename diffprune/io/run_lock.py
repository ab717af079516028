"""Run lock: one run of a name at a time in one store, and the attempt number that fences off what an earlier one left running.

The lock is the newest attempt below `locks/<run>/`: its blob names the process that holds it and is empty once released. A stale
lock is taken over by taking the next number: of two processes that try, one wins.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from diffprune.io.attempts import Attempts
from diffprune.io.blob_store import Blobs, open_blobs
from diffprune.io.json_object import parsed
from diffprune.io.names import checked_name

CLOCK_S = 2.0  # a process start time read twice may differ by a corrected clock


class Busy(ValueError):
    """Another run of this name is at work on this store."""


@dataclass(frozen=True)
class Owner:
    """The process that holds a lock. started: its start, seconds since 1970."""

    host: str
    pid: int
    started: float

    @property
    def gone(self) -> bool:
        """A process of this host that has ended. A process on another host is taken to be alive."""
        if self.host != socket.gethostname():
            return False
        try:
            process = psutil.Process(self.pid)
            return process.status() == psutil.STATUS_ZOMBIE or abs(process.create_time() - self.started) > CLOCK_S
        except psutil.NoSuchProcess:
            return True
        except psutil.AccessDenied:
            return False


def attempts_at(blobs: Blobs, run: str) -> Attempts:
    """The attempts at a run in a store.

    Raises:
        ValueError: a run name outside the allow-list.
    """
    return Attempts(blobs, f"locks/{checked_name(run, 'run name')}", f"run {run!r}")


def _owner(attempts: Attempts, number: int) -> Owner | None:
    """Who holds an attempt; None where it was released, or where the blob names nobody."""
    try:
        found = Owner(**parsed(attempts.blobs.read(attempts.key(number))))
    except (FileNotFoundError, ValueError, TypeError):
        return None
    fits = isinstance(found.host, str) and type(found.pid) is int and found.pid > 0 and isinstance(found.started, int | float)
    return found if fits else None


def refuse_if_held(store: Blobs | Path | str, run: str) -> None:
    """Look whether a run's name is free, in an instant; nothing is taken or written.

    Raises:
        Busy: another live process holds it. ValueError: a run name outside the allow-list, or a store that is a file.
    """
    attempts = attempts_at(open_blobs(store), run)
    _check_free(attempts, attempts.newest())


def _check_free(attempts: Attempts, newest: int) -> None:
    holder = _owner(attempts, newest) if newest else None
    if holder and not holder.gone:
        raise Busy(
            f"{attempts.title} in {attempts.blobs} is held by process {holder.pid} on {holder.host} (attempt {newest}): "
            f"wait for it, choose another name, or empty {attempts.blobs}/{attempts.key(newest)} if that machine is gone"
        )


def _acquire(attempts: Attempts) -> int:
    mine = Owner(socket.gethostname(), os.getpid(), psutil.Process().create_time())
    note = json.dumps(asdict(mine)).encode()
    while True:
        newest = attempts.newest()
        _check_free(attempts, newest)
        if attempts.take(newest + 1, note):
            return newest + 1


@contextlib.contextmanager
def lock(store: Blobs | Path | str, run: str) -> Iterator[int]:
    """Hold the name `run` in a store; yields the attempt number, 1 for the first, to put into `Provenance`.

    Raises:
        Busy: another live process holds it (named in the text), at once.
        ValueError: a run name outside the allow-list, or a store that is a file.
    """
    attempts = attempts_at(open_blobs(store), run)
    number = _acquire(attempts)
    try:
        yield number
    finally:
        with contextlib.suppress(OSError):  # as on a full disk; then the lock is stale when this process has ended
            attempts.blobs.replace(attempts.key(number), b"")
