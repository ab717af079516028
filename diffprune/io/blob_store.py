"""Blob storage: named bytes, written whole and read whole. Everything that persists goes through it.

`Blobs` is the contract, `LocalBlobs` keeps blobs as files below a folder, `S3Blobs` as objects of a bucket that speaks S3,
`ObjectBlobs` as those of Google's and Azure's. Another object store is one more class that passes `tests/test_blob_store.py`: its
conditional put, put, get, list and delete are the verbs here.
"""

from __future__ import annotations

import errno
import os
import re
import stat
import tempfile
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from diffprune.io.names import checked_key, is_key
from diffprune.io.object_blobs import STORES, ObjectBlobs
from diffprune.io.s3_blobs import S3Blobs

TEMPORARY = ".temporary"  # how the names of unfinished files end; they begin with a dot, as no key does
SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/")
ABANDONED_S = 3600.0  # no single write takes as long


class Blobs(Protocol):
    """Bytes under keys such as `parts/steps/a1.parquet`: names without a leading dot, separated by '/'. Where `a/b` is a key, `a`
    is none.

    Atomic:     a reader finds a blob absent or complete, as it was before a write or as it is after, never part of it.
    Exclusive:  of any number of writers that `create` one key, in any process on any machine, exactly one succeeds.
    Durable:    what `create` or `replace` has written when it returns survives a crash of program and machine.
    Consistent: once a call has returned, every later call of every process sees its effect, `list` included.
    Unordered:  writes to different keys know nothing of each other, so whoever refers to a blob is written after it has
                returned; of two concurrent `replace` of one key either may be the one that stays.

    A write that raised, or whose process died, has happened or not: `replace` and `delete` may simply be repeated. After a
    `create` of unknown outcome the key may hold one's own bytes; who must know makes them tell whose they are.

    Folders do not exist apart from keys. `str(blobs)` says in messages where the blobs are.

    Raises:
        ValueError: a key that is none, by every method.
        OSError: the medium failed, is full or read-only, by every method; the text names the blob.
    """

    def create(self, key: str, data: bytes | memoryview) -> None:
        """Write a blob that must not be there yet. Raises FileExistsError: it is; it stays as it was."""

    def replace(self, key: str, data: bytes | memoryview) -> None:
        """Write a blob, whether or not there was one."""

    def read(self, key: str) -> bytes:
        """The whole blob. Raises FileNotFoundError: there is none."""

    def version(self, key: str) -> str | None:
        """A text that a write changes, for a cheap look whether to read again; None: there is no such blob."""

    def list(self, prefix: str = "") -> dict[str, str]:
        """Every blob whose key starts with `prefix` and '/' (all of them by default), in the order of keys: {key: version}."""

    def delete(self, key: str) -> None:
        """Remove a blob; one that is not there is as good. Not durable: after a loss of power the blob may be back."""


def open_blobs(place: Blobs | Path | str, private: bool = False) -> Blobs:
    """The blobs at a place: a folder of this machine, created by the first write; `s3://bucket/folder`, `gs://bucket/folder` or
    `az://container/folder`, also as a `Path`, which writes one '/' less; or blobs that are open already. private: of `LocalBlobs`;
    who may read a bucket, its owner says.

    Raises:
        ValueError: no such address, or storage of another kind.
    """
    if not isinstance(place, str | Path):
        if not hasattr(place, "create"):
            raise ValueError(f"a store lies in a folder or in blobs, not in {f'{place!r}':.80}")
        return place
    if (scheme := remote(place)) is None:
        return LocalBlobs(place, private)
    address = f"{scheme}://" + str(place).partition(":")[2].lstrip("/")
    if scheme == "s3":
        return S3Blobs(address)
    if scheme in STORES:
        return ObjectBlobs(address)
    known = "s3://bucket/folder, gs://bucket/folder or az://container/folder"
    raise ValueError(f"{scheme}:// is no storage that is known here: name a folder, {known}")


def remote(place: Path | str) -> str | None:
    """The scheme of an address, such as `s3`; None for a folder."""
    found = SCHEME.match(str(place))
    return found[1].lower() if found else None


def absolute(place: Path | str) -> Path:
    """A place that stays the same in other working folders; an address does anyway."""
    return Path(place) if remote(place) else Path(place).absolute()


