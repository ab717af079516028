"""Numbered attempts at one piece of work: fencing tokens by which a newer process shuts out whatever an older one left running.

An attempt is a blob `<prefix>/<number>`, taken by `Blobs.create`; the highest number owns the work. Numbers only ever grow:
the newest attempt stays when it has ended, older ones are removed.
"""

from __future__ import annotations

from dataclasses import dataclass

from diffprune.io.blob_store import Blobs


class Fenced(RuntimeError):
    """A newer attempt at this work has taken over; this one may not write any more."""


@dataclass(frozen=True)
class Attempts:
    """The attempts at the work that `prefix` stands for; `title` is what messages call it."""

    blobs: Blobs
    prefix: str
    title: str

    def key(self, number: int) -> str:
        """The blob that stands for an attempt."""
        return f"{self.prefix}/{number}"

    def _all(self) -> list[int]:
        names = (key.rpartition("/")[2] for key in self.blobs.list(self.prefix))
        return [int(name) for name in names if name.isdecimal()]

    def newest(self) -> int:
        """The highest attempt so far, 0 where there was none."""
        return max(self._all(), default=0)

    def take(self, number: int, note: bytes = b"") -> bool:
        """Become attempt `number`, with `note` in its blob; False where others took this or a newer one meanwhile."""
        try:
            self.blobs.create(self.key(number), note)
        except FileExistsError:
            return False
        if self.newest() != number:  # this number was taken, passed on and removed before: start again behind the others
            self.blobs.delete(self.key(number))
            return False
        for earlier in self._all():
            if earlier < number:
                self.blobs.delete(self.key(earlier))
        return True

    def begin(self) -> int:
        """Take over, whoever is at work; returns the number of the new attempt."""
        while not self.take(number := self.newest() + 1):
            pass
        return number

    def check(self, number: int) -> None:
        """Raises Fenced: a newer attempt has taken over from this one."""
        newest = self.newest()
        if newest > number:
            raise Fenced(f"attempt {number} of {self.title} in {self.blobs} may not write: attempt {newest} has taken over")
