"""A run's report and records as text on standard output, so that they come back through a job's log. Runs on its own.

    python run_archive.py FOLDER

Only the standard library: this file alone is sent to the cluster, whatever version is installed there.
"""

from __future__ import annotations

import base64
import hashlib
import io
import sys
import tarfile
from pathlib import Path

BEGIN, END = "--- begin of the archive, sha256 ", "--- end of the archive"
PARTS = ("report", "store")  # scorers and training states stay
MOST_BYTES = 64 * 2**20  # compressed; what is larger is copied from the shared folder


def packed(folder: Path) -> bytes:
    """A compressed tar of what a run's folder has to show."""
    held = io.BytesIO()
    with tarfile.open(fileobj=held, mode="w:gz") as archive:
        for path in sorted(folder.iterdir()):
            if path.name in PARTS or (path.is_file() and not path.is_symlink()):
                archive.add(path, path.name)
    return held.getvalue()


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
    data = packed(folder)
    if len(data) > MOST_BYTES:
        print(f"{folder} takes {len(data) / 2**20:.0f} MiB, more than comes back through a log: copy it from there")
        return 2
    print(f"{BEGIN}{hashlib.sha256(data).hexdigest()}\n{base64.encodebytes(data).decode()}{END}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
