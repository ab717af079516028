"""A run's report and records as text on standard output, so that they come back through a job's log. Runs on its own.

    python run_archive.py FOLDER

Only the standard library: this file alone is sent to the cluster, whatever version is installed there.

The run may be at work. Its store is read through manifests, each of which is written after its parts and removed before them: so an
archive is consistent where all manifests that were read first still stand when everything else has been read. The report is read
before them, so that a store that has gone on since is newer than it, here as there.
"""

from __future__ import annotations

import base64
import hashlib
import io
import os
import sys
import tarfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

BEGIN, END = "--- begin of the archive, sha256 ", "--- end of the archive"
PARTS = ("report", "store")  # scorers and training states stay
MANIFESTS = ("store/manifests", "store/bundles")
MOST_BYTES = 64 * 2**20  # compressed; what is larger is copied from the shared folder
TRIES, PAUSE_S = 8, 0.5  # of a store whose bundles are merged meanwhile, which they are after every sixteenth


class Busy(Exception):
    """A manifest went while the rest was read."""


def packed(folder: Path) -> bytes:
    """A compressed tar of what a run's folder has to show.

    Raises:
        Busy: see there. OSError: a file cannot be read.
    """
    held = io.BytesIO()
    with tarfile.open(fileobj=held, mode="w:gz") as archive:
        for path in _files(folder, "report"):
            _add(archive, folder, path)
        manifests, again = _manifests(folder), _manifests(folder)
        if manifests != again:  # a listing may miss a bundle that became part of another one while it was made, and that one, too
            raise Busy
        if not all([_add(archive, folder, path) for path in manifests]):
            raise Busy
        known = {path.parent for path in manifests} | {folder / name for name in MANIFESTS}
        for path in (*_files(folder, "store"), *_files(folder, "", below=False)):
            if path.parent not in known:
                _add(archive, folder, path)
        if not all(path.exists() for path in manifests):
            raise Busy
    return held.getvalue()


def _manifests(folder: Path) -> list[Path]:
    return [path for name in MANIFESTS for path in _files(folder, name)]


def _files(folder: Path, name: str, below: bool = True) -> Iterator[Path]:
    """Plain files in a folder of the run and below it, in order: no links, nothing with a leading dot, which is being written. One
    that goes meanwhile may be among them."""
    for place, folders, names in os.walk(folder / name, onerror=_unless_gone):
        folders[:] = sorted(one for one in folders if below and not one.startswith("."))
        paths = [Path(place) / one for one in sorted(names) if not one.startswith(".")]
        yield from (path for path in paths if not path.is_symlink() and (path.is_file() or not path.exists()))


def _unless_gone(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError):
        raise error


def _add(archive: tarfile.TarFile, folder: Path, path: Path) -> bool:
    """Add a file as it is now; False where it has gone."""
    with suppress(FileNotFoundError), path.open("rb") as file:
        entry = archive.gettarinfo(str(path), str(path.relative_to(folder)), file)
        data = file.read()
        entry.size = len(data)  # a log grows meanwhile
        archive.addfile(entry, io.BytesIO(data))
        return True
    return False


def _at_rest(folder: Path) -> bytes:
    """`packed`, again where the store was being merged."""
    for _ in range(TRIES - 1):
        with suppress(Busy):
            return packed(folder)
        time.sleep(PAUSE_S)
    return packed(folder)


def unpacked(text: str, folder: Path) -> int:
    """Write what `packed` found, from a log; returns the number of files.

    Raises:
        ValueError: the log holds no whole archive.
    """
    _, begin, rest = text.partition(BEGIN)
    digest, _, body = rest.partition("\n")
    body, end, _ = body.partition(END)
    data = base64.b64decode("".join(body.split())) if begin and end else b""
    if not data or hashlib.sha256(data).hexdigest() != digest.strip():
        raise ValueError("the archive did not come whole through the log: ask again")
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        archive.extractall(folder, filter="data")
        return sum(member.isfile() for member in archive)


def main() -> int:
    """Print the archive of the folder named on the command line."""
    folder = Path(sys.argv[1])
    if not folder.is_dir():
        print(f"there is no folder {folder} on the head: has the run begun, and does the head reach --out?")
        return 2
    try:
        data = _at_rest(folder)
    except Busy:
        print(f"the records in {folder} were merged all the while they were packed: ask again in a minute")
        return 2
    except OSError as error:
        print(f"{error.filename or folder} cannot be read on the head ({error.strerror or error})")
        return 2
    if len(data) > MOST_BYTES:
        print(f"{folder} takes {len(data) / 2**20:.0f} MiB, more than comes back through a log: copy it from there")
        return 2
    print(f"{BEGIN}{hashlib.sha256(data).hexdigest()}\n{base64.encodebytes(data).decode()}{END}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
