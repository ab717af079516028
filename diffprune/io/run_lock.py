"""Run lock: one run of a name at a time in one store, and the attempt number that fences off what an earlier one left running.

The lock is the newest attempt below `locks/<run>/`: its blob names the process that holds it and is empty once released; beside it
`beats/<run>/` has the process's heartbeat. A stale lock is taken over by taking the next number: of two processes that try, one
wins. Stale is one whose process has ended on this machine, which is known at once, or whose heartbeat has stopped (`lease`).
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from diffprune.io import lease
from diffprune.io.attempts import Attempt, Attempts
from diffprune.io.blob_store import Blobs, open_blobs
from diffprune.io.json_object import parsed
from diffprune.io.names import checked_name

GLANCE_S = 1.5 * lease.BEAT_S  # which a heartbeat falls into


class Busy(ValueError):
    """Another run of this name is at work on this store."""


@dataclass(frozen=True)
class Owner:
    """The process that holds a lock.

    machine: `machine()` where it runs; host: its name, for messages; ticks: its start, in clock ticks since the machine's; token:
    random.
    """

    host: str
    machine: str
    pid: int
    ticks: int
    token: str

    @property
    def is_here(self) -> bool:
        """Whether its process id means something to us."""
        return bool(self.machine) and self.machine == machine()

    @property
    def gone(self) -> bool:
        """Whether its process has ended; for a process of this machine."""
        return start_ticks(self.pid) != self.ticks


def machine() -> str:
    """The running system, and the namespace of its process ids: another after a reboot and in another container, whatever their
    names. Empty where the system does not tell."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}-{os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return ""


def start_ticks(pid: int) -> int | None:
    """When a process of this machine began, in clock ticks since the machine did, which no correction of the clock changes; None
    where there is none, or only one that has ended and is not collected yet.

    Raises:
        OSError: one cannot look, as too many files are open; that tells nothing of the process.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] in "ZX" else int(fields[19])


def attempts_at(blobs: Blobs, run: str) -> Attempts:
    """The attempts at a run in a store.

    Raises:
        ValueError: a run name outside the allow-list.
    """
    return Attempts(blobs, f"locks/{checked_name(run, 'run name')}", f"run {run!r}")


def _heartbeats(run: str) -> str:
    return f"beats/{checked_name(run, 'run name')}"


def _owner(note: bytes | None) -> Owner | None:
    """Whom the blob of an attempt names; None where it was released, or names nobody."""
    try:
        found = Owner(**parsed(note or b""))
        checked_name(found.token, "token")
    except (ValueError, TypeError):
        return None
    texts = isinstance(found.host, str) and isinstance(found.machine, str)
    return found if texts and type(found.pid) is int and found.pid > 0 and type(found.ticks) is int else None


def holder(store: Blobs | Path | str, run: str) -> Owner | None:
    """The process that holds a run's name; None where none does, as far as this machine can tell: one elsewhere counts as alive.

    Raises:
        ValueError: a run name outside the allow-list, or a store that is a file.
    """
    attempts = attempts_at(open_blobs(store), run)
    newest = attempts.newest()
    found = _owner(attempts.note(newest)) if newest else None
    return None if found is None or (found.is_here and found.gone) else found


def refuse_if_held(store: Blobs | Path | str, run: str) -> None:
    """Look whether a run's name is free: an instant where its last process was of this machine, else until its heartbeat would have
    been seen. Nothing is taken or written.

    Raises:
        Busy: another live process holds it. ValueError: a run name outside the allow-list, or a store that is a file.
    """
    attempts = attempts_at(open_blobs(store), run)
    if newest := attempts.newest():
        _refuse_if_alive(attempts, run, newest, GLANCE_S)


def _refuse_if_alive(attempts: Attempts, run: str, number: int, seconds: float) -> None:
    """Raises Busy: the owner of an attempt lives. seconds: that one elsewhere is given to show it."""
    note = attempts.note(number)
    holder = _owner(note)
    if holder is None or (holder.is_here and holder.gone):
        return
    key = f"{_heartbeats(run)}/{number}-{holder.token}"
    if holder.is_here or lease.beats(attempts.blobs, key, seconds, lambda: attempts.note(number) == note):
        raise Busy(
            f"{attempts.title} in {attempts.blobs} is held by process {holder.pid} on {holder.host} (attempt {number}): "
            f"wait for it or choose another name; when that machine is gone, the same command takes over by itself"
        )


def _acquire(attempts: Attempts, run: str) -> Attempt:
    token = secrets.token_hex(8)
    mine = Owner(socket.gethostname(), machine(), os.getpid(), start_ticks(os.getpid()) or 0, token)
    note = json.dumps(asdict(mine)).encode()
    while True:
        newest = attempts.newest()
        if newest:
            _refuse_if_alive(attempts, run, newest, lease.LEASE_S)
        if taken := attempts.take(newest + 1, note):
            return taken


@contextlib.contextmanager
def lock(store: Blobs | Path | str, run: str) -> Iterator[Attempt]:
    """Hold the name `run` in a store; yields the attempt, number 1 for the first, to put into `Provenance`.

    Where the last holder was a process elsewhere that did not release it, this takes `lease.LEASE_S` without a heartbeat.

    Raises:
        Busy: another live process holds it (named in the text): at once, of a process elsewhere with its next heartbeat.
        Fenced: at the end of the block, which went well, the lock was not ours any more, or the store was not there.
        ValueError: a run name outside the allow-list, or a store that is a file.
    """
    attempts = attempts_at(open_blobs(store), run)
    number = _acquire(attempts, run)
    owner = _owner(number.note)
    assert owner is not None, "we have just named ourselves"
    key = f"{_heartbeats(run)}/{number}-{owner.token}"
    with contextlib.suppress(OSError):
        for other in attempts.blobs.list(_heartbeats(run)):  # of attempts that ended without a word
            attempts.blobs.delete(other)

    def held() -> bool:
        return attempts.note(number) == number.note

    try:
        with lease.Heartbeat(attempts.blobs, key, held):
            yield number
            attempts.check(number)
    finally:
        with contextlib.suppress(OSError):  # as on a full disk; then the lock is stale when this process has ended
            if held():
                attempts.blobs.replace(attempts.key(number), b"")
