"""Names that are safe as file names, and files that are either absent or complete and on the disk."""

from __future__ import annotations

import errno
import os
import re
import uuid
from pathlib import Path

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}\Z")
WINDOWS = re.compile(r"(con|prn|aux|nul|com[0-9]|lpt[0-9])(\..*)?\Z|.*\.\Z", re.IGNORECASE)


def checked_name(name: str, what: str) -> str:
    """`name`, if it is a safe file name on every system.

    Raises:
        ValueError: anything outside the allow-list, so no separators, no leading dot, no device names of Windows.
    """
    if not isinstance(name, str) or not NAME.match(name) or WINDOWS.match(name):
        raise ValueError(f"{what} {name!r:.100} is refused: 1 to 64 of A-Z a-z 0-9 . _ - and a letter or digit first")
    return name


def sync_folder(folder: Path) -> None:
    """Bring the entries of a folder (a rename, a new file) to the disk; systems that cannot open folders are left as they are."""
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def make_folder(folder: Path) -> None:
    """Create a folder and its parents, durably, so that a file published in it cannot vanish with its folder.

    Raises:
        ValueError: a file stands where a folder should be.
    """
    if folder.is_dir():
        return
    make_folder(folder.parent)
    try:
        folder.mkdir(exist_ok=True)  # another process may just have made it
    except FileExistsError:
        raise ValueError(f"{folder} is a file, but a folder of results must be there") from None
    sync_folder(folder.parent)


def naming(error: OSError, path: Path) -> OSError:
    """The same error with the path in its text: a failed write or fsync does not say which file it was."""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    return OSError(error.errno, "disk full, could not write" if full else f"could not write ({error.strerror or error})", str(path))


def write_durably(path: Path, data: bytes, staging: Path) -> None:
    """Write a whole file: temporary file in `staging` (same file system), fsync, rename, fsync of the folder.

    Raises:
        OSError: with `path` in its text; the temporary file is removed and whatever stood at `path` before is untouched.
    """
    temporary = staging / uuid.uuid4().hex
    try:
        make_folder(staging)
        make_folder(path.parent)
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except OSError as error:
        raise naming(error, path) from error
    finally:
        temporary.unlink(missing_ok=True)
