"""Which records a report has seen: the names of the store's commits when it was written, noted beside the page.

Times of files would say it, too, but not after a run was copied.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from diffprune.io.blob_store import open_blobs
from diffprune.store.manifest import BUNDLES, MANIFESTS

FILE = "seen.txt"
COMMITS = (MANIFESTS, BUNDLES)


def commits(store: Path) -> str:
    """A hash of the names of all commits of a store in a folder."""
    names = sorted(f"{place}/{path.name}" for place in COMMITS for path in (store / place).glob("*.json"))
    return hashlib.sha256("\n".join(names).encode()).hexdigest()


def note(report: Path, found: str) -> None:
    """Keep what `commits` gave before a report was written."""
    open_blobs(report).replace(FILE, f"{found}\n".encode())


def all_of(store: Path, report: Path) -> bool:
    """Whether a report has seen every record; where it has no note, whether no commit is younger than its page."""
    if (report / FILE).is_file():
        return (report / FILE).read_text(encoding="utf-8").strip() == commits(store)
    written = (report / "report.html").stat().st_mtime_ns
    return all(path.stat().st_mtime_ns <= written for place in COMMITS for path in (store / place).glob("*.json"))
