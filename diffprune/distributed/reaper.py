"""Reaper of a local Ray: ends its processes and removes its folder when the driver is gone, however that ended.

Ray's own notice a dead driver after up to a minute. This is a small process beside Ray that reads a pipe of which the driver alone
holds the other end: the system closes it with the driver, so nothing is polled while that lives. It is started by its path and
imports nothing of ours; it leads a session of its own, so that what ends the driver's group (Ctrl-C, a job that is stopped) leaves
it alone.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

GONE_S = 5.0  # for processes that were killed, and those they were about to start, to be gone
LOOK_S = 0.02  # between looks whether they are
DRIVERS = "python-core-driver-"  # logs of programs that speak to a Ray, and are none of its processes: whoever joined it lives on


def _of(folder: str) -> list[psutil.Process]:
    """Our processes that have a file in a folder open for writing, as all of a Ray have their logs, but not drivers that only have
    a driver's. Command lines tell less: a worker changes its own, and who reads a log has the folder in his."""
    found, inside = [], os.path.join(os.path.realpath(folder), "")
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            if process.pid != os.getpid() and process.uids().real == os.getuid() and _writes(process, inside):
                found.append(process)
    return found


def _writes(process: psutil.Process, inside: str) -> bool:
    """Whether a file is open for writing; for anything, where the system does not tell (macOS)."""
    written = (file.path for file in process.open_files() if getattr(file, "mode", "w") != "r")
    return any(path.startswith(inside) and not os.path.basename(path).startswith(DRIVERS) for path in written)


def clear(folder: str) -> None:
    """End the processes that write into a folder, and remove it. What is in `r` goes first: the note of the owner stays with
    what cannot be removed now, for the next start to sweep."""
    end = time.monotonic() + GONE_S
    while (left := _of(folder)) and time.monotonic() < end:  # again: one that was starting others may have done so
        for process in left:
            with suppress(psutil.Error):
                process.kill()  # of psutil: never another that has got its number
        time.sleep(LOOK_S)
    shutil.rmtree(f"{folder}/r", ignore_errors=True)
    shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def reaped(folder: str) -> Iterator[None]:
    """Clear a folder at the end of the block, or when this process is killed in it."""
    command = [sys.executable, "-P", str(Path(__file__)), str(os.getpid()), folder]
    quiet = subprocess.DEVNULL
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=quiet, stderr=quiet, start_new_session=True) as reaper:
        try:
            yield
        finally:
            clear(folder)
            reaper.kill()  # nothing is left for it


def ended(driver: psutil.Process) -> bool:
    """Whether a process has, be it that nobody has asked for its exit code yet."""
    try:
        return not driver.is_running() or driver.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def await_end(pid: int) -> None:
    """Wait for the end of the driver that has the other end of our standard input."""
    with suppress(psutil.NoSuchProcess):
        driver = psutil.Process(pid)
        sys.stdin.buffer.read()  # returns when that end is closed; by a mistake somewhere, that may be before
        while not ended(driver):
            time.sleep(LOOK_S)


if __name__ == "__main__":
    await_end(int(sys.argv[1]))
    clear(sys.argv[2])