class LocalBlobs:
    """Blobs as files below a folder, which the first write creates. Needs a file system with hard links.

    A write goes to a temporary file beside its target, is synced, gets its name (by rename, or by link where the name must be
    free), and then the folder is synced: two syncs in all. Temporary files that killed processes left are removed after an hour
    by the next process that writes beside them. On a network file system, "every later call" of other machines means: as soon
    as their caches allow.

    private: files that it writes can be read by their owner alone.

    Raises:
        ValueError: the folder is a file.
    """

    def __init__(self, root: Path | str, private: bool = False) -> None:
        self.root, self._mode = Path(root).resolve(), 0o600 if private else 0o666
        if self.root.exists() and not self.root.is_dir():
            raise ValueError(f"{self.root} is a file, but a folder is needed")
        self._swept: set[Path] = set()

    def __str__(self) -> str:
        return str(self.root)

    def create(self, key: str, data: bytes | memoryview) -> None:
        """See `Blobs`."""
        self._write(self._path(key), data, _link)

    def replace(self, key: str, data: bytes | memoryview) -> None:
        """See `Blobs`."""
        self._write(self._path(key), data, os.replace)

    def read(self, key: str) -> bytes:
        """See `Blobs`."""
        path = self._path(key)
        try:
            return path.read_bytes()
        except (NotADirectoryError, IsADirectoryError):
            raise FileNotFoundError(errno.ENOENT, "no such file", str(path)) from None

    def version(self, key: str) -> str | None:
        """See `Blobs`."""
        return _version(self._path(key))

    def list(self, prefix: str = "") -> dict[str, str]:
        """See `Blobs`."""
        start = self._path(prefix) if prefix else self.root
        found = {}
        for folder, folders, names in os.walk(start, onerror=_raise_unless_absent):
            folders[:] = filter(is_key, folders)
            below = "" if Path(folder) == self.root else f"{Path(folder).relative_to(self.root).as_posix()}/"
            for name in filter(is_key, names):
                if version := _version(os.path.join(folder, name)):
                    found[below + name] = version
        return dict(sorted(found.items()))

    def delete(self, key: str) -> None:
        """See `Blobs`."""
        with suppress(FileNotFoundError, NotADirectoryError):
            self._path(key).unlink()

    def _path(self, key: str) -> Path:
        return self.root / checked_key(key)

    def _write(self, path: Path, data: bytes | memoryview, publish: Callable[[Path, Path], None]) -> None:
        temporary = path.with_name(f".{uuid.uuid4().hex}{TEMPORARY}")
        try:
            _make_folder(path.parent)
            self._sweep(path.parent)
            with open(temporary, "xb", opener=lambda name, flags: os.open(name, flags, self._mode)) as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            publish(temporary, path)
            _sync_folder(path.parent)
        except OSError as error:
            raise named(error, path) from error
        finally:
            with suppress(OSError):
                temporary.unlink()

    def _sweep(self, folder: Path) -> None:
        """Remove what killed processes left in a folder; looked for once per folder."""
        if folder in self._swept:
            return
        self._swept.add(folder)
        for path in folder.glob(f".*{TEMPORARY}"):
            with suppress(FileNotFoundError):
                if time.time() - path.stat().st_mtime > ABANDONED_S:
                    path.unlink()


def _link(temporary: Path, path: Path) -> None:
    """Give a file its name, which must be free. A network file system may answer a link that it made by saying it is there."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        if os.stat(temporary).st_nlink == 1:
            raise
    except OSError as error:
        if error.errno in (errno.EPERM, errno.EOPNOTSUPP):
            raise OSError(error.errno, "the file system has no hard links") from None
        raise


def _version(path: Path | str) -> str | None:
    """Times, size and inode: a rename brings another inode, a change in place other times."""
    try:
        found = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    if not stat.S_ISREG(found.st_mode):
        return None
    return f"{found.st_mtime_ns} {found.st_ctime_ns} {found.st_size} {found.st_ino}"


def _raise_unless_absent(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError | NotADirectoryError):
        raise error


def _sync_folder(folder: Path) -> None:
    """Bring the entries of a folder (a rename, a new file) to the disk; systems that cannot open folders are left as they are."""
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def refuse_if_unwritable(folder: Path | str, *, attempt: bool = True) -> None:
    """Look whether a file could be written below a folder, which need not be there yet; nothing stays. An address is not asked.

    attempt: whether to open a file there; else only what stands there is looked at.

    Raises:
        ValueError: it could not, or a file stands where a folder should be.
    """
    if remote(folder):
        return
    try:
        there = next(place for place in (Path(folder).absolute(), *Path(folder).absolute().parents) if place.exists())
        if there.is_dir():
            if attempt:
                tempfile.TemporaryFile(dir=there).close()
            return
    except OSError as error:
        raise ValueError(f"nothing can be written to {folder} ({error.strerror}): give another folder with --out") from None
    raise ValueError(f"{there} is a file, but a folder is needed")


def _make_folder(folder: Path) -> None:
    """Create a folder and its parents, durably, so that a file published in it cannot vanish with its folder.

    Raises:
        ValueError: a file stands where a folder should be.
    """
    if folder.is_dir():
        return
    _make_folder(folder.parent)
    try:
        folder.mkdir(exist_ok=True)  # another process may just have made it
    except FileExistsError:
        raise ValueError(f"{folder} is a file, but a folder is needed") from None
    _sync_folder(folder.parent)


def named(error: OSError, path: Path) -> OSError:
    """The same error with the path and a reason in its text: a failed write or fsync does not say which file it was."""
    if error.errno == errno.EEXIST:
        return FileExistsError(error.errno, "is there already", str(path))
    if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        return OSError(error.errno, f"read-only, could not write ({error.strerror})", str(path))
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return OSError(error.errno, "disk full, could not write", str(path))
    return OSError(error.errno, f"could not write ({error.strerror or error})", str(path))
