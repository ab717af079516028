"""Bring a run's report and records back from a cluster: through the log of a small job, which the same token guards, or from the
bucket they lie in."""

from __future__ import annotations

import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from diffprune.distributed.head import Head, on_this_machine, without_rays_lines
from diffprune.distributed.submit import POLL_S, found, start
from diffprune.io import run_archive
from diffprune.io.blob_store import Blobs, LocalBlobs, open_blobs, remote

ARCHIVE_S = 300.0
FORGET_TRIES = 3
STOP_S = 30.0  # Ray takes three to end a job that runs; one that is still being started is ended only then
MONITOR_S = 1.5  # Ray looks every second whether a job has ended


def fetch(head: Head, name: str, to: Path) -> int:
    """Write what a job's run has so far into the new folder `to`; returns the number of files. The job may be running still.

    Raises:
        ValueError: no such job, nothing there yet, too much to send, or a folder that is not empty.
    """
    told = found(head, name).metadata or {}
    if not {"run", "out"} <= set(told):
        raise ValueError(f"{name} was not sent by diffprune submit, so nothing tells where its results lie")
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise ValueError(f"{to} is not empty: name another folder with --to")
    if remote(told["out"]):
        return copied(open_blobs(f"{told['out']}/{told['run']}"), to)
    log = _log_of(head, f"{told['out']}/{told['run']}")
    if run_archive.BEGIN not in log:
        raise ValueError(" ".join(without_rays_lines(log).split()) or f"the head gave no results of {name}")
    with _made_whole(to):
        return run_archive.unpacked(log, to)


def copied(run: Blobs, to: Path) -> int:
    """Copy report and records of a run in object storage into a folder, with this machine's own credentials; how many files.

    Raises:
        ValueError: nothing is there.
    """
    if not any(map(_shown, run.list())):
        raise ValueError(f"there is nothing in {run} yet: has the run begun?")
    with _made_whole(to):
        here, had = LocalBlobs(to, private=True), dict[str, str]()
        for _ in range(run_archive.TRIES):
            if _copied_at_rest(run, here, had):
                return len(here.list())
            time.sleep(run_archive.PAUSE_S)
        raise ValueError(f"the records in {run} were merged all the while they were copied: ask again in a minute")


@contextmanager
def _made_whole(to: Path) -> Iterator[None]:
    """A new folder, for its owner alone, that goes again where the block fails: else it is not empty when one asks again."""
    to.mkdir(parents=True, exist_ok=True, mode=0o700)
    try:
        yield
    except BaseException:
        shutil.rmtree(to, ignore_errors=True)
        raise


def _shown(key: str) -> bool:
    return "/" not in key or key.split("/")[0] in run_archive.PARTS


def _copied_at_rest(run: Blobs, here: Blobs, had: dict[str, str]) -> bool:
    """Copy what is not `had` yet, in an order in which every manifest that comes has its parts; False where bundles were merged
    meanwhile. The report comes last: whoever looks which is newer, it or the store, goes by the times of files."""
    manifests = _manifests(run)
    if manifests != _manifests(run):  # see `run_archive.packed`
        return False
    try:
        read = {key: run.read(key) for key in manifests}
    except FileNotFoundError:
        return False
    listed = {key: version for key, version in run.list().items() if _shown(key) and not key.startswith(run_archive.MANIFESTS)}
    report = [key for key in listed if key.startswith("report/")]
    for key in [key for key in listed if key not in report]:
        _copy(run, here, key, listed[key], had)
    if not manifests.keys() <= _manifests(run).keys():
        return False
    for key, data in read.items():
        here.replace(key, data)
    for key in report:
        _copy(run, here, key, listed[key], had)
    return True


def _manifests(run: Blobs) -> dict[str, str]:
    return {key: version for name in run_archive.MANIFESTS for key, version in run.list(name).items()}


def _copy(run: Blobs, here: Blobs, key: str, version: str, had: dict[str, str]) -> None:
    """One blob, unless it has come in this version; nothing where it has gone."""
    if had.get(key) != version:
        with suppress(FileNotFoundError):
            here.replace(key, run.read(key))
            had[key] = version


def _log_of(head: Head, folder: str) -> str:
    """What the archive's script prints on the head about a folder there; script and log are removed again."""
    python = sys.executable if on_this_machine(head.get_address()) else "python"
    name = f"results-{time.time_ns()}"
    try:
        with tempfile.TemporaryDirectory(prefix="diffprune-") as place:
            shutil.copy(run_archive.__file__, Path(place) / "run_archive.py")
            start(head, shlex.join([python, "run_archive.py", folder]), name, {"working_dir": place}, {})
        if not _ended(head, name, ARCHIVE_S):
            raise RuntimeError(f"{name}, which packs the results, has not ended after {ARCHIVE_S:.0f} s")
        log = str(head.get_job_logs(name))
    except BaseException:  # its log is the whole archive, which nobody wants to find among jobs
        with suppress(RuntimeError, OSError):
            head.stop_job(name)
            _ended(head, name, STOP_S)  # else it cannot be deleted
            _forget(head, name)
        raise
    _forget(head, name)
    return log


def _ended(head: Head, name: str, seconds: float) -> bool:
    """Wait until a job has ended, for so many seconds at most; whether it has."""
    until = time.monotonic() + seconds
    while not head.get_job_status(name).is_terminal():
        if time.monotonic() > until:
            return False
        time.sleep(POLL_S)
    return True


def _forget(head: Head, name: str) -> None:
    """Delete a job that has ended, with its log. Ray's monitor has to have seen its end before: else it puts the job down again as
    one that has failed, and on a busy head that comes late."""
    for _ in range(FORGET_TRIES):
        time.sleep(MONITOR_S)
        if name in {job.submission_id for job in head.list_jobs()}:
            head.delete_job(name)
