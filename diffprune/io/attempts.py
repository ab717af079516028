"""Numbered attempts at one piece of work: fencing tokens by which a newer process shuts out whatever an older one left running.

An attempt is a blob `<prefix>/<number>`, taken by `Blobs.create`; the highest number owns the work. Numbers only ever grow:
the newest attempt stays when it has ended, older ones are removed. What stands in the blob tells an attempt from any other of its
number, so that one whose blob was removed by hand, or moved away with its folder, is shut out as well.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from dataclasses import dataclass

from diffprune.io.blob_store import Blobs


class Fenced(RuntimeError):
    """Another attempt at this work has taken over, or the blob of this one is gone; it may not write any more."""


class Attempt(int):
    """The number of an attempt that was taken. note: what stands in its blob, which no other attempt has in its own."""

    note: bytes

    @classmethod
    def noted(cls, number: int, note: bytes) -> Attempt:
        """The number with its note."""
        found = cls(number)
        found.note = note
        return found


@dataclass(frozen=True)
class Attempts:
    """The attempts at the work that `prefix` stands for; `title` is what messages call it."""

    blobs: Blobs
    prefix: str
    title: str

    def key(self, number: int) -> str:
        """The blob that stands for an attempt."""
        return f"{self.prefix}/{int(number)}"

    def _all(self) -> Iterator[int]:
        names = (key.rpartition("/")[2] for key in self.blobs.list(self.prefix))
        return (int(name) for name in names if name.isdecimal())

    def newest(self) -> int:
        """The highest attempt so far, 0 where there was none."""
        return max(self._all(), default=0)

    def note(self, number: int) -> bytes | None:
        """What stands in the blob of an attempt; None where there is no blob."""
        try:
            return self.blobs.read(self.key(number))
        except FileNotFoundError:
            return None

    def take(self, number: int, note: bytes) -> Attempt | None:
        """Become attempt `number`; None where others took this or a newer one meanwhile. note: nobody else's, for its blob."""
        try:
            self.blobs.create(self.key(number), note)
        except FileExistsError:
            if self.note(number) != note:  # else an earlier try of ours, whose answer was lost
                return None
        if self.newest() != number:  # this number was taken, passed on and removed before: start again behind the others
            self.blobs.delete(self.key(number))
            return None
        for earlier in self._all():
            if earlier < number:
                self.blobs.delete(self.key(earlier))
        return Attempt.noted(number, note)

    def begin(self) -> Attempt:
        """Take over, whoever is at work; returns the new attempt."""
        note = secrets.token_hex(16).encode()
        while not (taken := self.take(self.newest() + 1, note)):
            pass
        return taken

    def check(self, number: int) -> None:
        """Refuse what is written by an attempt that does not own the work. A plain number, whose note is not known, is only
        compared with the newest.

        Raises:
            Fenced: a newer attempt has taken over from this one, or its own blob is gone or another's.
        """
        newest = self.newest()
        refused = f"attempt {int(number)} of {self.title} in {self.blobs} may not write"
        if newest > number:
            raise Fenced(f"{refused}: attempt {newest} has taken over")
        if isinstance(number, Attempt) and self.note(number) != number.note:
            why = f"{self.key(number)} is gone or another's: was the folder moved, or the file removed by hand?"
            raise Fenced(f"{refused}: {why} Run the same command again to go on")
