"""Where the lines of a step log lie: in one file of the run's folder, or, in a bucket, in pieces that are published one by one.

A file grows by a line per step, of whichever worker trains a scorer, under a lock. A bucket knows no such thing: there lines wait
until a state is saved or a while has passed, and are published together as `steps/<attempt>-<number>`, numbered without a gap
whoever writes them, so that their order is that of writing. A process that is killed takes lines with it, but only of steps that
are done again, as no state of theirs was saved.
"""

from __future__ import annotations

import errno
import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from diffprune.io.blob_store import Blobs, named, open_blobs, remote

STEPS = "steps.jsonl"
PIECES = "steps"
PUBLISH_S = 10.0  # lines wait no longer
LOCK_S = 5.0  # for another who appends


class StepLog(Protocol):
    """Lines, each of which ends with a newline. `str(log)` says in messages where they are."""

    def append(self, line: bytes, durable: bool = False) -> None:
        """Add a line; `durable` waits until it and all before it survive a crash."""

    def flush(self) -> None:
        """Show readers all that was appended."""

    def read(self) -> bytes:
        """All lines; the last may be torn."""

    def newer(self, place: Any) -> tuple[bytes, Any]:
        """(whole lines behind a place, the place behind them). place: from an earlier call, None for the beginning."""


def opened(folder: Path | str, attempt: int = 0) -> StepLog:
    """The step log of a run's folder. attempt: of who appends."""
    return PieceLog(open_blobs(folder), attempt) if remote(folder) else FileLog(Path(folder) / STEPS)


class FileLog:
    """See `StepLog`: one file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __str__(self) -> str:
        return str(self.path)

    def append(self, line: bytes, durable: bool = False) -> None:
        """See `StepLog`. What another process left torn is ended first."""
        try:
            with self.path.open("ab+", buffering=0) as stream, _alone(stream):
                whole = stream.tell() == 0 or (stream.seek(-1, os.SEEK_END) and stream.read(1) == b"\n")
                left = memoryview((b"" if whole else b"\n") + line)
                while left:  # a disk that is almost full takes a part without a word
                    left = left[stream.write(left) :]
                if durable:
                    os.fsync(stream.fileno())
        except OSError as error:
            raise named(error, self.path) from error

    def flush(self) -> None:
        """See `StepLog`."""

    def read(self) -> bytes:
        """See `StepLog`."""
        return self.path.read_bytes() if self.path.is_file() else b""

    def newer(self, place: int | None) -> tuple[bytes, int | None]:
        """See `StepLog`."""
        with suppress(FileNotFoundError), self.path.open("rb") as stream:
            start = stream.seek(place or 0)
            text = stream.read()
            whole = text[: text.rfind(b"\n") + 1]
            return whole, start + len(whole)
        return b"", place


@contextmanager
def _alone(stream: BinaryIO) -> Iterator[None]:
    """Nobody else appends meanwhile: on NFS the end of a file is what this host knew of it, until it holds a lock. Where there are
    no locks, or another keeps one (a host that froze), it is done without."""
    until = time.monotonic() + LOCK_S
    while True:
        try:
            fcntl.lockf(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)  # goes when the file is closed
            break
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN) or time.monotonic() > until:
                break
            time.sleep(0.002)
    yield


class PieceLog:
    """See `StepLog`: pieces in blobs."""

    def __init__(self, blobs: Blobs, attempt: int) -> None:
        self.blobs, self.mine = blobs, f"{PIECES}/{int(attempt):08d}-"
        self.waiting, self.published = b"", time.monotonic()

    def __str__(self) -> str:
        return f"{self.blobs}/{PIECES}"

    def append(self, line: bytes, durable: bool = False) -> None:
        """See `StepLog`."""
        self.waiting += line
        if durable or time.monotonic() - self.published > PUBLISH_S:
            self.flush()

    def flush(self) -> None:
        """See `StepLog`. After a lost answer lines may be there twice, which says nothing else than once."""
        while self.waiting:
            numbers = [int(key.removeprefix(self.mine)) for key in self.blobs.list(PIECES) if key.startswith(self.mine)]
            with suppress(FileExistsError):  # another worker's, a moment ago
                self.blobs.create(f"{self.mine}{max(numbers, default=0) + 1:08d}", self.waiting)
                self.waiting = b""
        self.published = time.monotonic()

    def read(self) -> bytes:
        """See `StepLog`."""
        return self.newer(None)[0]

    def newer(self, place: str | None) -> tuple[bytes, str | None]:
        """See `StepLog`. The place is the last piece; what an older attempt adds late stands before it."""
        keys = [key for key in self.blobs.list(PIECES) if key > (place or "")]
        return b"".join(map(self.blobs.read, keys)), keys[-1] if keys else place
