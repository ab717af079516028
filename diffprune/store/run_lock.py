"""One run of a name at a time in one store, and the attempt number that fences off what an earlier attempt left running.

`root/locks/<run>/<attempt>.json` is created with O_EXCL and names host, process and attempt; the highest attempt is the
owner. When the run ends the file is renamed to `<attempt>.released` and stays, so attempts only ever grow, and a stale lock is
taken over by creating the next number: of two processes that try, one wins.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from diffprune.store.files import checked_name, make_folder, naming, sync_folder

CLOCK_S = 2.0  # a process start time read twice may differ by a corrected clock
EMPTY_S = 1.0  # a lock file is empty for the moment between its creation and its first write


class Busy(ValueError):
    """Another run of this name is at work on this store."""


class Fenced(RuntimeError):
    """A newer attempt of this run has taken over; this one may not publish any more."""


@dataclass(frozen=True)
class Owner:
    """Who holds a lock. started: process start, seconds since 1970."""

    host: str
    pid: int
    started: float
    run: str
    attempt: int

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


def folder_of(root: Path, run: str) -> Path:
    """Where the lock files of a run are."""
    return root / "locks" / checked_name(run, "run name")


def newest_attempt(root: Path, run: str) -> int:
    """The highest attempt that ever locked this run here; 0 where there is none."""
    try:
        names = os.listdir(folder_of(root, run))
    except FileNotFoundError:
        return 0
    stems = (name.removesuffix(".json").removesuffix(".released") for name in names)
    return max((int(stem) for stem in stems if stem.isdecimal()), default=0)


def check_fence(root: Path, run: str, attempt: int) -> None:
    """Raises: Fenced, where a newer attempt of the run holds or held the lock."""
    newest = newest_attempt(root, run)
    if newest > attempt:
        raise Fenced(f"attempt {attempt} of run {run!r} may not publish in {root}: attempt {newest} has taken over")


def owner_of(path: Path) -> Owner | None:
    """The owner a lock file names; None where it was released, or where its maker died before writing it."""
    patience = time.monotonic() + EMPTY_S
    while True:
        try:
            return Owner(**json.loads(path.read_bytes()))
        except FileNotFoundError:
            return None
        except (ValueError, TypeError):
            if time.monotonic() > patience:
                return None
            time.sleep(0.02)


def _create(path: Path, owner: Owner) -> bool:
    """Create the lock file exclusively; False where another process was first."""
    try:
        handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
    except FileExistsError:
        return False
    try:
        os.write(handle, json.dumps(asdict(owner)).encode())
        os.fsync(handle)
    except OSError as error:
        path.unlink(missing_ok=True)
        raise naming(error, path) from error
    finally:
        os.close(handle)
    sync_folder(path.parent)
    return True


def _acquire(root: Path, run: str) -> Owner:
    folder = folder_of(root, run)
    make_folder(folder)
    while True:
        newest = newest_attempt(root, run)
        holder = owner_of(folder / f"{newest}.json")
        if holder and not holder.gone:
            raise Busy(
                f"run {run!r} in {root} is held by process {holder.pid} on {holder.host} (attempt {holder.attempt}): wait for it, "
                f"choose another name, or delete {folder / f'{newest}.json'} if that machine is gone"
            )
        mine = Owner(socket.gethostname(), os.getpid(), psutil.Process().create_time(), run, newest + 1)
        path = folder / f"{mine.attempt}.json"
        if not _create(path, mine):
            continue
        if newest_attempt(root, run) == mine.attempt and not path.with_suffix(".released").exists():
            return mine
        # Others took and passed on this or newer attempts while we were looking: start again behind them.
        path.unlink(missing_ok=True)


def _clear(root: Path, mine: Owner) -> None:
    """Remove the locks and temporary files of earlier attempts."""
    for earlier in folder_of(root, mine.run).iterdir():
        if earlier.stem.isdecimal() and int(earlier.stem) < mine.attempt:
            earlier.unlink(missing_ok=True)
    shutil.rmtree(root / "tmp" / mine.run, ignore_errors=True)


@contextlib.contextmanager
def lock(root: Path | str, run: str) -> Iterator[int]:
    """Hold the name `run` in the store at `root`; yields the attempt number, 1 for the first, to put into `Provenance`.

    Temporary files that an earlier attempt left behind are removed.

    Raises:
        Busy: another live process holds it (named in the text), at once.
        ValueError: a run name outside the allow-list.
    """
    root = Path(root).resolve()
    mine = _acquire(root, run)
    _clear(root, mine)
    path = folder_of(root, run) / f"{mine.attempt}.json"
    try:
        yield mine.attempt
    finally:
        # A rename needs no space, so a run that ends on a full disk still lets go. Gone: a newer attempt took over.
        with contextlib.suppress(FileNotFoundError):
            os.replace(path, path.with_suffix(".released"))
