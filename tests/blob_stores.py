"""Blobs for tests: in memory, failing on purpose, and written by many at once."""

from __future__ import annotations

import threading
from collections.abc import Callable

from diffprune.io.blob_store import Blobs
from diffprune.io.names import checked_key


class MemoryBlobs:
    """Blobs in a dictionary: what passes on them needs no file system."""

    def __init__(self) -> None:
        self._blobs: dict[str, tuple[str, bytes]] = {}
        self._lock, self._writes = threading.Lock(), 0

    def __str__(self) -> str:
        return "memory"

    def create(self, key: str, data: bytes | memoryview) -> None:
        with self._lock:
            if checked_key(key) in self._blobs:
                raise FileExistsError(17, "is there already", key)
            self._put(key, data)

    def replace(self, key: str, data: bytes | memoryview) -> None:
        with self._lock:
            self._put(checked_key(key), data)

    def _put(self, key: str, data: bytes | memoryview) -> None:
        self._writes += 1
        self._blobs[key] = str(self._writes), bytes(data)

    def read(self, key: str) -> bytes:
        try:
            return self._blobs[checked_key(key)][1]
        except KeyError:
            raise FileNotFoundError(2, "no such blob", key) from None

    def version(self, key: str) -> str | None:
        return self._blobs.get(checked_key(key), (None,))[0]

    def list(self, prefix: str = "") -> dict[str, str]:
        start = f"{checked_key(prefix)}/" if prefix else ""
        with self._lock:
            return {key: self._blobs[key][0] for key in sorted(self._blobs) if key.startswith(start)}

    def delete(self, key: str) -> None:
        self._blobs.pop(checked_key(key), None)


class FailingBlobs:
    """Blobs that raise `error` at every write after the first `allowed` ones; `late`: when it has taken effect."""

    def __init__(self, inner: Blobs, error: BaseException, allowed: int = 0, late: bool = False) -> None:
        self.inner, self.error, self.left, self.late = inner, error, allowed, late
        self.read, self.version, self.list = inner.read, inner.version, inner.list

    def __str__(self) -> str:
        return str(self.inner)

    def create(self, key: str, data: bytes | memoryview) -> None:
        self._write(lambda: self.inner.create(key, data))

    def replace(self, key: str, data: bytes | memoryview) -> None:
        self._write(lambda: self.inner.replace(key, data))

    def delete(self, key: str) -> None:
        self._write(lambda: self.inner.delete(key))

    def _write(self, write: Callable[[], None]) -> None:
        self.left -= 1
        if self.left >= 0 or self.late:
            write()
        if self.left < 0:
            raise self.error


def together(num: int, work: Callable[[int], None]) -> None:
    """Run `work` in threads that begin at once."""
    gate = threading.Barrier(num)
    threads = [threading.Thread(target=lambda i=i: (gate.wait(), work(i))) for i in range(num)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
