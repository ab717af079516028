"""Which records a report has seen: the names of the store's commits when it was written, noted beside the page.

Times of files would say it, too, but not after a run was copied.
"""

from __future__ import annotations

import hashlib
from contextlib import suppress
from pathlib import Path

from diffprune.io.blob_store import open_blobs, remote
from diffprune.store.manifest import BUNDLES, MANIFESTS

FILE = "seen.txt"
COMMITS = (MANIFESTS, BUNDLES)


def commits(store: Path | str) -> str:
    """A hash of the names of all commits of a store."""
    return hashlib.sha256("\n".join(_commits(store)).encode()).hexdigest()


def _commits(store: Path | str) -> list[str]:
    blobs = open_blobs(store)
    return sorted(key for place in COMMITS for key in blobs.list(place) if key.endswith(".json"))


def note(report: Path | str, found: str) -> None:
    """Keep what `commits` gave before a report was written."""
    open_blobs(report).replace(FILE, f"{found}\n".encode())


def all_of(store: Path | str, report: Path | str) -> bool:
    """Whether a report has seen every record; where it has no note, whether no commit of its folder is younger than its page."""
    with suppress(FileNotFoundError):
        return open_blobs(report).read(FILE).decode().strip() == commits(store)
    if remote(store) or remote(report):
        return False
    written = (Path(report) / "report.html").stat().st_mtime_ns
    return all((Path(store) / key).stat().st_mtime_ns <= written for key in _commits(store))
